"""What every recipe is to the training loop: a module that returns loss terms of teachers, and how they add up."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kpu_fast.models.features import FeatureSpec
from kpu_fast.models.student import Student


class Objective(nn.Module):
    """Everything trainable: the student, and what a recipe compares it to its teachers with.

    A recipe has forward(images, targets, valid) → {"<teacher>/<term>": fp32 scalar}, each with its weight on it.

    factors: term → what it counts. weights: teacher → w_t in 1/T sum_t w_t L_t, 1 where it is not given.
    """

    def __init__(
        self,
        student: Student,
        specs: Mapping[str, FeatureSpec],
        factors: Mapping[str, float],
        weights: Mapping[str, float] | None,
    ):
        super().__init__()
        self.student, self.specs = student, dict(specs)
        shares = {name: (weights or {}).get(name, 1.0) / len(specs) for name in specs}
        self.weights = {f"{name}/{term}": share * f for name, share in shares.items() for term, f in factors.items()}
        self.standardize = nn.ModuleDict()  # of each teacher's features, where the recipe has it

    def total(self, terms: Mapping[str, Tensor], shares: Tensor | None = None) -> Tensor:
        """The loss: the sum of all teachers' terms; with shares (T,), those take the place of 1/T each."""
        if shares is None:
            return torch.stack(list(terms.values())).sum()
        return (shares * self.losses(terms)).sum()

    def losses(self, terms: Mapping[str, Tensor]) -> Tensor:
        """(T,) the sum of each teacher's terms alone, without the 1/T."""
        sums = [sum(v for key, v in terms.items() if key.rpartition("/")[0] == name) for name in self.specs]
        return len(sums) * torch.stack(sums)

    def unweighed(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same terms without their weights and without gradient."""
        return {key: value.detach() / self.weights[key] for key, value in terms.items()}

    def after_step(self, batches: int = 1) -> None:
        """What is not learned by gradient moves on. Every rank calls this once a step.

        batches: of each teacher since the last call, as many as backwards.
        """

    def in_own_spaces(self) -> Student:
        """The student as others use it. Under ZeRO 3 call with the student's parameters gathered."""
        return self.student
