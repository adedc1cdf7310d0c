"""What an algorithm refuses of its keys: values out of range, and values that could not act."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from rlzoo.errors import UserError, check_acts, check_at_least, check_choice
from rlzoo.learning.losses import KL_ESTIMATORS
from rlzoo.learning.microbatching import AGGREGATIONS

log = logging.getLogger(__name__)

CLIP_DEFAULTS = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
Options = Mapping[str, Any]  # an algorithm's attributes, by the names that they have as keys


class Declared(Protocol):
    """What an algorithm says of itself, see `PolicyAlgorithm`."""

    has_ratio: bool
    has_dual_clip: bool
    uses_reward_values: bool
    uses_advantages: bool
    can_reject: bool
    scale_free: bool
    blames: bool

    @property
    def shapes_rewards(self) -> bool: ...


def check_values(options: Options) -> None:
    """Raises a UserError for a value out of range."""
    for key, known in {
        "aggregation": AGGREGATIONS,
        "rejected": ("drop", "zero"),
        "reward_scale": ("zero_one", "plus_minus_one"),
        "kl_estimator": KL_ESTIMATORS,
        "kl_in": ("loss", "reward"),
    }.items():
        check_choice(f"algo.{key}", options[key], known)
    for key in ("updates", "passes", "max_response_tokens", "max_tokens_per_microbatch"):
        check_at_least(f"algo.{key}", options[key], 1)
    for key in ("kl_coef", "entropy_coef", "overlong_penalty"):
        check_at_least(f"algo.{key}", options[key], 0)
    if options["tis_cap"] is not None:
        check_at_least("algo.tis_cap", options["tis_cap"], 1)
    if not 0 <= options["overlong_buffer"] < 1:
        raise UserError(
            f"algo.overlong_buffer must be in [0, 1), got {options['overlong_buffer']}: it is a"
            " share of the length limit. DAPO uses 0.2."
        )
    if not options["temperature"] > 0:
        raise UserError(
            f"algo.temperature must be above 0, got {options['temperature']}: training needs a"
            " distribution to take gradients of. Greedy decoding is for evaluation."
        )
    if not options["max_logprob_gap"] > 0:
        raise UserError(f"algo.max_logprob_gap must be above 0, got {options['max_logprob_gap']}.")
    check_clips(options)
    if options["kl_coef"] and options["kl_in"] == "loss" and options["kl_estimator"] == "k1":
        log.warning("algo.kl_estimator=k1 in the loss has a mean gradient of 0: prefer k2 or k3.")


def check_clips(options: Options) -> None:
    low, high, dual = (options[key] for key in CLIP_DEFAULTS)
    if low is not None and not 0 < low < 1:
        raise UserError(
            f"algo.clip_low must be in (0, 1) or null, got {low}: the ratio is clipped from"
            " below at 1 - clip_low, which has to stay positive. PPO uses 0.2."
        )
    if high is not None and not high > 0:
        raise UserError(f"algo.clip_high must be above 0 or null, got {high}. PPO uses 0.2.")
    if dual is not None and not dual > 1:
        raise UserError(
            f"algo.dual_clip must be above 1 or null, got {dual}: it bounds a loss that"
            " is at least -A at ratio 1. Released code uses 3."
        )


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
    if algo.has_ratio and not algo.blames:
        why = "no advantage is below 0, where alone it acts"
        idle |= {"algo.clip_low": why, "algo.dual_clip": why}
    return idle
