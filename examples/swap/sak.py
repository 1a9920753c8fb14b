"""SAK: four levels per teacher, one cosine over each sample's whole map; as published, and as one call per level.

Features are {teacher: [map (B, C, H, W), ...]}, one map per level. The student's maps have one grid at all levels, 24²
for images of 384²; the teachers' have 27², 24² and 64².
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from kpu_fast.kernels import align_loss
from torch import Tensor

Levels = Mapping[str, Sequence[Tensor]]


def published_level(source: Tensor, target: Tensor) -> Tensor:
    """0.9·(1 − cosine) + 0.1·smooth-L1; the smaller map moves to the larger grid."""
    if source.shape[2] < target.shape[2]:
        source = F.interpolate(source, size=target.shape[2:], mode="bilinear", align_corners=False)
    elif source.shape[2:] != target.shape[2:]:
        target = F.interpolate(target, size=source.shape[2:], mode="bilinear", align_corners=False)
    ones = source.new_ones(len(source))
    cosine = F.cosine_embedding_loss(source.flatten(1), target.flatten(1), ones)
    return 0.9 * cosine + 0.1 * F.smooth_l1_loss(source, target)


def our_level(source: Tensor, target: Tensor) -> Tensor:
    """The same; the resize happens inside the kernel."""
    if source.shape == target.shape:
        # One cosine over all of a sample: the order of its numbers is free, so C neighbours, which fit the kernels
        # whatever H·W is, pass for the channels of a token.
        source, target = (x.reshape(len(x), -1, x.shape[1]) for x in (source, target))  # views of dense maps
        return align_loss(source, target, cos_over="map")
    resize = "source" if source.shape[2] < target.shape[2] else "target"
    return align_loss(source, target, resize=resize, cos_over="map", layout="NCHW")


def published(student: Levels, teacher: Levels) -> Tensor:
    """The sum over levels and teachers."""
    return _total(published_level, student, teacher)


def ours(student: Levels, teacher: Levels) -> Tensor:
    """The same of our levels."""
    return _total(our_level, student, teacher)


def _total(level, student: Levels, teacher: Levels) -> Tensor:
    pairs = (pair for name in teacher for pair in zip(student[name], teacher[name], strict=True))
    return torch.stack([level(source, target) for source, target in pairs]).sum()
