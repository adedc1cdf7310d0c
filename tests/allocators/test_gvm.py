import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlzoo.allocators.base import round_to_total
from rlzoo.allocators.gvm import GVMBudgets, gvm_weights
from rlzoo.allocators.uniform import Uniform
from rlzoo.errors import UserError

EIGHTHS = [i / 8 for i in range(1, 9)]
VECTORS = [
    ([1, 2, 0, 4], [0.5, 0.25, 0, 1], 32, [1.41139, 3.96838, 0, 3.99800], [5, 13, 0, 14]),
    (
        [10] * 8,
        EIGHTHS,
        64,
        [27.42042, 19.84189, 16.27218, 14.11394, 12.63295, 11.53676, 10.68347, 9.99500],
        [14, 10, 9, 7, 7, 6, 6, 5],
    ),
    (
        [3, 1, 4, 1, 5, 9, 2, 6],
        EIGHTHS,
        64,
        [8.22613, 1.98419, 6.50887, 1.41139, 6.31648, 10.38308, 2.13669, 5.99700],
        [12, 3, 10, 2, 9, 16, 3, 9],
    ),
]


@pytest.mark.parametrize("norms, rates, total, weights, budgets", VECTORS)
def test_proposition_1_has_its_known_values(norms, rates, total, weights, budgets):
    rates, norms = np.array(rates, float), np.array(norms, float)
    assert gvm_weights(rates, norms, 1e-3, 2.0) == pytest.approx(weights, abs=1e-5)
    assert GVMBudgets().budgets(rates, norms, total) == budgets


def test_no_accepted_pilot_at_all_falls_back_to_uniform():
    assert GVMBudgets().budgets(np.zeros(4), np.zeros(4), 10) == [3, 3, 2, 2]


def test_equal_prompts_get_equal_budgets():
    assert GVMBudgets().budgets(np.full(5, 0.5), np.full(5, 2.0), 20) == [4] * 5


def test_what_a_capped_prompt_cannot_take_goes_to_the_others():
    rates, norms = np.array([0.5, 0.25, 0.0, 1.0]), np.array([1.0, 2.0, 0.0, 4.0])
    budgets = GVMBudgets(n_max=12).budgets(rates, norms, 32)
    assert sum(budgets) == 32 and max(budgets) == 12
    assert budgets[2] == 0, "an unsolved prompt was paid although others had room"


def test_an_unsolved_prompt_gets_the_floor():
    rates, norms = np.array([0.5, 0.25, 0.0, 1.0]), np.array([1.0, 2.0, 0.0, 4.0])
    assert GVMBudgets(n_min=2).budgets(rates, norms, 32)[2] == 2


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, *EIGHTHS]), st.floats(0, 100)), min_size=1, max_size=30
    ),
    st.integers(0, 3),
    st.integers(4, 20),
    st.floats(0, 1),
)
def test_budgets_are_exact_in_sum_and_within_bounds(prompts, low, high, share):
    rates, norms = (np.array(column) for column in zip(*prompts, strict=True))
    total = round(len(prompts) * (low + share * (high - low)))
    budgets = GVMBudgets(n_min=low, n_max=high).budgets(rates, norms, total)
    assert sum(budgets) == total
    assert min(budgets) >= low and max(budgets) <= high


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40), st.integers(0, 500))
def test_rounding_moves_no_budget_by_more_than_one(shares, total):
    shares = np.array(shares) / sum(shares)
    counts = np.array(round_to_total(shares, total))
    assert counts.sum() == total and (np.abs(counts - total * shares) < 1.01).all()


def test_budgets_go_by_prompt_id_not_by_row():
    allocator = GVMBudgets()
    allocator.observe(["a", "b"], [[1, 0], [1, 1]], [4.0, 1.0])
    forward = dict(zip("ab", allocator.allocate(["a", "b"], 10), strict=True))
    backward = dict(zip("ba", allocator.allocate(["b", "a"], 10), strict=True))
    assert forward == backward and forward["a"] > forward["b"]


def test_an_allocator_goes_on_from_its_state():
    allocator, copy = GVMBudgets(), GVMBudgets()
    allocator.observe(["a", "b"], [[1, 0], [1, 1]], [4.0, 1.0])
    copy.load_state_dict(allocator.state_dict())
    assert copy.allocate(["a", "b"], 9) == allocator.allocate(["a", "b"], 9)


def test_a_cap_that_cannot_hold_the_total_is_named():
    allocator = GVMBudgets(n_max=4)
    allocator.observe(["a", "b"], [[1], [1]], [1.0, 1.0])
    with pytest.raises(UserError, match="n_max=4 is too small: 2 prompts have to share 9"):
        allocator.allocate(["a", "b"], 9)


def test_uniform_budgets_differ_by_at_most_one():
    assert sorted(Uniform().allocate(["a", "b", "c"], 11)) == [3, 4, 4]
