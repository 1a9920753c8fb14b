"""How much each teacher's loss counts: shares that sum to 1, constants of a step, never read by the host.

    equal         share_t = 1/T
    FAMO          share_t = (z_t / D_t) / sum_s (z_s / D_s)       z = softmax(w), D = max(loss, 0) + 1e-8
                  share_t = 0 and no part of the sum              where the loss is 0: nothing was compared
                  after the step, on the same batch: w moves by Adam along J_softmax^T (log D - log D')
    TeacherDrop   share_t = kept_t / sum of kept                  the largest loss is kept, each other with 1 - p

loss_t is all that teacher t contributes: L_s2t + L_t2s + lambda L_rec. FAMO's objective is sum_t z_t log D_t / c with
c = sum_t z_t / D_t a constant; its gradient is that of sum_t share_t loss_t. What is our choice: docs/objectives.md.
"""

from typing import Any

import torch
from torch import Tensor, distributed

FAMO_LR, FAMO_DECAY, FAMO_EPS = 0.025, 0.01, 1e-8


@torch.no_grad()
def teacher_drop(losses: Tensor, *, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Coefficients (T, B) of the losses (T, B) of T teachers on B samples: UNIC's teacher dropping, without a sync.

    Each sample keeps the teacher that it is furthest from, the one with its largest loss, and drops every other one
    with probability p. What is kept weighs the same over the whole batch, so that the coefficients sum to 1. They are
    constants, float32 or float64; the loss is (coefficients * losses).sum().

    generator: of the device of `losses`. Raises ValueError for a shape or a probability that does not fit.
    """
    if losses.dim() != 2 or 0 in losses.shape:
        raise ValueError(f"losses: expected (teachers, samples), found shape {tuple(losses.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability, found {p}")
    teachers = torch.arange(losses.shape[0], device=losses.device)
    furthest = teachers[:, None] == losses.argmax(0)
    survives = torch.rand(losses.shape, generator=generator, device=losses.device) >= p
    kept = (furthest | survives).to(torch.promote_types(losses.dtype, torch.float32))
    return kept / kept.sum()


class TeacherDrop:
    """`teacher_drop` where teachers have batches of their own: the losses of a step, one column per rank.

    Every rank draws the same numbers, from the device's default generator, for all ranks: their generators must be in
    the same state, as they are after one `torch.manual_seed`. Resuming with that state resumes the draws.
    """

    @torch.no_grad()
    def shares(self, losses: Tensor) -> Tensor:
        """(T,) losses of this rank → (T,) shares of this rank; over all ranks and teachers their mean is 1/T."""
        columns = _of_all_ranks(losses)  # (T, ranks)
        ranks = columns.shape[1]
        rank = distributed.get_rank() if ranks > 1 else 0
        return (ranks * teacher_drop(columns)[:, rank]).to(losses.dtype)


class FAMO:
    """Fast Adaptive Multitask Optimization (arXiv 2306.03792): shares that let all losses fall at the same rate.

    In a step call `shares` before the backward, and `learn` after the optimiser's step with the losses that the same
    batch has then. Both take this rank's losses and work on the mean over ranks: every rank holds the same state. A
    loss that rounding took below 0 counts as 0, and a teacher whose loss is 0 sits the step out.
    """

    def __init__(self, teachers: int, device: torch.device | str):
        self.w = torch.zeros(teachers, dtype=torch.float64, device=device, requires_grad=True)
        self.adam = torch.optim.Adam([self.w], lr=FAMO_LR, weight_decay=FAMO_DECAY)
        self._log_before: Tensor | None = None

    @torch.no_grad()
    def shares(self, losses: Tensor) -> Tensor:
        """(T,) losses → (T,) shares that sum to 1, or are all 0 where the losses are."""
        distance = _distance(losses)
        self._log_before = distance.log()
        # 1/D of a teacher without one valid cell would be all of the sum, and the others would teach nothing.
        weighed = (self.w.softmax(0) / distance).masked_fill(distance == FAMO_EPS, 0.0)
        return (weighed / weighed.sum().clamp_min(torch.finfo(weighed.dtype).tiny)).to(losses.dtype)

    @torch.no_grad()
    def learn(self, losses: Tensor) -> None:
        """Move w: a teacher whose loss fell more than the others' in this step gets less of the next ones."""
        gained = self._log_before - _distance(losses).log()
        z = self.w.softmax(0)
        self.w.grad = z * (gained - (z * gained).sum())  # the Jacobian of a softmax is diag(z) - z zᵀ
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """w and its Adam."""
        return {"w": self.w.detach().clone(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        with torch.no_grad():
            self.w.copy_(state["w"])
        self.adam.load_state_dict(state["adam"])


def build_balance(kind: str, teachers: int, device: torch.device | str) -> TeacherDrop | FAMO | None:
    """What `objective.balance` names: None for "equal", which needs no shares."""
    if kind == "famo":
        return FAMO(teachers, device)
    return TeacherDrop() if kind == "teacher_drop" else None


def _distance(losses: Tensor) -> Tensor:
    """D of FAMO: positive, also where 1 - cos of two equal features came out as -8e-8."""
    return _of_all_ranks(losses.double()).mean(1).clamp_min(0) + FAMO_EPS


def _of_all_ranks(losses: Tensor) -> Tensor:
    """(T,) on every rank → (T, ranks), the same on every rank."""
    losses = losses.detach()
    if not (distributed.is_available() and distributed.is_initialized()):
        return losses[:, None]
    columns = [torch.empty_like(losses) for _ in range(distributed.get_world_size())]
    distributed.all_gather(columns, losses)
    return torch.stack(columns, 1)
