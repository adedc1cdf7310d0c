"""Processes that torchrun starts on several hosts make the run that they make on one.

The hosts are network namespaces, where those are permitted, and loopback addresses always; their
docstrings in hosts.py say what they share.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlzoo.bench._equal import equal_but_time
from tests.multinode.conftest import SMALL
from tests.multinode.hosts import LOOPBACK, Host, NotPermitted, agents, finish, machines, two_hosts


def only_run(cwd: Path) -> Path:
    """The run directory that all ranks agreed on: the only one there is."""
    (run_dir,) = (cwd / "outputs").glob("*/*")
    return run_dir


def assert_one_run_of_two_ranks(run_dir: Path, expected: Path) -> None:
    assert equal_but_time(run_dir / "metrics.csv", expected / "metrics.csv") == []
    assert equal_but_time(run_dir / "ledger.csv", expected / "ledger.csv") == []
    logs = sorted(path.name for path in run_dir.glob("log*.txt"))
    assert logs == ["log.rank1.txt", "log.txt"]
    for name in logs:
        assert (run_dir / name).stat().st_size > 0


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two network namespaces, or two loopback addresses where none can be made."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(two_hosts())
        except NotPermitted:
            yield LOOPBACK


def test_two_hosts_without_a_named_run_directory_make_the_run_of_two_local_ranks(
    hosts, two_local_ranks, tmp_path
):
    overrides = (*SMALL, "algo=grpo", "sampler=gvm", "strategy=ddp")
    outputs = finish(agents(hosts, *overrides, cwd=tmp_path))
    assert_one_run_of_two_ranks(only_run(tmp_path), two_local_ranks("ddp"))
    assert "Validation avg@8 went" in outputs[0] and "Validation" not in outputs[1]


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", ["deepspeed_zero2", "deepspeed_zero3"])
def test_two_hosts_with_parts_of_the_optimizer_do_too(strategy, hosts, two_local_ranks, tmp_path):
    overrides = (*SMALL, "algo=grpo", "sampler=gvm", f"strategy={strategy}")
    finish(agents(hosts, *overrides, cwd=tmp_path))
    assert_one_run_of_two_ranks(only_run(tmp_path), two_local_ranks(strategy))


@pytest.mark.slow
def test_lightnings_own_launcher_on_two_hosts_makes_that_run_too(hosts, two_local_ranks, tmp_path):
    finish(machines(hosts, *SMALL, "strategy=ddp", "run_dir=run", cwd=tmp_path))
    run_dir, expected = tmp_path / "run", two_local_ranks("ddp")
    assert equal_but_time(run_dir / "metrics.csv", expected / "metrics.csv") == []
    logs = sorted(path.name for path in run_dir.glob("log*.txt"))
    assert logs == ["log.node1.rank0.txt", "log.txt"]
