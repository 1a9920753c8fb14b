"""UNIC and DUNE (Naver): standardised teachers, losses per sample, teacher dropping; as published, and as ours.

Features are {teacher: {"cls": (B, C), "patch": (B, N, C)}}, statistics {teacher: {"cls": (mean, std), ...}} of (C,).
UNIC standardises with the running statistics from before the batch, which hold std + 1e-6, and adds another 1e-6. DUNE
standardises with those of the batch in training and the stored ones in evaluation, std clamped at 1e-3.
"""

import random
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from kpu_fast.kernels import align_loss, moments
from torch import Tensor, distributed

from kpu_fast.objectives.balance import teacher_drop

Outputs = Mapping[str, Mapping[str, Tensor]]
Statistics = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]


def published_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel over all ranks: every rank gathers every rank's features."""
    if distributed.is_initialized():
        gathered = [torch.empty_like(features) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, features.contiguous())
        features = torch.cat(gathered)
    tokens = tuple(range(features.dim() - 1))
    return features.mean(tokens), features.std(tokens)


def our_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """The same from one pass and one all-reduce of 2·C + 1 numbers."""
    found = moments(features).all_reduce()
    unbiased = found.std * (found.count / (found.count - 1)).sqrt()
    return found.mean.float(), unbiased.float()


def published_standardise(features: Tensor, mean_ema: Tensor, std_ema: Tensor, momentum: float) -> Tensor:
    """UNIC: features standardised with the running statistics, (1, C) or (1, 1, C), which then move on."""
    out = (features - mean_ema) / (std_ema + 1e-6)
    mean, std = published_statistics(features)
    mean_ema.copy_(mean_ema * (1 - momentum) + mean * momentum)
    std_ema.copy_(std_ema * (1 - momentum) + (std + 1e-6) * momentum)
    return out


def our_running_statistics(
    features: Tensor, mean_ema: Tensor, std_ema: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """UNIC: the (mean, std) of (C,) that these features take, and the running statistics moved on."""
    taken = mean_ema.flatten().clone(), std_ema.flatten() + 1e-6
    if momentum == 0:  # evaluation
        return taken
    mean, std = our_statistics(features)
    mean_ema.lerp_(mean.expand_as(mean_ema), momentum)
    std_ema.lerp_((std + 1e-6).expand_as(std_ema), momentum)
    return taken


def published(
    student: Outputs,
    teacher: Outputs,
    statistics: Statistics,
    p: float = 0.5,
    draw: Callable[[int, int], float] = lambda teacher, sample: random.random(),
) -> Tensor:
    """draw(teacher, sample): the number in [0, 1) that decides whether the sample drops the teacher."""
    losses = []
    for name in sorted(teacher):
        kinds = []
        for kind, raw in teacher[name].items():
            mean, std = statistics[name][kind]
            source, target = student[name][kind], (raw - mean) / std
            cosine = 1 - F.cosine_similarity(source, target, dim=-1)
            smooth = F.smooth_l1_loss(source, target, reduction="none").mean(-1)
            loss = 0.5 * cosine + 0.5 * smooth
            kinds.append(loss.mean(1) if loss.dim() == 2 else loss)
        losses.append(torch.stack(kinds).mean(0))
    losses = torch.stack(losses)  # (T, B)

    coefficients = torch.ones_like(losses)
    for sample in range(losses.shape[1]):
        furthest = losses[:, sample].argmax()
        for index in range(losses.shape[0]):
            if index != furthest and draw(index, sample) < p:  # on a GPU the comparison waits for it: T·B times a step
                coefficients[index, sample] = 0
    coefficients = (coefficients / coefficients.sum()).detach()
    return (coefficients * losses).sum()


def ours(
    student: Outputs,
    teacher: Outputs,
    statistics: Statistics,
    p: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same without a sync; the standardisation happens inside the kernel."""
    losses = torch.stack(
        [
            sum(
                align_loss(
                    student[name][kind], raw, cos_weight=0.5 / len(teacher[name]), l1_weight=0.5 / len(teacher[name]),
                    target_mean=statistics[name][kind][0], target_std=statistics[name][kind][1], reduction="sample",
                )
                for kind, raw in teacher[name].items()
            )
            for name in sorted(teacher)
        ]
    )  # fmt: skip
    return (teacher_drop(losses, p=p, generator=generator) * losses).sum()
