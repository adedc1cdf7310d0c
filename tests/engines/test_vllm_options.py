"""Settings of engine=vllm that cannot be, refused before vLLM is imported."""

import pytest

from rlzoo.engines.vllm import VLLMEngine
from rlzoo.errors import UserError
from rlzoo.models.loading import TINY
from tests import warm

LENGTHS = {"max_prompt_tokens": 8, "max_response_tokens": 8}


def make(**options: object) -> VLLMEngine:
    return VLLMEngine(str(TINY), [0], **LENGTHS | options)


@pytest.mark.parametrize(
    "name, words",
    [
        ("quantization", "another policy"),
        ("hf_overrides", "another policy"),
        ("speculative_config", "another policy"),
        ("load_format", "rlzoo sets it, and would not work"),
        ("logprobs_mode", "rlzoo sets it, and would not work"),
        ("skip_tokenizer_init", "rlzoo sets it, and would not work"),
        ("enable_prefix_caching", "rlzoo sets it, and would not work"),
        ("model", "take model.path"),
        ("seed", "take seed"),
        ("tensor-parallel-size", "take engine.tensor_parallel"),
        ("gpu_memory_utilization", "take engine.gpu_memory_share"),
    ],
)
def test_an_option_that_rlzoo_relies_on_is_refused_by_name(name, words):
    with pytest.raises(UserError, match=f"engine.options.{name}: .*{words}"):
        make(options={name: 1})


def test_every_argument_that_rlzoo_passes_is_refused_as_an_option():
    engine = make()
    for cuda in (False, True):
        engine.cuda = cuda
        for name in engine._arguments().keys() - {"block_size"}:  # a CPU's, free to choose
            with pytest.raises(UserError, match=f"engine.options.{name}"):
                make(options={name: 1})


def test_options_that_change_speed_alone_are_passed_on():
    assert make(options={"max_num_batched_tokens": 4096})._arguments()["max_num_batched_tokens"]


@pytest.mark.parametrize("size, processes, fits", [(2, 8, True), (3, 8, False), (2, 1, False)])
def test_engines_share_out_the_processes_of_a_machine(size, processes, fits):
    if fits:
        make(tensor_parallel=size, processes=processes)
    else:
        with pytest.raises(UserError, match=f"engine.tensor_parallel={size} .*the {processes} "):
            make(tensor_parallel=size, processes=processes)


def test_the_command_line_says_the_same(tmp_path):
    told = warm.refused(tmp_path / "one", "engine=vllm", "+engine.options.quantization=fp8")
    assert "engine.options.quantization" in told
    told = warm.refused(tmp_path / "two", "engine=vllm", "engine.tensor_parallel=2")
    assert "engine.tensor_parallel=2" in told and "trainer.devices" in told


@pytest.mark.parametrize("size, fits", [(1, True), (4, True), (3, False), (8, False)])
def test_engines_share_out_the_heads_of_the_model(size, fits):
    if fits:  # the tiny policy has four
        make(tensor_parallel=size, processes=size)
    else:
        with pytest.raises(UserError, match=f"engine.tensor_parallel={size} .*4 attention heads"):
            make(tensor_parallel=size, processes=size)
