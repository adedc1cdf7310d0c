"""What a run will take of memory: formulas against counted tensors, and what is refused."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rlzoo.bench._live import Live
from rlzoo.engines.shapes import empty_model
from rlzoo.errors import UserError
from rlzoo.launch import facts, fitting, forecast
from rlzoo.launch.forecast import Forecast
from rlzoo.models import memory
from rlzoo.models.memory import saved_by_layer, shape_of
from rlzoo.models.packed import packed_hidden, settle_attention
from tests import warm
from tests.test_configs import compose

ROOT = Path(__file__).parents[1]
GPU = 85.0e9  # bytes of a GPU of 80 GB
LARGE: dict[str, PretrainedConfig] = {  # of config.json
    "1.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}
SIZES = {"1.5B": 1.54e9, "7B": 7.62e9, "70B": 70.6e9}  # parameters, as their makers say


@pytest.fixture(scope="module")
def large() -> dict[str, PreTrainedModel]:
    """Without weights."""
    return {name: empty_model(config) for name, config in LARGE.items()}


def foreseen(model: PreTrainedModel, *overrides: str, total: float = GPU) -> Forecast:
    cfg: DictConfig = compose("model=hf", "model.path=somewhere", *overrides)
    return forecast.forecast(facts.facts_of(cfg, model, total, vllm=facts.on_gpu(cfg)))


# --- formulas against tensors --------------------------------------------------------------------

SMALL = {
    "qwen2": Qwen2Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
}


def saved_bytes(config: PretrainedConfig, layers: int, arithmetic: str, packed: bool) -> int:
    """Of the tensors that a forward pass over four rows of 60 tokens keeps, weights left out."""
    config.num_hidden_layers = layers
    half = torch.bfloat16 if arithmetic == "half" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=half, attn_implementation="sdpa")
    settle_attention(model, "packed" if packed else "sdpa", "here")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:  # nor copies of them
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 64, (4, 60))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), cast:
        if packed:
            packed_hidden(model, ids, torch.full((4,), 60))
        else:
            model.model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arithmetic", ["float32", "autocast", "half"])
@pytest.mark.parametrize("family", SMALL)
def test_a_layer_keeps_what_the_formula_says(family, arithmetic, packed):
    config = SMALL[family]
    two, three = (saved_bytes(config, n, arithmetic, packed) for n in (2, 3))
    formula = saved_by_layer(shape_of(config, empty_model(config)), arithmetic, joined=packed)
    assert (three - two) / (4 * 60) == pytest.approx(formula, rel=0.03)


def test_at_real_widths_a_layer_keeps_63_to_77_bytes_a_token_and_width(large):
    found = {
        (name, kind): saved_by_layer(shape_of(LARGE[name], large[name]), kind)
        / LARGE[name].hidden_size
        for name in ("1.5B", "7B")
        for kind in ("autocast", "half")
    }
    assert {key: round(value) for key, value in found.items()} == {
        ("1.5B", "autocast"): 77,
        ("1.5B", "half"): 67,
        ("7B", "autocast"): 73,
        ("7B", "half"): 63,
    }


def test_the_parameters_are_those_of_the_configuration(large):
    for name, model in large.items():
        shape = shape_of(LARGE[name], model)
        assert shape.parameters == pytest.approx(SIZES[name], rel=0.005)
        assert shape.tied == (name == "1.5B")


def test_what_lives_is_counted_once_and_until_it_is_freed():
    with Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert live.now == 4000
        c = a + 1
        del a
        assert live.now == 8000
        del b, c
    assert live.now == 0 and live.peak == 8000


# --- what is settled -----------------------------------------------------------------------------


def test_a_microbatch_is_as_large_as_fits_and_holds_the_longest_sequence(large):
    gpus = ("trainer=gpu8", "strategy=deepspeed_zero2")
    found = foreseen(large["7B"], *gpus)
    room = forecast.countable(found.facts)
    assert found.tokens % 1024 == 0 and 4096 < found.tokens <= 65_536
    assert found.phases["training"] <= room
    more = foreseen(large["7B"], *gpus, f"algo.tokens_per_microbatch={found.tokens + 1024}")
    assert found.tokens == 65_536 or more.phases["training"] > room
    longest = foreseen(large["7B"], "trainer=gpu", total=20e9)  # fits not at all
    assert longest.tokens == 1024 + 3072
    with pytest.raises(UserError):
        fitting.check(longest)


def test_the_engine_gets_what_the_trainer_leaves(large):
    one = foreseen(large["1.5B"], "trainer=gpu")
    ppo = foreseen(large["1.5B"], "trainer=gpu", "algo=ppo")
    assert one.share is not None and ppo.share is not None and ppo.share < one.share
    for found in (one, ppo):
        fitting.check(found)
        assert sum(found.syncing.values()) <= forecast.countable(found.facts)
    awake = foreseen(large["1.5B"], "trainer=gpu", "engine.vllm.sleep_level=0")
    assert awake.share is not None and awake.share < one.share
    assert awake.training["engine"] == awake.share * GPU and one.training["engine"] == 0
    fitting.check(awake)


def test_the_reference_and_the_critic_count(large):
    plain, kl = (foreseen(large["1.5B"], "trainer=gpu", f"algo.kl_coef={c}") for c in (0.0, 0.1))
    assert plain.training["reference"] == 0
    shape = kl.facts.shape
    halved = shape.linear  # the head is the embedding, which autocast leaves in float32
    assert kl.training["reference"] == 2 * halved + 4 * (shape.parameters - halved)
    dpo = foreseen(large["1.5B"], "trainer=gpu", "algo=iterative_dpo", "algo.reference=initial")
    assert dpo.training["reference"] == kl.training["reference"]
    lora = foreseen(large["1.5B"], "trainer=gpu", "algo.kl_coef=0.1", "model.lora={r: 16}")
    assert lora.training["reference"] == 0 and lora.training["optimizer"] < 0.2e9
    ppo = foreseen(large["1.5B"], "trainer=gpu", "algo=ppo")
    assert ppo.training["optimizer"] == 2 * plain.training["optimizer"]


# --- what is refused -----------------------------------------------------------------------------

REFUSED = {
    ("7B", "trainer=gpu"): [
        "An update does not fit",
        "weights 30.5",
        "model.lora={r: 16, alpha: 32}",
    ],
    ("7B", "trainer=gpu8"): ["An update does not fit", "strategy=deepspeed_zero2"],
    (
        "1.5B",
        "trainer=gpu",
        "model.gradient_checkpointing=false",
        "algo.tokens_per_microbatch=16384",
    ): ["An update does not fit", "algo.tokens_per_microbatch=auto", "gradient_checkpointing=true"],
    ("1.5B", "trainer=gpu", "engine=vllm", "engine.gpu_memory_share=0.8"): [
        "Sampling does not fit",
        "engine.gpu_memory_share=auto",
    ],
    (
        "7B",
        "trainer=gpu8",
        "strategy=deepspeed_zero3",
        "engine=vllm",
        "engine.gpu_memory_share=0.1",
    ): [
        "engine.gpu_memory_share=0.1 is 8.5 GB, but the engine needs",
        "Raise it to",
    ],
    (
        "70B",
        "trainer=gpu8",
        "trainer.num_nodes=8",
        "strategy=deepspeed_zero3",
    ): ["Sampling does not fit: the engine needs 145.", "engine.vllm.tensor_parallel=8"],
    (
        "1.5B",
        "trainer=gpu",
        "model.gradient_checkpointing=false",
        "algo.tokens_per_microbatch=1024",
        "datamodule.max_response_tokens=16384",
    ): ["An update does not fit", "gradient_checkpointing=true"],
}


@pytest.mark.parametrize("given", REFUSED, ids="_".join)
def test_what_cannot_fit_is_refused_with_the_number_and_what_would(given, large):
    name, *overrides = given
    with pytest.raises(UserError) as refused:
        fitting.check(foreseen(large[name], *overrides))
    for words in REFUSED[given]:
        assert words in str(refused.value), str(refused.value)


def test_rows_are_as_many_as_fit_at_their_longest(large):
    found = foreseen(large["1.5B"], total=100e9)
    engine = found.facts.engine
    assert found.rows is not None and 1 < found.rows < forecast.MOST_ROWS
    room = forecast.usable(found.facts) - sum(found.sampling.values()) + 0.7e9
    assert 0 <= room < engine.row + 4 * found.facts.shape.largest
    many = "engine.transformers.max_rows=4096"
    with pytest.raises(UserError, match="engine.transformers.max_rows=auto"):
        fitting.check(foreseen(large["1.5B"], many, total=100e9))


def test_a_share_is_not_offered_that_the_trainer_leaves_no_room_for(large):
    nodes = ("trainer=gpu8", "trainer.num_nodes=8", "strategy=deepspeed_zero3")
    given = ("engine=vllm", "engine.gpu_memory_share=0.5")
    with pytest.raises(UserError) as refused:
        fitting.check(foreseen(large["70B"], *nodes, *given))
    assert "Raise it to" not in str(refused.value)
    assert "engine.tensor_parallel=8 engine.gpu_memory_share=auto" in str(refused.value)


def test_a_microbatch_has_room_for_the_longest_that_is_never_split(large):
    small = ("trainer=gpu", "algo.tokens_per_microbatch=1024")
    longer, as_long = (
        foreseen(large["1.5B"], "trainer=gpu", f"algo.tokens_per_microbatch={n}")
        for n in (1024, 4096)
    )
    assert longer.training == as_long.training and longer.tokens == 1024
    assert "1,024 tokens, up to 4,096" in forecast.line(longer)
    pairs = foreseen(large["1.5B"], *small, "algo=iterative_dpo")
    assert pairs.largest == 2 * 4096


def test_on_a_cpu_a_quarter_of_the_memory_is_left_free(large):
    found = foreseen(large["1.5B"], total=100e9)
    assert 0.7 * 100e9 < max(found.phases.values()) <= 0.75 * 100e9


@pytest.mark.parametrize(
    "engine",
    [
        ("engine=transformers_process", "pipeline=one_step", "algo.tis_cap=2.0"),
        ("engine=transformers", "engine.device=cpu"),
    ],
)
def test_an_engine_on_the_cpu_takes_the_machine_s_memory_alone(engine, large, monkeypatch):
    monkeypatch.setattr(facts, "machine_bytes", lambda: 64 * 10**9)
    found = foreseen(large["1.5B"], "trainer=gpu", *engine)
    one = found.facts.engine
    assert not found.sampling and found.training["engine"] == 0
    assert found.rows is not None and one.elsewhere is not None
    assert 1 < found.rows < forecast.MOST_ROWS
    assert 0 <= one.elsewhere - one.fixed - found.rows * one.row < one.row
    assert one.elsewhere < 0.75 * 64e9


@pytest.mark.parametrize(
    ("given", "moments"),
    [
        ("torch.optim.SGD", 0),
        ("bitsandbytes.optim.AdamW8bit", 2),
        ("torch.optim.AdamW", 8),
    ],
)
def test_an_optimizer_has_its_own_moments(given, moments, large):
    gpu = ("trainer=gpu", f"algo.optimizer._target_={given}")
    found = foreseen(large["1.5B"], *gpu)
    assert found.training["optimizer"] == moments * found.facts.shape.parameters


def test_nothing_is_refused_for_an_optimizer_that_is_unknown(large):
    found = foreseen(large["7B"], "trainer=gpu", "algo.optimizer._target_=mine.Small")
    fitting.check(found)
    assert "as if AdamW's" in forecast.line(found)


def test_64_true_is_twice_32_true(large):
    fixed = "algo.tokens_per_microbatch=8192"
    wide, plain = (
        foreseen(large["1.5B"], fixed, f"trainer.precision={p}") for p in ("64-true", "32-true")
    )
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert wide.training[part] == 2 * plain.training[part]
    assert wide.facts.engine.weights == 2 * plain.facts.engine.weights


def test_rows_are_settled_for_the_engine_that_stands_in_for_vllm(large, monkeypatch):
    monkeypatch.setattr(fitting, "empty_model", lambda *given: large["1.5B"])
    monkeypatch.setattr(fitting, "load_config", lambda *given: None)
    monkeypatch.setattr(fitting, "why_not_vllm", lambda: None)
    monkeypatch.setattr(fitting, "device_bytes", lambda cfg: GPU)
    cfg = compose("model=hf", "model.path=somewhere", "trainer=gpu")
    found = fitting.settle(cfg)
    assert cfg.engine.vllm.gpu_memory_share == found.share and found.rows is None
    own = foreseen(large["1.5B"], "trainer=gpu", "engine=transformers")
    assert cfg.engine.transformers.max_rows == own.rows and 1 < own.rows < 512


def test_a_cpu_tells_its_largest_phase_alone(large):
    found = foreseen(large["1.5B"], total=100e9)
    told = forecast.compared(found, {"sampling": 5e9, "training": 60e9, "planning": 60.1e9})
    assert "sampling 5.0 (" in told and "training" not in told and "planning" not in told


def test_a_cpu_refuses_what_is_far_over_alone(large):
    rows = "engine.transformers.max_rows=1"
    near = foreseen(large["1.5B"], rows, total=40e9)
    assert max(near.phases.values()) > near.facts.total
    fitting.check(near)
    with pytest.raises(UserError, match="of the machine's memory"):
        fitting.check(foreseen(large["1.5B"], rows, total=10e9))


# --- the pages' commands -------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    """Those that start a run on GPUs."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "rlzoo.run" in line and "trainer=gpu" in line]


