"""LoRA (arXiv:2106.09685) through peft: a frozen policy with trained low-rank layers inside.

peft puts its layers into the model in place, so that the rest of rlzoo sees an ordinary
transformers model. Whoever needs whole weights (the engine, an export, `init_from`) is given
W + alpha / r * B A by the names that the model has without adapters, one parameter at a time; the
trained model is not changed for it, since adding and taking away again leaves rounding behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from annotated_types import MinLen
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlzoo.errors import UserError
from rlzoo.models.gather import gathered, gathered_in_place, whole
from rlzoo.values import AtLeast1, Positive, ShareBelow1, Text, misfit

DEFAULTS = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
KINDS: dict[str, Any] = {
    "r": AtLeast1,
    "alpha": Positive,
    "dropout": ShareBelow1,
    "target_modules": Literal["all-linear"] | Annotated[Sequence[Text], MinLen(1)],
}
NAME = "default"  # peft's name for a model's only adapter


def lora_settings(lora: object) -> dict[str, Any]:
    """All settings of `model.lora`, what is left out from DEFAULTS, as plain numbers and lists.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    if not isinstance(lora, Mapping):
        raise UserError(f"model.lora must be null or some of {DEFAULTS}; got {lora!r}.")
    if unknown := sorted(map(str, lora.keys() - DEFAULTS.keys())):
        raise UserError(f"model.lora has no key {unknown[0]}; it has {', '.join(DEFAULTS)}.")
    settings = DEFAULTS | dict(lora)
    names = settings["target_modules"]
    if isinstance(names, Sequence) and names != "all-linear":
        settings["target_modules"] = [names] if isinstance(names, str) else list(names)
    for key, kind in KINDS.items():
        if (problem := misfit(kind, settings[key])) is not None:
            raise UserError(f"model.lora.{key} {problem}")
    return settings


def target_names(policy: PreTrainedModel, target_modules: str | list[str]) -> list[str]:
    """Full names of the linear layers that get an adapter; "all-linear" is all but the output head.

    A name stands for every layer whose own name it is, or ends in: q_proj, self_attn.q_proj.

    Raises:
        UserError: a name that no linear layer has, or the output head's: log-probs, gradient norms
            and tied embeddings take its weight as it is.
    """
    head = policy.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in policy.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    own = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
    wanted = [""] if target_modules == "all-linear" else target_modules
    found: dict[str, None] = {}
    for ending in wanted:
        matches = [name for name in layers if f".{name}".endswith(f".{ending}" if ending else "")]
        if not matches:
            raise UserError(
                f"model.lora.target_modules={target_modules} names {ending or 'linear layers'}, but"
                f" {type(policy).__name__} has no linear layer of that name that can have an"
                f" adapter. They are: {own}. Name some of these, or train all weights with"
                " model.lora=null."
            )
        found |= dict.fromkeys(matches)
    return list(found)


def check_lora(lora: object, policy: PreTrainedModel) -> dict[str, Any]:
    """`lora_settings`, once they are known to fit.

    Args:
        policy: a model of the kind; it may be on the meta device.

    Raises:
        UserError: bad settings, targets that the model has not, or peft is not installed.
    """
    settings = lora_settings(lora)
    target_names(policy, settings["target_modules"])
    import_peft()
    return settings


def import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"model.lora needs peft, which is not installed ({error}). Install rlzoo[peft], or"
            " train all weights: model.lora=null."
        ) from error
    return peft


class TrainingDropout(nn.Dropout):
    """Dropout of passes with gradient alone: what scores rollouts is the policy that drew them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


def add_lora(policy: PreTrainedModel, lora: object) -> None:
    """Puts adapters into a policy, in place, and freezes everything else.

    Adapters are float32 whatever the policy is, as an optimizer needs them. They start as no change
    at all (B = 0), from noise that the run's seed alone decides, so that ranks start alike.

    Raises:
        UserError: see `check_lora`.
    """
    settings, peft = check_lora(lora, policy), import_peft()
    config = peft.LoraConfig(
        r=int(settings["r"]),
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=target_names(policy, settings["target_modules"]),
        task_type="CAUSAL_LM",
        base_model_name_or_path=policy.name_or_path,
    )
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed())
        peft.inject_adapter_in_model(config, policy)
    for layer in lora_layers(policy):
        layer.lora_A.float()
        layer.lora_B.float()
        if settings["dropout"] > 0:
            layer.lora_dropout[NAME] = TrainingDropout(settings["dropout"])
    vars(policy)["lora"] = settings


def lora_of(policy: PreTrainedModel) -> dict[str, Any] | None:
    """The settings that a policy's adapters were made with; None where it has none."""
    return getattr(policy, "lora", None)


def lora_layers(policy: PreTrainedModel) -> Iterator[Any]:
    """Those of peft, a LoraLayer each."""
    return (m for m in policy.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer"))


@contextmanager
def adapters_off(policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within it, a policy with adapters is the model that it was before.

    peft's own switch also clears requires_grad, which sharding strategies have already read; hence
    the attribute behind it.
    """
    layers = list(lora_layers(policy))
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield policy
    finally:
        for layer in layers:
            layer._disable_adapters = False


# --- weights ------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def merged(named: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Whole merged weights, by the names and in the order that the model has without adapters.

    One at a time, so that no process holds the model twice. Collective where weights are sharded.

    Args:
        named: parameters of a model with adapters, by its own names; or a checkpoint's.
        scale: alpha / r.
    """
    for name, weight in named.items():
        if is_adapter(name):
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        a, b = (named.get(f"{layer}.lora_{x}.{NAME}.weight") for x in "AB")
        if kind != "weight" or a is None or b is None:
            yield from gathered([(f"{layer}.{kind}" if layer else name, weight)])
            continue
        with torch.no_grad(), gathered_in_place([weight, a, b]):
            base = whole(weight.data)
            change = scale * (whole(b.data).float() @ whole(a.data).float())
            found = (base.float() + change).to(base.dtype)
        yield f"{layer}.weight", found


def whole_weights_of(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """A policy's parameters, whole, adapters merged; see `gathered` and `merged`."""
    named = dict(policy.named_parameters())
    lora = lora_of(policy)
    return merged(named, lora["alpha"] / lora["r"]) if lora else gathered(named.items())


def adapter_weights(policy: PreTrainedModel, keep: bool) -> dict[str, Tensor]:
    """The adapters, whole, by peft's names; none of a policy without.

    Args:
        keep: whether this rank needs them; collective, so that the others walk along.
    """
    adapters = ((n, p) for n, p in policy.named_parameters() if is_adapter(n))
    return {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in gathered(adapters)
        if keep
    }


def write_adapter(policy: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    """The adapters alone, as peft does: `PeftModel.from_pretrained(base, folder)` reads them."""
    policy.peft_config[NAME].save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
