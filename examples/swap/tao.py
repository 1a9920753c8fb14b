"""NVIDIA TAO, distillation with loss_type BALANCED: as published, and as ours, with and without the resize.

TAO standardises the teacher before (PHI-S). Where the student has other channels, its projector stands between the
resize and the loss, and works on (B, N, C). In summary mode features are (B, C), and the loss alone is left.
"""

from collections.abc import Callable

import torch.nn.functional as F
from kpu_fast.kernels import align_loss, resize_bilinear
from torch import Tensor

Projector = Callable[[Tensor], Tensor]
Balanced = Callable[[Tensor, Tensor], Tensor]


def published_balanced(s: Tensor, t: Tensor, weight: float = 0.1) -> Tensor:
    """What BalancedFeatureLoss computes of (B, N, C) or (B, C)."""
    cosine = 1 - F.cosine_similarity(s, t, dim=-1).mean()
    return (1 - weight) * cosine + weight * F.smooth_l1_loss(s, t, beta=2.0)


def our_balanced(s: Tensor, t: Tensor, weight: float = 0.1) -> Tensor:
    """The same as one call, with or without a projector before it."""
    return align_loss(s, t, beta=2.0, cos_weight=1 - weight, l1_weight=weight)


def published(
    student: Tensor, teacher: Tensor, projector: Projector | None = None, balanced: Balanced = published_balanced
) -> Tensor:
    """Maps (B, C, H, W); both move to the smaller height and the smaller width."""
    grid = tuple(min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    student, teacher = (
        x if x.shape[2:] == grid else F.interpolate(x, size=grid, mode="bilinear", align_corners=True)
        for x in (student, teacher)
    )
    student, teacher = student.flatten(2).mT, teacher.flatten(2).mT  # (B, H·W, C)
    return balanced(student if projector is None else projector(student), teacher)


def ours(student: Tensor, teacher: Tensor, projector: Projector | None = None) -> Tensor:
    """The same; the resize of one side happens inside the kernel, with a projector the teacher's."""
    student, teacher = student.permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1)  # views
    grid = tuple(min(sides) for sides in zip(student.shape[1:3], teacher.shape[1:3], strict=True))
    # Where a projector follows, and where one map is lower and the other narrower.
    if projector is not None or grid not in (student.shape[1:3], teacher.shape[1:3]):
        student = resize_bilinear(student, grid, align_corners=True)
    if projector is not None:
        student = projector(student.flatten(1, 2)).unflatten(1, grid)
    resize = "source" if grid == teacher.shape[1:3] else "target"
    return align_loss(student, teacher, beta=2.0, resize=resize, align_corners=True)
