"""DeepSpeed's ZeRO under Lightning, on CUDA and on CPUs, its updates as every other strategy's."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from rlzoo.errors import UserError
from rlzoo.learning.optimization import Trained, clip_limit
from rlzoo.types import Update
from rlzoo.values import AtLeast0, Positive

log = logging.getLogger(__name__)


OWN_KEYS = {  # settings of zero_optimization that have a key of their own
    "stage": "stage",
    "offload_optimizer": "offload",
    "offload_param": "offload",
    "cpu_offload": "offload",
    "stage3_param_persistence_threshold": "persistence_threshold",
    "param_persistence_threshold": "persistence_threshold",
}


class DeepSpeed(DeepSpeedStrategy):
    """ZeRO stages 1 to 3 (arXiv:1910.02054).

    Differs from Lightning's strategy in four things: it runs on CPUs (over gloo); a batch is an
    update, of several microbatches; each parameter group is clipped by its own norm, and an update
    without anything to learn from is skipped, as under every other strategy; models that
    transformers builds are sharded as they are loaded.

    Args:
        stage: what processes share: 1 optimizer states, 2 gradients too, 3 weights too.
        offload: keeps optimizer states, and in stage 3 weights, in host memory.
        persistence_threshold: elements up to which a parameter stays whole in stage 3.
        timeout: seconds that a process waits for the others in one exchange.
        options: further settings of DeepSpeed's `zero_optimization`.

    Raises:
        UserError: DeepSpeed is not installed, or does not take one of the options.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: bool = False,
        persistence_threshold: AtLeast0 = 100_000,
        timeout: Positive = 1800.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        import_deepspeed(stage)
        zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = persistence_threshold
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        config = {
            "zero_optimization": with_options(zero, options or {}),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # any torch optimizer steps in host memory too
            "gradient_clipping": 0.0,  # `group_updates` clips
            "steps_per_print": None,
        }
        if stage > 1:  # in stage 1 it selects an optimizer that `group_updates` does not know
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        super().__init__(config=config, timeout=timedelta(seconds=timeout))
        self.stage = stage
        self._side_engines: list[Any] = []
        self._warned = False

    # --- on a CPU ---------------------------------------------------------------------------

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def setup_environment(self) -> None:
        if not self.on_cpu:
            super().setup_environment()
        else:
            DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            super().setup_distributed()
            return
        import deepspeed

        # Gloo alone: the exchange through shared memory is compiled for most of a minute at its
        # first use, and a run killed meanwhile leaves a lock that all later ones wait for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Optimizer]:
        import deepspeed

        parameters = [p for p in model.parameters() if p.requires_grad]
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=Namespace(device_rank=self.local_rank),  # a CPU has no index
            config=self.config,
            model=model,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        group_updates(zero_optimizer, self)
        return engine, zero_optimizer

    # --- the model --------------------------------------------------------------------------

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """In stage 3, models that transformers loads are partitioned tensor by tensor; what else is
        built here is partitioned whole when training is set up."""
        self._init_config_if_needed()
        held = None
        if self.zero_stage_3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            held = HfDeepSpeedConfig(self.config)  # transformers keeps a weak reference alone
        yield
        del held

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        if not self.zero_stage_3:
            return
        import deepspeed

        config = dict(self.config or {})
        config.pop("gradient_accumulation_steps", None)
        zero = dict(config["zero_optimization"])
        zero.pop("offload_optimizer", None)
        for side in getattr(self.lightning_module, "side_models", ()):
            # An engine of its own, without optimizer, gathers the frozen model's parts.
            engine = deepspeed.initialize(
                args=Namespace(device_rank=self.local_rank),
                config=config | {"zero_optimization": zero},
                model=side,
                dist_init_required=False,
            )[0]
            self._side_engines.append(engine.eval())

    # --- updates ----------------------------------------------------------------------------

    def training_step(self, update: Update, batch_idx: int) -> STEP_OUTPUT:
        """Takes each microbatch through DeepSpeed's own forward and backward pass: what it sets up
        around one must be around all. Lightning does that for the last."""
        engine, (*earlier, last) = self.deepspeed_engine, update.parts()
        if earlier:
            self.warn_of_half_sums()
        for part in earlier:
            engine.set_gradient_accumulation_boundary(False)
            loss = super().training_step(part, batch_idx)
            assert isinstance(loss, Tensor)
            self.backward(loss, None)
        engine.set_gradient_accumulation_boundary(True)
        return super().training_step(last, batch_idx)

    def warn_of_half_sums(self) -> None:
        if self.stage == 1 and self.precision_plugin.precision != "32-true" and not self._warned:
            self._warned = True
            log.warning(
                "strategy=deepspeed_zero1 adds the gradients of an update's microbatches"
                " (algo.tokens_per_microbatch) up in half precision, where small ones are lost."
                " Take strategy=deepspeed_zero2, which adds them up in float32."
            )


