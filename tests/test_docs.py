"""What code, configuration and documentation cite is in the repository, by that name."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_layout import ROOMS

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "CHANGELOG.md"  # names what is no more
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.md")} - {HISTORY})
REPORTS = sorted(ROOT.glob("experiments/*/*.md"))
SOURCES = [("rlzoo", "*.py"), ("conf", "*.yaml"), ("tests", "*.py")]
CODE = [path for folder, files in SOURCES for path in (ROOT / folder).rglob(files)]

LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGE = re.compile(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.md)\b")
SECTION = re.compile(r"([\w/-]+\.md) (\d+(?:\.\d+)?)(?: and (\d+(?:\.\d+)?))?")
TITLE = re.compile(r'([\w/-]+\.md), "([^"]+)"')
FUNCTION = re.compile(r"((?:[\w.-]+/)+[\w-]+\.py)::([\w.]+)")
FOLDERS = "rlzoo|conf|tests|docs|experiments|requirements"
PLACE = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/(?:[\w*-]+/)*[\w*-]+\.(?:py|yaml|md|csv|png|txt))")
TEST_FILE = re.compile(r"(?<![\w/.-])(test_\w+\.py)\b")
DOTTED = re.compile(r"`(rlzoo(?:\.\w+)+)`")


@functools.cache
def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)


def anchor(heading: str) -> str:
    """As a reader of markdown makes it from a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@functools.cache
def defined(module: Path) -> set[str]:
    """Names at the top of a module and, as Class.name, within its classes."""

    def names(body: list[ast.stmt], within: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield within + node.name
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{node.name}.")
            if isinstance(node, ast.ImportFrom) and module.name == "__init__.py":
                yield from (alias.name for alias in node.names)
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            yield from (within + t.id for t in targets if isinstance(t, ast.Name))

    return set(names(ast.parse(module.read_text()).body, ""))


def is_there(dotted: str) -> bool:
    """Whether rlzoo.a.b is a room or a module, or a name that the module rlzoo.a defines."""
    parts = dotted.split(".")
    if ROOT.joinpath(*parts).is_dir() or ROOT.joinpath(*parts).with_suffix(".py").is_file():
        return True
    for end in range(len(parts) - 1, 0, -1):
        base = ROOT.joinpath(*parts[:end])
        for module in (base.with_suffix(".py"), base / "__init__.py"):
            if module.is_file():
                return ".".join(parts[end:]) in defined(module)
    return False


def faults(citing: Path) -> Iterator[str]:
    """Each citation that leads nowhere."""
    text = re.sub(r"\s*\n[ \t]*#?[ \t]*(?=\S)", " ", citing.read_text())  # citations may be wrapped

    def page(name: str) -> Path | None:
        folders = (ROOT, citing.parent, ROOT / "docs")
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    yield from (name for name in PAGE.findall(text) if not page(name))
    for name, *sections in SECTION.findall(text):
        known = [heading.split()[0].rstrip(".") for heading in headings(page(name) or citing)]
        yield from (f"{name} {number}" for number in sections if number and number not in known)
    for name, title in TITLE.findall(text):
        if title not in headings(page(name) or citing):
            yield f'{name}, "{title}"'
    for file, name in FUNCTION.findall(text):
        if not (ROOT / file).is_file() or name not in defined(ROOT / file):
            yield f"{file}::{name}"
    yield from (
        place for place in PLACE.findall(text) if not any(ROOT.glob(place.replace("NAME", "*")))
    )
    tests = ROOT / "tests"
    yield from (name for name in TEST_FILE.findall(text) if not any(tests.rglob(name)))
    yield from (name for name in DOTTED.findall(text) if not is_there(name))


def test_what_is_cited_exists():
    citing = {*PAGES, *REPORTS, *CODE} - {Path(__file__)}
    found = {f"{path.relative_to(ROOT)}: {fault}" for path in citing for fault in faults(path)}
    assert not sorted(found)


def test_links_lead_somewhere():
    broken = []
    for page in (*PAGES, *REPORTS, HISTORY):
        for target in LINK.findall(page.read_text()):
            file, _, place = target.partition("#")
            to = page.parent / file if file else page
            there = "://" in target or (
                to.exists() and (not place or place in map(anchor, headings(to)))
            )
            broken += [] if there else [f"{page.relative_to(ROOT)}: {target}"]
    assert not broken


def test_every_algorithm_and_sampler_is_in_the_tables():
    algos, samplers = (
        {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        for group in ("algo", "sampler")
    )
    readme, formulas = (ROOT / "README.md").read_text(), (ROOT / "docs/formulas.md").read_text()
    named = [{*re.findall(r"`(\w+)`", text)} for text in (readme, formulas)]
    bases = {"shared", "clipped"}  # keys that algorithms share
    assert not (algos | samplers) - bases - named[0]
    assert not algos - bases - named[1]


def test_the_readme_lists_every_page():
    readme = (ROOT / "README.md").read_text()
    pages = {*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")} - {ROOT / "README.md"}
    assert not [str(page) for page in pages if f"]({page.relative_to(ROOT)})" not in readme]


def rows_of(page: str, title: str) -> list[str]:
    """The rows of the table under a heading, its own head left out."""
    section = (ROOT / page).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_a_prompt_walks_through_the_code_in_ten_stops_each_a_function():
    stops = rows_of("docs/architecture.md", "One prompt through the code")
    assert 5 < len(stops) <= 10
    assert not [stop for stop in stops if len(re.findall(r"`rlzoo/[\w/]+\.py::\w", stop)) != 1]


def test_every_law_has_a_test():
    laws = [row for row in rows_of("docs/architecture.md", "The laws") if "**" not in row]
    assert len(laws) > 20
    assert not [law for law in laws if not re.search(r"`tests/[\w/]+\.py::test_", law)]


def test_the_rooms_have_a_line_each_in_their_order():
    lines = [row.split("|")[1] for row in rows_of("docs/architecture.md", "The rooms")]
    assert tuple(re.findall(r"`([a-z]+)/?`", " ".join(lines))) == ROOMS
