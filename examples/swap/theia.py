"""Theia: one cosine over each sample's whole map, stored mean and std; as published, and as one call per teacher.

Features are {teacher: (B, N, C)}, statistics {teacher: (mean, std)} of (C,), measured once over the data set.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from kpu_fast.kernels import align_loss
from torch import Tensor

Features = Mapping[str, Tensor]
Statistics = Mapping[str, tuple[Tensor, Tensor]]


def published(student: Features, teacher: Features, statistics: Statistics) -> Tensor:
    """0.9·(1 − cosine of the flattened maps) + 0.1·smooth-L1, averaged over the teachers."""
    cosine = smooth = 0.0
    for name, source in student.items():
        mean, std = statistics[name]
        target = (teacher[name] - mean) / std
        ones = source.new_ones(len(source))
        unit, teacher_unit = F.normalize(source.flatten(1), dim=1), F.normalize(target.flatten(1), dim=1)
        cosine += F.cosine_embedding_loss(unit, teacher_unit, ones) / len(student)
        smooth += F.smooth_l1_loss(source, target) / len(student)
    return 0.9 * cosine + 0.1 * smooth


def ours(student: Features, teacher: Features, statistics: Statistics) -> Tensor:
    """The same; the teacher is standardised inside the kernel."""
    weights = {"cos_weight": 0.9 / len(student), "l1_weight": 0.1 / len(student), "cos_over": "map"}
    return sum(
        align_loss(source, teacher[name], target_mean=mean, target_std=std, **weights)
        for (name, source), (mean, std) in ((item, statistics[item[0]]) for item in student.items())
    )
