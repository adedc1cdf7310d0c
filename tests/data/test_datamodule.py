import pytest
import torch

from rlzoo.allocators import Allocator, Dynamic, GVMBudgets, Uniform
from rlzoo.data import datamodule
from rlzoo.data.arithmetic import ArithmeticPrompts
from rlzoo.data.datamodule import RolloutDataModule
from rlzoo.data.draw import Drawer
from rlzoo.errors import UserError
from rlzoo.models.policy import load_tokenizer
from rlzoo.types import Rollouts

TOKENIZER = load_tokenizer("tiny")


def make(allocator: Allocator | None = None, **sizes: int) -> RolloutDataModule:
    data = RolloutDataModule(
        ArithmeticPrompts(num_train=50, num_val=4),
        TOKENIZER,
        allocator or Uniform(),
        **{"prompts_per_epoch": 16, "responses_per_prompt": 4, "responses_per_step": 16} | sizes,
    )
    data.setup("fit")
    return data


class Draws(Drawer):
    """A drawer without an engine: it keeps what it is asked for."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, list[str], list[int]]] = []

    def draw(
        self, prompts: list, budgets: list[int], stream: str, rollout_step: int, round_: int = 0
    ) -> Rollouts:
        self.draws.append((rollout_step, [prompt.id for prompt in prompts], budgets))
        chosen = [(p, n) for p, n in zip(prompts, budgets, strict=True) if n]
        num = sum(budgets)
        return Rollouts(
            prompts=[p for p, _ in chosen],
            group_ids=torch.arange(len(chosen)).repeat_interleave(
                torch.tensor([n for _, n in chosen], dtype=torch.long)
            ),
            responses=[torch.zeros(1, dtype=torch.long)] * num,
            sampler_logprobs=[torch.zeros(1)] * num,
            truncated=torch.zeros(num, dtype=torch.bool),
            rewards=torch.zeros(num),
            verdicts=torch.zeros(num, dtype=torch.int8),
            policy_version=0,
            rollout_step=rollout_step,
        )


def draw_step(data: RolloutDataModule, drawer: Drawer) -> Rollouts:
    """The next rollout step, as the loop draws it."""
    rollouts = drawer.draw_in_rounds(*data.next_prompts(), data)
    data.step_drawn()
    return rollouts


def begin_epoch(data: RolloutDataModule, budgets: list[int]) -> None:
    data.set_budgets({p.id: n for p, n in zip(data.shard(), budgets, strict=True)})


RAGGED = [40, 0, 1, 3, 0, 2, 2, 0, 0, 1, 1, 4, 4, 3, 3, 0]  # the first fills two and a half steps


@pytest.mark.parametrize("budgets", [[4] * 16, RAGGED, RAGGED[::-1]])
def test_an_epoch_draws_exactly_its_budgets_in_whole_groups(budgets):
    data, drawer = make(), Draws()
    begin_epoch(data, budgets)
    order = [prompt.id for prompt in data.shard()]
    sizes = [len(draw_step(data, drawer)) for _ in range(data.steps_per_epoch)]
    assert sum(sizes) == 64 and not data.epoch_in_progress()
    drawn = {i: n for _, ids, counts in drawer.draws for i, n in zip(ids, counts, strict=True)}
    assert drawn == {i: n for i, n in zip(order, budgets, strict=True) if i in drawn}
    for step in range(4):  # what one step overshoots the next gives back
        assert 16 * (step + 1) <= sum(sizes[: step + 1]) < 16 * (step + 1) + max(budgets)


def test_a_pass_shows_every_prompt_at_most_once_and_the_next_another_order():
    data = make()
    shards = []
    for _ in range(6):
        shards.append([prompt.id for prompt in data.shard()])
        data.epoch += 1
    first_pass = sum(shards[:3], [])
    assert len(set(first_pass)) == 48  # of 50: two sit out
    assert sum(shards[3:], []) != first_pass


def test_a_data_set_is_put_in_order_once_an_epoch_and_not_at_every_rollout_step(monkeypatch):
    data, orders = make(), []
    seeded = datamodule.derive_seed
    monkeypatch.setattr(datamodule, "derive_seed", lambda *k: orders.append(k) or seeded(*k))
    for _ in range(2):
        begin_epoch(data, [4] * 16)
        for _ in range(data.steps_per_epoch):
            draw_step(data, Draws())
    assert len(orders) == 2 and data.epoch == 2


@pytest.mark.parametrize("budgets", [[4] * 15 + [5], [4] * 15 + [3], [-1, 9] + [4] * 14])
def test_budgets_of_another_sum_or_below_zero_are_refused(budgets):
    with pytest.raises(ValueError):
        begin_epoch(make(), budgets)


def test_a_restored_datamodule_draws_what_the_first_would_have_drawn():
    data, other = make(), make()
    begin_epoch(data, RAGGED[::-1])
    draw_step(data, Draws())
    other.load_state_dict(data.state_dict())
    found = []
    for module in (data, other):
        found.append(Draws())
        while module.epoch_in_progress():
            draw_step(module, found[-1])
    assert found[0].draws == found[1].draws and found[1].draws


def test_a_checkpoint_of_other_sizes_is_refused_with_the_mend():
    state = make().state_dict()
    with pytest.raises(UserError, match="init_from=CHECKPOINT"):
        make(responses_per_prompt=8).load_state_dict(state)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="64 responses, not a multiple of responses_per_step=24"):
        make(responses_per_step=24)


@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 20}])
def test_truncated_sampling_has_to_be_asked_for_twice(truncation):
    with pytest.raises(UserError, match="allow_truncated_sampling=true"):
        make(**truncation)
    data = make(**truncation, allow_truncated_sampling=True)
    assert data.params._asdict().items() >= truncation.items()


def test_more_prompts_an_epoch_than_there_are_is_refused():
    with pytest.raises(UserError, match="prompts_per_epoch=64, but the data has only 50"):
        make(prompts_per_epoch=64)


class Alternating(Draws):
    """Makes every second prompt of a draw right once, so that its group has contrast."""

    def draw(self, *args: object) -> Rollouts:
        rollouts = super().draw(*args)
        rollouts.rewards[(rollouts.group_ids % 2 == 0) & (torch.arange(len(rollouts)) % 4 == 0)] = (
            1.0
        )
        return rollouts


def test_dynamic_sampling_replaces_prompts_without_contrast_by_others_until_none_is_left():
    data, drawer = make(Dynamic(max_rounds=9)), Alternating()
    begin_epoch(data, [4] * 16)
    rollouts = draw_step(data, drawer)
    rounds = [ids for _, ids, _ in drawer.draws]
    assert [len(ids) for ids in rounds] == [4, 2, 1]  # half of each round is replaced
    ids = sum(rounds, [])
    assert len(set(ids)) == len(ids) == len(rollouts.prompts)
    assert [prompt.id for prompt in rollouts.prompts] == ids
    assert torch.bincount(rollouts.group_ids).tolist() == [4] * 7
    assert rollouts.rounds == 3
    assert data.next_prompt == 4  # the others are not taken from the epoch's order


def test_dynamic_sampling_stops_after_its_rounds_and_keeps_what_it_drew():
    data, drawer = make(Dynamic(max_rounds=2)), Draws()  # no group ever has contrast
    begin_epoch(data, [4] * 16)
    assert len(draw_step(data, drawer)) == 16 + 16
    assert len(drawer.draws) == 2


def test_dynamic_sampling_draws_the_same_again_from_the_same_seed():
    draws = []
    for seed in (0, 0, 1):
        data, drawer = make(Dynamic(max_rounds=3), seed=seed), Draws()
        begin_epoch(data, [4] * 16)
        draw_step(data, drawer)
        draws.append(drawer.draws)
    assert draws[0] == draws[1] != draws[2]


def test_a_replay_has_no_use_for_a_sampler(tmp_path):
    with pytest.raises(UserError, match="sampler=uniform"):
        make(GVMBudgets(), replay=str(tmp_path))
    with pytest.raises(UserError, match=f"replay={tmp_path} is neither"):
        make(replay=str(tmp_path))


def test_validation_prompts_that_are_trained_on_are_named(caplog):
    data = make()
    data.train_prompts = []
    data.source.load = lambda split: ArithmeticPrompts(num_train=50).load("train")
    data.setup("fit")
    assert "50 of 50 validation prompts are also trained on" in caplog.text
