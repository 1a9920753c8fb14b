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
    flags |= {"HAS_MEAN": mean is not None, "HAS_STD": std is not None, "HAS_VALID": valid is not None}
    flags |= {"GRAD_S": grad_source.numel() > 0, "GRAD_T": grad_target.numel() > 0, "BY_MAP": by_map}
    if flat_stride(upstream) is None:  # a number per token: no reason to read whole maps line by line
        upstream = upstream.contiguous()
    made = grad_source, grad_target
    across = tokens_adjacent(source) and tokens_adjacent(target)
    across &= resize == "none" and _evenly_spaced(source, target, *made)
    if not across:  # an NCHW side is turned by a copy first
        source, target = (x.contiguous() if tokens_adjacent(x) else x for x in (source, target))
        made = tuple(x.new_empty(x.shape) if x.numel() and tokens_adjacent(x) else x for x in made)
    tensors = upstream, source, target, *constants, share, rows, stats, *made
    run = _launch_across if across else _launch_along
    weights = cos_weight, l1_weight, beta, inverse_beta(beta)
    with device_of(source):
        run(tensors, (upstream, source, target, *made), weights, flags, resize, corners)
    for grad, here in zip((grad_source, grad_target), made, strict=True):
        if here is not grad:
            grad.copy_(here)


def _launch_along(tensors, views, weights, flags, resize, corners) -> None:
    upstream, source, target, *_ = views
    samples, height, width = upstream.shape
    flat = resize == "none" and _evenly_spaced(*views)
    strides = [step for x in views for step in _strides(x, flat)]
    if flat:
        height, width = 1, height * width
    tile = token_tile(source.shape[3])
    align_along_kernel[(samples * triton.cdiv(height * width, tile.tokens),)](
        *tensors, *strides, upstream.numel(), samples, source.shape[3], *source.shape[1:3], *target.shape[1:3],
        height, width, *weights, **flags, FLAT=flat, RESIZE=_RESIZE[resize], CORNERS=corners,
        TOKENS=tile.tokens, CHUNK=tile.chunk, PIECES=tile.pieces, num_warps=tile.num_warps,
    )  # fmt: skip


def _launch_across(tensors, views, weights, flags, *_) -> None:
    upstream, source, *_ = views
    samples, height, width = upstream.shape
    strides = [(first, *rest) for first, _, *rest in (_strides(x, True) for x in views)]
    wide = math.gcd(8, height * width, *(step for first, _, last in strides[1:] for step in (first, last)))
    tile = ALIGN_TILE_ACROSS
    align_across_kernel[(samples * triton.cdiv(height * width, tile.tokens),)](
        *tensors, *(step for steps in strides for step in steps),
        upstream.numel(), samples, height * width, source.shape[3], *weights, **flags,
        TOKENS=tile.tokens, CHUNK=tile.chunk, WIDE=wide, num_warps=tile.num_warps,
    )  # fmt: skip


def _evenly_spaced(*views: Tensor) -> bool:
    """Whether the lines of each, if it is not empty, follow one another as its tokens do."""
    return all(flat_stride(x) is not None for x in views if x.numel())


def _strides(x: Tensor, flat: bool) -> tuple[int, ...]:
    """Those of (B, H, W) or (B, H, W, C); flat: as one line; 0 of an empty tensor, and from one sample to none."""
    if not x.numel():
        return (0, 0, 0, 0)
    sample = x.stride(0) if len(x) > 1 else 0
    return (sample, 0, flat_stride(x), *x.stride()[3:]) if flat else (sample, *x.stride()[1:])


def launch_scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor in place, for a dense gradient in any order of dimensions."""
    block = SCALE_TILE.channels
    with device_of(grad):
        align_scale_kernel[(triton.cdiv(grad.numel(), block),)](
            grad, factor, grad.numel(), BLOCK=block, num_warps=SCALE_TILE.num_warps
        )
