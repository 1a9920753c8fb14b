"""Triton kernel of moments.py. The formula stands at the top of that file."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MOMENTS_TILE, device_of, run_kernel


@triton.jit
def moments_kernel(
    x_ptr,  # (B, H, W, C)
    valid_ptr,  # (B, H, W), dense; unread without HAS_VALID
    parts_ptr,  # (parts, 2, C) float64, out: Σx and Σx² of one part's tokens
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
    out = parts_ptr + part.to(tl.int64) * 2 * channels + cols
    tl.store(out, count * mean + rest, mask=cols < channels)
    tl.store(out + channels, squares + 2.0 * mean * rest + count * mean * mean, mask=cols < channels)


def launch_moments(x: Tensor, valid: Tensor | None) -> Tensor:
    """(parts, 2, C) float64 sums whose sum over the parts is that of x (B, H, W, C)."""
    batch, height, width, channels = x.shape
    rows, block, num_warps = MOMENTS_TILE
    parts = batch * height * triton.cdiv(width, rows)
    out = x.new_empty((parts, 2, channels), dtype=torch.float64)
    with device_of(x):
        run_kernel(
            moments_kernel, (parts * triton.cdiv(channels, block), 1),
            x, x if valid is None else valid.contiguous(), out, *x.stride(), height, width, channels,
            HAS_VALID=valid is not None, ROWS=rows, BLOCK_C=block, num_warps=num_warps,
        )  # fmt: skip
    return out
