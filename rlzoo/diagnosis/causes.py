"""Does the engine draw from the policy that is trained? Figures of the gap, and its likely cause.

Gaps are |trainer - engine| log-probs of the same tokens and weights, nats. Causes are told by
evidence: what the configuration says of both sides (`Setting`), what is left of the gap when the
trainer scores the same tokens under a suspicion (`Suspect`, from `rlzoo.diagnosis.suspects`), a
probe at temperature 1, and where in a response the gap lies. What nothing bears out is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 0.1  # nats; tokens further apart are counted
EXACT = 1e-3  # nats; a mean below is rounding of float32
APART = 0.01  # nats; a mean above is more than number formats that are not known explain
BORNE_OUT = 1 / 3  # share of a gap that may be left under a suspicion that explains it
# Mean gap of text, nats, that a number format on either side alone can explain.
SIZES = {"float32": EXACT, "tf32": 0.01, "float16": 0.01, "bfloat16": 0.05, "float8": 0.1}


class Setting(NamedTuple):
    """What is known of both sides, whatever the log-probs say."""

    trainer: str = "float32"  # dtype that the trainer computes in
    weights: str = "float32"  # of the trainer's parameters
    engine: str = "float32"  # dtype that the engine computes in
    cache: str = "auto"  # dtype of the engine's key-value cache; auto: the engine's
    bos: int | None = None  # the tokenizer's begin token
    left_out: str = ""  # keys by which the run itself leaves tokens out of sampling

    @property
    def exact(self) -> bool:
        """Whether both sides compute in float32 throughout."""
        return self.size == EXACT

    @property
    def size(self) -> float:
        """Mean gap of text, nats, that the number formats alone can explain."""
        formats = [self.trainer, self.weights, self.engine]
        formats += [] if self.cache == "auto" else [self.cache]
        return max(SIZES.get(name, SIZES["float8"]) for name in formats)

    @property
    def formats(self) -> str:
        cache = "" if self.cache == "auto" else f" with a cache of {self.cache}"
        return f"the trainer computes in {self.trainer}, the engine in {self.engine}{cache}"


class Suspect(NamedTuple):
    """A suspicion, and the gap that is left under it."""

    name: str  # a key of SENTENCES; or "none", "rounding", "left_out"
    residual: float  # mean |trainer - engine| of the sample's tokens, nats
    value: str = ""  # what fits best: a temperature, a k


class Probe(NamedTuple):
    """What a probe at temperature 1 showed before the first draw."""

    gap: float  # mean |trainer - engine|, nats
    limit: float  # that number formats alone can explain, nats
    found: Sequence[Suspect] = ()  # of `suspects.suspects`, if the gap is more than rounding
    same_weights: bool = False  # whether both sides' weights are known to be equal, by checksum


class Evidence:
    """What is known before the first draw, and what follows from it and the rollouts.

    Attributes:
        setting: what is known of both sides; None without the doctor.
        probe: None where none was asked for.
    """

    def __init__(self, setting: Setting | None = None, probe: Probe | None = None) -> None:
        self.setting, self.probe = setting, probe

    def cause(self, gaps: Sequence[Tensor], found: Sequence[Suspect], temperature: float) -> str:
        """What most likely sets engine and trainer apart; "unknown" if nothing bears a cause out.

        Args:
            gaps: of each rollout, [L] in order of its tokens.
            found: of `rlzoo.diagnosis.suspects.suspects`.
            temperature: of the trainer's log-probs.
        """
        probe, setting = self.probe, self.setting
        apart = None if probe is None or probe.gap <= probe.limit else probe
        if apart is not None and (told := on_probe(apart.found, setting or Setting())) is not None:
            return told
        gaps = [gap.double() for gap in gaps if len(gap)]
        flat = torch.cat([torch.zeros(0), *gaps])
        if not flat.isfinite().all():
            return "log-probs that are not finite"
        mean = float(flat.mean()) if len(flat) else 0.0
        if mean <= EXACT:
            return "none: the difference is rounding"
        if setting is not None and setting.left_out and any(s.name == "left_out" for s in found):
            return (
                f"the sampling settings: {setting.left_out} leaves tokens out, as was allowed, and"
                " the trainer's log-probs are of all tokens"
            )
        if (explained := borne_out(found, setting or Setting(), temperature)) is not None:
            return explained
        if setting is not None and not setting.exact and mean <= size_of(setting, found):
            return f"precision: {setting.formats}, which alone explains means of such a size"
        if apart is not None:
            return (FORWARD if apart.same_weights else WEIGHTS).format(gap=apart.gap)
        if (place := by_place(gaps)) is not None:
            return place
        if setting is None and mean <= APART:
            return "precision: the engine computes in another dtype than the trainer"
        return unknown(probe, setting, found)


SENTENCES = {
    "dropout": "dropout: it is on while the trainer scores, so that two passes over the same tokens"
    " differ (model.lora.dropout, or the dropouts of the model's config.json)",
    "adapters": "the adapters: model.lora is not merged into the weights that the engine holds",
    "precision": "precision: {formats}; where the trainer computes in float32 too, they agree",
    "temperature": "the sampling settings: the engine's log-probs are those of temperature {value},"
    " the trainer's of {temperature:.3g}",
    "top_p": "the sampling settings: the engine's log-probs are those of top_p={value} or so, the"
    " trainer's of all tokens",
    "top_k": "the sampling settings: the engine's log-probs are those of top_k={value}, the"
    " trainer's of all tokens",
    "cap": "the logits: the engine caps them at {value}, the trainer does not",
    "shift": "a shift: the engine's log-probs stand one token too {value}",
    "prompt": "the prompt: the engine saw it {value}",
}
FORWARD = (
    "the forward pass: engine and trainer hold equal weights and compute other log-probs from them"
    " (by {gap:.2g} nats on a probe)"
)
WEIGHTS = (
    "the weights: a weight sync left some of them as they were, or the engine computes another"
    " model from them (a probe of the same tokens differs by {gap:.2g} nats)"
)
NOT_BY_WEIGHTS = (  # causes that importance weights hide, and do not mend
    "a shift",
    "dropout",
    "how a response",
    "the adapters",
    "the forward pass",
    "the logits",
    "the prompt",
    "the weights",
    "unknown",
)
SCALED = "the logits: the engine's are the trainer's divided by {value}"  # on a probe


def gap_figures(gaps: Tensor) -> dict[str, float]:
    """Mean, 99th percentile, largest, and the share of tokens over 0.1 nats; {} for no token.

    Tokens whose gap is no number are left out of these and counted as `logprob_gap/not_finite`,
    which is there only if there are some.
    """
    if not gaps.numel():
        return {}
    count, gaps = gaps.numel(), gaps.double()
    gaps = gaps[gaps.isfinite()]
    odd = {"logprob_gap/not_finite": count - len(gaps)} if len(gaps) < count else {}
    if not len(gaps):
        names = ("mean", "p99", "max", "far")
        return {f"logprob_gap/{name}": math.nan for name in names} | odd
    rank = max(1, round(0.99 * gaps.numel()))
    return {
        "logprob_gap/mean": float(gaps.mean()),
        "logprob_gap/p99": float(gaps.kthvalue(rank).values),
        "logprob_gap/max": float(gaps.max()),
        "logprob_gap/far": float((gaps > FAR).double().mean()),
    } | odd


def borne_out(found: Sequence[Suspect], setting: Setting, temperature: float) -> str | None:
    """The suspicion under which least is left of the gap, if it explains the gap."""
    whole = next((s.residual for s in found if s.name == "none"), 0.0)
    limit = min(BORNE_OUT * whole, max(2 * EXACT, setting.size))
    able = [s for s in found if s.name in SENTENCES and s.residual <= limit]
    if not able:
        return None
    least = min(s.residual for s in able)
    first = next(s for s in able if s.residual <= 2 * least + 1e-6)  # of equals, the simplest
    return SENTENCES[first.name].format(
        value=first.value, temperature=temperature, formats=setting.formats
    )


def on_probe(found: Sequence[Suspect], setting: Setting) -> str | None:
    """As `borne_out`, of a probe, where no sampling has a say."""
    told = borne_out(found, setting, 1.0)
    if told is not None and told.startswith("the sampling settings"):
        value = next(s.value for s in found if s.name == "temperature")
        return SCALED.format(value=value) if "of temperature" in told else None
    return told


def size_of(setting: Setting, found: Sequence[Suspect]) -> float:
    """Mean gap that number formats explain: what is known of them, or what was measured here."""
    measured = [3 * s.residual for s in found if s.name == "rounding" and s.residual < math.inf]
    return max([setting.size, *measured])


def by_place(gaps: Sequence[Tensor]) -> str | None:
    """What a gap says that lies at the first or at the last token of each response alone."""
    long = [gap for gap in gaps if len(gap) > 2]
    if not long:
        return None
    inner = float(torch.cat([gap[1:-1] for gap in long]).mean())
    first = float(torch.stack([gap[0] for gap in long]).mean())
    last = float(torch.stack([gap[-1] for gap in long]).mean())
    if last > 10 * inner and last > 10 * first:
        return "how a response ends: the engine stops at other tokens than the tokenizer's end"
    if first > 10 * inner and first > 10 * last:
        return "the prompt: the engine saw other prompt tokens, or another template"
    return None


def unknown(probe: Probe | None, setting: Setting | None, found: Sequence[Suspect]) -> str:
    """What is left when no cause is borne out, and what has been ruled out."""
    if any(s.name == "left_out" for s in found):
        return (
            "the sampling settings: the engine leaves tokens out (its log-probs are nowhere below"
            " the trainer's), by a top-p, a top-k or both"
        )
    if probe is None:
        return (
            "unknown: a weight sync that failed, another temperature or top-p in the engine, or"
            " another dtype"
        )
    tried = ""
    if found:
        tried = " no temperature, top-p, top-k, cap, shift or dtype of one side explains it, and"
    return (
        f"unknown:{tried} on a probe the weights agree. Look at the sampling settings that the"
        " engine has of its own (penalties, min-p, biases) and at the prompt's tokens"
    )


def not_finite(ours: int, theirs: int, broken: Sequence[str], setting: Setting | None) -> str:
    """What to say of log-probs that are no numbers.

    Args:
        ours, theirs: how many of the trainer's and of the engine's are not finite.
        broken: names of the weights that hold NaN or inf.
    """
    if ours or not theirs:
        what = f"The policy's log-probs are not finite ({ours} tokens of the trainer's, {theirs} of"
        what += " the engine's)"
    else:
        what = f"The engine's log-probs are not finite ({theirs} tokens; the trainer's are)"
    formats = "" if setting is None else f" ({setting.formats})"
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        return (
            f"{what}: {', '.join(broken[:3])}{more} hold NaN or inf. Start from weights that are"
            " numbers: a checkpoint before this one, or model.path and init_from; if training"
            f" broke them, with model.dtype=float32 or a lower algo.optimizer.lr{formats}."
        )
    return (
        f"{what}, though all weights are: the numbers outgrow their format{formats}. Compute in a"
        " wider one: model.dtype=float32 or bfloat16, trainer.precision=32-true or bf16-mixed,"
        " engine.dtype alike."
    )


def verdict(figures: dict[str, float], cause: str, limit: float) -> str:
    """One line for the user.

    Args:
        figures: of `gap_figures`.
        limit: `algo.max_logprob_gap`, mean nats.
    """
    mean = figures["logprob_gap/mean"]
    odd = int(figures.get("logprob_gap/not_finite", 0))
    if odd:
        return f"Engine and trainer cannot be compared: {odd} log-probs are not finite."
    word = "agree" if mean <= EXACT else "differ a little" if mean <= limit else "differ"
    numbers = (
        f"mean {mean:.2g}, p99 {figures['logprob_gap/p99']:.2g}, max"
        f" {figures['logprob_gap/max']:.2g} nats a token, {100 * figures['logprob_gap/far']:.3g}%"
        f" of tokens over {FAR}"
    )
    mended = mean > EXACT and not cause.startswith(NOT_BY_WEIGHTS)
    mend = " algo.tis_cap=2 corrects for it." if mended else ""
    reason = "" if mean <= EXACT else f" Likely cause: {cause}.{mend}"
    return f"Engine and trainer {word}: {numbers}.{reason}"
