"""Calls a reward, whosever it is, and checks once what every later step relies on."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.rewards.base import Reward, Scores, Verdict, is_right
from rlzoo.types import Prompt

_GOLDS_TRIED, _GOLDS_NAMED = 256, 20

log = logging.getLogger(__name__)


class RewardCaller:
    """Calls a reward, and returns its answer as `Scores` whatever form it has.

    Attributes:
        by_response: whether it says that it scores each response by itself, so that it may be
            called with some of them at a time, from another thread.
        unparsed_golds: of the last call, ids of prompts, one a response.

    Raises:
        UserError: it cannot be called; when it is, it returned something else than finite numbers,
            one for each response.
    """

    def __init__(self, reward: Reward) -> None:
        made = reward.func if isinstance(reward, functools.partial) else reward
        named = made if hasattr(made, "__qualname__") else type(made)
        self.name = f"{named.__module__}.{named.__qualname__}"
        if not callable(reward) or inspect.isclass(reward):
            raise UserError(
                f"reward=... made {self.name}, which is not a reward: it must be callable with"
                " (prompts, texts, truncated). Give a class with __call__ as reward._target_, or a"
                " function of these (docs/extending.md)."
            )
        self.reward: Callable[..., Any] = reward
        self.takes_progress = takes_progress(reward)
        self.by_response = scores_singly(made)
        self.has_told: set[str] = set()
        self.unparsed_golds: list[str] = []

    def __call__(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        truncated: Sequence[bool],
        on_progress: Callable[[int], None] | None = None,
    ) -> Scores:
        """The reward's scores of N rollouts; it is not called for none, on a rank without any."""
        self.unparsed_golds = []
        if not prompts:
            return Scores(torch.zeros(0), torch.zeros(0, dtype=torch.int8))
        extra = {"on_progress": on_progress} if self.takes_progress else {}
        returned = self.reward(list(prompts), list(texts), list(truncated), **extra)
        self.unparsed_golds = list(getattr(self.reward, "unparsed_golds", ()))
        rewards, verdicts = returned if isinstance(returned, Scores) else (returned, None)
        rewards = self.checked_rewards(rewards, prompts)
        right = is_right(rewards)
        if verdicts is None:
            verdicts = right.to(torch.int8)
        else:
            verdicts = self.checked_verdicts(verdicts, right, rewards, prompts)
        if on_progress and not self.takes_progress:
            on_progress(len(prompts))
        beyond = (rewards.abs() > 1 + 1e-6).nonzero()[:, 0].tolist()
        if beyond:
            self.tell_once(
                "scale",
                f"The reward {self.name} gave {float(rewards[beyond[0]]):g} to a response to prompt"
                f" {prompts[beyond[0]].id}. Right means a reward of at least 1 wherever rlzoo asks"
                " (accept_rate, avg@k, GVM, RAFT): scale it so that 1 is the full reward.",
            )
        return Scores(rewards, verdicts)

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Names those of up to 256 prompts, from all over, whose gold answer makes no sense."""
        if not prompts or not hasattr(self.reward, "unparsed"):
            return
        sample = prompts[:: max(1, len(prompts) // _GOLDS_TRIED)][:_GOLDS_TRIED]
        if found := self.reward.unparsed(sample):
            named = ", ".join(f"{p.id} ({p.answer!r:.40})" for p in found[:5])
            log.warning(
                f"{len(found)} of {len(sample)} gold answers tried cannot be parsed, so that only"
                f" their very words would be right: {named}. Mend them or leave them out."
            )

    def tell_unparsed(self, ids: Sequence[str]) -> None:
        """Says once of each prompt that its gold answer made no sense, up to a number of them."""
        new = [i for i in dict.fromkeys(ids) if f"gold {i}" not in self.has_told]
        told = sum(name.startswith("gold ") for name in self.has_told)
        for prompt_id in new[: max(0, _GOLDS_NAMED - told)]:
            self.tell_once(
                f"gold {prompt_id}",
                f"The gold answer of prompt {prompt_id} cannot be parsed: its responses are"
                " unverifiable and teach nothing (unverifiable/gold counts them). Mend it or leave"
                " it out.",
            )

    def tell_limits(self, num_hit: int, num_responses: int) -> None:
        """Says once that limits of the verifier decide about a good part of the answers."""
        if num_responses >= 20 and num_hit > 0.05 * num_responses:
            self.tell_once(
                "limits",
                f"{num_hit} of {num_responses} answers hit a limit of the reward (time, memory or"
                " length) and earn nothing. If they are no nonsense, raise"
                " reward.seconds_per_answer, reward.memory_mb or reward.max_answer_chars.",
            )

    def close(self) -> None:
        if callable(close := getattr(self.reward, "close", None)):
            close()

    def checked_rewards(self, returned: Any, prompts: Sequence[Prompt]) -> Tensor:
        """[N] float32 on the CPU."""
        wanted = (
            f"{len(prompts)} finite numbers, one for each response (a list, a tensor or Scores)"
        )
        try:
            rewards = torch.as_tensor(returned).detach()
            if rewards.is_complex():
                raise TypeError("complex numbers have no order")
            rewards = rewards.to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"The reward {self.name} must return {wanted};"
                f" it returned {self.found(returned, prompts)}."
            ) from None
        if rewards.shape != (len(prompts),):
            raise UserError(
                f"The reward {self.name} must return {wanted}, the first to a response to prompt"
                f" {prompts[0].id}; it returned shape {list(rewards.shape)}."
            )
        for i in (~rewards.isfinite()).nonzero()[:1, 0].tolist():
            raise UserError(
                f"The reward {self.name} gave {float(rewards[i])} to a response to prompt"
                f" {prompts[i].id}, which would make every weight NaN: it must return {wanted}."
            )
        return rewards

    def checked_verdicts(
        self, returned: Any, right: Tensor, rewards: Tensor, prompts: Sequence[Prompt]
    ) -> Tensor:
        """[N] int8, RIGHT where the reward is full and nowhere else."""
        try:
            verdicts = torch.as_tensor(returned).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            verdicts = torch.zeros(0)
        known = torch.tensor([int(v) for v in Verdict])
        integer = not verdicts.is_floating_point() and not verdicts.is_complex()
        if verdicts.shape != right.shape or not integer or not torch.isin(verdicts, known).all():
            raise UserError(
                f"The reward {self.name} must return {len(prompts)} verdicts (int8: 0 wrong, 1"
                f" right, 2 unverifiable), the first of a response to prompt {prompts[0].id}; it"
                f" returned {self.found(returned, prompts)}. None derives them from the rewards."
            )
        apart = (right != (verdicts == Verdict.RIGHT)).nonzero()[:, 0].tolist()
        if apart:
            i = apart[0]
            self.tell_once(
                "verdict",
                f"The reward {self.name} called a response to prompt {prompts[i].id}"
                f" {Verdict(int(verdicts[i])).name.lower()} and gave it {float(rewards[i]):g}."
                " Right is the full reward of 1, throughout: the verdict follows the reward.",
            )
        verdicts = torch.where(verdicts == Verdict.RIGHT, Verdict.WRONG, verdicts)
        return torch.where(right, Verdict.RIGHT, verdicts).to(torch.int8)

    def found(self, returned: Any, prompts: Sequence[Prompt]) -> str:
        """What stands there instead of numbers; of a list, the first that is none."""
        if isinstance(returned, (list, tuple)) and len(returned) == len(prompts):
            for value, prompt in zip(returned, prompts, strict=True):
                if not isinstance(value, (int, float)):
                    return f"{value!r:.60} for prompt {prompt.id}"
        return f"{type(returned).__name__} {returned!r:.60}, the first for prompt {prompts[0].id}"

    def tell_once(self, kind: str, message: str) -> None:
        if kind not in self.has_told:
            self.has_told.add(kind)
            log.warning(message)


def make_reward(node: DictConfig) -> Reward:
    """The reward that `reward=` names: an object of its class, or the function itself.

    A function that asks for three arguments or more besides its keys is the reward; one that asks
    for fewer makes it.

    Raises:
        UserError: a function that is neither, such as one with another library's arguments.
    """
    target, is_function = get_object(node._target_), False
    if inspect.isfunction(target) and "_partial_" not in node:
        needed = [
            name
            for name, parameter in inspect.signature(target).parameters.items()
            if parameter.default is parameter.empty and parameter.kind <= parameter.KEYWORD_ONLY
        ]
        missing = [name for name in needed if name not in node]
        is_function = len(missing) >= 3
        if missing and not is_function and "_args_" not in node:
            raise UserError(
                f"reward=... names the function {node._target_}, which needs"
                f" {', '.join(missing)}. A reward is called with (prompts, texts, truncated), and a"
                " function that makes one is given the keys of its YAML alone (docs/extending.md)."
            )
    reward: Reward = instantiate(node, _partial_=True) if is_function else instantiate(node)
    return reward


def scores_singly(reward: object) -> bool:
    """Whether a reward says `by_response = True` where its `__call__` is defined, or on itself: a
    subclass with another `__call__` may look at all responses of a draw."""
    owner = next((kind for kind in type(reward).__mro__ if "__call__" in vars(kind)), type(reward))
    return any(bool(getattr(x, "__dict__", {}).get("by_response")) for x in (reward, owner))


def takes_progress(reward: Callable[..., Any]) -> bool:
    """Whether `reward` can be given `on_progress` by name; True if it hides its signature."""
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return True
    return "on_progress" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )
