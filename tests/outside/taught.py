"""An algorithm from outside the repository: GRPO that a teacher pulls towards itself."""

from rlzoo.algos import GRPO
from rlzoo.learning.losses import LossOutput, kl_to_reference


class Taught(GRPO):
    scores = ("old_logprobs", "teacher_logprobs")

    def __init__(self, policy, optimizer, *, teacher, teacher_coef: float = 1.0, **shared):
        super().__init__(policy, optimizer, **shared)
        self.teacher, self.teacher_coef = teacher, teacher_coef

    def build_models(self):
        super().build_models()
        self.frozen["teacher"] = self.teacher()

    def policy_loss(self, logprobs, batch):
        surrogate, metrics = super().policy_loss(logprobs, batch)
        apart = kl_to_reference(logprobs, batch.teacher_logprobs, batch.weights)
        metrics = metrics | {"teacher_kl": apart.detach()}
        return LossOutput(surrogate + self.teacher_coef * apart, metrics)
