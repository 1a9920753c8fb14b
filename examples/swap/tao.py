"""NVIDIA TAO, distillation with loss_type BALANCED: as published, and as one call.

TAO standardises the teacher before (PHI-S), and where the student has other channels its projector stands between the
resize and the loss. Then only the teacher's resize can be fused: `resize_bilinear(student, grid, layout="NCHW",
align_corners=True)` in place of F.interpolate, the projector, `align_loss(..., resize="target")`.
"""

import torch.nn.functional as F
from kpu_fast.kernels import align_loss, resize_bilinear
from torch import Tensor


def published(student: Tensor, teacher: Tensor) -> Tensor:
    """Maps (B, C, H, W); both move to the smaller height and the smaller width."""
    grid = tuple(min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    student, teacher = (
        x if x.shape[2:] == grid else F.interpolate(x, size=grid, mode="bilinear", align_corners=True)
        for x in (student, teacher)
    )
    student, teacher = student.flatten(2).mT, teacher.flatten(2).mT  # (B, H·W, C)
    cosine = 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    return 0.9 * cosine + 0.1 * F.smooth_l1_loss(student, teacher, beta=2.0)


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    """The same; the resize of one side happens inside the kernel."""
    student, teacher = student.permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1)  # views
    height, width = (min(sides) for sides in zip(student.shape[1:3], teacher.shape[1:3], strict=True))
    if (height, width) not in (student.shape[1:3], teacher.shape[1:3]):  # one is lower, the other narrower
        student = resize_bilinear(student, (height, width), align_corners=True)
    resize = "source" if (height, width) == teacher.shape[1:3] else "target"
    return align_loss(student, teacher, beta=2.0, resize=resize, align_corners=True)
