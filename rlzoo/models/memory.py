"""Bytes that training takes on each rank, on paper: tensors, by a model's configuration.

Element sizes: a float32 has 4 bytes, a bfloat16 2. Training computes in one of three ways:

- `float32`: `32-true`;
- `autocast`: `bf16-mixed` under DDP or alone: float32 weights, residual stream and norms; linear
  layers and attention in bfloat16;
- `half`: bfloat16 throughout but for sums: `bf16-true`, and `bf16-mixed` under DeepSpeed and FSDP.

`python -m rlzoo.bench peak` holds all this to tensors that were counted, `python -m rlzoo.bench
memory` the states alone, on several ranks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlzoo.models.tiles import KEPT_ELEMENTS, TILE_ELEMENTS

Arithmetic = Literal["float32", "autocast", "half"]
Held = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]  # what ranks share; one alone is as ddp
PARTS = ("weights", "gradients", "optimizer")
ELEMENT = {"float32": 4, "autocast": 2, "half": 2}  # bytes, of what linear layers compute in
RESIDUAL = {"float32": 4, "autocast": 4, "half": 2}  # bytes, of the stream between layers
BUCKET = 500_000_000  # elements that DeepSpeed exchanges at once, its default
TILE = {device: 4 * n for device, n in TILE_ELEMENTS.items()}  # bytes of logits made at once
TILES = 4  # of them at a time: logits, probabilities, their gradient, and one as it is made


class Shape(NamedTuple):
    """What the memory of a causal language model depends on; counts of elements."""

    parameters: int
    linear: int  # parameters of linear layers but the head, which autocast casts
    largest: int  # of the largest parameter
    layers: int
    width: int  # of the residual stream
    queries: int  # heads times width of a head
    keys: int  # key-value heads times width of a head
    heads: int
    inner: int  # width of the MLP, or of all experts that a token goes through
    vocabulary: int
    tied: bool = True  # whether the head is the embedding

    @property
    def head(self) -> int:
        """Elements of the output head."""
        return self.vocabulary * self.width

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        outside = self.parameters - self.head * (1 if self.tied else 2)
        return max(1, outside) // self.layers


class Setting(NamedTuple):
    """How a run trains."""

    held: Held = "ddp"
    ranks: int = 1
    arithmetic: Arithmetic = "float32"
    element: int = 4  # bytes of a weight as it is loaded
    recompute: bool = False  # gradient checkpointing
    adapters: int | None = None  # parameters of LoRA's, which alone are trained
    critic: bool = False  # of PPO, with a backbone of its own
    reference: bool = False  # a frozen copy of the policy
    offload: bool = False  # ZeRO's states in host memory
    fused: bool = True  # the optimizer makes no temporaries
    moments: int = 8  # bytes a parameter that the optimizer keeps; 8 of AdamW
    wide: int = 1  # 2 for 64-true: all of float32 twice
    device: Literal["cpu", "cuda"] = "cuda"


def shape_of(config: PretrainedConfig, model: PreTrainedModel) -> Shape:
    """Of a configuration, and its model, which may be empty (`rlzoo.engines.shapes.empty_model`).

    What a family does not say is taken from others: one head for each 128 elements of the width, an
    MLP of four times the width.
    """
    text = config.get_text_config()
    sizes = [p.numel() for p in model.parameters()]
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [m for m in model.modules() if type(m) is nn.Linear and m is not output]

    def said(*names: str, default: int) -> int:
        found = (getattr(text, name, None) for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), default)

    width = said("hidden_size", "n_embd", "d_model", default=1024)
    heads = said("num_attention_heads", "n_head", "n_heads", default=max(1, width // 128))
    head = said("head_dim", default=width // heads)
    inner = said("intermediate_size", "n_inner", "ffn_dim", default=4 * width)
    experts = said("num_experts_per_tok", default=0)
    if experts:
        inner = experts * said("moe_intermediate_size", default=inner)
    return Shape(
        parameters=sum(sizes),
        linear=sum(m.weight.numel() for m in linear),
        largest=max(sizes),
        layers=said("num_hidden_layers", "n_layer", "n_layers", default=12),
        width=width,
        queries=heads * head,
        keys=said("num_key_value_heads", default=heads) * head,
        heads=heads,
        inner=inner,
        vocabulary=said("vocab_size", default=max(sizes) // width),
        tied=getattr(output, "weight", None) is getattr(embedding, "weight", None),
    )


def states(
    held: Held, parameters: int, ranks: int, half: bool, moments: int = 8
) -> dict[str, float]:
    """Weights, complete gradients and an optimizer's states (arXiv:1910.02054 section 3.1).

    For P parameters on N ranks, with w and g bytes of an element:

    | | weights | gradients | AdamW's moments | DeepSpeed's float32 copy |
    |---|---|---|---|---|
    | ddp | w P | g P | 8 P | none |
    | zero1 | w P | g P / N | 8 P / N | 4 P / N |
    | zero2 | w P | g P / N | 8 P / N | 4 P / N |
    | zero3, fsdp | w P / N | g P / N | 8 P / N | 4 P / N, none under FSDP |

    w and g are 4 in float32; under DeepSpeed's bf16-mixed w is 2, and g is 2 in stage 1, 4 in
    stages 2 and 3, which add microbatches up in float32. The paper has g P for zero1: so it is
    during the backward pass, but what is not a rank's own is freed before the step.

    Returns:
        bytes by the names of PARTS; DeepSpeed's copy counts as the optimizer's.
    """
    share = {part: parameters / ranks for part in PARTS}
    if held == "ddp":
        share = dict.fromkeys(PARTS, float(parameters))
    elif held in ("zero1", "zero2"):
        share["weights"] = parameters
    element = 2 if half and held.startswith("zero") else 4
    kept = moments + (4 if held.startswith("zero") else 0)
    gradient = element if held == "zero1" else 4  # the others add microbatches up in float32
    sizes = {"weights": element, "gradients": gradient, "optimizer": kept}
    return {part: share[part] * sizes[part] for part in PARTS}


def saved_by_layer(shape: Shape, arithmetic: Arithmetic, joined: bool = False) -> float:
    """Bytes a token that one layer keeps for its backward pass.

    Of a layer with two RMS norms, attention of separate projections and a gated MLP: D is the
    width, Q that of all queries, K of all keys, H heads, M the MLP's inner width. What other
    families keep is less, or near it.

    - norms: their input and what it is once normalised, in float32 (half: the input in float32,
      the normalised in bfloat16 and, for the sum, the stream itself); the inverse deviation;
    - attention: the projections' input (autocast casts it for each of three), queries, keys,
      values, the result, and a float32 for each head;
    - MLP: its input (autocast: for each of two), gate, its activation, the other branch, their
      product.

    Args:
        joined: whether the result of attention is kept twice, since rows are attended to one by one
            and joined, as packed ones on a CPU are.
    """
    d, k, m = shape.width, shape.keys, shape.inner
    q = shape.queries * (1.5 if joined else 1)
    small = 4 * shape.heads + 2 * 4
    if arithmetic == "float32":
        return 4 * (6 * d + 2 * q + 2 * k + 4 * m) + small
    inputs = 5 if arithmetic == "autocast" else 2
    norms = 4 * 4 * d if arithmetic == "autocast" else (2 * 4 + 2 * 2) * d
    return norms + 2 * (inputs * d + 2 * q + 2 * k + 4 * m) + small


def element_of_norms(arithmetic: Arithmetic) -> int:
    """Bytes of what a norm's weight is multiplied with."""
    return 2 if arithmetic == "half" else 4


