import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlzoo.data.prompts import FilePrompts
from rlzoo.data.templates import PromptTemplate, names_read
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
    (record,) = caplog.records
    assert "2 of 4" in record.getMessage() and "'p3'" in record.getMessage()


def test_dropping_every_prompt_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="No prompt is left.*max_prompt_tokens=5"):
        PromptTemplate().encode(prompts("2 + 2?"), tokenizer, 5, on_too_long="drop")


def test_a_tokenizer_without_chat_template_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        PromptTemplate().encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)


def test_a_tokenizer_without_eos_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        PromptTemplate().encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)


def test_a_chat_template_that_refuses_a_system_turn_is_an_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHATML
    PromptTemplate().encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)
    with pytest.raises(UserError, match=r"no system.*data\.template\.system=null"):
        PromptTemplate(system=SYSTEM).encode(prompts("2 + 2?"), tokenizer, 500)


# --- arguments of the chat template

THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"


def rendered(tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    template = PromptTemplate(**options)
    (encoded,) = template.encode(prompts("2 + 2?"), tokenizer, max_prompt_tokens=500)
    return tokenizer.decode(encoded.token_ids)


def test_arguments_reach_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = THINKING
    arguments = OmegaConf.create({"enable_thinking": False})
    assert rendered(tokenizer, arguments=arguments).endswith("assistant\n<no>")
    assert rendered(tokenizer, arguments={"enable_thinking": True}) == rendered(tokenizer)
    assert rendered(tokenizer).endswith("assistant\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"enable_thinkin": False}, "enable_thinkin does nothing.* reads enable_thinking"),
        ({"add_generation_prompt": False}, "is not the chat template's but rlzoo's"),
        ({"continue_final_message": True}, "is not the chat template's but rlzoo's"),
        ({"role": "user"}, "arguments.role does nothing"),
    ],
)
def test_an_argument_that_the_chat_template_never_reads_is_refused_with_those_it_does(
    tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], named: str
) -> None:
    tokenizer.chat_template = "{# enable_thinkin: see role #}" + THINKING
    with pytest.raises(UserError, match=named):
        rendered(tokenizer, arguments=arguments)


def test_names_that_a_template_reads_are_found_whatever_it_does_with_them() -> None:
    source = (
        "{%- if tools is defined %}{% set n = tools %}{% endif %}"
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{% set effort = effort | default('low') %}"
        "{% macro show(x) %}{{ x }}{{ depth }}{% endmacro %}"
        "{% for message in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ show(n) }}{% endgeneration %}{% endfor %}{{ date_string }}{{ effort }}"
    )
    read = {"tools", "date_string", "strftime_now", "effort", "depth", "messages"}
    assert names_read(source) - {"n"} == read


def test_one_of_several_chat_templates_is_chosen_by_name(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = {"one": CHATML, "two": CHATML + "two"}
    with pytest.raises(UserError, match=r"several chat templates, \['one', 'two'\]"):
        rendered(tokenizer)
    assert rendered(tokenizer, arguments={"chat_template": "two"}).endswith("two")
    tokenizer.chat_template |= {"default": CHATML + "default"}
    assert rendered(tokenizer).endswith("default")


def test_a_template_that_asks_for_the_date_gets_the_same_on_every_day(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    today = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    tokenizer.chat_template = CHATML + today + "{% endif %}{{ date_string }}"
    assert rendered(tokenizer).endswith("26 Jul 2024")
    assert rendered(tokenizer, date="2025-01-31").endswith("31 Jan 2025")
    assert rendered(tokenizer, arguments={"date_string": "now"}).endswith("now")
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match="data.template.date=2025-01-31 does nothing"):
        rendered(tokenizer, date="2025-01-31")
    with pytest.raises(UserError, match="a date as YYYY-MM-DD, got '31.1.'"):
        rendered(tokenizer, date="31.1.")


# --- what a chat template may do wrong


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ messages[0].content }}", "leaves out the user turn of prompt 'p0'"),
        ("{{ messages[-1].content }}", "leaves out the system turn.*data.template.system=null"),
        ("{{ messages[-1].content[:20] }}{{ messages[0].content }}", "leaves out the user turn"),
        ("{{ messages[0].parts + 1 }}", "refused prompt 'p0'"),
        ("{% if %}", "not valid Jinja"),
    ],
)
def test_a_template_that_leaves_a_turn_out_is_refused(
    tokenizer: PreTrainedTokenizerFast, source: str, named: str
) -> None:
    tokenizer.chat_template = source
    template = PromptTemplate(system="Be brief.")
    with pytest.raises(UserError, match=named):
        template.encode(prompts("2 + 2 is what, do you think?"), tokenizer, 500)


def test_every_prompt_is_looked_at_and_spaces_do_not_count(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ messages[-1].content | replace('\n', ' ') | trim }}"
    PromptTemplate(user_suffix="  ").encode(prompts("2 +\n2?", "3"), tokenizer, 500)
    tokenizer.chat_template = "{{ messages[-1].content[:6] }}"
    with pytest.raises(UserError, match="user turn of prompt 'p1'"):
        PromptTemplate().encode(prompts("2 + 2?", "3 + 3 = ?"), tokenizer, 500)


def test_a_prompt_that_ends_as_a_turn_or_begins_twice_is_warned_of_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    template = PromptTemplate()
    template.encode(prompts("2?"), tokenizer, 500)
    assert caplog.text == ""
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}<|im_end|>\n"
    template = PromptTemplate()
    for _ in range(2):
        template.encode(prompts("2?"), tokenizer, 500)
    assert caplog.text.count("opens no turn for the assistant") == 1
    assert caplog.text.count("begins prompts with two '<|im_start|>'") == 1


def test_a_chat_is_rendered_as_it_is_and_says_what_is_not_added(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    said = (("user", "a"), ("assistant", "b"), ("user", "c"))
    turns = tuple({"role": role, "content": content} for role, content in said)
    chat = dataclasses.replace(prompts("q")[0], turns=turns)
    (encoded,) = PromptTemplate(system="s", user_suffix="!").encode([chat], tokenizer, 500)
    assert tokenizer.decode(encoded.token_ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "data.template.system, user_prefix and user_suffix are not added" in caplog.text


def test_prompts_are_tokenised_together_as_they_are_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    many = prompts(*(f"{i} + {i * i}?" for i in range(1500)))
    together = PromptTemplate(system="s").encode(many, tokenizer, 500)
    turns = [PromptTemplate(system="s").turns(p.question) for p in many[::300]]
    alone = [
        tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False)
        for t in turns
    ]
    assert [list(p.token_ids) for p in together[::300]] == alone
    assert len(together) == 1500


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
