import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlzoo.data.shares import GRAIN, Piece, share_out

PROMPTS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 150)), max_size=20)
LENGTH = st.floats(1, 1000)


def shares_of(
    groups: list[tuple[int, int]], length: float, parts: int
) -> tuple[list[list[Piece]], list[float]]:
    """Shares of groups of (prompt tokens, budget), and the expected tokens of each."""
    shares = share_out([p for p, _ in groups], [n for _, n in groups], length, parts)
    return shares, [sum(tokens(piece, groups, length) for piece in share) for share in shares]


def tokens(piece: Piece, groups: list[tuple[int, int]], length: float) -> float:
    return groups[piece.prompt][0] + (piece.stop - piece.start) * length


@given(PROMPTS, LENGTH, st.integers(1, 9))
def test_pieces_hold_every_response_once(groups, length, parts):
    shares, _ = shares_of(groups, length, parts)
    assert len(shares) == parts and all(share == sorted(share) for share in shares)
    pieces = sorted(piece for share in shares for piece in share)
    drawn = [(i, j) for i, start, stop in pieces for j in range(start, stop)]
    assert drawn == [(i, j) for i, (_, n) in enumerate(groups) for j in range(n)]
    assert all(start < stop for _, start, stop in pieces)


@given(PROMPTS, LENGTH, st.integers(1, 9))
def test_a_share_is_over_the_mean_by_a_piece_at_most(groups, length, parts):
    shares, loads = shares_of(groups, length, parts)
    largest = max((tokens(p, groups, length) for share in shares for p in share), default=0)
    assert max(loads) <= sum(loads) / parts + largest + 1e-6


@given(PROMPTS, LENGTH)
def test_a_rank_alone_draws_whole_groups_in_order(groups, length):
    ((share,), _) = shares_of(groups, length, 1)
    assert share == [Piece(i, 0, n) for i, (_, n) in enumerate(groups)]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_large_group_spans_ranks_so_that_none_is_slow(parts):
    groups = [(80, n) for n in [4] * 20 + [150] + [4] * 20]
    shares, loads = shares_of(groups, 400.0, parts)
    assert max(loads) <= 1.1 * sum(loads) / parts
    assert all(any(piece.prompt == 20 for piece in share) for share in shares)


def test_prompts_weigh_too():
    _, loads = shares_of([(1000, 1), (100, 1), (1000, 1), (100, 1)], 10.0, 2)
    assert loads == [1120, 1120]


@given(PROMPTS, LENGTH, st.integers(2, 9))
def test_groups_are_cut_only_where_they_are_large_and_writing_is_most_of_the_work(
    groups, length, parts
):
    shares, _ = shares_of(groups, length, parts)
    grain = sum(p + n * length for p, n in groups) / parts / GRAIN
    for prompt, start, stop in (piece for share in shares for piece in share):
        read, n = groups[prompt]
        if stop - start < n:
            assert read + n * length > grain * 0.999
            assert (stop - start + 1) * length >= read  # n may not divide evenly
