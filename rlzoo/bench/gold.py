"""`python -m rlzoo.bench gold`: does every gold answer verify against itself, and no other?

Reads GSM8K and five benchmark files, puts each gold answer in a box at the end of a sentence and
verifies it against itself; then does the same with answers of other prompts of the same file. The
last line is JSON with
    gold_right_share: golds that are right against themselves, by the pool as training uses it;
    gold_symbolic_right_share: the same without the verifier's short cut for equal texts, so that
        every gold has to parse (distinct golds, in this process: these answers are not hostile);
    mismatched_right: pairs of unlike answers that are right, but for the truly equal ones;
    mismatched_truly_equal: pairs that are right and one answer in two spellings;
    unverifiable: golds and pairs on which there was no verdict.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from rlzoo.data.prompts import FilePrompts
from rlzoo.errors import check_at_least
from rlzoo.rewards.base import Verdict
from rlzoo.rewards.math import symbolic_verdict
from rlzoo.rewards.verifier import VerifierPool

GSM8K = {"question_column": "question", "answer_column": "answer", "answer_format": "hashes"}
BENCHMARK = {"question_column": "problem", "answer_column": "answer"}
FILES: dict[str, dict[str, Any]] = {
    "gsm8k/train.jsonl": GSM8K,
    "gsm8k/test.jsonl": GSM8K,
    "benchmarks/math500.jsonl": BENCHMARK,
    "benchmarks/aime24.jsonl": BENCHMARK,
    "benchmarks/amc23.jsonl": BENCHMARK,
    "benchmarks/minerva_math.jsonl": BENCHMARK | {"answer_format": "boxed"},
    "benchmarks/olympiad_bench.jsonl": BENCHMARK | {"answer_format": "first"},
}


class Pair(NamedTuple):
    file: str
    gold: str
    answer: str


def gold_answers(data: Path) -> dict[str, list[str]]:
    """The gold answers of every file in FILES, in the order of the file."""
    answers = {}
    for file, columns in FILES.items():
        prompts = FilePrompts(str(data / file), val_fraction=0.0, **columns).load("train")
        answers[file] = [prompt.answer for prompt in prompts]
    return answers


def mismatched_pairs(answers: dict[str, list[str]], count: int, seed: int) -> list[Pair]:
    """`count` pairs of unlike answers, each pair within one file, the files in turn."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    files = list(answers)
    while len(pairs) < count:
        file = files[len(pairs) % len(files)]
        gold, answer = rng.sample(answers[file], 2)
        if gold != answer:
            pairs.append(Pair(file, gold, answer))
    return pairs


def respond(answer: str) -> str:
    return f"Putting the steps together, the answer is \\boxed{{{answer}}}."


def same_value(a: str, b: str) -> bool:
    """Whether two unlike texts are one answer, judged without math-verify: spelling or number."""
    a, b = bare(a), bare(b)
    return a == b or (number(a) is not None and number(a) == number(b))


def bare(text: str) -> str:
    """The text without spaces, dollar signs and LaTeX's spacing and sizing commands."""
    text = re.sub(r"\\left|\\right|\\[!,;: ]|[\s$]|(?<=\d),(?=\d{3})", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text)


def number(text: str) -> Fraction | None:
    r"""The value of 12, -0.5, 3e8, 1/2 or \frac{1}{2}; None for anything else."""
    text = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if not re.fullmatch(r"-?(\d+/0*[1-9]\d*|\d*\.?\d+([eE][-+]?\d{1,3})?)", text):
        return None
    return Fraction(text)


def symbolic_failures(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that are not right by mathematics alone; for answers that are known to be tame."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    return [p for p in pairs if symbolic_verdict(p.gold, respond(p.answer)) != Verdict.RIGHT]


def main(argv: Sequence[str]) -> None:
    """Prints a table by file, every exception, and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.bench gold")
    parser.add_argument("--data", type=Path, required=True, help="folder of gsm8k/ and benchmarks/")
    parser.add_argument("--pairs", type=int, default=1000, help="mismatched pairs to verify")
    parser.add_argument("--seed", type=int, default=0, help="of the mismatched pairs")
    parser.add_argument("--workers", type=int, default=2, help="verifier processes")
    options = parser.parse_args(argv)
    check_at_least("--workers", options.workers, 1)

    answers = gold_answers(options.data)
    own = [Pair(file, gold, gold) for file, golds in answers.items() for gold in golds]
    mismatched = mismatched_pairs(answers, options.pairs, options.seed)
    pairs = own + mismatched
    with VerifierPool(num_workers=options.workers) as pool:
        verdicts = pool.verify([p.gold for p in pairs], [respond(p.answer) for p in pairs])

    failed = [p for p, v in zip(own, verdicts[: len(own)], strict=True) if v != Verdict.RIGHT]
    distinct = list(dict.fromkeys(own))
    unparsed = symbolic_failures(distinct)
    judged = list(zip(mismatched, verdicts[len(own) :], strict=True))
    matched = [p for p, v in judged if v == Verdict.RIGHT]
    unlike = [p for p in matched if not same_value(p.gold, p.answer)]
    groups = {
        "golds": own,
        "not right": failed,
        "not symbolic": unparsed,
        "mismatched": mismatched,
        "unverifiable": [p for p, v in judged if v == Verdict.UNVERIFIABLE],
        "truly equal": [p for p in matched if p not in unlike],
        "wrongly right": unlike,
    }
    print_table(groups)
    summary = {
        "gold_right_share": 1 - len(failed) / len(own),
        "gold_symbolic_right_share": 1 - len(unparsed) / len(distinct),
        "mismatched_right": len(unlike),
        "mismatched_truly_equal": len(matched) - len(unlike),
        "unverifiable": Counter(verdicts)[Verdict.UNVERIFIABLE],
        "golds": len(own),
        "mismatched": len(mismatched),
    }
    print(json.dumps(summary))


def print_table(groups: dict[str, list[Pair]]) -> None:
    """Counts by file, then each pair of the groups that should be small."""
    counts = {name: Counter(pair.file for pair in pairs) for name, pairs in groups.items()}
    print(f"{'file':<32}" + "".join(f"{name:>15}" for name in counts))
    for file in FILES:
        print(f"{file:<32}" + "".join(f"{count[file]:>15}" for count in counts.values()))
    for name, pairs in groups.items():
        if name not in ("golds", "mismatched"):
            for pair in pairs:
                print(f"{name}: {pair.file}: gold {pair.gold!r}, answer {pair.answer!r}")
