"""Triton kernel of moments.py. The formula stands at the top of that file."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MOMENTS_FINISH_TILE, MOMENTS_TILE, device_of, run_kernel


@triton.jit
def moments_kernel(
    x_ptr,  # (B, H, W, C)
    valid_ptr,  # (B, H, W), dense; unread without HAS_VALID
    parts_ptr,  # (parts, 1 + 2·C) float64, out: n, Σx and Σx² of one part's tokens
    x_sb, x_sh, x_sw, x_sc,
    height, width, channels,
    HAS_VALID: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: up to ROWS tokens of one line × BLOCK_C channels, read once and kept in registers."""
    # Neighbouring programs read neighbouring channels. Whole lines, not single tokens, are told apart by division: so
    # the compiler sees that tokens, too, may be adjacent in memory, and an NCHW view is read along its rows.
    groups = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // groups
    cols = tl.program_id(0) % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    per_line = tl.cdiv(width, ROWS)
    w = part % per_line * ROWS + tl.arange(0, ROWS)
    line = (part // per_line).to(tl.int64)
    keep = w < width
    mask = keep[:, None] & (cols < channels)[None, :]
    at = line // height * x_sb + line % height * x_sh + w[:, None].to(tl.int64) * x_sw
    x = tl.load(x_ptr + at + cols[None, :].to(tl.int64) * x_sc, mask=mask, other=0.0).to(tl.float32)
    if HAS_VALID:  # not in the load's own mask, which would part tokens that are read together
        keep = keep & (tl.load(valid_ptr + line * width + w, mask=keep, other=0) != 0)
        mask = mask & keep[:, None]
        x = tl.where(mask, x, 0.0)

    count = tl.sum(keep.to(tl.float32), axis=0)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    rest = tl.sum(deviation, axis=0).to(tl.float64)
    squares = tl.sum(deviation * deviation, axis=0).to(tl.float64)
    count = count.to(tl.float64)
    mean = mean.to(tl.float64)
    out = parts_ptr + part.to(tl.int64) * (1 + 2 * channels)
    tl.store(out, count)  # the same from every group of channels
    tl.store(out + 1 + cols, count * mean + rest, mask=cols < channels)
    tl.store(out + 1 + channels + cols, squares + 2.0 * mean * rest + count * mean * mean, mask=cols < channels)


@triton.jit
def moments_finish_kernel(
    parts_ptr,  # (parts, 1 + 2·C) float64
    sums_ptr,  # (1 + 2·C,) float64, out: n, Σx and Σx²
    parts, channels,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels over all parts, ROWS at a time, in order."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, ROWS)
    counts = tl.zeros((ROWS,), dtype=tl.float64)
    totals = tl.zeros((ROWS, BLOCK_C), dtype=tl.float64)
    squares = tl.zeros((ROWS, BLOCK_C), dtype=tl.float64)
    for first in range(0, parts, ROWS):
        there = first + rows < parts
        at = parts_ptr + (first + rows).to(tl.int64) * (1 + 2 * channels)
        mask = there[:, None] & (cols < channels)[None, :]
        counts += tl.load(at, mask=there, other=0.0)
        totals += tl.load(at[:, None] + 1 + cols[None, :], mask=mask, other=0.0)
        squares += tl.load(at[:, None] + 1 + channels + cols[None, :], mask=mask, other=0.0)
    count = tl.sum(counts, axis=0)
    total = tl.sum(totals, axis=0)
    square = tl.sum(squares, axis=0)
    inside = cols < channels
    tl.store(sums_ptr, count)
    tl.store(sums_ptr + 1 + cols, total, mask=inside)
    tl.store(sums_ptr + 1 + channels + cols, square, mask=inside)


def launch_moments(x: Tensor, valid: Tensor | None, out: Tensor) -> None:
    """Fill `out` (1 + 2·C,) float64 with n, Σx and Σx² of x (B, H, W, C)."""
    batch, height, width, channels = x.shape
    rows, block, num_warps = MOMENTS_TILE
    parts = batch * height * triton.cdiv(width, rows)
    each = x.new_empty((parts, 1 + 2 * channels), dtype=torch.float64)
    with device_of(x):
        run_kernel(
            moments_kernel, (parts * triton.cdiv(channels, block), 1),
            x, x if valid is None else valid.contiguous(), each, *x.stride(), height, width, channels,
            HAS_VALID=valid is not None, ROWS=rows, BLOCK_C=block, num_warps=num_warps,
        )  # fmt: skip
        rows, block, num_warps = MOMENTS_FINISH_TILE
        run_kernel(
            moments_finish_kernel, (triton.cdiv(channels, block), 1),
            each, out, parts, channels, ROWS=rows, BLOCK_C=block, num_warps=num_warps,
        )  # fmt: skip
