"""Fused losses and resampling for feature maps: Triton on CUDA, plain torch elsewhere. Needs torch only."""

from .align import AlignLoss, align_loss, align_loss_reference
from .align_group import AlignTerm, align_losses
from .deform_attn import MultiScaleDeformableAttention, deform_attn, deform_attn_reference, ms_deform_attn
from .moments import Moments, moments, moments_reference
from .resize import resize_bilinear, resize_bilinear_reference
from .shadowed import step_aside

__all__ = [
    "AlignLoss",
    "AlignTerm",
    "Moments",
    "MultiScaleDeformableAttention",
    "align_loss",
    "align_loss_reference",
    "align_losses",
    "deform_attn",
    "deform_attn_reference",
    "moments",
    "moments_reference",
    "ms_deform_attn",
    "resize_bilinear",
    "resize_bilinear_reference",
]

if __name__ == "kernels":  # not as kpu_fast.kernels, nor as a copy in another package
    step_aside(__name__)
