"""How a question becomes the tokens a policy sees, in pilots, training and evaluation alike."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from rlzoo.errors import UserError
from rlzoo.types import Prompt

if TYPE_CHECKING:  # prompts alone, as in the verifier's workers, need not wait for transformers
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class PromptTemplate:
    """A system turn and a user turn, rendered with the tokenizer's own chat template.

    Args:
        system: text of the system turn; None leaves it out (a chat template may add its own then).
        user_suffix, user_prefix: text right after and right before the question, spaces included.

    Attributes:
        num_dropped: prompts left out so far for being too long.
    """

    def __init__(
        self, system: str | None = None, user_suffix: str = "", user_prefix: str = ""
    ) -> None:
        self.system, self.user_suffix, self.user_prefix = system, user_suffix, user_prefix
        self.num_dropped = 0

    def turns(self, question: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        content = f"{self.user_prefix}{question}{self.user_suffix}"
        return [*system, {"role": "user", "content": content}]

    def encode(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        on_too_long: str = "error",
    ) -> list[Prompt]:
        """The prompts with their `token_ids`, the opening of the assistant's turn included.

        Args:
            prompts: in any order, which is kept.
            tokenizer: of the policy; needs a chat template and an EOS token.
            max_prompt_tokens: tokens of the rendered prompt, at most.
            on_too_long: `error` stops at a longer prompt, `drop` leaves it out and counts it.

        Raises:
            UserError: a tokenizer that cannot render or end a turn, a prompt over the limit,
                or none within it.
        """
        if on_too_long not in ("error", "drop"):
            raise UserError(f"on_too_long must be error or drop, got {on_too_long!r}.")
        check_tokenizer(tokenizer)
        encoded, too_long = [], []
        for prompt in prompts:
            token_ids = self.render(prompt, tokenizer)
            if len(token_ids) <= max_prompt_tokens:
                encoded.append(dataclasses.replace(prompt, token_ids=token_ids))
                continue
            too_long.append((prompt.id, len(token_ids)))
            if on_too_long == "error":
                raise UserError(
                    f"Prompt {prompt.id!r} is {len(token_ids)} tokens long, over"
                    f" datamodule.max_prompt_tokens={max_prompt_tokens}. Raise the limit, or leave"
                    " longer prompts out with datamodule.on_too_long=drop."
                )
        if too_long:
            longest_id, longest = max(too_long, key=lambda pair: pair[1])
            report = (
                f"{len(too_long)} of {len(prompts)} prompts are over"
                f" datamodule.max_prompt_tokens={max_prompt_tokens}; the longest,"
                f" {longest_id!r}, has {longest} tokens"
            )
            if not encoded:
                raise UserError(f"No prompt is left: {report}. Raise the limit.")
            self.num_dropped += len(too_long)
            log.warning("Prompts dropped: %s.", report)
        return encoded

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        try:
            token_ids = tokenizer.apply_chat_template(
                self.turns(prompt.question),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,  # transformers 5 returns a BatchEncoding otherwise
            )
        except TemplateError as error:
            raise UserError(
                f"The tokenizer's chat template refused prompt {prompt.id!r}: {error}. If it has"
                " no system turn, set data.template.system=null."
            ) from error
        return tuple(token_ids)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless the tokenizer can render a chat and end a response."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {name!r} has no chat template, so a question cannot be rendered."
            " Choose an instruction-tuned model, or put a chat_template.jinja beside its"
            " tokenizer files."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {name!r} has no EOS token, so a response could never end."
            " Set eos_token in its tokenizer_config.json."
        )
