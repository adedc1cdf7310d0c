import re

import pytest

from rlzoo.data.arithmetic import (
    FAMILIES,
    LEVELS,
    SPLITS,
    ArithmeticCorpus,
    ArithmeticPrompts,
    split_of,
)
from rlzoo.errors import UserError
from rlzoo.types import Prompt


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Prompt]]:
    source = ArithmeticPrompts(num_train=1500, num_val=300, num_test=300)
    return {split: source.load(split) for split in SPLITS}


def independent_answer(question: str) -> int:
    """The answer read off the text of the question, by none of the code that wrote it."""
    if match := re.fullmatch(r"What is (\d+) mod (\d+)\?", question):
        return int(match[1]) % int(match[2])
    if match := re.fullmatch(r"What is the remainder of (\d+) divided by (\d+)\?", question):
        return int(match[1]) % int(match[2])
    if match := re.fullmatch(r"What is ([\d+* -]+)\?", question):
        return eval(match[1])  # digits, spaces and + - * alone
    if match := re.fullmatch(r"There are (\d+) \w+ with (\d+) eggs each\. .*", question):
        return int(match[1]) * int(match[2])
    if match := re.fullmatch(r"(Solve) (.+) = (.+) for x\.", question):
        sides = [re.sub(r"(\d+)x", r"\1*x", side) for side in match.groups()[1:]]
        (root,) = [x for x in range(-100, 101) if len({eval(s, {"x": x}) for s in sides}) == 1]
        return root
    match = re.fullmatch(r"\w+ has (\d+) (\w+), (.+)\. How many \2 now\?", question)
    signs = {"gets": 1, "loses": -1}
    moves = [move.split() for move in match[3].split(", ")]
    return int(match[1]) + sum(signs[verb] * int(amount) for verb, amount in moves)


def test_the_answer_of_every_problem_is_the_value_of_its_question(
    splits: dict[str, list[Prompt]],
) -> None:
    for prompt in splits["train"]:
        assert int(prompt.answer) == independent_answer(prompt.question), prompt.question


def test_every_step_of_a_gold_solution_is_true_and_it_ends_in_the_boxed_answer(
    splits: dict[str, list[Prompt]],
) -> None:
    for prompt in splits["train"]:
        *steps, last = prompt.solution.split(" ")
        assert last == f"\\boxed{{{prompt.answer}}}"
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right), step


def test_every_family_and_level_is_in_every_split_about_equally_often(
    splits: dict[str, list[Prompt]],
) -> None:
    cells = {(family, level) for family in FAMILIES for level in LEVELS}
    for split, prompts in splits.items():
        counts = dict.fromkeys(cells, 0)
        for prompt in prompts:
            counts[prompt.tags["family"], prompt.tags["level"]] += 1
        share = len(prompts) // len(cells)
        assert min(counts.values()) >= min(share, 8), split  # small cells run out early
        assert max(counts.values()) <= share + 5, split


def test_no_question_is_in_two_splits_or_twice_in_one(splits: dict[str, list[Prompt]]) -> None:
    questions = [prompt.question for prompts in splits.values() for prompt in prompts]
    assert len(questions) == len(set(questions)) == 2100
    for split, prompts in splits.items():
        assert {split_of(prompt.question) for prompt in prompts} == {split}


def test_ids_are_unique_and_depend_on_the_question_alone(
    splits: dict[str, list[Prompt]],
) -> None:
    ids = {prompt.question: prompt.id for prompt in splits["train"]}
    assert len(set(ids.values())) == len(ids)
    others = ArithmeticPrompts(num_train=400, seed=3, families=("products",)).load("train")
    shared = [prompt for prompt in others if prompt.question in ids]
    assert len(shared) > 20
    assert all(ids[prompt.question] == prompt.id for prompt in shared)


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    first, again, other = (
        ArithmeticPrompts(num_train=100, seed=seed).load("train") for seed in (5, 5, 6)
    )
    assert first == again
    assert len({p.id for p in first} & {p.id for p in other}) < 50


def test_generated_prompts_are_those_of_the_first_release() -> None:
    """The shipped policy was trained on these; a change here would make its task another one."""
    first = ArithmeticPrompts(num_train=4).load("train")
    assert [(prompt.id, prompt.question) for prompt in first] == [
        ("arithmetic-8e1419e9d9eb", "Ben has 17 shells, gets 25. How many shells now?"),
        ("arithmetic-62e9336c9202", "There are 8 trays with 3 eggs each. How many eggs?"),
        ("arithmetic-815f5016505a", "What is 6 * 9 + 5?"),
        ("arithmetic-3c47efadd096", "What is the remainder of 73 divided by 8?"),
    ]


def test_asking_for_more_prompts_only_appends() -> None:
    few, many = (ArithmeticPrompts(num_val=count).load("val") for count in (30, 90))
    assert many[:30] == few


def test_an_exhausted_split_is_an_error_that_says_how_many_there_are() -> None:
    source = ArithmeticPrompts(num_val=100, families=("equations",), levels=(2,))
    with pytest.raises(UserError) as caught:
        source.load("val")
    found = int(re.search(r"only (\d+) distinct", str(caught.value))[1])
    assert "data.num_val=100" in str(caught.value)
    fits = ArithmeticPrompts(num_val=found, families=("equations",), levels=(2,)).load("val")
    equations = {f"Solve {a}x = {a * x} for x." for a in range(3, 10) for x in range(2, 13)}
    assert {p.question for p in fits} == {q for q in equations if split_of(q) == "val"}


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(UserError, match="no split 'validation'"):
        ArithmeticPrompts().load("validation")


# --- the corpus


def test_an_example_of_the_corpus_depends_on_seed_and_index_alone() -> None:
    corpus, again, other = (ArithmeticCorpus(seed=seed) for seed in (1, 1, 2))
    forward = [corpus[i] for i in range(50)]
    assert [again[i] for i in reversed(range(50))] == forward[::-1]
    assert sum(corpus[i] == other[i] for i in range(50)) < 5


def test_the_corpus_holds_training_questions_only() -> None:
    corpus = ArithmeticCorpus()
    assert {split_of(corpus[i][0]) for i in range(500)} == {"train"}


def test_a_careful_corpus_is_right_and_a_hasty_one_has_no_steps() -> None:
    careful = ArithmeticCorpus(hasty=(0.0, 0.0), sloppy=0.0)
    hasty = ArithmeticCorpus(hasty=(1.0, 1.0), guess_off=(1.0, 1.0))
    for question, solution in (careful[i] for i in range(300)):
        assert solution.endswith(f"\\boxed{{{independent_answer(question)}}}")
    for question, solution in (hasty[i] for i in range(300)):
        assert re.fullmatch(r"\\boxed\{-?\d+\}", solution)
        assert solution != f"\\boxed{{{independent_answer(question)}}}"


def test_habits_come_as_often_as_asked() -> None:
    corpus = ArithmeticCorpus(
        hasty=(0.3, 0.3), guess_off=(0.0, 0.0), sloppy=1.0, slip_rate=(0.2, 0.2)
    )
    examples = [corpus[i] for i in range(2000)]
    is_hasty = [solution.startswith("\\boxed") for _, solution in examples]
    assert abs(sum(is_hasty) / 2000 - 0.3) < 0.05
    steps = [step for _, solution in examples for step in solution.split(" ")[:-1]]
    slips = [eval(left.replace("/", "//")) != int(right) for left, right in map(parts, steps)]
    assert abs(sum(slips) / len(slips) - 0.2) < 0.03


def parts(step: str) -> list[str]:
    return step.split("=")
