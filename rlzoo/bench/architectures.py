"""`python -m rlzoo.bench architectures`: every causal family of transformers, as a tiny model.

Each is loaded, scored, drawn from, trained for an update, exported and resumed, against the model's
own `forward`; or rlzoo refuses it, by name. The table goes to docs/architectures.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rlzoo.bench._tiny_models import families, tiny_model
from rlzoo.engines.base import Request, SamplingParams
from rlzoo.engines.decoding import CachedDecoder
from rlzoo.engines.transformers import TransformersEngine
from rlzoo.errors import UserError
from rlzoo.models.checks import mode
from rlzoo.models.gather import load_whole
from rlzoo.models.gradnorms import head_gradient_norms
from rlzoo.models.loading import some
from rlzoo.models.logits import transform_of
from rlzoo.models.logprobs import response_hidden, response_scores, token_scores
from rlzoo.models.policy import load_policy
from rlzoo.types import BatchRow, RolloutBatch, collate

LIMIT = 1e-4  # nats between rlzoo's log-prob of a token and the model's own forward
LENGTHS = (17, 5, 11)  # tokens of the sequences that are scored
SECONDS = 300  # for one family
PARAMS = SamplingParams(temperature=0.8, max_response_tokens=9)


class Row(NamedTuple):
    """What came of a family. `outcome`: works, refused, fails, or none where there is no model."""

    family: str
    model: str
    outcome: str
    attention: str = ""
    engine: str = ""  # cache, or whole passes
    gap: float | None = None  # nats, the worst token of scoring and drawing
    note: str = ""


class Wrong(Exception):
    """A family is trained as another model, or not at all, and nobody says so."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench architectures")
    parser.add_argument("families", nargs="*", help="model types of transformers; all by default")
    asked = parser.parse_args(argv).families
    if unknown := sorted(set(asked) - set(families())):
        raise UserError(f"transformers has no causal family {', '.join(unknown)}.")
    rows = list(walk(asked or families()))
    print(table(rows))
    print(json.dumps(Counter(row.outcome for row in rows)))


def walk(names: Sequence[str]) -> Iterator[Row]:
    for name in names:
        told = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, quiet(told):
            row = examined(name, Path(folder))
        yield row


@contextlib.contextmanager
def quiet(told: io.StringIO) -> Iterator[None]:
    """Libraries' words go into a string, and a family has its time."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    level, before = transformers.logging.get_verbosity(), signal.signal(signal.SIGALRM, late)
    transformers.logging.set_verbosity_error()
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(told):
            with contextlib.redirect_stderr(told):
                warnings.simplefilter("ignore")
                yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        transformers.logging.set_verbosity(level)


def examined(name: str, folder: Path) -> Row:
    """Tries everything with a tiny model of a family."""
    try:
        model = tiny_model(name)
        model.save_pretrained(folder / "model")
    except Exception as error:
        return Row(name, "", "none", note=short(error))
    kind = type(model).__name__
    try:
        return examine(name, kind, folder)
    except UserError as error:
        return Row(name, kind, "refused", note=short(error, folder))
    except Exception as error:
        return Row(name, kind, "fails", note=f"{type(error).__name__}: {short(error, folder)}")


def examine(name: str, kind: str, folder: Path) -> Row:
    """The row of a family that works.

    Raises:
        UserError: rlzoo refuses it.
        Wrong: it says nothing, and is wrong.
    """
    load = partial(load_policy, str(folder / "model"))
    policy = load()
    batch = sequences_of(policy)
    gap = scoring_gap(policy, batch)
    check_norm(policy, batch)
    engine = TransformersEngine(load, eos_token_ids=[0], pad_token_id=1, device="cpu")
    engine.load_weights(policy.named_parameters(), 0)
    gap = max(gap, drawing_gap(policy, engine))
    if not gap <= LIMIT:
        raise Wrong(f"log-probs are {gap:.2g} nats off the model's own forward")
    idle = check_training(policy, batch, load, folder)
    note = f"without gradient: {some(idle)}" if idle else ""
    cached = engine.decoder is CachedDecoder
    attention = policy.config._attn_implementation or "eager"
    return Row(name, kind, "works", attention, "cache" if cached else "whole passes", gap, note)


def sequences_of(policy: PreTrainedModel) -> RolloutBatch:
    draw = torch.Generator().manual_seed(7)
    ids = [torch.randint(2, 60, (length,), generator=draw).tolist() for length in LENGTHS]
    return collate([BatchRow(row[:1], torch.tensor(row[1:])) for row in ids], 1)


@torch.no_grad()
def own_logprobs(policy: PreTrainedModel, ids: Sequence[int], temperature: float) -> Tensor:
    """[S - 1] log-probs of every token but the first, by the model's own forward alone."""
    whole = torch.tensor([list(ids)])
    with mode(policy, training=False):
        logits: Tensor = policy(input_ids=whole, use_cache=False).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]


