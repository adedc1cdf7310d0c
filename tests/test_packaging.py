"""The wheel carries all that a run needs, and the lock all that the wheel needs."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "setup.cfg", "pyproject.toml", "LICENSE", "README.md", "rlzoo", "conf"]


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel holds, built from a copy of the sources.

    A copy, since setuptools builds in place: leftovers in build/ would end up in the wheel.
    """
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*pip_wheel, "--wheel-dir", str(folder / "dist"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (folder / "dist").glob("rlzoo-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def files_under(folder: Path, pattern: str) -> set[str]:
    """Paths of the files that fit `pattern`, relative to `folder`."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)) for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_configuration_file(unpacked_wheel: Path) -> None:
    expected = files_under(ROOT / "conf", "*.yaml")
    assert expected, "conf/ holds no YAML file"
    assert files_under(unpacked_wheel / "rlzoo" / "conf", "*") == expected


def test_the_wheel_holds_every_module_and_the_tiny_policy(unpacked_wheel: Path) -> None:
    package = unpacked_wheel / "rlzoo"
    assert files_under(ROOT / "rlzoo", "*.py") == files_under(package, "*.py")
    assert (package / "py.typed").is_file()  # or another's mypy takes all of rlzoo for Any
    tiny = Path("models") / "tiny"
    assert files_under(ROOT / "rlzoo" / tiny, "*") == files_under(package / tiny, "*")


def test_the_wheel_brings_no_package_but_rlzoo(unpacked_wheel: Path) -> None:
    names = {path.name for path in unpacked_wheel.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"rlzoo"}


def test_an_unpacked_wheel_finds_its_own_configuration(
    unpacked_wheel: Path, tmp_path: Path
) -> None:
    code = "from rlzoo.launch.configuration import conf_dir; print(conf_dir())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # a stranger's folder, with neither rlzoo/ nor conf/
        env=os.environ | {"PYTHONPATH": str(unpacked_wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == unpacked_wheel / "rlzoo" / "conf"


def pins(name: str) -> dict[str, str]:
    """Canonical package name to exact version, from requirements/`name`."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in found}


def unmet(requirement: Requirement, locked: dict[str, str]) -> bool:
    pinned = locked.get(canonicalize_name(requirement.name))
    builds = () if pinned is None else (pinned, f"{pinned}+cpu")  # the lock names no build
    return not any(requirement.specifier.contains(build, prereleases=True) for build in builds)


def requirements_of(package: str, extras: set[str]) -> list[Requirement]:
    """What the installed `package` needs on this machine, `extras` included."""
    requirements = [Requirement(text) for text in metadata.requires(package) or []]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras})
    ]


def test_the_lock_meets_every_need_of_rlzoo_its_tests_and_its_lint() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    needs = setup["options"]["install_requires"] + extras["test"] + extras["lint"]
    lines = [line for line in needs.splitlines() if line and not line.startswith("#")]
    locked = pins("cpu.txt")
    assert len(lines) > 10
    assert [line for line in lines if unmet(Requirement(line), locked)] == []


def test_the_lock_is_complete() -> None:
    """It is installed with --no-deps, so that whatever it leaves out is missing."""
    locked = pins("cpu.txt") | pins("build.txt")
    extras = {"math-verify": {"antlr4_9_3"}, "fsspec": {"http"}}
    missing = []
    text = (ROOT / "requirements" / "left_out.txt").read_text()
    left_out = {line for line in text.splitlines() if not line.startswith("#")}
    for package in pins("cpu.txt"):
        if package == "torch" and not metadata.version("torch").endswith("+cpu"):
            continue  # the CUDA build asks for libraries that a CPU lock has no use for
        for requirement in requirements_of(package, extras.get(package, set())):
            if requirement.name not in left_out and unmet(requirement, locked):
                missing.append(f"{package} needs {requirement}")
    assert missing == []


def test_the_lock_names_versions_and_never_one_build_of_them() -> None:
    assert [pin for pin in pins("cpu.txt").items() if not re.fullmatch(r"[\w.]+", pin[1])] == []


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """requirements/check.py, which lies outside any package."""
    spec = importlib.util.spec_from_file_location("check", ROOT / "requirements" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_torch_other_than_the_locked_one_is_named(check: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text("numpy==1.0\ntorch==0.0.1\n")
    message = check.torch_problem(lock)
    assert "torch 0.0.1 is locked" in message
    assert f"holds torch {metadata.version('torch')}" in message
    assert "PIP_ARGS" in message


def test_a_torch_that_cannot_be_imported_is_named(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcublas.so: no such file')\n")
    lock = tmp_path / "cpu.txt"
    lock.write_text(f"torch=={metadata.version('torch').partition('+')[0]}\n")
    assert check.torch_problem(lock) is None
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    message = check.torch_problem(lock)
    assert "cannot be imported (ImportError: libcublas.so" in message
    assert "PIP_ARGS" in message


def test_a_build_for_cpus_in_an_environment_for_gpus_is_named(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "cuda.txt"
    lock.write_text("torch==2.13.0\n")
    monkeypatch.setattr(check, "version", lambda name: "2.13.0+cpu")
    assert "make venv REQUIREMENTS=requirements/cuda.txt" in check.torch_problem(lock)
    monkeypatch.setattr(check, "version", lambda name: "2.13.0")
    assert check.torch_problem(lock) is None
