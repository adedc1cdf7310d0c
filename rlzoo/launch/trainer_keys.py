"""What each argument of Lightning's Trainer is under rlzoo: one that acts, or one that is refused.

rlzoo drives its runs from boundaries, so that much of what the Trainer offers would do nothing, or
end a run without closing it. A test walks all arguments that Lightning's Trainer has, so that a new
one has to be given its place here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from lightning import Trainer

from rlzoo.values import AtLeast1, NonNegative, Precision, Refused, Says, fits, refuses

# What rlzoo reads too.
READ = ("strategy", "accelerator", "devices", "num_nodes")
LIMIT = "It ends a run without closing it: use limits.max_responses, max_updates, max_seconds"
BOUNDARY = "It does nothing here, for rlzoo validates at boundaries: use val_every"
ROLLOUTS = "It does nothing here: data.* and datamodule.* say how much is trained on"

ACTS: dict[str, Any] = {
    "accelerator": Literal["cpu", "gpu", "cuda"],
    "devices": AtLeast1,
    "num_nodes": AtLeast1,
    "precision": Precision,
    "max_epochs": Annotated[Literal[-1] | AtLeast1, Says("-1 leaves the end to limits.*")],
    "gradient_clip_val": Annotated[NonNegative | None, Says("0 and null are off")],
    "deterministic": bool | Literal["warn"] | None,
    "benchmark": bool | None,
    "detect_anomaly": bool,
    "enable_model_summary": bool,
    "profiler": Literal["simple", "advanced", "pytorch"] | None,
}
# The only values that are taken, and what to use for the rest.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "min_epochs": ((None, 0), LIMIT),
    "max_steps": ((-1,), LIMIT),
    "min_steps": ((None, 0), LIMIT),
    "max_time": ((None,), LIMIT),
    "fast_dev_run": ((False,), f"{LIMIT}; doctor=true looks at one rollout step"),
    "gradient_clip_algorithm": ((None, "norm"), "rlzoo clips by the norm of each parameter group"),
    "accumulate_grad_batches": (
        (1,),
        "An update is split by tokens: use algo.tokens_per_microbatch",
    ),
    "limit_train_batches": ((None, 1.0), ROLLOUTS),
    "overfit_batches": ((0.0, 0), ROLLOUTS),
    "limit_val_batches": ((0, 0.0), "callbacks.validation validates, at boundaries: use val_every"),
    "limit_test_batches": ((None, 1.0), ROLLOUTS),
    "limit_predict_batches": ((None, 1.0), ROLLOUTS),
    "val_check_interval": ((None, 1.0), BOUNDARY),
    "check_val_every_n_epoch": ((1,), BOUNDARY),
    "num_sanity_val_steps": ((0,), "A validation would sample before the first weight sync"),
    "log_every_n_steps": ((1,), "It does nothing here: a row is written for each rollout step"),
    "enable_checkpointing": ((False,), "callbacks.checkpoint saves, at boundaries"),
    "enable_progress_bar": ((False,), "rlzoo draws its own, by phase"),
    "use_distributed_sampler": ((False,), "The DataModule shares prompts over processes"),
    "reload_dataloaders_every_n_epochs": ((0,), "It would draw rollouts that nobody trains on"),
    "inference_mode": ((True,), "It does nothing here: rlzoo does not use Lightning's validation"),
    "sync_batchnorm": ((False,), "It does nothing here: language models have no batch norm"),
    "barebones": ((False,), "It would leave out the callbacks that make a run"),
    "enable_autolog_hparams": ((True,), "It does nothing here: config.yaml has the settings"),
    "default_root_dir": ((None,), "Use run_dir"),
    "model_registry": ((None,), "It does nothing here: policy/ has the result"),
    "logger": ((), "Use the group: logger=csv, or +logger.NAME._target_=CLASS"),
    "callbacks": ((), "Use the group: +callbacks.NAME._target_=CLASS"),
    "plugins": ((), "rlzoo sets them: see strategy= and trainer.precision"),
    "strategy": ((), "Use the group: strategy=ddp, fsdp, deepspeed_zero2"),
}


def fixed(values: tuple[Any, ...], mend: str) -> Any:
    return Annotated[Literal[values] if values else Refused, Says(mend)]


def deleted(node: Mapping[str, Any]) -> list[str]:
    """Arguments that `trainer` leaves out though rlzoo reads them, or does not run with Lightning's
    default for them."""
    defaults = {p.name: p.default for p in inspect.signature(Trainer.__init__).parameters.values()}
    return [
        name
        for name, kind in ARGUMENTS.items()
        if name not in node and (name in READ or not (refuses(kind) or fits(kind, defaults[name])))
    ]


ARGUMENTS: dict[str, Any] = ACTS | {name: fixed(*rule) for name, rule in FIXED.items()}