@torch.no_grad()
def scoring_gap(policy: PreTrainedModel, batch: RolloutBatch) -> float:
    scores = response_scores(policy.train(), batch, 0.8).logprobs
    gaps = []
    for row, length in enumerate(LENGTHS):
        own = own_logprobs(policy, batch.input_ids[row, :length].tolist(), 0.8)
        gaps.append(float((scores[row, : length - 1] - own).abs().max()))
    return max(gaps)


def drawing_gap(policy: PreTrainedModel, engine: TransformersEngine) -> float:
    draw = torch.Generator().manual_seed(8)
    prompts = [tuple(torch.randint(2, 60, (n,), generator=draw).tolist()) for n in (3, 14, 8)]
    wanted = [Request(p, tuple(range(10 * i, 10 * i + 3))) for i, p in enumerate(prompts)]
    gaps = []
    for prompt, group in zip(prompts, engine.generate(wanted, PARAMS, 0), strict=True):
        for response in group:
            ids = [*prompt, *response.token_ids.tolist()]
            own = own_logprobs(policy, ids, PARAMS.temperature)[len(prompt) - 1 :]
            gaps.append(float((response.logprobs - own).abs().max()))
    return max(gaps)


def check_norm(policy: PreTrainedModel, batch: RolloutBatch) -> None:
    """The closed form of GVM against autograd, at the head."""
    head, transform = policy.get_output_embeddings(), transform_of(policy)
    hidden = response_hidden(policy, batch).detach()
    tokens = batch.response_ids[batch.response_mask]
    scores = token_scores(hidden, head, tokens, 0.8, transform=transform)
    (gradient,) = torch.autograd.grad(scores.logprobs.sum(), [head.weight])
    bias = getattr(head, "bias", None)
    (found,) = head_gradient_norms([hidden], head.weight.detach(), [tokens], 0.8, bias, transform)
    if not (found / gradient.norm() - 1).abs() <= 1e-3:
        raise Wrong(f"the head's gradient norm is {float(found):.4g}, not {gradient.norm():.4g}")


def check_training(
    policy: PreTrainedModel,
    batch: RolloutBatch,
    load: partial[PreTrainedModel],
    folder: Path,
) -> list[str]:
    """An update changes weights; what is exported, or resumed from a checkpoint, is the same.

    Returns:
        Names of weights that got no gradient.
    """
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    update(policy, batch, optimizer)
    idle = [name for name, p in trained.items() if p.grad is None]
    moved = [name for name, p in trained.items() if not torch.equal(p, before[name])]
    if len(moved) + len(idle) < len(before) / 2 or not all(
        p.isfinite().all() for p in policy.parameters()
    ):
        raise Wrong(f"an update moved {len(moved)} of {len(before)} weights, or left NaN")
    scores = response_scores(policy, batch, 1.0).logprobs
    policy.save_pretrained(folder / "exported")
    exported = load_policy(str(folder / "exported")).train()
    if not torch.equal(response_scores(exported, batch, 1.0).logprobs, scores):
        raise Wrong("what is exported is not what was trained")
    torch.save([policy.state_dict(), optimizer.state_dict()], folder / "checkpoint")
    weights, state = torch.load(folder / "checkpoint")
    resumed = load().train()
    load_whole(resumed, weights)
    optimizer_2 = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    optimizer_2.load_state_dict(state)
    for model, steps in ((policy, optimizer), (resumed, optimizer_2)):
        update(model, batch, steps)
    pairs = zip(policy.parameters(), resumed.parameters(), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise Wrong("a resumed policy trains to other weights")
    return idle


def update(policy: PreTrainedModel, batch: RolloutBatch, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (-response_scores(policy.train(), batch, 1.0).logprobs.mean()).backward()
    optimizer.step()


def short(error: Exception, folder: Path | None = None) -> str:
    said = " ".join(str(error).split())
    if folder is not None:
        said = said.replace(f"model.path={folder / 'model'}: ", "").replace(str(folder), "FOLDER")
    return said[:240]


def table(rows: Sequence[Row]) -> str:
    """In Markdown, families that work first."""
    titles = ("family", "model", "result", "attention", "engine=transformers", "worst gap, nats")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    order = {"works": 0, "refused": 1, "none": 2, "fails": 3}
    for row in sorted(rows, key=lambda r: (order[r.outcome], r.family)):
        gap = f"{row.gap:.0e}" if row.gap is not None else ""
        said = row.outcome if not row.note else f"{row.outcome}: {row.note.replace('|', '/')}"
        lines.append(
            f"| {row.family} | {row.model} | {said} | {row.attention} | {row.engine} | {gap} |"
        )
    return "\n".join(lines)