def activations(shape: Shape, setting: Setting, tokens: int) -> float:
    """Bytes of a pass over a microbatch, at the most: what the layers keep, or with recomputation
    the stream between them; what one layer's backward pass makes; and what stands at the ends. A
    critic keeps as much again.
    """
    models = 2 if setting.critic else 1
    stream = RESIDUAL[setting.arithmetic]
    kept = stream * shape.width if setting.recompute else kept_by_layer(shape, setting)
    ends = (3 * 4 + stream) * shape.width  # the last norm's, and the states that predict tokens
    return tokens * (models * (shape.layers * kept + ends) + made_by_layer(shape, setting))


def kept_by_layer(shape: Shape, setting: Setting) -> float:
    """Bytes a token that a layer keeps, of a policy that is trained in this setting."""
    kind = setting.arithmetic
    own = saved_by_layer(shape, kind, joined=setting.device == "cpu")
    if setting.adapters is not None:  # a norm that is not trained keeps nothing of its own result
        own -= 2 * element_of_norms(kind) * shape.width
    return own


def made_by_layer(shape: Shape, setting: Setting) -> float:
    """Bytes a token of one layer's backward pass: two gradients of the MLP's inner width, two of
    the stream, and what it keeps if it is recomputed."""
    element, stream = ELEMENT[setting.arithmetic], RESIDUAL[setting.arithmetic]
    again = kept_by_layer(shape, setting) if setting.recompute else 0.0
    return again + 2 * element * shape.inner + 2 * stream * shape.width


def head(shape: Shape, setting: Setting, tokens: int) -> float:
    """Bytes that log-probs of a microbatch take: tiles of logits, hidden states and their gradient
    in float32, and the gradient of the head before it is added to the others'; all logits where
    they are few, as far as they are more than what layers make once they are gone."""
    element = ELEMENT[setting.arithmetic]
    states_ = tokens * shape.width * (4 + element)
    weight = 2 if setting.arithmetic == "half" else 4
    gradient = 0 if setting.adapters is not None else weight * shape.head
    logits = tokens * shape.vocabulary
    kept = 4.0 * logits if logits <= KEPT_ELEMENTS and setting.adapters is None else 0.0
    kept = max(0.0, kept - tokens * made_by_layer(shape, setting))  # they are gone by then
    return TILES * TILE[setting.device] + states_ + gradient + kept


