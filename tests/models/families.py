"""Tiny models of any family, on the disk."""

import itertools
from pathlib import Path
from typing import Any

from rlzoo.bench._tiny_models import tiny_model

NUMBER = itertools.count()


def saved(folder: Path, family: str, **changes: Any) -> Path:
    """A directory of its own with a tiny random model, as transformers saves it."""
    path = folder / f"{family}_{next(NUMBER)}"
    tiny_model(family, **changes).save_pretrained(path)
    return path
