"""`python -m rlzoo.bench NAME [ARGS]` runs `rlzoo.bench.NAME.main(ARGS)`."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import rlzoo.bench
from rlzoo.errors import UserError


def names() -> list[str]:
    """Every bench there is."""
    modules = pkgutil.iter_modules(rlzoo.bench.__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def main(argv: list[str]) -> None:
    """Run the bench that `argv` names.

    Raises:
        UserError: it names none.
    """
    if not argv or argv[0] not in names():
        found = f"no bench is called {argv[0]!r}" if argv else "no bench was named"
        raise UserError(f"python -m rlzoo.bench NAME: {found}. Choose from: {', '.join(names())}.")
    importlib.import_module(f"rlzoo.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
