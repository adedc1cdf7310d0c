"""How fast the verifier is, and what hostile answers cost it.

Each pair is fresh (a gold answer of its own), each answer stands at the end of a written solution,
and about a third are wrong. The last line is JSON with
    answers_per_second: a mix of two plain integers to one number and one symbolic answer;
    answers_per_second_symbolic: expressions, tuples, sets, intervals and equations alone;
    poisoned_seconds: 1,000 answers of the mix, 20 of them poisoned;
    poisoned_limit_seconds: what these may take, their summed limits / workers + 5 s;
    verdicts_unchanged: the other 980 verdicts are what they are without the poison.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence

from rlzoo.errors import check_at_least
from rlzoo.rewards.base import Verdict
from rlzoo.rewards.verifier import VerifierPool

Pair = tuple[str, str]  # gold answer, response (from a Kind: an equal answer, spelt otherwise)
Kind = Callable[[random.Random], Pair]

POISON = (
    "10^{10^{10}}",
    "9^{9^{9^9}}",
    "(10^9)!",
    r"\binom{10^9}{5\cdot 10^8}",
    "(" * 400 + "1" + ")" * 400,
    r"\sum_{n=1}^{10^9} n^{n}",
)


def integer(rng: random.Random) -> Pair:
    value = rng.randint(-(10**6), 10**6)
    return str(value), str(value)


def number(rng: random.Random) -> Pair:
    top, bottom = rng.randint(1, 10**5), rng.randint(2, 99)
    return rng.choice(
        [
            (rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}"),
            (f"{top / 100}", rf"\frac{{{top}}}{{100}}"),
            (rf"{top}\%", f"{top / 100}"),
            (f"{top + 1000:,}", rf"{top + 1000}\text{{ cm}}"),
        ]
    )


def symbolic(rng: random.Random) -> Pair:
    a, b, c = (rng.randint(2, 999) for _ in range(3))
    return rng.choice(
        [
            (f"{a}x^2+{a * b}x", f"{a}x(x+{b})"),
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}"),
            (rf"\left({a}, \frac{{{b}}}{{2}}\right)", f"({a}, {b / 2})"),
            (rf"\{{{a}, {b}\}}", f"{b}, {a}"),
            (rf"[{a}, \infty)", rf"[{2 * a}/2, \infty)"),
            (f"y={a}x+{b}", f"y-{b}={a}x"),
            (rf"{a}\pi+{c}", rf"{c}+{a}\pi"),
        ]
    )


def response(rng: random.Random, answer: str) -> str:
    steps = " ".join(f"Step {i}: ${rng.randint(1, 99)} + {i} = y_{{{i}}}$." for i in range(1, 9))
    return rf"{steps} So the final answer is $\boxed{{{answer}}}$."


def pairs(rng: random.Random, count: int, kinds: Sequence[Kind]) -> list[Pair]:
    """`count` pairs, of each kind in turn, about a third of them wrong."""
    drawn = []
    for i in range(count):
        gold, answer = kinds[i % len(kinds)](rng)
        if rng.random() < 1 / 3:
            _, answer = kinds[i % len(kinds)](rng)
        drawn.append((gold, response(rng, answer)))
    return drawn


def timed(pool: VerifierPool, work: list[Pair]) -> tuple[float, list[Verdict]]:
    """Seconds of wall time, and the verdicts."""
    start = time.perf_counter()
    verdicts = pool.verify([gold for gold, _ in work], [text for _, text in work])
    return time.perf_counter() - start, verdicts


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench verifier")
    parser.add_argument("--answers", type=int, default=1000, help="answers in each measurement")
    parser.add_argument("--poisoned", type=int, default=20, help="how many of them are poisoned")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_at_least("--workers", args.workers, 1)
    rng = random.Random(args.seed)
    mix = [integer, number, integer, symbolic]
    with VerifierPool(num_workers=args.workers) as pool:
        start_seconds, _ = timed(pool, [("1", r"\boxed{1}")])
        mix_seconds, _ = timed(pool, pairs(rng, args.answers, mix))
        symbolic_seconds, _ = timed(pool, pairs(rng, args.answers, [symbolic]))

        ordinary = pairs(rng, args.answers, mix)
        _, expected = timed(pool, ordinary)
        poisoned = list(ordinary)
        at = rng.sample(range(args.answers), args.poisoned)
        for turn, i in enumerate(at):
            poisoned[i] = (ordinary[i][0], response(rng, POISON[turn % len(POISON)]))
        poisoned_seconds, verdicts = timed(pool, poisoned)
        limit = args.poisoned * pool.seconds_per_answer / args.workers + 5
    others = set(range(args.answers)) - set(at)
    result = {
        "answers_per_second": round(args.answers / mix_seconds, 1),
        "answers_per_second_symbolic": round(args.answers / symbolic_seconds, 1),
        "poisoned_seconds": round(poisoned_seconds, 2),
        "poisoned_limit_seconds": round(limit, 2),
        "verdicts_unchanged": all(verdicts[i] == expected[i] for i in others),
        "start_seconds": round(start_seconds, 2),
        "num_workers": args.workers,
        "right": expected.count(Verdict.RIGHT),
        "wrong": expected.count(Verdict.WRONG),
        "unverifiable_of_poisoned": sum(verdicts[i] == Verdict.UNVERIFIABLE for i in at),
    }
    for name, value in result.items():
        print(f"{name:<30}{value!s:>10}")
    print(json.dumps(result))
