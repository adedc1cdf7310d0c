"""What tells one run's data from another's: a resume goes on with the data it began with."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlzoo.errors import UserError
from rlzoo.types import Prompt

SAMPLED = 1024  # examples read of a corpus that is made as it is asked for
EDGE = 65536  # bytes read at either end of a large file


def of_prompts(prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Digests of what prompts are, in their order: one pass, about 4 seconds for 860,000 of them.

    Returns:
        `count`; digests of `ids` and of `texts` (question, answer, solution) in order, of `tokens`
        (the rendered prompts); and `set`, which is the same in any order.
    """
    ids, texts, tokens = (hashlib.blake2b(digest_size=16) for _ in range(3))
    count = together = 0
    for prompt in prompts:
        name = as_bytes(prompt.id)
        ids.update(name)
        texts.update(as_bytes(prompt.question, prompt.answer, prompt.solution))
        tokens.update(array("q", prompt.token_ids).tobytes())
        together ^= int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
        count += 1
    digests = {"ids": ids.hexdigest(), "texts": texts.hexdigest(), "tokens": tokens.hexdigest()}
    return {"count": count, **digests, "set": f"{together:016x}"}


def of_pairs(corpus: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Digest of supervised examples, in order; of a corpus that is no list, of a sample."""
    count = len(corpus)
    digest = hashlib.blake2b(digest_size=16)
    for i in range(0, count, stride(corpus)):
        for part in corpus[i]:
            digest.update(as_bytes(part) if isinstance(part, str) else array("q", part).tobytes())
    return {"count": count, "texts": digest.hexdigest()}


def stride(corpus: Sequence[Any]) -> int:
    """Examples from one that is looked at to the next: 1 in a list, which is all there."""
    return 1 if isinstance(corpus, list) else max(1, len(corpus) // SAMPLED)


def of_files(paths: Iterable[Path]) -> list[str]:
    """A digest of each file: its size and its two ends. Parquet's figures of every column, and
    safetensors' of every tensor, stand there."""
    return [of_file(path) for path in paths]


def of_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(EDGE, size - EDGE))
        digest.update(file.read(EDGE))
    return digest.hexdigest()


def as_bytes(*texts: str | None) -> bytes:
    """Texts as bytes that no other texts have."""
    parts = [b"" if t is None else t.encode("utf-8", "surrogatepass") + b"\1" for t in texts]
    return b"\0".join(parts) + b"\0\0"


def prompts_differ(before: dict[str, Any], now: dict[str, Any], which: str) -> str | None:
    """How the prompts of a split differ from those that a run began with; None if they do not."""
    told = {  # the first that differs explains the others
        "count": f"there were {before['count']:,} {which} prompts, now there are {now['count']:,}",
        "set": f"some {which} prompts have other ids (another file, split, seed or filter)",
        "ids": f"the {which} prompts stand in another order",
        "texts": f"some {which} prompts have another question, answer or solution (an edited"
        " file?)",
        "tokens": f"the {which} prompts are rendered to other tokens (another tokenizer, chat"
        " template, or data.template)",
    }
    return next((what for name, what in told.items() if before[name] != now[name]), None)


def files_differ(before: Sequence[str] | None, now: Sequence[str] | None) -> str | None:
    """How recorded rollouts differ from those that a run began with; more at the end may come."""
    if (before is None) != (now is None):
        return (
            "it drew its rollouts, now replay= is set" if now else "it replayed, now it would draw"
        )
    for i, (old, new) in enumerate(zip(before or (), now or (), strict=False)):
        if old != new:
            return f"file {i} of replay= (from 0) is another one"
    return None


def refuse(faults: Sequence[str]) -> None:
    """Raises a UserError if a run's data are not those that it began with."""
    if faults:
        raise UserError(
            f"The run cannot go on from its checkpoint: {'; '.join(faults)}. Give what it was begun"
            " with, or start a new run_dir from its weights: init_from=CHECKPOINT."
        )
