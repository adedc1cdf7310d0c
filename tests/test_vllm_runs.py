"""Whole runs with the real vLLM inside: what a user sees, what is left behind, what goes wrong."""

import contextlib
import re
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlzoo.launch.summary import read_metrics
from tests.test_runs import UNIFORM, finish, run, start, start_anew, summary_of

pytestmark = pytest.mark.vllm
VLLM = (*UNIFORM, "engine=vllm", "engine.kv_cache_gb=0.25", "limits.max_responses=96")

FAILS_IN_THE_MIDDLE = """
import sys
from rlzoo.engines import vllm
generate, calls = vllm.VLLMEngine.generate, []
def failing(self, *args, **options):
    calls.append(1)
    if len(calls) == 3:  # validation, one rollout step, then this
        self._llm.llm_engine.step = lambda: 1 / 0
    return generate(self, *args, **options)
vllm.VLLMEngine.generate = failing
from rlzoo.run import main
sys.argv[0] = "rlzoo.run"
main()
"""


def shared_memory_of(process: subprocess.Popen, seen: set[Path]) -> None:
    """Adds the shared memory that a process and its children map, as long as it lives."""
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):  # one has ended
            whole = psutil.Process(process.pid)
            for one in (whole, *whole.children(recursive=True)):
                maps = Path(f"/proc/{one.pid}/maps").read_text()
                seen |= {Path(path) for path in re.findall(r"/dev/shm/\S+", maps)}
        time.sleep(0.05)


def test_a_run_is_quiet_agrees_with_its_engine_and_leaves_nothing_running(tmp_path):
    process, memory = start_anew(tmp_path / "run", *VLLM), set()
    watch = threading.Thread(target=shared_memory_of, args=(process, memory))
    watch.start()
    group = {process.pid, *(child.pid for child in psutil.Process(process.pid).children())}
    output = finish(process)
    assert "Engine and trainer agree" in output
    assert not any(word in output for word in ("INFO", "WARNING", "Warning", "vllm/"))
    assert (tmp_path / "run" / "vllm.log").stat().st_size > 500
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    gaps = [float(row["logprob_gap/max"]) for row in rows if row.get("logprob_gap/max")]
    assert len(gaps) == 3 and max(gaps) < 1e-3
    assert float(rows[-1]["time/weight_sync"]) >= 0
    assert summary_of(tmp_path / "run")["responses"] == 96
    assert not any(psutil.pid_exists(pid) for pid in group)
    marker = f"run_dir={tmp_path / 'run'}"
    left = [p for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or [])]
    watch.join()
    assert left == [] and memory and not any(path.exists() for path in memory)


def test_an_engine_that_fails_in_a_draw_leaves_a_checkpoint_to_go_on_from(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILS_IN_THE_MIDDLE)
    output = finish(start(tmp_path / "run", *VLLM, program=str(script)), expected=2)
    assert "ZeroDivisionError" in output
    run(tmp_path / "run", *VLLM, "ckpt_path=last")
    assert summary_of(tmp_path / "run")["responses"] == 96
    steps = [row["rollout_step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert steps == ["0", "1", "2", "3"]


def test_too_little_memory_for_the_cache_names_the_setting(tmp_path):
    output = run(tmp_path / "run", *VLLM, "engine.kv_cache_gb=0.0001", expected=2)
    assert "Raise engine.kv_cache_gb" in output and "Traceback" not in output


def test_the_doctor_compares_and_trains_nothing(tmp_path):
    output = run(tmp_path / "run", *VLLM, "doctor=true")
    assert "Engine and trainer agree" in output and "nothing was trained" in output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.deepspeed
def test_adapters_in_parts_reach_an_engine_in_each_of_two_ranks(tmp_path):
    options = ("trainer.devices=2", "strategy=deepspeed_zero3", "model.lora={r: 8}")
    check = "callbacks.weight_sync.check=always"
    output = run(tmp_path / "run", *VLLM, *options, check)
    assert "Engine and trainer agree" in output
    assert summary_of(tmp_path / "run")["responses"] == 96
