"""Fused losses and resampling for feature maps: Triton on CUDA, plain torch elsewhere. Needs torch only."""

from .align import AlignLoss, align_loss, align_loss_reference
from .deform_attn import deform_attn, deform_attn_reference
from .resize import resize_bilinear, resize_bilinear_reference

__all__ = [
    "AlignLoss",
    "align_loss",
    "align_loss_reference",
    "deform_attn",
    "deform_attn_reference",
    "resize_bilinear",
    "resize_bilinear_reference",
]
