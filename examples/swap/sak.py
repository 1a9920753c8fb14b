"""SAK: four levels per teacher, one cosine over each sample's whole map; as published, and as one call per level.

Features are {teacher: [map (B, C, H, W), ...]}, one map per level.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from kpu_fast.kernels import align_loss
from torch import Tensor

Levels = Mapping[str, Sequence[Tensor]]


def published(student: Levels, teacher: Levels) -> Tensor:
    """0.9·(1 − cosine) + 0.1·smooth-L1, summed over levels and teachers; the smaller map moves to the larger grid."""
    losses = []
    for name in teacher:
        for source, target in zip(student[name], teacher[name], strict=True):
            if source.shape[2] < target.shape[2]:
                source = F.interpolate(source, size=target.shape[2:], mode="bilinear", align_corners=False)
            elif source.shape[2:] != target.shape[2:]:
                target = F.interpolate(target, size=source.shape[2:], mode="bilinear", align_corners=False)
            ones = source.new_ones(len(source))
            cosine = F.cosine_embedding_loss(source.flatten(1), target.flatten(1), ones)
            losses.append(0.9 * cosine + 0.1 * F.smooth_l1_loss(source, target))
    return torch.stack(losses).sum()


def ours(student: Levels, teacher: Levels) -> Tensor:
    """The same; the resize happens inside the kernel."""
    losses = []
    for name in teacher:
        for source, target in zip(student[name], teacher[name], strict=True):
            if source.shape == target.shape:
                # One cosine over all of a sample: the order of its numbers is free, so C neighbours, which fit the
                # kernels whatever H·W is, pass for the channels of a token.
                source, target = (x.reshape(len(x), -1, x.shape[1]) for x in (source, target))  # views
                losses.append(align_loss(source, target, cos_over="map"))
                continue
            resize = "source" if source.shape[2] < target.shape[2] else "target"
            source, target = source.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1)  # views
            losses.append(align_loss(source, target, resize=resize, cos_over="map"))
    return torch.stack(losses).sum()
