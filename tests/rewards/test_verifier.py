"""The pool: blame, limits, order, and processes that come and go."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import rlzoo
from rlzoo.errors import UserError
from rlzoo.launch.configuration import conf_dir
from rlzoo.rewards.base import Verdict
from rlzoo.rewards.verifier import MathReward, VerifierPool
from rlzoo.types import Prompt

RIGHT, WRONG, UNVERIFIABLE = Verdict.RIGHT, Verdict.WRONG, Verdict.UNVERIFIABLE
LIMIT = 0.5  # seconds per answer

ENDLESS = [  # each takes longer than any limit
    "10^{10^{10}}",
    "9^{9^{9^9}}",
    "(10^9)!",
    r"\binom{10^9}{5\cdot 10^8}",
    "(" * 400 + "1" + ")" * 400,
    r"\sum_{n=1}^{10^9} n^{n}",
]
BROKEN = ["9" * 100_000, "{" * 3000, r"\frac{1}{", "}}}}", "\0", "a\0b", "\ud800", "", "\\"]


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(seconds_per_answer=LIMIT) as pool:
        pool.verify(["1"], [boxed("1")])  # started
        yield pool


@pytest.fixture
def patient_pool() -> Iterator[VerifierPool]:
    """For tests that are not about time: a busy machine may take long over any answer."""
    with VerifierPool(seconds_per_answer=60.0) as pool:
        pool.verify(["1"], [boxed("1")])  # started
        yield pool


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def with_rlzoo() -> dict[str, str]:
    """This environment, for a program in another folder that imports rlzoo."""
    return os.environ | {"PYTHONPATH": str(Path(rlzoo.__file__).parents[1])}


def worker_pids(pool: VerifierPool) -> list[int]:
    return [worker.pid for worker in pool._workers]


def test_verdicts_come_in_the_order_of_the_answers(pool: VerifierPool):
    golds = [str(i) for i in range(300)]
    responses = [boxed(f"{i + (i % 3 == 0)}.0") for i in range(300)]
    expected = [WRONG if i % 3 == 0 else RIGHT for i in range(300)]
    assert pool.verify(golds, responses) == expected


def test_hostile_answers_change_no_other_verdict_and_stay_in_their_time(pool: VerifierPool):
    golds, responses, expected = [], [], []
    for i, hostile in enumerate(ENDLESS + BROKEN):
        golds += [str(i), "-1", str(i)]
        responses += [boxed(f"{i}.0"), boxed(hostile), boxed(f"{i}.5")]
        expected += [RIGHT, UNVERIFIABLE if hostile in ENDLESS else None, WRONG]

    start = time.monotonic()
    verdicts = pool.verify(golds, responses)
    seconds = time.monotonic() - start

    assert seconds < (len(ENDLESS) + len(BROKEN)) * LIMIT / pool.num_workers + 5
    assert [v for v, e in zip(verdicts, expected, strict=True) if e is not None] == [
        e for e in expected if e is not None
    ]
    assert RIGHT not in verdicts[1::3]


def test_hostile_answers_outside_a_box_are_survived(pool: VerifierPool):
    hostile = [f"the answer is ${answer}$" for answer in ENDLESS + BROKEN]
    verdicts = pool.verify(["-1"] * (len(hostile) + 1), [*hostile, "it is -1."])
    assert RIGHT not in verdicts[:-1]
    assert verdicts[-1] is RIGHT


def test_a_hostile_gold_answer_is_unverifiable_and_no_other_is(pool: VerifierPool):
    verdicts = pool.verify(["10^{10^{10}}", "2.0"], [boxed("1.0"), boxed("2")])
    assert verdicts == [UNVERIFIABLE, RIGHT]


def test_every_endless_gold_answer_verifies_against_itself(pool: VerifierPool):
    assert pool.verify(ENDLESS, [boxed(f" {answer}.") for answer in ENDLESS]) == [RIGHT] * 6


def test_an_answer_over_the_memory_cap_is_unverifiable_before_its_time_is_up():
    with VerifierPool(memory_mb=16, seconds_per_answer=30) as pool:
        pool.verify(["1"], [boxed("1")])
        start = time.monotonic()
        # One huge number asked for at once: math-verify alone takes the MemoryError for wrong.
        verdicts = pool.verify(["5.0", "5.0"], [boxed(r"\frac{2^{10^{11}}}{3}"), boxed("5")])
    assert verdicts == [UNVERIFIABLE, RIGHT]
    assert time.monotonic() - start < 15


def test_length_is_that_of_the_box_or_else_of_the_response():
    with VerifierPool(max_answer_chars=50) as pool:
        thoughts = "thinking " * 1000
        responses = [thoughts + boxed("7.0"), thoughts + "it is 7.", boxed("7" * 60), "it is 7."]
        assert pool.verify(["7"] * 4, responses) == [RIGHT, UNVERIFIABLE, UNVERIFIABLE, RIGHT]


def test_answers_in_time_are_not_blamed_for_a_parent_that_is_held_up():
    with VerifierPool(seconds_per_answer=0.4) as pool:
        pool.verify(["1"], [boxed("1")])
        verdicts = pool.verify(
            ["3"] * 8, [boxed("3.0")] * 8, on_progress=lambda known: time.sleep(0.6)
        )
    assert verdicts == [RIGHT] * 8


def test_progress_rises_to_the_number_of_answers(pool: VerifierPool):
    known: list[int] = []
    pool.verify(["5"] * 100, [boxed("5.0")] * 99 + ["9" * 30_000], known.append)
    assert known == sorted(known)
    assert known[-1] == 100
    assert len(set(known)) > 3


def test_progress_counts_answers_that_are_all_too_long():
    known: list[int] = []
    assert VerifierPool().verify(["5"] * 3, ["9" * 30_000] * 3, known.append) == [UNVERIFIABLE] * 3
    assert known == [3]


def test_progress_counts_responses_that_are_wrong_unseen():
    known: list[int] = []
    prompts = [Prompt(id=str(i), question="?", answer="5") for i in range(4)]
    reward = MathReward(num_workers=1, truncated_is_wrong=True)
    reward(prompts, [boxed("5.0")] * 4, [False, True, True, False], known.append)
    reward.close()
    assert known[-1] == 4


def test_idle_workers_that_were_killed_are_replaced_without_blame(pool: VerifierPool):
    killed = worker_pids(pool)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(killed)
    assert pool.verify(["5"] * 40, [boxed("5.0")] * 40) == [RIGHT] * 40
    assert not set(killed) & set(worker_pids(pool))


@pytest.mark.parametrize("end", [VerifierPool.close, lambda pool: pool.verify(["5"], ["5.0"])])
def test_the_pid_of_a_worker_that_ended_by_itself_is_never_signalled(
    end: Callable[[VerifierPool], object],
):
    with VerifierPool(num_workers=1) as pool:
        pool.verify(["1"], [boxed("1.0")])
        (worker,) = pool._workers
        os.kill(worker.pid, signal.SIGKILL)
        wait_until_gone([worker.pid])
        with subprocess.Popen(["sleep", "60"]) as heir:
            worker.pid = heir.pid  # as if the system had given the number out again
            end(pool)
            time.sleep(0.2)
            has_survived = heir.poll() is None
            heir.kill()
    assert has_survived


def test_a_killed_server_is_started_again(patient_pool: VerifierPool):
    server = patient_pool._server._process
    killed = [server.pid, *worker_pids(patient_pool)]
    server.kill()
    wait_until_gone(killed)
    assert patient_pool.verify(["5"] * 40, [boxed("5.0")] * 40) == [RIGHT] * 40


def test_workers_are_replaced_after_their_share_of_answers():
    with VerifierPool(num_workers=1, recycle_after=10) as pool:
        pids = set()
        for _ in range(3):
            assert pool.verify(["5"] * 10, [boxed("5.0")] * 10) == [RIGHT] * 10
            pids |= set(worker_pids(pool))
            assert pool.verify(["5"], [boxed("5.0")]) == [RIGHT]
            pids |= set(worker_pids(pool))
    assert len(pids) >= 3


def test_ctrl_c_reaches_neither_server_nor_workers(pool: VerifierPool):
    pool.verify(["1"], [boxed("1.0")])
    server, workers = pool._server._process.pid, worker_pids(pool)
    for pid in [server, *workers]:
        assert os.getsid(pid) != os.getsid(0)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert pool.verify(["5"] * 40, [boxed("5.0")] * 40) == [RIGHT] * 40
    assert (pool._server._process.pid, worker_pids(pool)) == (server, workers)


def test_the_pool_works_from_another_thread(pool: VerifierPool):
    found: list[Verdict] = []
    golds, responses = ["5"] * 3, [boxed("5.0"), boxed(ENDLESS[0]), boxed("6")]
    thread = threading.Thread(target=lambda: found.extend(pool.verify(golds, responses)))
    thread.start()
    thread.join(timeout=20)
    assert found == [RIGHT, UNVERIFIABLE, WRONG]


def test_an_interrupted_call_leaves_no_reports_to_the_next(patient_pool: VerifierPool):
    def interrupt(known: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patient_pool.verify(["5"] * 100, [boxed("6.0")] * 100, interrupt)
    assert patient_pool.verify(["5"] * 100, [boxed("5.0")] * 100) == [RIGHT] * 100


def test_a_closed_pool_leaves_no_process_and_starts_again():
    pool = VerifierPool()
    assert pool.verify(["5"], [boxed("5.0")]) == [RIGHT]
    pids = [pool._server._process.pid, *worker_pids(pool)]
    pool.close()
    wait_until_gone(pids)
    assert pool.verify(["5"], [boxed("5.0")]) == [RIGHT]
    pool.close()


ENDLESS_PROGRAM = r"""
import json, os, signal, threading
from rlzoo.rewards.verifier import VerifierPool

