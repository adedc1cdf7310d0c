from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # pytest's own process, which runs no tests, does without
    from transformers import Qwen2ForCausalLM

VOCABULARY = 40
settings.register_profile("same", derandomize=True, deadline=None)  # on a busy machine, too
settings.load_profile("same")
DEAREST = (  # files of ten seconds and more, so that the two processes end together
    "test_runs.py",
    "test_resume.py",
    "test_steps.py",
    "test_rank_failures.py",
    "test_multinode.py",
    "test_vllm_server.py",
    "test_vllm_runs.py",
    "test_verifier.py",
    "test_ends.py",
    "test_resume_changes.py",
    "test_vllm_ranks.py",
    "test_idle_options.py",
    "test_slurm.py",
    "test_configs.py",
    "test_lora.py",
    "test_two_ranks.py",
)


def pytest_collection_finish() -> None:
    """No later collection of garbage looks at what has been imported."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Dear files come first, whole."""
    place = {name: i for i, name in enumerate(DEAREST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """What is computed here is so small that a second thread costs more."""
    import torch

    torch.set_num_threads(1)


def make_tiny_model(
    seed: int = 0,
    tied: bool = False,
    spread: float = 0.3,
    width: int = 32,
    attention: str = "packed",
) -> Qwen2ForCausalLM:
    """A random two-layer policy; at the default spread of weights its outputs are far from uniform.
    vLLM's CPU kernels take heads of 32 dimensions, so a width of 64."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import rlzoo.models.packed  # noqa: F401  # which registers the attention

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation=attention).eval()


@pytest.fixture
def tiny_model() -> Qwen2ForCausalLM:
    return make_tiny_model()
