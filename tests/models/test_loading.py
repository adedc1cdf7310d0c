"""Every weight of a model directory is accounted for, or it is refused by their names."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlzoo.engines.transformers import TransformersEngine
from rlzoo.errors import UserError
from rlzoo.models.lora import whole_weights_of
from rlzoo.models.policy import eos_token_ids, load_policy
from tests.conftest import make_tiny_model
from tests.models.families import saved

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def refusal(path: Path | str, **options) -> str:
    with pytest.raises(UserError) as refused:
        load_policy(str(path), **options)
    return str(refused.value)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Sets weights in a directory's file; None removes one. Dots are written as two underscores."""
    weights = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_head_that_no_file_has_is_not_made_up(folder):
    change(folder, lm_head__weight=None)
    assert "lacks lm_head.weight" in refusal(folder)


def test_a_tied_head_is_not_missing(folder):
    change(folder, lm_head__weight=None)
    configure(folder, tie_word_embeddings=True)
    policy = load_policy(str(folder))
    assert policy.lm_head.weight is policy.model.embed_tokens.weight


def test_a_head_of_its_own_in_a_tied_model_is_refused(folder):
    configure(folder, tie_word_embeddings=True)  # transformers would leave the two apart
    said = refusal(folder)
    assert "another lm_head.weight than model.embed_tokens.weight" in said
    assert "tie_word_embeddings to false" in said
    change(folder, lm_head__weight=load_file(folder / WEIGHTS)["model.embed_tokens.weight"].clone())
    load_policy(str(folder))  # both are there, and equal


def test_buffers_of_old_checkpoints_are_not_left_over(folder):
    rotary = "model__layers__0__self_attn__rotary_emb__"
    change(folder, **{f"{rotary}{name}": torch.zeros(4) for name in ("inv_freq", "cos_cached")})
    head = load_policy(str(folder)).lm_head.weight
    assert torch.equal(head, load_file(folder / WEIGHTS)["lm_head.weight"])


def test_a_reward_models_weights_are_named(folder):
    change(folder, lm_head__weight=None, score__weight=torch.zeros(1, 32))
    said = refusal(folder)
    assert "lm_head.weight" in said and "score.weight" in said


def test_weights_of_another_vocabulary_are_refused(folder):
    change(folder, lm_head__weight=torch.zeros(70, 32))
    said = refusal(folder)
    assert "lm_head.weight (70, 32) for (64, 32)" in said and "lacks" not in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    weight = load_file(folder / WEIGHTS)["model.norm.weight"]
    weight[3] = value
    change(folder, model__norm__weight=weight)
    assert "NaN or infinite: model.norm.weight" in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 2000])
def test_a_file_cut_short_is_named(folder, size):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:size])
    assert "cut short" in refusal(folder)


def test_a_shard_that_is_not_there_is_named(folder):
    make_model = load_policy(str(folder))
    make_model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    shard = sorted((folder / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(folder / "sharded")


def test_old_weight_files_are_read(folder):
    policy = load_policy(str(folder))
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    again = load_policy(str(folder))
    for one, other in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_directory_that_is_no_causal_model_says_what_it_is(folder, tmp_path):
    assert "quantised" in refusal(quantised(folder))
    (folder / "config.json").unlink()
    assert "without config.json" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapters" in refusal(folder)
    assert "no causal language model" in refusal(encoder_decoder(tmp_path / "t5"))


def quantised(folder: Path) -> Path:
    other = Path(shutil.copytree(folder, folder.with_name("quantised")))
    configure(other, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return other


def encoder_decoder(folder: Path) -> Path:
    folder.mkdir()
    config = {"model_type": "t5", "d_model": 8, "num_layers": 1, "architectures": ["T5"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_attention_that_a_family_has_not_is_named_by_our_key(folder, tmp_path):
    said = refusal(saved(tmp_path, "gpt_oss"), attention="sdpa")
    assert "model.attention=eager" in said and "attn_implementation" not in said
    assert "model.attention=eager" in refusal(folder, attention="flash_attention_2")
    configure(folder, num_attention_heads=3)  # a message about heads is none about attention
    assert "model.attention" not in refusal(folder)


def test_an_attention_without_a_backward_pass_here_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "model.attention=flex_attention" in refusal(folder, attention="flex_attention")


def test_float16_weights_are_not_trained(folder):
    assert "model.dtype=float16" in refusal(folder, dtype="float16")


def test_an_engine_holds_the_frozen_half_of_a_float16_policy_with_adapters(folder):
    policy = functools.partial(load_policy, str(folder), dtype="float16", lora={"r": 2})
    engine = TransformersEngine(policy, [0], 1)
    engine.load_weights(whole_weights_of(policy()), 0)
    assert engine.dtype == "float16"


def test_a_padding_token_outside_of_the_embedding_names_its_key(folder):
    configure(folder, pad_token_id=64)
    assert "pad_token_id in its config.json must be below vocab_size" in refusal(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"eos_token_id": ["5"]}', "eos_token_id=['5']"),
        ('{"eos_token_id": 5.0}', "eos_token_id=[5.0]"),
    ],
)
def test_end_tokens_that_cannot_be_read_are_not_left_out(folder, text, words):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match="generation_config.json") as refused:
        eos_token_ids(str(folder), SimpleNamespace(eos_token_id=0))
    assert words in str(refused.value)


@pytest.mark.parametrize("found, expected", [(None, [0]), ([5, 3], [0, 3, 5]), (5, [0, 5])])
def test_end_tokens_are_the_tokenizers_and_the_generation_configs(folder, found, expected):
    # transformers would refuse the file, not knowing such a max_new_tokens
    text = json.dumps({"eos_token_id": found, "max_new_tokens": -1})
    (folder / "generation_config.json").write_text(text)
    assert eos_token_ids(str(folder), SimpleNamespace(eos_token_id=0)) == expected
    (folder / "generation_config.json").unlink()
    assert eos_token_ids(str(folder), SimpleNamespace(eos_token_id=0)) == [0]


def test_a_home_directory_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    head = load_policy("~/model", init_from="~/model").lm_head.weight
    assert torch.equal(head, load_file(folder / WEIGHTS)["lm_head.weight"])


# --- init_from ------------------------------------------------------------------------------------


def test_init_from_is_held_to_the_same(original, folder):
    change(folder, lm_head__weight=None)
    said = refusal(original, init_from=str(folder))
    assert "init_from" in said and "lm_head.weight" in said


def test_init_from_another_architecture_is_refused(original, tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "qwen")
    assert "Qwen2ForCausalLM" in refusal(original, init_from=str(tmp_path / "qwen"))


def test_init_from_another_size_names_the_weights(original, tmp_path):
    other = saved(tmp_path, "llama", intermediate_size=40)
    said = refusal(original, init_from=str(other))
    assert "has another shape of" in said and "mlp.down_proj.weight" in said


def test_an_untied_head_is_not_lost_in_a_tied_model(tmp_path):
    tied, untied = (saved(tmp_path, "llama", tie_word_embeddings=tie) for tie in (True, False))
    assert "lm_head.weight" in refusal(tied, init_from=str(untied))
    policy = load_policy(str(untied), init_from=str(tied))
    assert torch.equal(policy.lm_head.weight, policy.model.embed_tokens.weight)


def test_a_file_that_is_no_checkpoint_starts_nothing(original, tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(b"PK")
    torch.save([1], tmp_path / "other.ckpt")
    for name in ("cut.ckpt", "other.ckpt"):
        assert f"{name} is no checkpoint" in refusal(original, init_from=str(tmp_path / name))


def test_a_checkpoint_with_nan_starts_nothing(original, tmp_path):
    state = {f"policy.{name}": p for name, p in load_policy(str(original)).state_dict().items()}
    state["policy.lm_head.weight"] = torch.full((64, 32), torch.nan)
    torch.save({"state_dict": state, "callbacks": {}}, tmp_path / "run.ckpt")
    assert "NaN or infinite: lm_head.weight" in refusal(original, init_from=tmp_path / "run.ckpt")
