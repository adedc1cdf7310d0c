import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlzoo.bench.gold import (
    FILES,
    Pair,
    gold_answers,
    main,
    mismatched_pairs,
    respond,
    same_value,
    symbolic_failures,
)
from rlzoo.rewards.base import Verdict
from rlzoo.rewards.verifier import VerifierPool

BESIDE = Path(__file__).parents[2].parent / "shared" / "data"
DATA = Path(os.environ.get("RLZOO_SHARED_DATA", BESIDE))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason="the real data is not at ../shared/data beside the repository, nor at RLZOO_SHARED_DATA",
)


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    return gold_answers(DATA)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(num_workers=2) as pool:
        yield pool


@needs_data
def test_every_row_of_every_file_has_a_gold_answer(answers: dict[str, list[str]]) -> None:
    sizes = {file: len(golds) for file, golds in answers.items()}
    assert list(sizes.values()) == [7473, 1319, 500, 30, 40, 272, 675]
    minerva = answers["benchmarks/minerva_math.jsonl"]  # its answers are boxed inside solutions
    assert not any("boxed" in gold for gold in minerva)


@needs_data
def test_gold_answers_verify_against_themselves(
    answers: dict[str, list[str]], pool: VerifierPool
) -> None:
    rng = random.Random(0)
    sample = [
        (file, gold)
        for file, golds in answers.items()
        for gold in rng.sample(golds, min(40, len(golds)))
    ]
    golds = [gold for _, gold in sample]
    verdicts = pool.verify(golds, [respond(gold) for gold in golds])
    assert [pair for pair, v in zip(sample, verdicts, strict=True) if v != Verdict.RIGHT] == []


@needs_data
def test_gold_answers_are_right_by_mathematics_alone(answers: dict[str, list[str]]) -> None:
    """The verifier passes equal texts unread; without that, each gold answer must parse."""
    rng = random.Random(0)
    sample = [
        Pair(file, gold, gold)
        for file, golds in answers.items()
        for gold in rng.sample(golds, min(20, len(golds)))
    ]
    assert symbolic_failures(sample) == []
    assert len(symbolic_failures([Pair("none", "2", "3"), sample[0]])) == 1


@needs_data
def test_answers_of_other_prompts_verify_as_right_only_if_truly_equal(
    answers: dict[str, list[str]], pool: VerifierPool
) -> None:
    pairs = mismatched_pairs(answers, count=20 * len(FILES), seed=1)
    verdicts = pool.verify([p.gold for p in pairs], [respond(p.answer) for p in pairs])
    right = [p for p, v in zip(pairs, verdicts, strict=True) if v == Verdict.RIGHT]
    assert [p for p in right if not same_value(p.gold, p.answer)] == []
    # a few golds are no mathematics, and a busy machine runs into the pool's wall limit
    assert sum(v == Verdict.WRONG for v in verdicts) > 0.9 * len(pairs)


@needs_data
def test_a_folder_without_the_files_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gsm8k/train\.jsonl.*no such file"):
        main(["--data", str(tmp_path)])


def test_mismatched_pairs_are_seeded_and_never_hold_the_same_text_twice() -> None:
    answers = {"a": ["1", "1", "2", "3"], "b": ["x", "y"]}
    pairs = mismatched_pairs(answers, count=30, seed=0)
    assert pairs == mismatched_pairs(answers, count=30, seed=0)
    assert pairs != mismatched_pairs(answers, count=30, seed=1)
    assert all(p.gold != p.answer and {p.gold, p.answer} <= {*answers[p.file]} for p in pairs)
    assert sum(p.file == "b" for p in pairs) == 15


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("0.5", r"$\dfrac{1}{2}$", True),
        ("1,200", "1200", True),
        ("023", "23", True),
        ("3e8", "300000000", True),
        (r"\left(1, 2\right)", "(1,2)", True),
        ("-3", "3", False),
        ("1/2", "2/1", False),
        ("(1,200)", "(1,20)", False),
        ("1/0", "2/0", False),
        ("x", "y", False),
    ],
)
def test_two_spellings_of_one_answer_are_told_from_two_answers(
    gold: str, answer: str, expected: bool
) -> None:
    assert same_value(gold, answer) is expected