assert __name__ == "__main__", "the workers imported the main program again"
pool = VerifierPool(seconds_per_answer=1000)
pool.verify(["1"], [r"\boxed{1}"])
print(json.dumps([pool._server._process.pid, *[w.pid for w in pool._workers]]), flush=True)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
pool.verify(["1"] * 4, [r"\boxed{10^{10^{10}}}"] * 4)
"""


def test_workers_at_an_endless_answer_die_with_a_killed_main_program(tmp_path: Path):
    program = tmp_path / "main.py"
    program.write_text(ENDLESS_PROGRAM)
    ended = subprocess.run(
        [sys.executable, program], stdout=subprocess.PIPE, env=with_rlzoo(), timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    wait_until_gone(json.loads(ended.stdout))


def test_workers_import_no_torch():
    program = "import sys, rlzoo.rewards.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=with_rlzoo()).returncode == 0


@pytest.mark.parametrize(
    ("truncated_is_wrong", "expected"),
    [(False, [RIGHT, WRONG, RIGHT, UNVERIFIABLE]), (True, [RIGHT, WRONG, WRONG, UNVERIFIABLE])],
)
def test_only_right_answers_earn_one(truncated_is_wrong: bool, expected: list[Verdict]):
    config = OmegaConf.load(f"{conf_dir()}/reward/math.yaml")
    changed = {"seconds_per_answer": LIMIT, "truncated_is_wrong": truncated_is_wrong}
    reward = instantiate(config, **changed, processes=1)
    assert isinstance(reward, MathReward)
    prompts = [Prompt(id=str(i), question="?", answer="5") for i in range(4)]
    texts = [boxed("5.0"), boxed("6"), boxed("5"), boxed(ENDLESS[0])]
    scores = reward(prompts, texts, [False, False, True, False])
    reward.close()
    assert scores.verdicts.dtype == torch.int8
    assert scores.verdicts.tolist() == expected
    assert scores.rewards.dtype == torch.float32
    assert scores.rewards.tolist() == [float(v == RIGHT) for v in expected]


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(2, 1, 2), (128, 8, 16), (64, 8, 8), (4, 8, 1), (96, 1, 16)]
)
def test_workers_share_the_cores_of_the_machine(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert VerifierPool(processes=processes).num_workers == workers
    assert VerifierPool(num_workers=3, processes=processes).num_workers == 3


def test_no_rollouts_at_all_have_empty_scores():
    scores = MathReward()([], [], [])
    assert scores.rewards.shape == scores.verdicts.shape == (0,)


def test_a_machine_that_is_held_up_costs_no_verdict():
    with VerifierPool(num_workers=1, seconds_per_answer=0.3) as pool:
        pool.verify(["1"], [boxed("1.0")])
        (pid,) = worker_pids(pool)
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.6, lambda: os.kill(pid, signal.SIGCONT)).start()
        assert pool.verify(["x+1"], [boxed("1+x")]) == [RIGHT]
        assert worker_pids(pool) == [pid]


def test_a_worker_that_never_goes_on_is_given_up():
    with VerifierPool(num_workers=1, seconds_per_answer=0.1) as pool:
        pool.verify(["1"], [boxed("1.0")])
        os.kill(worker_pids(pool)[0], signal.SIGSTOP)
        assert pool.verify(["x+1"], [boxed("1+x")]) == [UNVERIFIABLE]


def test_golds_that_do_not_parse_are_told_from_limits():
    golds = ["t(0,4]", "x+1", "5", "10^{10^{10}}", "t(0,4]", ""]
    responses = [boxed(a) for a in ("5", ENDLESS[0], "5", "1.5", "t(0,4]", "5")]
    prompts = [Prompt(id=f"p{i}", question="?", answer=gold) for i, gold in enumerate(golds)]
    reward = MathReward(num_workers=1, seconds_per_answer=LIMIT)
    verdicts = reward(prompts, responses, [False] * 6).verdicts.tolist()
    assert verdicts == [UNVERIFIABLE, UNVERIFIABLE, RIGHT, UNVERIFIABLE, RIGHT, UNVERIFIABLE]
    assert sorted(reward.unparsed_golds) == ["p0", "p5"]
    assert reward.unparsed(prompts) == [prompts[0], prompts[4], prompts[5]]
    reward.close()


def test_a_server_that_does_not_start_is_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="worker server ended with 1; what it says stands above"):
        VerifierPool().verify(["1"], [boxed("1")])
