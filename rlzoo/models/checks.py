"""What a loaded policy computes, compared with the model's own `forward` on a few tokens.

One comparison finds logits that are changed after the head in a way that rlzoo does not know,
noise that is on in training, attention to later tokens, and log-probs that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlzoo.errors import UserError
from rlzoo.models.gather import as_forward, is_partitioned
from rlzoo.models.limits import longest_sequence
from rlzoo.models.logits import backbone_of, transform_of, vocabulary_size
from rlzoo.models.tiles import Head

TOKENS = 16  # of the sequence that is compared
TOLERANCE = 1e-4  # nats, where log-probs are above -10; grows with the largest one
HALF_TOLERANCE = 2**-5  # the same in half precision
ON_CPUS = ("eager", "sdpa", "packed")  # attentions that run anywhere
LOGIT_WORDS = ("logit", "lm_head", "scal", "multipl", "softcap")  # in keys of a configuration


@torch.no_grad()
def check_policy(policy: PreTrainedModel, source: str) -> None:
    """Refuses a model whose log-probs rlzoo would not get as its own `forward` has them.

    Two passes over a few tokens. Collective where ZeRO-3 holds the model in parts.

    Args:
        source: what it was loaded from, as the user wrote it: "model.path=...".

    Raises:
        UserError: the family's name, what differs, and what to choose.
    """
    if policy.get_output_embeddings() is None:
        raise UserError(
            f"{source}: {type(policy).__name__} has no output head that transformers knows of"
            " (get_output_embeddings), so rlzoo cannot take its log-probs. Choose a causal language"
            " model whose head is one linear layer."
        )
    ids = probe_ids(policy)
    longer = torch.cat([ids, ids.flip(1)], dim=1)  # what follows must change nothing
    with mode(policy, training=False):
        own = own_logprobs(policy, ids, source)
    with mode(policy, training=True):
        trained = rlzoo_logprobs(policy, longer, source)[: len(own)]
    if not gap(policy, trained, own) <= 1:
        raise UserError(f"{source}: {problem(policy, ids, longer, own, source)}")


def can_be_checked(policy: PreTrainedModel) -> bool:
    """Whether a pass can be made where the model is now: whole, with an attention of that place."""
    parameter = next(policy.parameters())
    attention = getattr(policy.config, "_attn_implementation", None) or "eager"
    return not is_partitioned(parameter) and (
        attention in ON_CPUS or parameter.device.type != "cpu"
    )


def probe_ids(policy: PreTrainedModel) -> Tensor:
    """[1, S] token ids spread over the vocabulary, without those that a configuration names."""
    head = vocabulary_size(policy.get_output_embeddings())
    size = min(head, getattr(policy.config.get_text_config(), "vocab_size", None) or head)
    named = {v for k, v in policy.config.to_dict().items() if "token" in k and isinstance(v, int)}
    allowed = np.setdiff1d(np.arange(size), list(named))
    longest = longest_sequence(policy.config) or 2 * TOKENS
    draw = np.random.Generator(np.random.Philox(key=1))
    ids = draw.choice(allowed, (1, max(1, min(TOKENS, longest // 2))))
    return torch.from_numpy(ids).to(next(policy.parameters()).device)


# --- two ways to the same log-probs --------------------------------------------------------------


def own_logprobs(policy: PreTrainedModel, ids: Tensor, source: str) -> Tensor:
    """[S, V] log-probs of the model's own forward.

    Raises:
        UserError: it cannot be called, or what it makes is not finite.
    """
    with explained(policy, source, "its own forward"):
        logits: Tensor = policy(input_ids=ids, use_cache=False).logits[0].float()
    if not logits.isfinite().all():
        dtype = str(next(policy.parameters()).dtype).removeprefix("torch.")
        mend = (
            "Its activations leave the range of float16: take model.dtype=bfloat16 or float32."
            if dtype == "float16"
            else "Its weights or its config.json are broken: compare them with the original's."
        )
        raise UserError(
            f"{source}: the log-probs of {type(policy).__name__} are not finite under"
            f" model.dtype={dtype}, so nothing could be drawn or trained. {mend}"
        )
    return logits.log_softmax(-1)


def rlzoo_logprobs(policy: PreTrainedModel, ids: Tensor, source: str) -> Tensor:
    """[S, V] log-probs by backbone, head and transform, as `rlzoo.models.logprobs` takes them."""
    with explained(policy, source, "backbone and head apart"):
        hidden = backbone_of(policy)(input_ids=ids, use_cache=False).last_hidden_state[0]
        head = policy.get_output_embeddings()
        logits = as_forward(
            head, lambda states: Head.of(head, 1.0, transform_of(policy)).logits(states), hidden
        )
    return logits.log_softmax(-1)


def gap(policy: PreTrainedModel, one: Tensor, other: Tensor) -> float:
    """How far log-probs of the same tokens are apart, in tolerances: of the worst token; of the
    median one in half precision, where rounding may send a token to another expert. NaN stays."""
    if one.shape != other.shape:
        return float("inf")
    gaps = (one - other).abs().amax(-1)
    half = next(policy.parameters()).dtype != torch.float32
    limit = (HALF_TOLERANCE if half else TOLERANCE) * max(1.0, float(other.abs().max()) / 10)
    return float(gaps.median() if half else gaps.max()) / limit


@contextmanager
def mode(policy: PreTrainedModel, training: bool) -> Iterator[None]:
    """Within it, the model trains or is evaluated; afterwards each part is as it was."""
    before = {module: module.training for module in policy.modules()}
    policy.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


# --- what is wrong -------------------------------------------------------------------------------


@contextmanager
def explained(policy: PreTrainedModel, source: str, what: str) -> Iterator[None]:
    """Makes whatever a family's code raises a message that names the family."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        attention = policy.config._attn_implementation
        mend = "Choose another causal language model."
        if attention not in ("eager", "sdpa", None):
            mend = f"Take model.attention=sdpa or eager in the place of {attention}."
        raise UserError(
            f"{source}: {type(policy).__name__} cannot be run on token ids alone by {what}"
            f" ({type(error).__name__}: {said}), so rlzoo cannot train it. {mend}"
        ) from error