def exchange(shape: Shape, setting: Setting) -> float:
    """Bytes of what ranks exchange while gradients are made: buckets, and parts gathered whole.

    DDP's buckets are where its gradients live, but for those of an update's first microbatches,
    which the last one copies there. FSDP gathers two layers at a time, or embedding and head, and
    reduces a layer's gradient in float32; ZeRO-3 gathers up to 1e9 elements.
    """
    if setting.ranks == 1:
        return 0
    if setting.held == "ddp":
        return 4 * (shape.parameters if setting.adapters is None else setting.adapters)
    element = ELEMENT[setting.arithmetic]
    if setting.held == "fsdp":
        return element * (2 * shape.layer + 2 * shape.head) + 4 * shape.layer
    gathered = 2 * BUCKET if setting.held == "zero3" else BUCKET
    return element * (min(BUCKET, shape.parameters) + min(gathered, shape.parameters))


def training(shape: Shape, setting: Setting, tokens: int) -> dict[str, float]:
    """Bytes by part, at the most, in an update of several microbatches of so many tokens."""
    half = setting.arithmetic != "float32"
    models = 2 if setting.critic else 1
    found = frozen_and_trained(shape, setting)
    found["reference"] = reference(shape, setting)
    # Each linear layer's weight is cast once for all microbatches of an update.
    found["casts"] = models * 2 * shape.linear if setting.arithmetic == "autocast" else 0
    found["exchange"] = models * exchange(shape, setting)
    found["activations"] = activations(shape, setting, tokens)
    found["logits"] = head(shape, setting, tokens)
    kept = setting.moments + (4 if setting.held.startswith("zero") else 0)
    if not setting.fused and kept:
        found["step"] = 4 * found["optimizer"] / kept
    if setting.held == "zero1" and half:
        found["gradients"] = models * 2 * shape.parameters
    return {part: setting.wide * size for part, size in found.items()}


def frozen_and_trained(shape: Shape, setting: Setting) -> dict[str, float]:
    """Weights, gradients and optimizer of all that a run's module holds."""
    models = 2 if setting.critic else 1
    half = setting.arithmetic != "float32"
    trained = models * (shape.parameters if setting.adapters is None else setting.adapters)
    found = states(setting.held, trained, setting.ranks, half, setting.moments)
    if setting.adapters is not None:  # the frozen policy under them
        whole = setting.held not in ("fsdp", "zero3")
        element = 2 if half and setting.held.startswith("zero") else setting.element
        share = 1 if whole else 1 / setting.ranks
        found["weights"] += models * element * shape.parameters * share
    elif setting.element == 2 and not setting.held.startswith("zero"):
        found = {part: size / 2 for part, size in found.items()}  # bfloat16 throughout
    if setting.offload:
        found["optimizer"] = 0
        found["weights"] *= setting.held != "zero3"
    return found


def reference(shape: Shape, setting: Setting) -> float:
    """Bytes of a frozen policy beside the one that is trained: in the numbers that it computes
    with; its own network with adapters off under LoRA."""
    if not setting.reference or setting.adapters is not None:
        return 0
    if setting.arithmetic == "autocast":  # which leaves embeddings and norms as they are
        halved = shape.linear + (0 if shape.tied else shape.head)
        return 2 * halved + 4 * (shape.parameters - halved)
    element = 4 if setting.arithmetic == "float32" else 2
    share = setting.ranks if setting.held in ("fsdp", "zero3") else 1
    return element * shape.parameters / share


def resting(shape: Shape, setting: Setting) -> float:
    """Bytes that stay while nothing trains: gradients go after each update, but where they live in
    an exchange's buffers."""
    found = frozen_and_trained(shape, setting)
    bound = setting.ranks > 1 and setting.held in ("ddp", "zero2", "zero3")
    gradients = found["gradients"] if bound else 0
    stays = found["weights"] + found["optimizer"] + gradients + reference(shape, setting)
    return setting.wide * stays


def planning(shape: Shape, setting: Setting, tokens: int) -> float:
    """Bytes beside those at rest while GVM takes gradient norms: one layer's pass without gradient
    and the head's tiles."""
    element, stream = ELEMENT[setting.arithmetic], RESIDUAL[setting.arithmetic]
    a_pass = tokens * (4 * element * shape.inner + 4 * stream * shape.width)
    casts = 2 * shape.linear if setting.arithmetic == "autocast" else 0
    found = a_pass + casts + TILES * TILE[setting.device] + 2 * 4 * tokens * shape.width
    return setting.wide * found


def cached_token(shape: Shape, element: int) -> int:
    """Bytes of a token's keys and values in all layers of an engine's cache."""
    return 2 * shape.layers * shape.keys * element