def overrides_of(command: str) -> list[str]:
    words = shlex.split(command.partition(" #")[0])
    words = words[words.index("rlzoo.run") + 1 :]
    return [word for word in words if word not in ("...", "data=...") and "=" in word]


ON_GPUS = [(page, line) for page in ("docs/scale.md", "README.md") for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), ON_GPUS, ids=range(len(ON_GPUS)))
def test_every_command_of_the_pages_fits_gpus_of_80_gb(page, line, large):
    given = overrides_of(line)
    nodes = [word for word in given if "num_nodes=8" in word]
    name = "70B" if nodes else "7B" if "gpu8" in line else "1.5B"
    given = [word for word in given if not word.startswith(("model.path=", "data.path="))]
    found = foreseen(large[name], *given)
    fitting.check(found)
    if page == "docs/scale.md":
        assert forecast.line(found) in (ROOT / page).read_text(), forecast.line(found)


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_says_its_forecast_and_puts_what_was_measured_beside_it(tmp_path: Path):
    said = warm.passed(tmp_path)
    assert "Memory of a process on paper" in said and "Memory of the first step" in said
    told = json.loads((tmp_path / "forecast.json").read_text())
    assert told["tokens_per_microbatch"] == 16_384 and told["max_rows"] == 1024
    config = (tmp_path / "config.yaml").read_text()
    assert "tokens_per_microbatch: 16384" in config and "max_rows: 1024" in config
    assert told["measured"].keys() == {"training", "sampling", "syncing", "planning"}
    assert all(size > 0.1e9 for size in told["measured"].values())
    assert told["on_paper"].keys() == {"training", "sampling", "syncing"}


def test_only_what_says_auto_is_settled():
    cfg = compose("algo.tokens_per_microbatch=2048", "engine.transformers.max_rows=64")
    with contextlib.suppress(UserError):
        fitting.settle(cfg)
    assert cfg.algo.tokens_per_microbatch == 2048
    assert cfg.engine.transformers.max_rows == 64
    assert cfg.engine.vllm.gpu_memory_share == "auto"  # there is no GPU to take a share of


def test_sharded_states_are_a_rank_s_part():
    whole, part = (memory.states("zero3", 8000, ranks, half=True) for ranks in (1, 8))
    assert all(part[name] * 8 == whole[name] for name in memory.PARTS)