def with_options(zero: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`, once it has been read as DeepSpeed will read it.

    Raises:
        UserError: an option that has a key of its own, that DeepSpeed does not know, or whose value
            it does not take.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name in options:
        if name in OWN_KEYS:
            raise UserError(f"strategy.options.{name}: take strategy.{OWN_KEYS[name]} for that.")
    config = zero | dict(options)
    try:
        DeepSpeedZeroConfig(**config)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"strategy.options.{name}: DeepSpeed does not take it ({first['msg']}). Options are"
            " those of its zero_optimization."
        ) from error
    return config


def import_deepspeed(stage: int) -> None:
    """Imports DeepSpeed, without the compiler commands that it tries and prints.

    Raises:
        UserError: it is not installed.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    try:
        import deepspeed

        _ = deepspeed.ops.__compatible_ops__  # found out at the first look
    except ImportError as error:
        raise UserError(
            f"strategy=deepspeed_zero{stage} needs DeepSpeed, which is not installed ({error})."
            " Install rlzoo[deepspeed], or take strategy=fsdp or strategy=ddp."
        ) from error
    finally:
        root.setLevel(level)


last_skip: list[str | None] = [None]  # why the last update was skipped


def is_no_false_alarm(record: logging.LogRecord) -> bool:
    """False for what ZeRO says of an update without anything to learn from, which it takes for one
    that overflowed."""
    return last_skip[0] != "empty" or "overflow" not in record.getMessage().lower()


def partition_norms(optimizer: Any) -> list[Tensor]:
    """Norm of each parameter group's averaged gradient in stages 1 and 2; collective."""
    if optimizer.cpu_offload:
        norm = optimizer.complete_grad_norm_calculation_for_cpu_offload
        return [norm(parameters) for parameters in optimizer.params_in_partition]
    return [
        optimizer.get_grad_norm_direct(optimizer.averaged_gradients[i], parameters)
        for i, parameters in enumerate(optimizer.params_in_partition)
    ]


def group_updates(optimizer: Any, strategy: DeepSpeed) -> None:
    """Makes a ZeRO optimizer clip each parameter group by its own norm, and skip what must be.

    ZeRO computes the norms of its partitioned gradients and then steps group by group (in stage 3,
    by parts of groups). The norms are handed to the module, which says whether to go on; an update
    to be skipped is reported to ZeRO as one that overflowed, which leaves weights and Adam's state
    as they are. Reaches into deepspeed 0.19, since there is no public place for either.

    Args:
        optimizer: a DeepSpeedZeroOptimizer or DeepSpeedZeroOptimizer_Stage3.
        strategy: of a PolicyAlgorithm.
    """
    module = cast(Trained, strategy.lightning_module)
    third = hasattr(optimizer, "_get_norm_groups")
    name = "_get_norm_groups" if third else "scaled_global_norm"
    norms_of_parts = getattr(optimizer, name) if third else partial(partition_norms, optimizer)
    step = optimizer._optimizer_step
    scales: dict[str, float] = {}  # of the update in progress, by parameter group

    def group_of(part: int) -> int:
        return optimizer.sub_group_to_group_id[part] if third else part

    def name_of(part: int) -> str:
        return str(optimizer.param_groups[group_of(part)]["name"])

    def settled(*_: Any) -> Any:
        """Norms for ZeRO to look at: those of the parts, or infinite ones to skip the update."""
        limit = clip_limit(module.trainer.gradient_clip_val)
        # DeepSpeed reports what is not finite as -1.
        parts = [float(norm) if norm >= 0 else math.inf for norm in norms_of_parts()]
        squares: dict[str, float] = defaultdict(float)
        for part, norm in enumerate(parts):
            if name_of(part) not in module.frozen_groups:
                squares[name_of(part)] += norm**2
        norms = {name: math.sqrt(square) for name, square in squares.items()}
        scales.update({name: min(1.0, limit / (norm + 1e-6)) for name, norm in norms.items()})
        skipped = module.settle_update(norms)
        last_skip[0] = skipped
        if skipped:
            parts = [math.inf]
        elif module.frozen_groups:
            parts = list(norms.values())
        found = torch.tensor(parts, device=strategy.root_device)
        return list(found) if third else found.norm()

    def clipped_step(_: Any, part: int) -> None:
        if name_of(part) in module.frozen_groups:
            return
        shards = "fp32_partitioned_groups_flat" if third else "single_partition_of_fp32_groups"
        getattr(optimizer, shards)[part].grad.mul_(scales[name_of(part)])
        step(part)

    logging.getLogger("DeepSpeed").addFilter(is_no_false_alarm)
    optimizer.settles_updates = True
    setattr(optimizer, name, settled)
    optimizer._optimizer_step = MethodType(clipped_step, optimizer)
