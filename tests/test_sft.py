"""Supervised training obeys the house's laws: one mean over an update's tokens, limits, ends."""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from rlzoo.algos import SFT
from rlzoo.data.sft import SFTDataModule
from rlzoo.errors import UserError
from rlzoo.launch.summary import read_metrics
from rlzoo.ranks.exchange import world
from rlzoo.report.ledger import Limits
from rlzoo.types import Prompt
from tests import warm
from tests.zoo import calm_model, flat

PAIRS = [  # token ids, so that lengths are known: 1 to 8 tokens of solution
    (tuple(range(2, 4 + i % 3)), tuple((5 + 7 * i + j) % 40 for j in range(i + 1)))
    for i in range(8)
]


class Tokenizer:
    """Of a letter a token."""

    chat_template, eos_token_id, pad_token_id, name_or_path = "yes", 0, 1, "letters"

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[2 + ord(letter) % 30 for letter in text] for text in texts]}


def data_of(pairs, val=(), **changes) -> SFTDataModule:
    ids = lambda prompt: tuple(2 + ord(x) % 30 for x in prompt.question)  # noqa: E731
    encode = lambda prompts, _, __: [replace(p, token_ids=ids(p)) for p in prompts]  # noqa: E731
    template = SimpleNamespace(encode=encode)
    source = SimpleNamespace(template=template, load=lambda split: list(val))
    options = {"batch_size": 4, "updates_per_step": 1, "corpus": pairs} | changes
    return SFTDataModule(source, Tokenizer(), **options)


def module(world_size: int = 1) -> SFT:
    algo = SFT(calm_model, lambda p: torch.optim.SGD(p, lr=1.0))
    algo.configure_model()
    algo.trainer = SimpleNamespace(world_size=world_size, precision_plugin=Precision())
    return algo


def sft_gradient(
    budget: int, ranks: int = 1, rank: int = 0, pairs=PAIRS, padded: bool = False
) -> torch.Tensor:
    """This rank's gradient of an update of all pairs in microbatches of so many tokens."""
    algo, update = module(ranks), data_of(pairs).update(pairs, budget, padded, rank, ranks)
    for part in update.parts():
        algo.training_step(part, 0).backward()
    return torch.cat([p.grad.flatten() for p in algo.parameters()])


def rank_gradient() -> torch.Tensor:
    """Of one process of several: averaged over them, that of one alone (test_two_ranks.py)."""
    rank, size = world()
    return sft_gradient(20, size, rank)


def rank_loss() -> float:
    """Of two batches, the second of one example, so that a second rank has no row of it."""
    (first, second), data = (PAIRS[:3], PAIRS[3:4]), data_of(PAIRS)
    updates = [data.update(pairs, 99, False, *world()) for pairs in (first, second)]
    return module().mean_loss(flat(updates))


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_gradient_is_one_mean_over_tokens_whatever_the_split():
    """Accumulation averaged the means of microbatches: 89% off where lengths are 1 to 8."""
    whole = sft_gradient(999)
    algo = module()
    (batch,) = data_of(PAIRS).update(PAIRS, 999).microbatches
    total = sum(float(algo.forward_scores(batch)["logprobs"].sum()) for _ in (1,))
    assert algo.mean_loss([batch]) == pytest.approx(-total / 36, rel=1e-5)
    assert whole.norm() > 1e-3
    for budget in (1, 20, 40):
        assert len(data_of(PAIRS).update(PAIRS, budget).microbatches) > 1
        assert apart(sft_gradient(budget), whole) < 1e-5
        assert apart(sft_gradient(budget, padded=True), whole) < 1e-5
    averaged = sum(sft_gradient(20, 3, rank) for rank in range(3)) / 3
    assert apart(averaged, whole) < 1e-5


def test_ranks_without_an_example_train_on_nothing():
    """Fewer examples than ranks."""
    few = PAIRS[2:4]
    averaged = sum(sft_gradient(99, 4, rank, few) for rank in range(4)) / 4
    assert apart(averaged, sft_gradient(99, pairs=few)) < 1e-5


def test_the_loss_of_no_batch_is_not_a_number():
    assert module().mean_loss([]) != module().mean_loss([])


def fed(data: SFTDataModule, budget: int = 999) -> list[list[int]]:
    """Solution lengths of each update of the next step."""
    updates = list(data.updates(budget, padded=False))
    assert [update.last for update in updates] == [False] * (len(updates) - 1) + [True]
    return [
        sorted(n for batch in update.microbatches for n in batch.response_mask.sum(-1).tolist())
        for update in updates
    ]


def test_a_resumed_loader_goes_on_where_it_was_and_small_microbatches_feed_the_same():
    whole = data_of(PAIRS, batch_size=3, updates_per_step=8)
    expected = fed(whole) + fed(whole)
    first = data_of(PAIRS, batch_size=3, updates_per_step=8)
    begun = fed(first)
    second = data_of(PAIRS, batch_size=3, updates_per_step=8)
    second.load_state_dict(first.state_dict())
    assert begun + fed(second) == expected
    assert fed(data_of(PAIRS, batch_size=3, updates_per_step=8), budget=1) == expected[:8]


