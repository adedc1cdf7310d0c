"""A reward that says the same of every response, for whole runs: `reward._target_=` names it."""

import torch

from rlzoo.rewards.base import Scores, Verdict


class Constant:
    """Every response is right (`value=1`) or wrong (0); other keys of the group are taken."""

    def __init__(self, value: float = 0.0, **_: object) -> None:
        self.value = value

    def __call__(self, prompts, texts, truncated, on_progress=lambda done: None) -> Scores:
        count = len(texts)
        on_progress(count)
        verdict = Verdict.RIGHT if self.value else Verdict.WRONG
        return Scores(
            torch.full((count,), self.value), torch.full((count,), verdict).to(torch.int8)
        )

    def close(self) -> None:
        pass


class OneRight(Constant):
    """Of the prompts of a call, the responses of one are right."""

    def __call__(self, prompts, texts, truncated, on_progress=lambda done: None) -> Scores:
        scores = super().__call__(prompts, texts, truncated, on_progress)
        lowest = min((prompt.id for prompt in prompts), default="")
        right = torch.tensor([prompt.id == lowest for prompt in prompts], dtype=torch.bool)
        verdicts = torch.where(right, int(Verdict.RIGHT), int(Verdict.WRONG)).to(torch.int8)
        return Scores(right.float(), verdicts if len(prompts) else scores.verdicts)
