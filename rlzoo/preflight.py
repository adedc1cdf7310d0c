"""What can only be told of a run's parts together, before anything is paid for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rlzoo.errors import UserError

log = logging.getLogger(__name__)

OFF = ("null", "none", "", "false")  # values that ask for nothing
NEUTRAL = {"algo.rejected": "zero", "algo.reward_scale": "zero_one"}


def check_parts(algo: Any, data: Any, overrides: Sequence[str]) -> None:
    """Whether algorithm, sampler and data fit each other, and every value that was set can act.

    Args:
        algo: a PolicyAlgorithm or SFT.
        data: its DataModule.
        overrides: of the command line, as Hydra has them.

    Raises:
        UserError: they do not; or a value set on the command line would do nothing.
    """
    if hasattr(data, "check_limits"):
        data.check_limits()
    if hasattr(data, "allocator"):
        check_groups(algo, data)
        check_temperature(algo, data)
    asked = {key: value for key, value in map(split_override, overrides) if asks(key, value)}
    for key, reason in algo.idle_options().items():
        for name in named(key, asked):
            raise UserError(f"{name}={asked[name]} would do nothing: {reason}. Leave it out.")
    for key, reason in algo.idle_on_policy().items():
        for name in named(key, asked):
            log.warning(f"{name}={asked[name]} does nothing here: {reason}.")


def check_groups(algo: Any, data: Any) -> None:
    """Whether the budgets have a solution, and groups the size that the algorithm learns from."""
    bounds = getattr(data.allocator, "bounds", lambda prompts, total: (0, total))
    _, most = bounds(data.prompts_per_epoch, data.total_budget)
    if data.replay is not None:
        return  # the recorded groups have the sizes they have
    least = getattr(algo, "smallest_group", 1)
    if most < least:
        raise UserError(
            f"{type(algo).__name__} compares the responses of a prompt, but"
            f" datamodule.responses_per_prompt={data.responses_per_prompt} under this sampler gives"
            f" no prompt more than {most}: every advantage would be 0 and nothing would be learnt."
            f" Set datamodule.responses_per_prompt (and sampler.allocator.n_max) to {least} at least,"
            " 8 is usual; or take an algorithm that needs no comparison, such as algo=reinforce."
        )
    size = getattr(algo, "group_size", None)
    if size is not None and size >= most:
        raise UserError(
            f"algo.group_size={size} would do nothing: no prompt gets more than {most} responses, so"
            " no group is cut. Lower it, or set it to null."
        )


def check_temperature(algo: Any, data: Any) -> None:
    sampled = data.drawer.params.temperature
    if algo.temperature != sampled:
        raise UserError(
            f"algo.temperature={algo.temperature}, but responses are drawn at"
            f" datamodule.temperature={sampled}: log-probs would be those of another distribution."
            " Set datamodule.temperature alone; the algorithm follows it."
        )


def split_override(override: str) -> tuple[str, str]:
    """("algo.clip_high", "0.28") of "+algo.clip_high=0.28"."""
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value.strip()


def asks(key: str, value: str) -> bool:
    return value.lower() not in OFF and value != NEUTRAL.get(key)


def named(key: str, asked: dict[str, str]) -> list[str]:
    """What was set of a key, or of the group that it names."""
    return [name for name in asked if name == key or name.startswith(f"{key}.")]
