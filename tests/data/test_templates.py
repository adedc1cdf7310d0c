import logging
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlzoo.data.prompts import FilePrompts
from rlzoo.data.templates import PromptTemplate
from rlzoo.errors import UserError
from rlzoo.types import Prompt

CONF = Path(__file__).parents[2] / "conf" / "data"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
SUFFIX = r" Let's think step by step and output the final answer within \boxed{}."


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML's two marks, and its template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def prompts(*questions: str) -> list[Prompt]:
    return [
        Prompt(id=f"p{number}", question=question, answer="4", solution="s", tags={"level": 1})
        for number, question in enumerate(questions)
    ]


def test_the_papers_template_is_rendered_with_the_assistants_turn_opened(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = PromptTemplate(system=SYSTEM, user_suffix=SUFFIX, user_prefix="Q: ")
    (encoded,) = template.encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)
    assert tokenizer.decode(encoded.token_ids) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\nQ: 2 + 2?{SUFFIX}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all(type(token_id) is int for token_id in encoded.token_ids)


def test_the_default_template_is_the_bare_question(tokenizer: PreTrainedTokenizerFast) -> None:
    (encoded,) = PromptTemplate().encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)
    text = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.token_ids) == text


def test_encoding_changes_nothing_but_the_token_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    before = prompts("2 + 2?", "3 + 1?")
    after = PromptTemplate(user_suffix="!").encode(before, tokenizer, max_prompt_tokens=500)
    assert [p.token_ids for p in before] == [(), ()]
    for old, new in zip(before, after, strict=True):
        assert {**vars(new), "token_ids": ()} == vars(old)


def test_a_prompt_at_the_limit_passes_and_one_token_more_is_an_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = PromptTemplate()
    (encoded,) = template.encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)
    length = len(encoded.token_ids)
    template.encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=length)
    with pytest.raises(UserError) as caught:
        template.encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=length - 1)
    message = str(caught.value)
    assert f"'p0' is {length} tokens" in message
    assert f"max_prompt_tokens={length - 1}" in message and "on_too_long=drop" in message


def test_dropped_prompts_are_counted_and_reported_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    template = PromptTemplate()
    mixed = prompts("2 + 2?", "9" * 200, "3 + 1?", "9" * 300)
    with caplog.at_level(logging.WARNING):
        kept = template.encode(mixed, tokenizer, max_prompt_tokens=100, on_too_long="drop")
    assert [p.id for p in kept] == ["p0", "p2"]
    assert template.num_dropped == 2
    (record,) = caplog.records
    assert "2 of 4" in record.getMessage() and "'p3'" in record.getMessage()


def test_dropping_every_prompt_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="No prompt is left.*max_prompt_tokens=5"):
        PromptTemplate().encode(prompts("2 + 2?"), tokenizer, 5, on_too_long="drop")


def test_an_unknown_on_too_long_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="on_too_long must be error or drop, got 'cut'"):
        PromptTemplate().encode(prompts("2 + 2?"), tokenizer, 500, on_too_long="cut")


def test_a_tokenizer_without_chat_template_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        PromptTemplate().encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)


def test_a_tokenizer_without_eos_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        PromptTemplate().encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)


def test_a_chat_template_that_refuses_a_system_turn_is_an_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHATML
    PromptTemplate().encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)
    with pytest.raises(UserError, match=r"no system.*data\.template\.system=null"):
        PromptTemplate(system=SYSTEM).encode(prompts("2 + 2?"), tokenizer, 500)


@pytest.mark.parametrize("name", ["gsm8k", "jsonl", "parquet"])
def test_file_sources_carry_the_papers_template(name: str) -> None:
    source = instantiate(OmegaConf.load(CONF / f"{name}.yaml"), path="train.jsonl")
    assert isinstance(source, FilePrompts)
    assert (source.template.system, source.template.user_suffix) == (SYSTEM, SUFFIX)
    assert source.file_format == ("parquet" if name == "parquet" else "jsonl")


def test_arithmetic_carries_the_bare_template() -> None:
    source = instantiate(OmegaConf.load(CONF / "arithmetic.yaml"))
    assert vars(source.template) == vars(PromptTemplate())
    assert source.counts == {"train": 4096, "val": 256, "test": 512}
