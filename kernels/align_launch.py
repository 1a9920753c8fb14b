"""Launches of align.py's kernels: along the channels, or across them where it is tokens that are adjacent in memory."""

import math

import triton
from torch import Tensor

from .align_across_triton import align_across_kernel
from .align_torch import common_grid
from .align_triton import align_along_kernel, align_finish_kernel, align_scale_kernel
from .launch import (
    ALIGN_TILE_ACROSS,
    FINISH_TILE,
    SCALE_PROGRAMS,
    SCALE_TILE,
    coded,
    device_of,
    flat_stride,
    inverse_beta,
    token_tile,
    tokens_adjacent,
)

_RESIZE = {"none": 0, "source": 1, "target": 2}


def launch_forward(
    source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
    rows, stats, grad_source, grad_target,
):  # fmt: skip
    """As align_torch.forward: fill rows, or with their sum a scalar, and stats and the gradients if not empty."""
    _launch(
        None, source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
        rows, stats, grad_source, grad_target, FORWARD=True, STATS=stats.numel() > 0, SUM=rows.dim() == 0,
    )  # fmt: skip


def launch_backward(
    upstream, source, target, mean, std, valid, share, stats, cos_weight, l1_weight, beta, resize, corners,
    grad_source, grad_target,
):  # fmt: skip
    """As align_torch.backward: fill the gradients that are not empty."""
    if grad_source.numel() or grad_target.numel():
        by_map = stats.shape[2:] != upstream.shape[1:]
        if flat_stride(upstream) is None:  # a number per token: no reason to read whole maps line by line
            upstream = upstream.contiguous()
        _launch(
            upstream, source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
            stats, stats, grad_source, grad_target, FORWARD=False, STATS=False, SUM=False,
        )  # fmt: skip


def _launch(
    upstream, source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
    rows, stats, grad_source, grad_target, **flags,
) -> None:  # fmt: skip
    """upstream: (B, H, W), evenly spaced, or None in a forward."""
    # A pointer that a flag keeps the kernel from following still has to be a tensor.
    constants = (
        source if mean is None else mean.contiguous().resolve_neg(),
        source if std is None else std.contiguous().resolve_neg(),
        source if valid is None else valid.contiguous(),
    )
    flags |= {"HAS_MEAN": mean is not None, "HAS_STD": std is not None, "HAS_VALID": valid is not None}
    flags |= {"GRAD_S": grad_source.numel() > 0, "GRAD_T": grad_target.numel() > 0, "BY_MAP": by_map}
    flags |= {"HAS_SHARE": share.numel() > 0}
    grid = common_grid(source, target, resize)
    made = grad_source, grad_target
    across = tokens_adjacent(source) and tokens_adjacent(target)
    across &= resize == "none" and _evenly_spaced(source, target, *made)
    if not across:  # an NCHW side is turned by a copy first
        source, target = (x.contiguous() if tokens_adjacent(x) else x for x in (source, target))
        made = tuple(x.new_empty(x.shape) if x.numel() and tokens_adjacent(x) else x for x in made)
    tile = ALIGN_TILE_ACROSS if across else token_tile(source.shape[3])
    programs = grid[0] * triton.cdiv(grid[1] * grid[2], tile.tokens)
    found = rows.new_empty(programs) if flags["SUM"] else rows
    tensors = source if upstream is None else upstream, source, target, *constants, share, found, stats, *made
    run = _launch_across if across else _launch_along
    weights = cos_weight, l1_weight, beta, inverse_beta(beta)
    with device_of(source):
        run(programs, tile, tensors, grid, (upstream, source, target, *made), weights, flags, resize, corners)
        if flags["SUM"]:
            align_finish_kernel[(1,)](
                found, rows, coded([0]), coded([programs]), COUNT=1, BLOCK=FINISH_TILE.channels,
                num_warps=FINISH_TILE.num_warps,
            )  # fmt: skip
    for grad, here in zip((grad_source, grad_target), made, strict=True):
        if here is not grad:
            grad.copy_(here)


def _launch_along(programs, tile, tensors, grid, views, weights, flags, resize, corners) -> None:
    _, source, target, *_ = views
    samples, height, width = grid
    flat = resize == "none" and _evenly_spaced(*views)
    strides = _strides(views[0], flat)[:3], *(_strides(x, flat) for x in views[1:])
    if flat:
        height, width = 1, height * width
    align_along_kernel[(programs,)](
        *tensors, *(step for steps in strides for step in steps),
        grid.numel(), samples, source.shape[3], *source.shape[1:3], *target.shape[1:3],
        height, width, *weights, **flags, FLAT=flat, RESIZE=_RESIZE[resize], CORNERS=corners,
        TOKENS=tile.tokens, CHUNK=tile.chunk, PIECES=tile.pieces, num_warps=tile.num_warps,
    )  # fmt: skip


def _launch_across(programs, tile, tensors, grid, views, weights, flags, *_) -> None:
    samples, height, width = grid
    (u_sample, _, u_token, _), *sides = (_strides(x, True) for x in views)
    sides = [(sample, token, channel) for sample, _, token, channel in sides]
    wide = math.gcd(8, height * width, *(step for sample, _, channel in sides for step in (sample, channel)))
    align_across_kernel[(programs,)](
        *tensors, u_sample, u_token, *(step for steps in sides for step in steps),
        grid.numel(), samples, height * width, views[1].shape[3], *weights, **flags,
        TOKENS=tile.tokens, CHUNK=tile.chunk, WIDE=wide, num_warps=tile.num_warps,
    )  # fmt: skip


def _evenly_spaced(*views: Tensor | None) -> bool:
    """Whether the lines of each, if it is not empty, follow one another as its tokens do."""
    return all(flat_stride(x) is not None for x in views if x is not None and x.numel())


def _strides(x: Tensor | None, flat: bool) -> tuple[int, int, int, int]:
    """Those of (B, H, W, C), or of (B, H, W) and 0; flat: as one line; 0 of nothing, and from one sample to none."""
    if x is None or not x.numel():
        return (0, 0, 0, 0)
    sample = x.stride(0) if len(x) > 1 else 0
    channel = x.stride(3) if x.dim() == 4 else 0
    return (sample, 0, flat_stride(x), channel) if flat else (sample, *x.stride()[1:3], channel)


def launch_scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor in place, for a dense gradient in any order of dimensions."""
    block = SCALE_TILE.channels
    with device_of(grad):
        align_scale_kernel[(min(SCALE_PROGRAMS, triton.cdiv(grad.numel(), block)),)](
            grad, factor, grad.numel(), BLOCK=block, num_warps=SCALE_TILE.num_warps
        )
