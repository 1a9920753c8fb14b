"""Launches of align.py's kernels: along the channels, or across them where it is tokens that are adjacent in memory."""

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .align_across_triton import align_across_kernel
from .align_torch import common_grid
from .align_triton import align_along_kernel, align_finish_kernel, align_scale_kernel
from .launch import (
    FINISH_TILE,
    SCALE_PROGRAMS,
    SCALE_TILE,
    TokenTile,
    across_tile,
    coded,
    device_of,
    inverse_beta,
    run_kernel,
    token_tile,
)
from .tensors import flat_stride, tokens_adjacent

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
    made = grad_source, grad_target
    plan = _plan(resize, *map(_seen, (upstream, source, target, *made)))
    if plan is None:  # an NCHW side beside others is turned by a copy first
        source, target = (x.contiguous() if tokens_adjacent(x) else x for x in (source, target))
        made = tuple(x.new_empty(x.shape) if x.numel() and tokens_adjacent(x) else x for x in made)
        plan = _plan(resize, *map(_seen, (upstream, source, target, *made)))
    flags |= {"HAS_MEAN": mean is not None, "HAS_STD": std is not None, "HAS_VALID": valid is not None}
    flags |= {"GRAD_S": grad_source.numel() > 0, "GRAD_T": grad_target.numel() > 0, "BY_MAP": by_map}
    flags |= {"HAS_SHARE": share.numel() > 0, **plan.constants}
    if not plan.across:
        flags["CORNERS"] = corners
    found = rows.new_empty(plan.programs) if flags["SUM"] else rows
    with device_of(source):
        run_kernel(
            align_across_kernel if plan.across else align_along_kernel, (plan.programs, 1),
            source if upstream is None else upstream, source, target, *constants, share, found, stats, *made,
            *plan.numbers, cos_weight, l1_weight, beta, inverse_beta(beta), num_warps=plan.num_warps, **flags,
        )  # fmt: skip
        if flags["SUM"]:
            run_kernel(
                align_finish_kernel, (1, 1),
                found, rows, coded([0]), coded([plan.programs]), COUNT=1, BLOCK=FINISH_TILE.channels,
                num_warps=FINISH_TILE.num_warps,
            )  # fmt: skip
    for grad, here in zip((grad_source, grad_target), made, strict=True):
        if here is not grad:
            grad.copy_(here)


class _Plan(NamedTuple):
    """What of a launch follows from shapes and strides."""

    across: bool
    programs: int
    numbers: tuple[int, ...]  # strides and sizes, in the order of the kernel's parameters
    num_warps: int
    constants: dict[str, int | bool]


def _seen(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.shape, x.stride())


def _plan(resize: str, *views: tuple | None) -> _Plan | None:
    """For upstream, source, target and their gradients, as `_seen`; None where an NCHW side has to be turned first."""
    _, height, width, channels = views[1][0]
    return _cached_plan(across_tile(height * width), token_tile(channels), resize, *views)


@functools.lru_cache(maxsize=4096)
def _cached_plan(across: TokenTile, along: TokenTile, resize: str, *views: tuple | None) -> _Plan | None:
    views = [x if x is None else torch.empty_strided(*x, device="meta") for x in views]
    _, source, target, *made = views
    grid = common_grid(source, target, resize)
    if tokens_adjacent(source) and tokens_adjacent(target) and resize == "none" and _evenly_spaced(*views[1:]):
        return _plan_across(across, grid, views)
    if any(tokens_adjacent(x) for x in (source, target, *made) if x.numel()):
        return None
    return _plan_along(along, grid, views, resize)


def _plan_along(tile: TokenTile, grid: torch.Size, views: list[Tensor | None], resize: str) -> _Plan:
    _, source, target, *_ = views
    samples, height, width = grid
    programs = samples * triton.cdiv(height * width, tile.tokens)
    flat = resize == "none" and _evenly_spaced(*views)
    strides = _strides(views[0], flat)[:3], *(_strides(x, flat) for x in views[1:])
    if flat:
        height, width = 1, height * width
    numbers = (
        *(step for steps in strides for step in steps),
        grid.numel(), samples, source.shape[3], *source.shape[1:3], *target.shape[1:3], height, width,
    )  # fmt: skip
    constants = {"TOKENS": tile.tokens, "CHUNK": tile.chunk, "PIECES": tile.pieces}
    return _Plan(False, programs, numbers, tile.num_warps, {"FLAT": flat, "RESIZE": _RESIZE[resize], **constants})


def _plan_across(tile: TokenTile, grid: torch.Size, views: list[Tensor | None]) -> _Plan:
    samples, height, width = grid
    (u_sample, _, u_token, _), *sides = (_strides(x, True) for x in views)
    sides = [(sample, token, channel) for sample, _, token, channel in sides]
    wide = math.gcd(8, height * width, *(step for sample, _, channel in sides for step in (sample, channel)))
    numbers = (
        u_sample, u_token, *(step for steps in sides for step in steps),
        grid.numel(), samples, height * width, views[1].shape[3],
    )  # fmt: skip
    programs = samples * triton.cdiv(height * width, tile.tokens)
    constants = {"TOKENS": tile.tokens, "CHUNK": tile.chunk, "WIDE": wide}
    return _Plan(True, programs, numbers, tile.num_warps, constants)


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
        programs = min(SCALE_PROGRAMS, -(-grad.numel() // block))
        run_kernel(
            align_scale_kernel, (programs, 1), grad, factor, grad.numel(), BLOCK=block, num_warps=SCALE_TILE.num_warps
        )
