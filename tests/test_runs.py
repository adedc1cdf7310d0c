"""Whole runs, as a user starts them: determinism, resume, real data, every algorithm."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlzoo.bench._equal import equal_but_time
from rlzoo.launch.summary import read_metrics
from tests import warm
from tests.forked import Program, Ranks

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("RLZOO_SHARED_DATA", ROOT.parent / "shared" / "data"))
SMALL = (
    "num_threads=1",
    "val_every=2",
    "data.num_train=64",
    "data.num_val=8",
    "datamodule.prompts_per_epoch=16",
    "datamodule.responses_per_prompt=4",
    "datamodule.responses_per_step=32",  # two rollout steps an epoch
    "sampler.callback.pilots=2",
    "limits.max_responses=192",  # two epochs of 32 pilots and 64 responses
    "algo.updates=2",
)


def start(run_dir: Path, *overrides: str, program: str = "rlzoo.run") -> Program:
    """A run in a process of its own; of several ranks, the first starts the others."""
    arguments = [f"run_dir={run_dir}", *overrides]
    return Program(program, arguments, run_dir.with_suffix(".txt"))


def start_anew(run_dir: Path, *overrides: str, cwd: Path = ROOT) -> subprocess.Popen:
    """The same from a shell, imports included."""
    command = [sys.executable, "-m", "rlzoo.run", f"run_dir={run_dir}", *overrides]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, **options)


def finish(process: Program | Ranks | subprocess.Popen, expected: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == expected, output
    return output


def run(run_dir: Path, *overrides: str, expected: int = 0) -> str:
    """The output of a run: in this process, but for one with a number of ranks, each in its own."""
    devices = [option for option in overrides if option.startswith("trainer.devices=")]
    if devices:
        arguments, said = [f"run_dir={run_dir}", *overrides], run_dir.with_suffix(".txt")
        count = int(devices[-1].removeprefix("trainer.devices="))
        return finish(Ranks("rlzoo.run", arguments, said, count=count), expected)
    outcome = warm.run(run_dir, *overrides, small=False)
    assert outcome.code == expected, outcome.output
    return outcome.output


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert equal_but_time(run_dir / "metrics.csv", other / "metrics.csv") == []
    assert equal_but_time(run_dir / "ledger.csv", other / "ledger.csv") == []
    ours, theirs = weights(run_dir), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for folder in ("rollouts", "budgets"):
        names = [sorted(p.name for p in (d / folder).iterdir()) for d in (run_dir, other)]
        assert names[0] == names[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small GVM-GRPO run, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    run(run_dir, *SMALL)
    return run_dir


def test_a_run_directory_explains_itself(reference):
    for name in ("config.yaml", "environment.json", "metrics.csv", "ledger.csv", "learning.png"):
        assert (reference / name).stat().st_size > 0
    summary = summary_of(reference)
    assert summary["responses"] == 192
    assert summary["pilot_share"] == pytest.approx(64 / 192)
    steps = len(read_metrics(reference / "metrics.csv")) - 1  # the first row is a validation
    assert summary["updates"] == 2 * steps
    assert 0 < summary["planning_share"] < 1
    assert {
        "val_avg_at_8_first",
        "val_avg_at_8_last",
        "val_avg_at_8_best",
        "tokens",
        "seconds",
    } <= (summary.keys())
    assert (reference / "policy" / "config.json").exists()
    assert list((reference / "tensorboard").glob("events*"))


def test_the_same_seed_gives_the_same_run_to_the_last_digit(reference, tmp_path):
    """Whether checkpoints are written at once or from a thread."""
    run(tmp_path / "thread", *SMALL, "callbacks.checkpoint.asynchronous=true")
    assert_same_run(tmp_path / "thread", reference)
    assert not list((tmp_path / "thread" / "checkpoints").glob("*.partial"))


def test_another_seed_gives_another_run(reference, tmp_path):
    small = [option for option in SMALL if not option.startswith("limits")]
    run(tmp_path / "other", *small, "limits.max_responses=96", "seed=1")  # one epoch
    other, first = (read_metrics(d / "metrics.csv")[1] for d in (tmp_path / "other", reference))
    assert other["rollout_step"] == first["rollout_step"] and other["tokens"] != first["tokens"]


def test_a_run_killed_after_every_boundary_resumes_to_the_same_end(reference, tmp_path):
    run_dir, options = tmp_path / "killed", SMALL
    for step in (1, 2, 3):  # inside an epoch, at its end, inside the next
        process = start(run_dir, *options)
        wait_for(run_dir / "rollouts" / f"step_{step - 1:06d}.parquet", process)
        time.sleep(random.Random(step).uniform(0.0, 0.3))  # anywhere in what follows
        process.send_signal(signal.SIGKILL)
        process.wait()
        options = (*SMALL, "ckpt_path=last")
    run(run_dir, *options)
    assert_same_run(run_dir, reference)


def wait_for(path: Path, process: Program | Ranks) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def test_ctrl_c_exits_130_and_the_resumed_run_is_the_same(reference, tmp_path):
    run_dir = tmp_path / "interrupted"
    process = start(run_dir, *SMALL)
    wait_for(run_dir / "rollouts" / "step_000001.parquet", process)
    process.send_signal(signal.SIGINT)
    output = finish(process, expected=130)
    assert "ckpt_path=last" in output and "Traceback" not in output
    run(run_dir, *SMALL, "ckpt_path=last")
    assert_same_run(run_dir, reference)


UNIFORM = (*(o for o in SMALL if not o.startswith(("sampler", "limits"))), "sampler=uniform")


@pytest.mark.parametrize("algo", ["raft", "reinforce_rej", "iterative_dpo"])
def test_every_kind_of_algorithm_trains_with_uniform_budgets(algo, tmp_path):
    options = ("limits.max_responses=64", "algo.kl_coef=0.001")
    run(tmp_path / algo, *UNIFORM, f"algo={algo}", *options)
    summary = summary_of(tmp_path / algo)
    assert summary["responses"] == 64 and summary["updates"] > 0
    assert summary["pilot_share"] == 0


def test_the_algorithm_that_the_readme_writes_outside_the_repository_trains(tmp_path):
    section = (ROOT / "README.md").read_text().split("## Write an algorithm")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL))
    lines = 0
    for language in ("python", "yaml"):
        path = tmp_path / blocks[language].splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(blocks[language])
        lines += len(blocks[language].splitlines())
    command = blocks["bash"].strip()
    assert lines + len(command.splitlines()) <= 40
    overrides = shlex.split(command.removeprefix("python -m rlzoo.run"))
    limit = "limits.max_responses=64"
    finish(start_anew(tmp_path / "run", *overrides, *UNIFORM, limit, cwd=tmp_path))
    assert summary_of(tmp_path / "run")["updates"] > 0
    assert "_target_: mine.rank_grpo.RankGRPO" in (tmp_path / "run" / "config.yaml").read_text()


def test_dynamic_sampling_pays_for_what_it_throws_away(tmp_path):
    small = [o for o in UNIFORM if not o.startswith("sampler")]
    run(tmp_path / "dapo", *small, "algo=dapo", "limits.max_responses=64")
    rows = read_metrics(tmp_path / "dapo" / "metrics.csv")[1:]
    drawn = [int(row["num_rollouts"]) for row in rows]
    assert max(int(row["rounds"]) for row in rows) > 1 and max(drawn) > 32
    assert summary_of(tmp_path / "dapo")["responses"] == sum(drawn)


def test_ppo_killed_in_the_middle_resumes_to_the_same_actor_and_critic(tmp_path):
    options = (*UNIFORM, "algo=ppo", "limits.max_responses=96", "algo.critic_warmup=1")
    run(tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    process = start(killed, *options)
    wait_for(killed / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(killed, *options, "ckpt_path=last")
    assert_same_run(killed, tmp_path / "whole")
    assert any(name.startswith("critic.") for name in weights(killed))


def test_recorded_rollouts_train_any_algorithm_and_are_not_paid_for(reference, tmp_path):
    options = ("algo=raft_pp", "limits.max_responses=null", f"replay={reference / 'rollouts'}")
    run(tmp_path / "replay", *UNIFORM, *options)
    summary = summary_of(tmp_path / "replay")
    assert summary["responses"] == 0 and summary["updates"] > 0
    assert summary["ledger"]["responses/replay"] == 128  # what the reference trained on
    assert "the end of replay" in summary["stopped_by"]


def test_right_rollouts_of_a_run_are_a_corpus_for_supervised_training(reference, tmp_path):
    run(
        tmp_path / "sft",
        "algo=sft",
        "num_threads=1",
        "data.num_val=16",
        f"datamodule.rollouts={reference / 'rollouts'}",
        "datamodule.batch_size=8",
        "datamodule.updates_per_step=2",
        "limits.max_responses=null",
        "limits.max_updates=4",
    )
    assert summary_of(tmp_path / "sft")["updates"] == 4


def test_gradients_that_are_not_finite_stop_the_run_with_a_word(tmp_path):
    output = run(
        tmp_path / "nan",
        *UNIFORM,
        "lr=1e30",
        "algo.max_skipped_updates=1",
        "algo.passes=4",
        expected=2,
    )
    assert "algo.max_skipped_updates=1" in output and "Traceback" not in output


def test_a_full_disk_costs_no_checkpoint_and_the_resumed_run_is_the_same(tmp_path):
    options = (*UNIFORM, "limits.max_responses=128", "val_every=0")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be made by root")
    try:  # one checkpoint of 11 MB fits, the next one beside it does not
        output = run(disk / "run", *options, expected=2)
        assert "The disk is full" in output and "last.ckpt, stands" in output
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run(disk / "run", *options, "ckpt_path=last")
        run(tmp_path / "whole", *options)
        assert_same_run(disk / "run", tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_policy_exported_by_one_run_starts_another(reference, tmp_path):
    small = [o for o in SMALL if not o.startswith("limits")]
    run(
        tmp_path / "next",
        *small,
        f"model.path={reference / 'policy'}",
        f"init_from={reference / 'checkpoints' / 'best.ckpt'}",
        "limits.max_responses=32",
    )
    assert (tmp_path / "next" / "summary.json").exists()


def test_supervised_training_resumes_to_the_same_weights(tmp_path):
    small = (
        "algo=sft",
        "num_threads=1",
        "data.num_train=256",
        "data.num_val=16",
        "datamodule.batch_size=8",
        "datamodule.updates_per_step=2",
        "limits.max_responses=null",
    )
    run(tmp_path / "whole", *small, "limits.max_updates=6", "algo.scheduler.num_training_steps=6")
    parts = tmp_path / "parts"
    run(parts, *small, "limits.max_updates=4", "algo.scheduler.num_training_steps=6")
    run(
        parts,
        *small,
        "limits.max_updates=6",
        "algo.scheduler.num_training_steps=6",
        "ckpt_path=last",
    )
    ours, theirs = weights(parts), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real GSM8K file is not on this machine")
def test_the_whole_loop_runs_on_the_real_gsm8k(tmp_path):
    small = [o for o in SMALL if not o.startswith(("data.", "limits"))]
    run(
        tmp_path / "gsm8k",
        *small,
        "data=gsm8k",
        f"data.path={SHARED_DATA / 'gsm8k' / 'train.jsonl'}",
        "data.max_prompts=32",
        "datamodule.max_prompt_tokens=1024",
        "datamodule.max_response_tokens=16",
        "limits.max_responses=64",
    )
    assert summary_of(tmp_path / "gsm8k")["responses"] >= 64
