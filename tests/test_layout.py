"""Who may import whom: rooms in one order, none below needs one above, and no circle of modules.

All imports are read from the source: those within functions too, where a circle would hide.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import rlzoo

ROOT = Path(rlzoo.__file__).parent
ROOMS = (  # from the lowest up; a module of the root is a room of its own
    "errors",  # the one exception a user reads
    "values",  # what a setting may hold
    "rng",  # a seed for every response
    "ranks",  # what ranks exchange, and where each is
    "types",  # prompts, rollouts, microbatches
    "report",  # ledger, metrics files, plots, progress bars
    "rewards",  # from a response to a reward
    "models",  # policies, critics, adapters, checkpoints; their logits and log-probs
    "learning",  # from rewards to updates: advantages, microbatches, losses, optimizer steps
    "allocators",  # budgets: how many responses each prompt gets
    "engines",  # what draws responses
    "diagnosis",  # why engine and trainer disagree
    "data",  # prompts, templates, drawing
    "strategies",  # how ranks share the model
    "algos",  # the algorithms
    "export",  # a checkpoint as a model directory
    "callbacks",  # the parts of the loop that a configuration chooses
    "loop",  # the rollout step, in order
    "launch",  # from a configuration to a trainer
    "run",  # the command line
    "bench",  # measurements of rlzoo itself
)


def modules(root: Path) -> dict[str, Path]:
    """Each module of a package by its name without the package's: "run", "models.policy"."""
    files = sorted(root.rglob("*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    return {n.removesuffix("__init__").rstrip("."): f for n, f in zip(names, files, strict=True)}


def imports(root: Path) -> dict[str, set[str]]:
    """What each module imports of its own package, wherever in it the import stands."""
    known = modules(root)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: a relative import"
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            own = (text.removeprefix(f"{root.name}.") for text in named if in_package(text, root))
            found[name] |= {t if t in known else t.rpartition(".")[0] for t in own} - {name}
    return found


def in_package(name: str, root: Path) -> bool:
    return name.startswith(f"{root.name}.")


def room(module: str) -> str:
    return module.partition(".")[0]


def arrows_up(found: dict[str, set[str]]) -> list[str]:
    height = {name: level for level, name in enumerate(ROOMS)}
    return [
        f"{module} -> {other}"
        for module, others in found.items()
        for other in sorted(others)
        if module and height[room(other)] > height[room(module)]
    ]


def circle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring; none, as a rule."""
    try:
        graphlib.TopologicalSorter(found).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_is_in_a_room_of_the_order():
    assert {room(module) for module in modules(ROOT)} - {""} == set(ROOMS)


def test_no_import_points_up():
    assert arrows_up(imports(ROOT)) == []


def test_no_modules_import_one_another_in_a_circle():
    assert circle(imports(ROOT)) == []


def test_the_root_has_eight_modules_at_most():
    files = [file.stem for file in ROOT.glob("*.py") if file.stem != "__init__"]
    assert len(files) <= 8, files


def test_imports_within_functions_are_read(tmp_path):
    """An arrow up and a circle, both deferred, in a small package of the same rooms."""
    root = tmp_path / "rlzoo"
    for name, source in {
        "errors.py": "def fail():\n    from rlzoo.models.policy import load\n",
        "models/policy.py": "from rlzoo.models import lora\n",
        "models/lora.py": "def merge():\n    import rlzoo.models.policy\n",
        "models/__init__.py": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    found = imports(root)
    assert arrows_up(found) == ["errors -> models.policy"]
    assert set(circle(found)) == {"models.lora", "models.policy"}
