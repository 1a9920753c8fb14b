"""Images for the ViTs, and what transformers' processor makes of them."""

import torch

from kpu_fast.models.mean_std import IMAGENET_MEAN, IMAGENET_STD


def images(height, width, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def imagenet(pixels):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std
