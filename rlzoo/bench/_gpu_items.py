"""The items of `gpu_check`, one function each: what it tries, its figures, what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from rlzoo.bench._gpu_place import (
    Failed,
    Found,
    Place,
    Sizes,
    column,
    made_up,
    memory_lines,
    skewed_lengths,
)
from rlzoo.callbacks.gvm import gradient_norms
from rlzoo.data.rollout_files import write_rollouts
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.vllm import VLLMEngine
from rlzoo.launch.devices import DRIVER, driver_version, why_no_cuda
from rlzoo.models.policy import load_policy, load_tokenizer
from rlzoo.types import Rollouts

GAP = 0.03  # nats, mean: of a bfloat16 trainer and a bfloat16 engine on text; trl issue 5312
GB = 1e9
ONE_STEP = ("sampler=uniform", "val_every=0", "callbacks.validation=null", "callbacks.export=null")


class Item(NamedTuple):
    what: str
    limit: int  # seconds on one H100 after which it counts as hung: twice what is expected
    mend: str  # where to look if it fails
    check: Callable[[Place, Found], None]
    gpus: int = 0  # without which it is left out


# --- 1 to 3: the environment and the parts ------------------------------------------------------


def environment(place: Place, found: Found) -> None:
    found.figures |= {"torch": torch.__version__, "driver": driver_version(DRIVER) or "none"}
    if (reason := why_no_cuda()) is not None:
        found.left_out.append(f"the GPU: {reason}")
    else:
        card = torch.cuda.get_device_properties(0)
        found.figures |= {"device": card.name, "memory_gb": round(card.total_memory / GB, 1)}
        found.expect(torch.cuda.is_bf16_supported(), "the GPU does not compute in bfloat16")
    imports = "import vllm, deepspeed; print(vllm.__version__)"
    done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:] or ["nothing"]
    found.figures["vllm"] = said[0][:100]
    found.expect(done.returncode == 0, f"vLLM or DeepSpeed cannot be imported: {said[0]}")
    if place.cuda:  # a CPU's environment leaves out some that vLLM names
        checked = subprocess.run(
            [sys.executable, "-m", "pip", "check"], capture_output=True, text=True
        )
        found.expect(checked.returncode == 0, f"pip check: {checked.stdout.splitlines()[:1]}")
    found.expect(takes_flash(place), "attention in training is not computed by a flash kernel")


def takes_flash(place: Place) -> bool:
    """Whether the attention of a training pass, with grouped heads of 128, has a flash kernel."""
    sizes: Sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"vocab_size": 512, "intermediate_size": 256, "num_hidden_layers": 1}
    config = Qwen2Config(**sizes)
    policy: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(
        place.device
    )
    tokens = torch.arange(64, device=place.device)[None]
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(place.device, torch.bfloat16):
            policy.model(input_ids=tokens, use_cache=False).last_hidden_state.sum().backward()
    except RuntimeError:
        return False
    return True


def numerics(place: Place, found: Found) -> None:
    place.tests(found, "tests/test_half_precision.py", "-k", place.device)


def vllm_alone(place: Place, found: Found) -> None:
    place.tests(found, "tests/engines/test_vllm_gpu.py", "tests/engines/test_vllm.py")
    if not place.cuda:
        found.left_out.append("sleep, CUDA graphs and the second model runner, which need a GPU")


# --- 4 and 5: the tiny policy, sampled by vLLM --------------------------------------------------

STEPS = 6
TINY = (
    *("sampler=uniform", "engine=vllm", "callbacks.weight_sync.check=always", "val_every=0"),
    *("datamodule.prompts_per_epoch=16", "datamodule.responses_per_prompt=4"),
    *("datamodule.responses_per_step=64", f"limits.max_responses={STEPS * 64}", "algo.updates=2"),
)


def tiny_options(place: Place, found: Found) -> tuple[str, ...]:
    if place.cuda:
        return (*TINY, "engine.gpu_memory_share=0.2")
    return (*TINY, "engine.kv_cache_gb=0.25")


def check_gaps(found: Found, rows: list[dict[str, str]]) -> None:
    gaps = column(rows, "logprob_gap/mean")
    found.figures |= {"gap_mean_worst": max(gaps, default=float("nan")), "steps": len(gaps)}
    found.expect(len(gaps) == STEPS, f"the gap was taken in {len(gaps)} of {STEPS} steps")
    found.expect(max(gaps, default=1.0) < GAP, f"the gap is over {GAP} nats: {gaps}")


def tiny_run(place: Place, found: Found) -> None:
    rows = place.run("run", *tiny_options(place, found))
    check_gaps(found, rows)
    asleep = [line["asleep_gb"] for line in memory_lines(place.memory("run"))]
    found.figures |= {"asleep_gb_first": asleep[1], "asleep_gb_last": asleep[-1]}
    found.figures["engine_start_s"] = column(rows, "time/engine_start")[0]
    if place.cuda:  # from the second step on, since Adam's states come with the first
        found.expect(
            max(asleep[1:]) <= 1.05 * asleep[1], f"a sleep gives back less each time: {asleep}"
        )
    else:
        found.left_out.append("sleep and CUDA graphs, which need a GPU")


def killed_run(place: Place, found: Found) -> None:
    options, name = tiny_options(place, found), "run"
    metrics = place.folder / name / "metrics.csv"
    process = place.start(place.command(name, *options), name)
    place.kill_when(process, lambda: metrics.exists() and len(rows_of(metrics)) >= 3, name)
    began = time.perf_counter()
    rows = place.run(name, *options, "ckpt_path=last")
    found.figures["seconds_from_the_kill"] = time.perf_counter() - began
    check_gaps(found, rows)


def rows_of(metrics: Any) -> list[str]:
    """Lines below the header."""
    return list(metrics.read_text().splitlines()[1:])


# --- 6 to 8: a policy of 1.5B -------------------------------------------------------------------


def engine_speed(place: Place, found: Found) -> None:
    policy = loaded(place, "bfloat16")
    longest = place.sized(1000, 16)
    room: dict[str, Any] = {"gpu_memory_share": 0.5} if place.cuda else {"kv_cache_gb": 0.25}
    engine = VLLMEngine(
        str(place.policy),
        [0],
        max_prompt_tokens=64,
        max_response_tokens=longest,
        max_num_seqs=place.sized(1024, 16),
        log_file=str(place.folder / "vllm.log"),
        **room,
    )
    found.figures["engine_start_s"] = seconds(engine.wake)
    found.figures["first_sync_s"] = seconds(
        lambda: engine.load_weights(policy.named_parameters(), 0)
    )
    params = SamplingParams(max_response_tokens=longest)
    engine.generate([Request((3, 4, 5), (0, 1))], params, 0)  # what is compiled at the first call
    for rows in (256, 512, 1024) if place.cuda else (4, 16):
        requests = [Request(tuple(range(3, 40)), tuple(range(rows)))]
        drawn: list[Any] = []
        took = seconds(lambda: drawn.extend(engine.generate(requests, params, 0)[0]))  # noqa: B023
        tokens = sum(len(response.token_ids) for response in drawn)
        found.figures[f"tokens_per_s_{rows}_rows"] = tokens / took
    if place.cuda:
        found.figures["share_off_the_gpu"] = share_off_the_gpu(engine)
    engine.sleep()
    found.figures["sync_after_sleep_s"] = seconds(
        lambda: engine.load_weights(policy.named_parameters(), 1)
    )
    engine.close()
    if not place.cuda:
        found.left_out.append("1.5B, which a CPU draws from too slowly: a small policy instead")


def loaded(place: Place, dtype: Literal["float32", "bfloat16"]) -> PreTrainedModel:
    policy: nn.Module = load_policy(str(place.policy), dtype)
    return cast(PreTrainedModel, policy.to(place.device))


def share_off_the_gpu(engine: VLLMEngine) -> float:
    """Of the time of 50 decoding steps of 256 rows, the part in which no kernel runs."""
    from torch.profiler import ProfilerActivity, profile

    requests = [Request(tuple(range(3, 40)), tuple(range(256)))]
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        engine.generate(requests, SamplingParams(max_response_tokens=50), 0)
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    return max(0.0, 1 - float(busy) / took)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def recorded(place: Place, count: int) -> tuple[Any, Rollouts]:
    """A file of made-up rollouts, and what is in it."""
    lengths = skewed_lengths(count, place.sized(688, 20), place.sized(3072, 90))
    rollouts = made_up(lengths, 8, place.sized(150, 12))
    file = place.folder / f"rollouts_{count}" / "step_000000.parquet"
    write_rollouts(file, rollouts, load_tokenizer(str(place.policy)))
    return file, rollouts


def replay(place: Place, file: Any, count: int) -> tuple[str, ...]:
    """A run that makes one update of recorded rollouts, with no engine and nothing else."""
    return (
        *(f"replay={file}", "model=hf", f"model.path={place.policy}", "algo=reinforce"),
        *(*ONE_STEP, "callbacks.weight_sync=null", "engine=transformers", "algo.updates=1"),
        *(f"datamodule.responses_per_step={count}", "limits.max_responses=null"),
        *("datamodule.responses_per_prompt=8", f"datamodule.prompts_per_epoch={count // 8}"),
        *("datamodule.max_prompt_tokens=256", f"datamodule.max_response_tokens={longest(place)}"),
    )


def longest(place: Place) -> int:
    return place.sized(3072, 96)


WAYS = {  # of the update, by name: what is other than the defaults of model=hf
    "default": (),
    "padded": ("model.attention=sdpa",),
    "foreach": ("algo.optimizer.fused=false",),
    "all_activations_kept": ("model.gradient_checkpointing=false",),
}


def update_speed(place: Place, found: Found) -> None:
    count = place.sized(512, 16)
    file, rollouts = recorded(place, count)
    tokens = sum(rollouts.num_tokens(i) for i in range(len(rollouts)))
    for way, options in WAYS.items():
        try:
            run = (*replay(place, file, count), *options, "callbacks.checkpoint=null")
            rows = place.run(way, *run)
        except Failed as failed:
            # Without recomputation 1.5B may not fit: that is a figure, not a fault.
            if way == "all_activations_kept" and "memory" in str(failed).lower():
                found.figures[f"{way}_fits"] = 0
            else:
                found.wrong.append(f"{way}: {failed}")
            continue
        found.figures[f"{way}_tokens_per_s"] = tokens / sum(column(rows, "time/training"))
        if mfu := column(rows, "time/mfu"):
            found.figures[f"{way}_mfu"] = mfu[0]
        peak, on_paper = forecast_of(place, way)
        found.figures |= {f"{way}_peak_gb": peak, f"{way}_peak_over_forecast": peak / on_paper}
        if place.cuda:  # on a CPU it is that of a whole process
            found.expect(
                0.9 < peak / on_paper < 1.1,
                f"{way}: training took {peak:.1f} GB, the forecast was {on_paper:.1f} GB",
            )
    if not place.cuda:
        found.left_out.append("1.5B: a small policy instead")


def forecast_of(place: Place, name: str) -> tuple[float, float]:
    """GB of tensors in the training of a run: measured, and as they were forecast; on a CPU, of
    the whole process."""
    told = json.loads((place.folder / name / "forecast.json").read_text())
    parts = told["on_paper"]["training"]
    if place.cuda:
        parts.pop("process")  # CUDA's own, which torch does not count
    return told["measured"]["training"] / GB, sum(parts.values()) / GB


def norms(place: Place, found: Found) -> None:
    policy = loaded(place, "float32")
    for length in (1000, 3072) if place.cuda else (16, 48):
        pilots = made_up(skewed_lengths(64, length, length).clip(min=length), 8, 32)
        few = list(range(4))
        exact = taken(policy, pilots, few)
        torch.cuda.reset_peak_memory_stats() if place.cuda else None
        before = torch.cuda.memory_allocated() if place.cuda else 0
        with torch.autocast(place.device, torch.bfloat16):
            taken(policy, pilots, few)  # once for the sake of kernels
            half: list[torch.Tensor] = []
            took = seconds(lambda: half.append(taken(policy, pilots, list(range(64)))))  # noqa: B023
        found.figures[f"ms_a_pilot_{length}"] = 1e3 * took / 64
        if place.cuda:
            peak = torch.cuda.max_memory_allocated() - before
            found.figures[f"peak_gb_{length}"] = peak / GB
        off = float(((half[0][:4] - exact).abs() / exact).mean())
        found.figures[f"off_float32_{length}"] = off
        found.expect(off < 0.03, f"norms in bfloat16 are {off:.1%} off those in float32")


def taken(policy: Any, pilots: Rollouts, which: list[int]) -> torch.Tensor:
    return gradient_norms(policy, pilots, which, temperature=1.0, max_tokens=16384)


# --- 9 to 12: strategies, checkpoints, a whole run, two GPUs ------------------------------------


def strategies(place: Place, found: Found) -> None:
    place.tests(found, "tests/strategies/test_on_device.py", "-k", f"{place.device} and one_rank")


def checkpoint(place: Place, found: Found) -> None:
    count = place.sized(64, 16)
    file, _ = recorded(place, count)
    place.run("run", *replay(place, file, count))
    saved = (place.folder / "run" / "checkpoints").resolve() / "last.ckpt"
    found.figures["checkpoint_gb"] = saved.resolve().stat().st_size / GB
    ledger = json.loads((place.folder / "run" / "summary.json").read_text())["ledger"]
    found.figures["checkpoint_s"] = ledger["time/checkpointing"]
    many = place.sized(8192, 512)
    lengths = skewed_lengths(many, place.sized(688, 60), place.sized(3072, 200))
    rollouts, tokenizer = made_up(lengths, 8, 150), load_tokenizer(str(place.policy))
    written = place.folder / "many" / "step_000000.parquet"
    found.figures["rollouts_s"] = seconds(lambda: write_rollouts(written, rollouts, tokenizer))
    found.figures["rollouts_mb"] = written.stat().st_size / 1e6


def small_run(place: Place, found: Found) -> None:
    tokens = place.sized(1024, 32)
    cache = () if place.cuda else ("engine.kv_cache_gb=0.25",)
    outside = place.folder / "conf"
    (outside / "reward").mkdir(parents=True)
    (outside / "reward" / "coin.yaml").write_text("_target_: rlzoo.bench._gpu_watch.Coin\n")
    rows = place.run(
        "run",
        *("sampler=gvm", "model=hf", f"model.path={place.policy}", "engine=vllm", *cache),
        *("val_every=0", "callbacks.validation=null", "callbacks.export=null"),
        *("callbacks.checkpoint=null", "datamodule.prompts_per_epoch=64"),
        *("datamodule.responses_per_prompt=8", "datamodule.responses_per_step=256"),
        *("datamodule.max_prompt_tokens=128", f"datamodule.max_response_tokens={tokens}"),
        *("sampler.callback.pilots=4", "limits.max_responses=1536"),
        *("reward=coin", f"hydra.searchpath=[file://{outside}]"),  # or there is nothing to learn
    )
    updates = column(rows, "updates")
    found.expect(len(rows) == 4 and updates[-1] == 16, f"{len(rows)} steps, {updates} updates")
    phases: dict[str, float] = {}
    for line in memory_lines(place.memory("run")):
        for phase, used in line["phases_gb"].items():
            phases[phase] = max(phases.get(phase, 0.0), used)
    found.figures |= {f"{phase.partition('/')[0]}_gb": used for phase, used in phases.items()}
    for name in ("time/sampling/train", "time/training", "time/weight_sync", "time/planning"):
        found.figures[f"{name.removeprefix('time/')}_s"] = sum(column(rows, name))
    found.figures["engine_start_s"] = sum(column(rows, "time/engine_start"))


def two_gpus(place: Place, found: Found) -> None:
    place.tests(
        found,
        "tests/engines/test_vllm_gpu.py",
        "tests/strategies/test_on_device.py",
        *("-k", "(two_ranks or replica) and not cpu"),
    )


ITEMS = {
    1: Item(
        "driver, torch, vLLM, flash attention",
        120,
        "Update the driver, or make .venv anew: make venv REQUIREMENTS=requirements/cuda.txt.",
        environment,
    ),
    2: Item(
        "log-probs, gradients and GVM's norms in bf16-mixed against float32 on the CPU",
        180,
        "Train with trainer.precision=32-true meanwhile, and report the figures.",
        numerics,
    ),
    3: Item(
        "vLLM alone: sleep levels, CUDA graphs, seeds, log-probs after every sync",
        300,
        "Take engine=transformers, or engine.sleep_level=0 and engine.enforce_eager=true, whichever"
        " of the tests fail.",
        vllm_alone,
    ),
    4: Item(
        "six steps of the tiny policy, weights compared at every sync",
        240,
        "Take engine.sleep_level=0 or engine.enforce_eager=true, whichever mends the gap.",
        tiny_run,
    ),
    5: Item(
        "the same, killed after three steps and resumed",
        300,
        "If there is too little free memory at the second start, lower engine.gpu_memory_share.",
        killed_run,
    ),
    6: Item(
        "vLLM drawing from 1.5B: start, sync, tokens a second",
        400,
        "Look at vllm.log; lower engine.gpu_memory_share or engine.max_num_seqs.",
        engine_speed,
    ),
    7: Item(
        "an update of 1.5B on 512 recorded rollouts: tokens a second, peak memory",
        600,
        "Lower the tokens of a microbatch, or keep to the way that passes.",
        update_speed,
    ),
    8: Item(
        "GVM's norms of 64 pilots of 1.5B",
        180,
        "Lower algo.tokens_per_microbatch; sampler=uniform plans without them.",
        norms,
    ),
    9: Item(
        "DeepSpeed ZeRO-2, ZeRO-3 and FSDP over the GPU's own exchange: update, checkpoint, export",
        360,
        "Take the strategy that passes; strategy=ddp needs none of them.",
        strategies,
    ),
    10: Item(
        "a checkpoint of 1.5B, a file of 8,192 rollouts",
        180,
        "Look for room and speed of the disk; raise the checkpoints' interval.",
        checkpoint,
    ),
    11: Item(
        "a whole run of 1.5B with GVM, two epochs: memory by phase",
        400,
        "Lower engine.gpu_memory_share.",
        small_run,
    ),
    12: Item(
        "two ranks: DDP, one engine over both, weights by nccl, 1 GB of objects",
        300,
        "Train on one GPU meanwhile, and report which test failed.",
        two_gpus,
        gpus=2,
    ),
}
