"""A seeded arithmetic task: generated problems, written solutions, and a corpus of mixed habits.

Every problem is made from its own seed and solved by the same few lines of code whether the chain
of thought is careful or slips: each elementary computation passes through `Work.step`, which may
be told to get it wrong. That gives gold solutions for free, and the corpus of `corpus_solution`,
which is like a base model's: careful chains, chains with slips, hasty answers without a chain.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from rlzoo.data.templates import PromptTemplate
from rlzoo.errors import UserError
from rlzoo.types import Prompt
from rlzoo.values import AtLeast1, Seed, Share

Family = Literal["sums", "products", "order_of_operations", "remainders", "equations"]
Level = Literal[1, 2, 3, 4, 5]
LEVELS: tuple[Level, ...] = (1, 2, 3, 4, 5)
SPLITS = {"train": range(0, 80), "val": range(80, 90), "test": range(90, 100)}  # hash buckets


@dataclass
class Work:
    """The written steps of one solution; `slip` may change the result of any of them."""

    slip: Callable[[int], int] = lambda value: value
    lines: list[str] = field(default_factory=list)

    def step(self, expression: str, value: int) -> int:
        value = self.slip(value)
        self.lines.append(f"{expression}={value}")
        return value


@dataclass(frozen=True)
class Problem:
    question: str
    solve: Callable[[Work], int]  # writes its steps, returns the answer


# --- families -----------------------------------------------------------------------------------


def _chain(work: Work, terms: list[int]) -> int:
    total = terms[0]
    for term in terms[1:]:
        total = work.step(f"{total}{'+' if term >= 0 else '-'}{abs(term)}", total + term)
    return total


def _times(work: Work, a: int, b: int) -> int:
    """a * b for one-digit b; longer a is multiplied digit by digit and summed."""
    if a < 10:
        return work.step(f"{a}*{b}", a * b)
    digits = [int(d) * 10**i for i, d in enumerate(reversed(str(a)))]
    parts = [work.step(f"{d}*{b}", d * b) for d in reversed(digits) if d]
    return _chain(work, parts)


def sums(rng: random.Random, level: int) -> Problem:
    """Sums and differences of 2 to 9 terms; the running total stays at zero or above."""
    count = rng.choice([(2,), (3,), (4, 5), (6, 7), (8, 9)][level - 1])
    largest = 20 + 6 * level
    terms = [rng.randint(1, largest)]
    for _ in range(count - 1):
        term = rng.randint(1, largest)
        terms.append(-term if term <= sum(terms) and rng.random() < 0.4 else term)
    if rng.random() < 0.5:
        shown = "".join(f" {'+' if t >= 0 else '-'} {abs(t)}" for t in terms[1:])
        question = f"What is {terms[0]}{shown}?"
    else:
        name = rng.choice(("Ann", "Ben", "Eva", "Tom"))
        thing = rng.choice(("coins", "books", "shells", "nuts"))
        moves = ", ".join(f"{'gets' if t >= 0 else 'loses'} {abs(t)}" for t in terms[1:])
        question = f"{name} has {terms[0]} {thing}, {moves}. How many {thing} now?"
    return Problem(question, lambda work: _chain(work, terms))


def products(rng: random.Random, level: int) -> Problem:
    """Products: two one-digit factors, then longer ones, then three and four factors."""
    d = partial(rng.randint, 2, 9)
    factors = [
        lambda: [d(), d()],
        lambda: [rng.randint(11, 39), d()],
        lambda: [rng.randint(21, 99), d()],
        lambda: [d(), d(), d()],
        lambda: [rng.randint(2, 5), rng.randint(2, 6), rng.randint(2, 5), d()],
    ][level - 1]()

    def solve(work: Work) -> int:
        total = factors[0]
        for factor in factors[1:]:
            total = _times(work, total, factor)
        return total

    if len(factors) == 2 and rng.random() < 0.5:
        thing = rng.choice(("boxes", "bags", "trays"))
        question = f"There are {factors[1]} {thing} with {factors[0]} eggs each. How many eggs?"
    else:
        question = f"What is {' * '.join(map(str, factors))}?"
    return Problem(question, solve)


def order_of_operations(rng: random.Random, level: int) -> Problem:
    """Products before sums: one to three products among one to three single terms."""
    num_products = (1, 1, 2, 2, 3)[level - 1]
    num_terms = (1, 2, 1, 2, 3)[level - 1]
    parts = [[rng.randint(2, 9), rng.randint(2, 9)] for _ in range(num_products)]
    parts += [[rng.randint(1, 30)] for _ in range(num_terms)]
    rng.shuffle(parts)
    shown = " + ".join(" * ".join(map(str, part)) for part in parts)

    def solve(work: Work) -> int:
        values = [_times(work, *part) if len(part) == 2 else part[0] for part in parts]
        return _chain(work, values)

    return Problem(f"What is {shown}?", solve)


def remainders(rng: random.Random, level: int) -> Problem:
    """Remainder of a 2- to 6-digit number by a one-digit one, by long division."""
    divisor = rng.randint(3, 9)
    number = rng.randint(10**level, 10 ** (level + 1) - 1)

    def solve(work: Work) -> int:
        digits = str(number)
        rest = int(digits[0]) % divisor if int(digits[0]) >= divisor else int(digits[0])
        for digit in digits[1:]:
            carried = 10 * rest + int(digit)
            rest = work.step(f"{carried}%{divisor}", carried % divisor)
        return rest

    wanted = rng.choice(
        (f"the remainder of {number} divided by {divisor}", f"{number} mod {divisor}")
    )
    return Problem(f"What is {wanted}?", solve)


def equations(rng: random.Random, level: int) -> Problem:
    """One unknown: x + a = b, ax = b, ax + b = c, and ax + b = cx + d."""
    x, a, b = rng.randint(2, 12), rng.randint(3, 9), rng.randint(1, 20 + 8 * level)
    if level == 1:
        equation, steps = f"x + {b} = {x + b}", lambda w: w.step(f"{x + b}-{b}", x)
    elif level == 2:
        equation, steps = f"{a}x = {a * x}", lambda w: w.step(f"{a * x}/{a}", x)
    elif level in (3, 4):
        sign = 1 if level == 3 or a * x < b else -1
        right = a * x + sign * b
        equation = f"{a}x {'+' if sign > 0 else '-'} {b} = {right}"

        def steps(w: Work) -> int:
            moved = w.step(f"{right}{'-' if sign > 0 else '+'}{b}", right - sign * b)
            return w.step(f"{moved}/{a}", moved // a)
    else:
        c = rng.randint(2, a - 1)
        right = (a - c) * x + b
        equation = f"{a}x + {b} = {c}x + {right}"

        def steps(w: Work) -> int:
            left = w.step(f"{a}-{c}", a - c)
            moved = w.step(f"{right}-{b}", right - b)
            return w.step(f"{moved}/{left}", moved // left) if left else moved

    return Problem(f"Solve {equation} for x.", steps)


FAMILIES: dict[Family, Callable[[random.Random, int], Problem]] = {
    "sums": sums,
    "products": products,
    "order_of_operations": order_of_operations,
    "remainders": remainders,
    "equations": equations,
}


# --- prompts ------------------------------------------------------------------------------------


def write(lines: list[str], answer: int) -> str:
    return " ".join([*lines, f"\\boxed{{{answer}}}"])


def split_of(question: str) -> str:
    """The split a question belongs to, by its hash: the same text can never be in two."""
    bucket = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=4).digest(), "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def problems(
    split: str, seed: int, families: Sequence[Family], levels: Sequence[Level]
) -> Iterator[tuple[Family, Level, Problem]]:
    """Distinct problems of a split, family and level in turn, until none is left.

    A cell (family, level) is taken to be exhausted after 500 problems in a row that were seen.
    """
    cells = [(family, level) for level in levels for family in families]
    counts, misses, seen = dict.fromkeys(cells, 0), dict.fromkeys(cells, 0), set()
    while cells:
        for cell in list(cells):
            while misses[cell] <= 500:
                counts[cell] += 1
                rng = random.Random(f"{seed}/{cell[0]}/{cell[1]}/{counts[cell]}")
                problem = FAMILIES[cell[0]](rng, cell[1])
                if split_of(problem.question) == split:
                    if problem.question not in seen:
                        break
                    misses[cell] += 1
            else:
                cells.remove(cell)
                continue
            misses[cell] = 0
            seen.add(problem.question)
            yield *cell, problem


def to_prompt(family: str, level: int, problem: Problem) -> Prompt:
    work = Work()
    answer = problem.solve(work)
    digest = hashlib.blake2b(problem.question.encode(), digest_size=6).hexdigest()
    return Prompt(
        id=f"arithmetic-{digest}",
        question=problem.question,
        answer=str(answer),
        solution=write(work.lines, answer),
        tags={"family": family, "level": level},
    )


class ArithmeticPrompts:
    """The prompt source behind `data=arithmetic`.

    Args:
        num_train, num_val, num_test: prompts per split.
        seed: of the problems; the same seed gives the same prompts anywhere.
        families: names from FAMILIES.
        levels: difficulties from 1 to 5.
        template: how a question becomes tokens; the bare question by default.
    """

    def __init__(
        self,
        num_train: AtLeast1 = 4096,
        num_val: AtLeast1 = 256,
        num_test: AtLeast1 = 512,
        seed: Seed = 0,
        families: tuple[Family, ...] = tuple(FAMILIES),
        levels: tuple[Level, ...] = LEVELS,
        template: PromptTemplate | None = None,
    ) -> None:
        self.counts = {"train": num_train, "val": num_val, "test": num_test}
        self.seed, self.families, self.levels = seed, tuple(families), tuple(levels)
        self.template = template or PromptTemplate()

    def load(self, split: str) -> list[Prompt]:
        """The prompts of one split, family and level in turn.

        Raises:
            UserError: no such split, or fewer distinct problems than were asked for.
        """
        if split not in self.counts:
            raise UserError(f"data has no split {split!r}; there are {list(self.counts)}.")
        found = []
        for family, level, problem in problems(split, self.seed, self.families, self.levels):
            found.append(to_prompt(family, level, problem))
            if len(found) == self.counts[split]:
                return found
        raise UserError(
            f"data.num_{split}={self.counts[split]}, but only {len(found)} distinct problems of"
            f" families {list(self.families)} at levels {list(self.levels)} exist in that split."
            " Ask for fewer, or add families and levels."
        )


# --- the corpus the tiny policy was trained on ------------------------------------------------


class ArithmeticCorpus:
    """Solutions as an undisciplined writer would give them, for supervised training.

    With difficulty d = (level - 1) / 4, a solution is
      - hasty, with probability `hasty[0] + (hasty[1] - hasty[0]) * d`: no chain, and a guess,
        which is off by a little with probability
        `guess_off[0] + (guess_off[1] - guess_off[0]) * d`;
      - else slipping, with probability `sloppy`: each step is off with probability
        `slip_rate[0] + (slip_rate[1] - slip_rate[0]) * d` and the chain goes on from there;
      - else careful.

    Args:
        num_examples: size of the training corpus.
        seed: of problems and habits.
        hasty, guess_off, slip_rate: probabilities at level 1 and level 5.
        sloppy: probability.
        families: names from FAMILIES; one that stands twice is drawn twice as often.
    """

    def __init__(
        self,
        num_examples: AtLeast1 = 200_000,
        seed: Seed = 1,
        hasty: tuple[Share, Share] = (0.1, 0.5),
        guess_off: tuple[Share, Share] = (0.3, 0.95),
        sloppy: Share = 0.8,
        slip_rate: tuple[Share, Share] = (0.15, 0.35),
        families: tuple[Family, ...] = tuple(FAMILIES),
    ) -> None:
        self.num_examples, self.seed = num_examples, seed
        self.families = tuple(families)
        self.hasty, self.guess_off = tuple(hasty), tuple(guess_off)
        self.sloppy, self.slip_rate = sloppy, tuple(slip_rate)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[str, str]:
        """One (question, solution) of the train split; the same index gives the same pair."""
        rng = random.Random(f"{self.seed}/corpus/{index}")
        while True:
            level, family = rng.choice(LEVELS), rng.choice(self.families)
            problem = FAMILIES[family](rng, level)
            if split_of(problem.question) == "train":
                return problem.question, self.solution(problem, level, rng)

    def solution(self, problem: Problem, level: int, rng: random.Random) -> str:
        difficulty = (level - 1) / (LEVELS[-1] - 1)

        def between(pair: Sequence[float]) -> float:
            return pair[0] + (pair[1] - pair[0]) * difficulty

        if rng.random() < between(self.hasty):
            answer = problem.solve(Work())
            return write([], off_by_a_little(answer, rng, between(self.guess_off)))
        rate = between(self.slip_rate) if rng.random() < self.sloppy else 0.0
        work = Work(slip=lambda value: off_by_a_little(value, rng, rate))
        answer = problem.solve(work)
        return write(work.lines, answer)


def off_by_a_little(value: int, rng: random.Random, probability: float) -> int:
    """`value`, or with the given probability a near miss of it on the same side of zero."""
    if rng.random() >= probability:
        return value
    misses = [value + d for d in (-10, -2, -1, 1, 2, 10)]
    return rng.choice([miss for miss in misses if (miss >= 0) == (value >= 0)])
