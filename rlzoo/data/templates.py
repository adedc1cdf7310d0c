"""How a question becomes the tokens a policy sees, in pilots, training and evaluation alike."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.meta
from omegaconf import OmegaConf

from rlzoo.errors import UserError
from rlzoo.models.limits import check_tokenizer
from rlzoo.types import Prompt

if TYPE_CHECKING:  # prompts alone, as in the verifier's workers, need not wait for transformers
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ALWAYS_GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}  # and special tokens
CALLABLE = {"raise_exception", "strftime_now", "namespace", "range", "dict", "joiner", "cycler"}
AS_DATE = "2024-07-26"  # what Llama 3's own template falls back to
CHUNK = 1024  # prompts that are tokenised in one call


class PromptTemplate:
    """A system turn and a user turn, rendered with the tokenizer's own chat template.

    A prompt that is a chat already (`Prompt.turns`) is rendered as it is.

    Args:
        system: text of the system turn; None leaves it out (a chat template may add its own then).
        user_suffix, user_prefix: text right after and right before the question, spaces included.
        arguments: what the chat template is given beside the turns, such as
            `enable_thinking: false`; the name of one of several templates as `chat_template`.
        date: today's date for a chat template that asks for it, as YYYY-MM-DD; None is 2024-07-26.
            The day itself would give a run that is resumed tomorrow other prompts.
    """

    def __init__(
        self,
        system: str | None = None,
        user_suffix: str = "",
        user_prefix: str = "",
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        self.system, self.user_suffix, self.user_prefix = system, user_suffix, user_prefix
        given: Any = arguments or {}
        if OmegaConf.is_config(given):
            given = OmegaConf.to_container(given, resolve=True)
        self.arguments, self.date = dict(given), date
        try:
            datetime.date.fromisoformat(date or AS_DATE)
        except (TypeError, ValueError):
            raise UserError(
                f"data.template.date must be null or a date as YYYY-MM-DD, got {date!r}."
            ) from None
        self._known: PreTrainedTokenizerBase | None = None  # looked at once

    def turns(self, question: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        content = f"{self.user_prefix}{question}{self.user_suffix}"
        return [*system, {"role": "user", "content": content}]

    def encode(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        on_too_long: Literal["error", "drop"] = "error",
    ) -> list[Prompt]:
        """The prompts with their `token_ids`, the opening of the assistant's turn included.

        Args:
            prompts: in any order, which is kept.
            tokenizer: of the policy; needs a chat template and an EOS token.
            max_prompt_tokens: tokens of the rendered prompt, at most.
            on_too_long: `error` stops at a longer prompt, `drop` leaves it out and counts it.

        Raises:
            UserError: a tokenizer that cannot render or end a turn, a chat template that does not
                show the question or read the arguments, a prompt over the limit, or none within it.
        """
        if prompts and tokenizer is not self._known:
            check_tokenizer(tokenizer, name_of(tokenizer))
            self.look_over(prompts, tokenizer, self.options(tokenizer))
            self._known = tokenizer
        options = self.options(tokenizer)
        encoded, too_long = [], []
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            texts = [self.render(prompt, tokenizer, options) for prompt in chunk]
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
            for prompt, token_ids in zip(chunk, ids["input_ids"], strict=True):
                if len(token_ids) <= max_prompt_tokens:
                    encoded.append(dataclasses.replace(prompt, token_ids=tuple(token_ids)))
                elif on_too_long == "drop":
                    too_long.append((prompt.id, len(token_ids)))
                else:
                    raise UserError(
                        f"Prompt {prompt.id!r} is {len(token_ids)} tokens long, over"
                        f" datamodule.max_prompt_tokens={max_prompt_tokens}. Raise the limit, or"
                        " leave longer prompts out with datamodule.on_too_long=drop."
                    )
        self.report_too_long(too_long, len(prompts), max_prompt_tokens)
        return encoded

    def report_too_long(
        self, too_long: Sequence[tuple[str, int]], num_prompts: int, max_prompt_tokens: int
    ) -> None:
        if not too_long:
            return
        longest_id, longest = max(too_long, key=lambda pair: pair[1])
        report = (
            f"{len(too_long)} of {num_prompts} prompts are over"
            f" datamodule.max_prompt_tokens={max_prompt_tokens}; the longest,"
            f" {longest_id!r}, has {longest} tokens"
        )
        if len(too_long) == num_prompts:
            raise UserError(f"No prompt is left: {report}. Raise the limit.")
        log.warning("Prompts dropped: %s.", report)

    # --- the chat template ------------------------------------------------------------------

    def options(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the chat template is given beside the turns.

        Raises:
            UserError: several templates and no choice, or an argument that the template never
                reads.
        """
        options, name = dict(self.arguments), name_of(tokenizer)
        source, allowed = tokenizer.chat_template, set[str]()
        if isinstance(source, dict):
            choice = options.get("chat_template", "default")
            if choice not in source:
                raise UserError(
                    f"The tokenizer of {name} has several chat templates, {sorted(source)}, but no"
                    f' {choice!r}. Choose one: "data.template.arguments={{chat_template: NAME}}".'
                )
            source, allowed = source[choice], {"chat_template"}
        taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}
        read = names_read(source)
        if self.date is not None and "strftime_now" not in read:
            raise UserError(
                f"data.template.date={self.date} does nothing: the chat template of {name} asks for"
                " no date. Set it to null."
            )
        for key in set(options) - allowed:
            offered = read - ALWAYS_GIVEN - CALLABLE - set(tokenizer.special_tokens_map)
            names = ", ".join(sorted(offered)) or "no argument at all"
            if key in taken:
                raise UserError(
                    f"data.template.arguments.{key} is not the chat template's but rlzoo's to say."
                    f" The chat template of {name} reads {names}."
                )
            if key not in read:
                raise UserError(
                    f"data.template.arguments.{key} does nothing: the chat template of {name} reads"
                    f" {names}."
                )
        if "strftime_now" in read:
            day = datetime.datetime.fromisoformat(self.date or AS_DATE)
            options["strftime_now"] = day.strftime
        return options

    def render(
        self,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any],
        opened: bool = True,
    ) -> str:
        """The prompt as text, special tokens included.

        Args:
            opened: whether the opening of the assistant's turn follows.

        Raises:
            UserError: the chat template refused it, or left the question out.
        """
        turns = list(prompt.turns or self.turns(prompt.question))
        try:
            text = str(
                tokenizer.apply_chat_template(
                    turns, add_generation_prompt=opened, tokenize=False, **options
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            mend = ""
            if prompt.turns is None and self.system is not None:
                mend = " If it has no system turn, set data.template.system=null."
            raise UserError(
                f"The tokenizer's chat template refused prompt {prompt.id!r}: {error}.{mend}"
            ) from error
        for turn in turns if opened else ():
            if turn["role"] != "assistant" and not shows(text, turn["content"]):
                mend = "Use another model's tokenizer, or mend its chat_template.jinja."
                if turn["role"] == "system" and prompt.turns is None:
                    mend = "Set data.template.system=null, and say it in data.template.user_prefix."
                raise UserError(
                    f"The chat template of {name_of(tokenizer)} leaves out the {turn['role']} turn"
                    f" of prompt {prompt.id!r}, so that the policy would never see it. {mend}"
                )
        return text

    def look_over(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any],
    ) -> None:
        """Warns of what is unlikely to be meant in how prompts are rendered."""
        adds = self.system is not None or self.user_prefix or self.user_suffix
        if adds and any(prompt.turns for prompt in prompts):
            log.warning(
                "Prompts that are chats are taken as they are: data.template.system, user_prefix"
                " and user_suffix are not added to them."
            )
        prompt = prompts[0]
        text = self.render(prompt, tokenizer, options)
        closed = self.render(prompt, tokenizer, options, opened=False)
        name, eos, bos = name_of(tokenizer), tokenizer.eos_token, tokenizer.bos_token
        if text == closed and text.rstrip().endswith(eos):
            log.warning(
                f"The chat template of {name} opens no turn for the assistant: prompts end with"
                f" {eos!r}. If the model has a header for it, add it to chat_template.jinja."
            )
        if bos and bos != eos and text.lstrip().removeprefix(bos).lstrip().startswith(bos):
            log.warning(f"The chat template of {name} begins prompts with two {bos!r}.")


@functools.lru_cache(maxsize=8)
def names_read(source: str) -> set[str]:
    """Names that a chat template reads without having set them itself."""
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)  # transformers' own tag
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError as error:
        raise UserError(
            f"The tokenizer's chat template is not valid Jinja ({error}). Mend chat_template.jinja."
        ) from error


def shows(text: str, content: str) -> bool:
    """Whether a rendered prompt holds a turn's content, whatever became of the spaces."""
    return "".join(content.split()) in "".join(text.split())


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
