import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 40
torch.set_num_threads(1)  # what is computed here is so small that a second thread costs more


def make_tiny_model(
    seed: int = 0, tied: bool = False, spread: float = 0.3, width: int = 32
) -> Qwen2ForCausalLM:
    """A random two-layer policy; at the default spread of weights its outputs are far from uniform.
    vLLM's CPU kernels take heads of 32 dimensions, so a width of 64."""
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
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def tiny_model() -> Qwen2ForCausalLM:
    return make_tiny_model()
