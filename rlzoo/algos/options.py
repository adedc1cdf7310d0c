"""The keys that algorithms share: the bounds of each, and what is refused as it could not act."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge, Gt, Lt

from rlzoo.errors import UserError, check_acts
from rlzoo.values import Positive, Says, ShareBelow1

log = logging.getLogger(__name__)

Singleton = Literal["zero", "reward"]  # the advantage of a group of one
ClipLow = Annotated[  # below 1, since 1 - clip_low has to stay positive
    Annotated[float, Gt(0), Lt(1)] | None, Says("The ratio is clipped at 1 - it; PPO uses 0.2")
]
ClipHigh = Annotated[Positive | None, Says("The ratio is clipped at 1 + it; PPO uses 0.2")]
DualClip = Annotated[
    Annotated[float, Gt(1)] | None,
    Says("It bounds a loss that is at least -A at ratio 1; released code uses 3"),
]
GroupSize = Annotated[
    Annotated[int, Ge(2)] | None, Says("A group of one has nothing to be compared with")
]
TISCap = Annotated[float, Ge(1)] | None
OverlongBuffer = Annotated[ShareBelow1, Says("It is a share of the length limit; DAPO uses 0.2")]
Temperature = Annotated[Positive, Says("Greedy decoding, at 0, is for evaluation")]
CLIP_DEFAULTS = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
Options = Mapping[str, Any]  # an algorithm's attributes, by the names that they have as keys


class Declared(Protocol):
    """What an algorithm says of itself, see `PolicyAlgorithm`."""

    scores: tuple[str, ...]
    has_ratio: bool
    has_dual_clip: bool
    uses_reward_values: bool
    uses_advantages: bool
    can_reject: bool
    scale_free: bool
    blames: bool

    @property
    def shapes_rewards(self) -> bool: ...


def check_acting(algo: Declared, options: Options) -> None:
    """Raises a UserError for a value that was asked for and could not act."""
    name = type(algo).__name__
    kl_in_reward = options["kl_coef"] > 0 and options["kl_in"] == "reward"
    if not algo.uses_reward_values and (options["overlong_buffer"] or kl_in_reward):
        raise UserError(
            f"{name} asks of rewards only which rollouts are right, so"
            " algo.overlong_buffer and algo.kl_in=reward would do nothing. Use"
            " algo.overlong_filter and algo.kl_in=loss."
        )
    for key, default in CLIP_DEFAULTS.items():
        if not algo.has_ratio and options[key] != default:
            raise UserError(
                f"algo.{key}={options[key]} would do nothing: {name} has no ratio that could be"
                " clipped. Leave it out."
            )
    if options["dual_clip"] is not None and not algo.has_dual_clip:
        raise UserError(
            f"algo.dual_clip={options['dual_clip']} would do nothing: {name} has none. Set it"
            " to null."
        )

    if options["kl_coef"] and options["kl_in"] == "loss" and options["kl_estimator"] == "k1":
        log.warning("algo.kl_estimator=k1 in the loss has a mean gradient of 0: prefer k2 or k3.")

    def check(key: str, default: object, why: str) -> None:
        check_acts(f"algo.{key}", options[key], default, why)

    if options["kl_coef"] == 0:
        why = "algo.kl_coef=0 leaves the KL out"
        check("kl_estimator", "k3", why)
        check("kl_in", "loss", why)
    if not algo.uses_reward_values:
        why = f"{name} asks of rewards only which rollouts are right"
        check("reward_scale", "zero_one", why)
    if not algo.uses_advantages:
        if options["old_logprobs"] != "trainer":
            raise UserError(
                f"algo.old_logprobs={options['old_logprobs']}: {name} has no ratio that could be"
                " taken to the engine; over a whole response the engine's rounding would add up"
                " in its margins. Set algo.old_logprobs=trainer."
            )
        check("tis_cap", None, f"the loss of {name} has no advantages that it could weigh")
    if options["overlong_buffer"] == 0:
        check("overlong_penalty", 1.0, "algo.overlong_buffer=0 leaves the penalty out")
    elif options["overlong_penalty"] == 0:
        check("overlong_buffer", 0.0, "algo.overlong_penalty=0 is no penalty")


def idle_keys(algo: Declared, options: Options) -> dict[str, str]:
    """Keys that cannot act as the others stand, by what the algorithm declares."""
    idle = {}
    if not algo.can_reject:
        idle["algo.rejected"] = f"this {type(algo).__name__} turns no rollout down"
    if not options["overlong_buffer"] and options["aggregation"] != "fixed_length":
        why = "responses are drawn up to datamodule.max_response_tokens"
        idle["algo.max_response_tokens"] = why
    if algo.scale_free and not algo.shapes_rewards:
        idle["algo.reward_scale"] = "advantages are standardised, whatever the rewards' scale"
    if options["old_logprobs"] == "engine":
        idle |= idle_beside_the_engine(algo, options)
    if algo.has_ratio and not algo.blames:
        why = "no advantage is below 0, where alone it acts"
        idle |= {"algo.clip_low": why, "algo.dual_clip": why}
    return idle


def idle_beside_the_engine(algo: Declared, options: Options) -> dict[str, str]:
    """Keys that cannot act where the ratio is taken to the engine."""
    cap, idle = options["tis_cap"], {}
    if cap is None:
        kl_in_reward = options["kl_coef"] > 0 and options["kl_in"] == "reward"
        if "old_logprobs" not in algo.scores and not kl_in_reward:
            idle["algo.old_logprobs"] = "its loss has no ratio, and algo.tis_cap is null"
        return idle
    why = f"algo.tis_cap={cap} bounds the ratio below it"
    if "old_logprobs" in algo.scores and cap <= 1 + (options["clip_high"] or 0.0):
        idle["algo.clip_high"] = why
    if cap <= (options["dual_clip"] or 0.0):
        idle["algo.dual_clip"] = why
    return idle
