"""What can only be told of a run's parts together, before anything is paid for."""

from __future__ import annotations

from typing import Any

from rlzoo.errors import UserError
from rlzoo.report.ledger import Limits


def check_parts(algo: Any, data: Any, limits: Limits) -> None:
    """Whether algorithm, sampler and data fit each other.

    Args:
        algo: a PolicyAlgorithm or SFT.
        data: its DataModule.
        limits: of the run.

    Raises:
        UserError: they do not.
    """
    if hasattr(data, "check_limits"):
        data.check_limits(limits)
    if hasattr(data, "allocator"):
        check_groups(algo, data)
        check_temperature(algo, data)
        check_old_logprobs(algo, data)


def check_pipeline(algo: Any, data: Any, engine: Any) -> None:
    """Whether `pipeline=one_step` can draw a rollout step while the one before is trained on."""
    name, problem = type(algo).__name__, None
    if not getattr(engine, "beside", False):
        problem = (
            f"{type(engine).__name__} draws in the trainer's own process, and cannot while it"
            " trains. Take engine=transformers_process (CPU), or engine=vllm_server with devices"
            " of its own"
        )
    elif not algo.uses_advantages:
        problem = f"{name} has no advantages that weights could correct for the lag"
    elif algo.tis_cap is None:
        problem = (
            "rollouts are drawn by the weights of a rollout step before, which truncated importance"
            " sampling corrects for. Set algo.tis_cap=2.0"
        )
    elif data.allocator.max_rounds > 1:
        problem = (
            "this sampler looks at a round's rewards before it draws the next, on all ranks"
            " together. Take sampler=uniform or gvm"
        )
    elif data.steps_per_epoch == 1:
        problem = (
            "an epoch has one rollout step, beside which nothing of it is left to draw. Raise"
            " datamodule.prompts_per_epoch"
        )
    if problem:
        raise UserError(f"pipeline=one_step: {problem}; or set pipeline=none.")


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
            f" Set datamodule.responses_per_prompt (and sampler.allocator.n_max) to {least} at"
            " least, 8 is usual; or take an algorithm that needs no comparison, such as"
            " algo=reinforce."
        )
    size = getattr(algo, "group_size", None)
    if size is not None and size >= most:
        raise UserError(
            f"algo.group_size={size} would do nothing: no prompt gets more than {most} responses,"
            " so no group is cut. Lower it, or set it to null."
        )


def check_old_logprobs(algo: Any, data: Any) -> None:
    """Whether the engine's log-probs are of the distribution that the trainer's are of."""
    top_p, top_k = data.params.top_p, data.params.top_k
    if algo.old_logprobs == "engine" and (top_p < 1 or top_k):
        raise UserError(
            f"algo.old_logprobs=engine with datamodule.top_p={top_p} and top_k={top_k}: the"
            " engine's log-probs are those of the truncated distribution, the trainer's of the"
            " whole one, so that their ratio is of two things. Set algo.old_logprobs=trainer, or"
            " datamodule.top_p=1 and top_k=0."
        )


def check_temperature(algo: Any, data: Any) -> None:
    sampled = data.params.temperature
    if algo.temperature != sampled:
        raise UserError(
            f"algo.temperature={algo.temperature}, but responses are drawn at"
            f" datamodule.temperature={sampled}: log-probs would be those of another distribution."
            " Set datamodule.temperature alone; the algorithm follows it."
        )
