"""Launches of align.py's kernels: along the channels, or across them where it is tokens that are adjacent in memory."""

import math

import triton
from torch import Tensor

from .align_across_triton import align_across_kernel
from .align_triton import align_along_kernel, align_scale_kernel
from .launch import ALIGN_TILE_ACROSS, SCALE_TILE, device_of, flat_stride, inverse_beta, token_tile, tokens_adjacent

_RESIZE = {"none": 0, "source": 1, "target": 2}


def launch_forward(
    source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
    rows, stats, grad_source, grad_target,
):  # fmt: skip
    """As align_torch.forward: fill rows, and stats and the gradients where they are not empty."""
    _launch(
        rows, source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
        rows, stats, grad_source, grad_target, FORWARD=True, STATS=stats.numel() > 0,
    )  # fmt: skip


def launch_backward(
    upstream, source, target, mean, std, valid, share, stats, cos_weight, l1_weight, beta, resize, corners,
    grad_source, grad_target,
):  # fmt: skip
    """As align_torch.backward: fill the gradients that are not empty."""
    if grad_source.numel() or grad_target.numel():
        by_map = stats.shape[2:] != upstream.shape[1:]
        _launch(
            upstream, source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
            upstream, stats, grad_source, grad_target, FORWARD=False, STATS=False,
        )  # fmt: skip


def _launch(
    upstream, source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
    rows, stats, grad_source, grad_target, **flags,
) -> None:  # fmt: skip
    """upstream and rows: (B, H, W), one of them unread."""
    # A pointer that a flag keeps the kernel from following still has to be a tensor.
    constants = (
        source if mean is None else mean.contiguous().resolve_neg(),
        source if std is None else std.contiguous().resolve_neg(),
        source if valid is None else valid.contiguous(),
    )
    samples, height, width = upstream.shape
    views = source, target, grad_source, grad_target
    flat = resize == "none" and all(flat_stride(x) is not None for x in (upstream, *views) if x.numel())
    strides = upstream.stride(), *(x.stride() if x.numel() else (0, 0, 0, 0) for x in views)
    if flat:
        line = upstream, *views
        strides = tuple(
            (step[0], 0, flat_stride(x) if x.numel() else 0, *step[3:]) for x, step in zip(line, strides, strict=True)
        )
        height, width = 1, height * width
    flags |= {"FLAT": flat, "RESIZE": _RESIZE[resize], "CORNERS": corners, "BY_MAP": by_map}
    flags |= {"HAS_MEAN": mean is not None, "HAS_STD": std is not None, "HAS_VALID": valid is not None}
    flags |= {"GRAD_S": grad_source.numel() > 0, "GRAD_T": grad_target.numel() > 0}
    if tokens_adjacent(source) or tokens_adjacent(target):
        kernel, tile = align_across_kernel, ALIGN_TILE_ACROSS["plain" if resize == "none" else "resized"]
        steps = (step for by_dim in strides[1:] for step in (by_dim[0], by_dim[3]))
        sizes = {"TOKENS": tile.rows, "CHUNK": tile.channels, "WIDE": math.gcd(8, width, *steps)}
    else:
        kernel, tile = align_along_kernel, token_tile(source.shape[3])
        sizes = {"TOKENS": tile.tokens, "CHUNK": tile.chunk, "PIECES": tile.pieces}
    with device_of(source):
        kernel[(samples * triton.cdiv(height * width, sizes["TOKENS"]),)](
            upstream, source, target, *constants, share, rows, stats, grad_source, grad_target,
            *(step for steps in strides for step in steps), upstream.numel(), samples, source.shape[3],
            *source.shape[1:3], *target.shape[1:3], height, width,
            cos_weight, l1_weight, beta, inverse_beta(beta), **flags, **sizes, num_warps=tile.num_warps,
        )  # fmt: skip


def launch_scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor in place, for a dense gradient in any order of dimensions."""
    block = SCALE_TILE.channels
    with device_of(grad):
        align_scale_kernel[(triton.cdiv(grad.numel(), block),)](
            grad, factor, grad.numel(), BLOCK=block, num_warps=SCALE_TILE.num_warps
        )