def test_what_is_too_long_is_refused_or_dropped_with_a_count(caplog):
    texts = [("ab", "abc"), ("abcdef", "abc"), ("ab", "abcdefgh")]
    limits = {"max_prompt_tokens": 4, "max_response_tokens": 8}
    with pytest.raises(
        UserError, match="Example 1 of the corpus has 6 prompt tokens.*max_prompt_tok"
    ):
        data_of(texts, **limits).setup("fit")
    with pytest.raises(
        UserError, match="Example 0 .* a solution of 9 tokens.*max_response_tokens=8"
    ):
        data_of(texts[2:], **limits).setup("fit")
    data = data_of(texts, on_too_long="drop", **limits)
    data.setup("fit")
    assert data.corpus == texts[:1] and "2 of 3 examples of the corpus dropped" in caplog.text
    assert "fewer than datamodule.batch_size=4" in caplog.text
    assert fed(data) == [[4, 4, 4, 4]]
    with pytest.raises(UserError, match="No example of the corpus is left"):
        data_of(texts[1:], on_too_long="drop", **limits).setup("fit")


@pytest.mark.parametrize(
    "pairs, message",
    [([("a", " ")], "Example 0 .* empty solution"), ([], "No example of the corpus")],
)
def test_a_corpus_that_teaches_nothing_is_refused(pairs, message):
    with pytest.raises(UserError, match=message):
        data_of(pairs).setup("fit")


def test_prompts_without_solutions_have_no_validation_loss(caplog):
    bare = Prompt("p", "q", "a")
    data = data_of(PAIRS, val=[bare])
    data.setup("fit")
    assert (
        data.validation(99, False) == []
        and "1 of 1 validation prompts have no worked" in caplog.text
    )


def test_what_is_validated_on_and_trained_on_is_told_by_the_tokens_of_its_prompt(caplog):
    val = [Prompt("x", "ab", "a", solution="abc"), Prompt("y", "cd", "a", solution="abc")]
    data_of([("ab", "other"), ("ef", "abc")], val=val, batch_size=2).setup("fit")
    assert "1 of 2 validation prompts are also trained on: val/loss" in caplog.text
    caplog.clear()
    data_of([("ef", "abc"), ("gh", "abc")], val=val, batch_size=2).setup("fit")
    assert "also trained on" not in caplog.text


# --- whole runs -----------------------------------------------------------------------------

SMALL = ("algo=sft", "num_threads=1", "logger=csv", "data.num_train=16", "data.num_val=4")
SMALL += ("datamodule.batch_size=4", "datamodule.updates_per_step=2", "lr=1e-3")


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "limits.max_updates"),
        (("limits.max_seconds=60",), "algo.scheduler.num_training_steps reads it"),
        (("algo.scheduler=null",), "limits.max_updates or limits.max_seconds"),
        (("limits.max_updates=2", "replay=somewhere"), "replay=somewhere would do nothing"),
        (("limits.max_updates=2", "datamodule.max_response_tokens=5"), "max_response_tokens=5"),
    ],
)
def test_a_supervised_run_that_cannot_go_well_is_refused(options, message, tmp_path):
    assert message in warm.refused(tmp_path, *SMALL, *options, small=False)


def test_a_supervised_run_passes_its_warm_up_and_a_resume_is_the_same(tmp_path):
    schedule = ("algo.scheduler.num_warmup_steps=2", "algo.scheduler.num_training_steps=8")
    warm.passed(tmp_path / "whole", *SMALL, *schedule, "limits.max_updates=8", small=False)
    rows = read_metrics(tmp_path / "whole" / "metrics.csv")
    assert [row["updates"] for row in rows] == ["2", "4", "6", "8"]
    assert float(rows[0]["lr"]) > float(rows[1]["lr"]) > float(rows[3]["lr"])  # risen, then falling
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["stopped_by"] == "limits.max_updates=8"
    warm.passed(tmp_path / "half", *SMALL, *schedule, "limits.max_updates=4", small=False)
    more = ("limits.max_updates=8", "ckpt_path=last")
    warm.passed(tmp_path / "half", *SMALL, *schedule, *more, small=False)
    resumed = read_metrics(tmp_path / "half" / "metrics.csv")
    same = ("updates", "loss", "val/loss", "lr")
    assert [[row[k] for k in same] for row in resumed] == [[row[k] for k in same] for row in rows]


def test_a_limit_that_will_be_overshot_is_said(caplog):
    limits = Limits(max_updates=1)
    data_of(PAIRS, updates_per_step=1).check_limits(limits)
    assert not caplog.text
    data_of(PAIRS, updates_per_step=50).check_limits(limits)
    assert (
        "limits.max_updates=1 is no multiple" in caplog.text
        and "it makes 50 updates" in caplog.text
    )


def test_a_schedule_that_must_know_its_length_is_refused_without_one():
    endless = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=None)
    with pytest.raises(UserError, match="algo.scheduler.T_max is null.*limits.max_updates"):
        SFT(calm_model, lambda p: torch.optim.SGD(p, lr=1.0), endless)


class Endless(Sequence):
    """Examples that are made as they are asked for, one of them too long."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> tuple[str, str]:
        return "1 + 1?", "2 " * (200 if index == 5 else 1)


def test_a_corpus_without_end_begins_at_once_and_is_looked_at_as_it_is_drawn():
    data = data_of(Endless(), max_prompt_tokens=64, max_response_tokens=32)
    data.setup("fit")
    assert data.fingerprint()["corpus"]["count"] == 10**9
    data.update([data.corpus[i] for i in range(4)], 99)
    with pytest.raises(
        UserError, match="solution of .* tokens, over datamodule.max_response_tokens=32"
    ):
        data.update([data.corpus[i] for i in range(4, 8)], 99)
