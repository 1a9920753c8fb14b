"""AM-RADIO (arXiv 2312.06709): cosine on the summary, cosine + smooth-L1 on the spatial features; and as two calls.

From the paper: NVlabs/RADIO has no training code. Which side is resized, and align_corners=False, are our choice.
"""

import torch.nn.functional as F
from kpu_fast.kernels import align_loss
from torch import Tensor


def published(summary: Tensor, maps: Tensor, teacher_summary: Tensor, teacher_maps: Tensor) -> Tensor:
    """summary (B, C), maps (B, C', H, W); the student's map moves to the teacher's grid."""
    loss = (1 - F.cosine_similarity(summary, teacher_summary, dim=-1)).mean()
    if maps.shape[2:] != teacher_maps.shape[2:]:
        maps = F.interpolate(maps, size=teacher_maps.shape[2:], mode="bilinear", align_corners=False)
    tokens, teacher_tokens = maps.flatten(2).mT, teacher_maps.flatten(2).mT  # (B, H·W, C')
    cosine = (1 - F.cosine_similarity(tokens, teacher_tokens, dim=-1)).mean()
    return loss + 0.9 * cosine + 0.1 * F.smooth_l1_loss(tokens, teacher_tokens)


def ours(summary: Tensor, maps: Tensor, teacher_summary: Tensor, teacher_maps: Tensor) -> Tensor:
    """The same; the resize happens inside the kernel."""
    loss = align_loss(summary, teacher_summary, cos_weight=1.0, l1_weight=0.0)
    return loss + align_loss(maps, teacher_maps, resize="source", layout="NCHW")