def problem(policy: PreTrainedModel, ids: Tensor, longer: Tensor, own: Tensor, source: str) -> str:
    """Why log-probs are not those of the model's own forward."""
    family = type(policy).__name__
    with mode(policy, training=False):
        same = rlzoo_logprobs(policy, ids, source)
        if not gap(policy, same, own) <= 1:
            return head_problem(policy, same, own)
        before_others = rlzoo_logprobs(policy, longer, source)[: len(own)]
    if not gap(policy, before_others, own) <= 1:
        return (
            f"the log-probs of {family} change with tokens that come later, so it is no causal"
            " language model. Choose a decoder; a masked language model is one only with"
            " is_decoder=true in its config.json."
        )
    return (
        f"the log-probs of {family} differ between training and evaluation although all dropout is"
        " off, so the policy that is trained would not be the one that drew. Choose another model."
    )


def head_problem(policy: PreTrainedModel, same: Tensor, own: Tensor) -> str:
    config = policy.config.get_text_config().to_dict()
    said = {k: v for k, v in config.items() if any(w in k for w in LOGIT_WORDS) and v is not None}
    listed = ", ".join(f"{key}={value}" for key, value in said.items()) or "nothing of it"
    off = (
        f"are of {same.shape[-1]} tokens where its own forward has {own.shape[-1]}"
        if same.shape != own.shape
        else f"differ from its own forward's by {float((same - own).abs().max()):.3g} nats"
    )
    return (
        f"the log-probs that rlzoo takes from backbone and head of {type(policy).__name__} {off}:"
        " this family makes its logits in a way that rlzoo does not know (its config.json says"
        f" {listed}). Another model would be trained; choose another family."
    )
