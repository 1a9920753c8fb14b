"""How much each teacher's loss counts."""

import torch
from torch import Tensor


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
