"""Triton kernels of resize.py, and the two helpers that every kernel with a fused resize shares."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import RESIZE_TILE_ACROSS, device_of, resize_tile, tokens_adjacent


@triton.jit
def taps(o, n_in, n_out, CORNERS: tl.constexpr):
    """Indices i0, i1 and weight λ of output index `o`; whole-number arithmetic, so no rounding moves a tap."""
    if CORNERS:
        numerator = o * (n_in - 1)
        denominator = tl.maximum(n_out - 1, 1)
    else:
        numerator = tl.maximum((2 * o + 1) * n_in - n_out, 0)
        denominator = 2 * n_out
    i0 = numerator // denominator
    weight = (numerator - i0 * denominator).to(tl.float32) / (denominator * 1.0)
    return i0, tl.minimum(i0 + 1, n_in - 1), weight


@triton.jit
def load_tokens(
    ptr,  # map (B, H, W, C)
    batch, y, x, cols,  # that broadcast to the tile: (ROWS, 1) and (1, BLOCK_C), or (1, TOKENS) and (BLOCK_C, 1)
    mask,  # the tile
    stride_b, stride_h, stride_w, stride_c,
    height, width,  # the map's own grid
    out_height, out_width,  # the grid that y and x count on
    RESIZE: tl.constexpr, CORNERS: tl.constexpr,
):  # fmt: skip
    """A float32 tile of tokens at (y, x); bilinear between four tokens where RESIZE."""
    column = cols.to(tl.int64) * stride_c
    plane = batch.to(tl.int64) * stride_b
    if RESIZE:
        y0, y1, wy = taps(y, height, out_height, CORNERS)
        x0, x1, wx = taps(x, width, out_width, CORNERS)
        top = plane + y0.to(tl.int64) * stride_h
        bottom = plane + y1.to(tl.int64) * stride_h
        left = x0.to(tl.int64) * stride_w
        right = x1.to(tl.int64) * stride_w
        v00 = tl.load(ptr + (top + left) + column, mask=mask, other=0.0).to(tl.float32)
        v01 = tl.load(ptr + (top + right) + column, mask=mask, other=0.0).to(tl.float32)
        v10 = tl.load(ptr + (bottom + left) + column, mask=mask, other=0.0).to(tl.float32)
        v11 = tl.load(ptr + (bottom + right) + column, mask=mask, other=0.0).to(tl.float32)
        return (1.0 - wy) * ((1.0 - wx) * v00 + wx * v01) + wy * ((1.0 - wx) * v10 + wx * v11)
    token = plane + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return tl.load(ptr + token + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def tile_indices(ACROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's tokens and channels as a column and a row; ACROSS: as a row and a column.

    The compiler lays neighbouring threads along the last dimension: channels, or the tokens of an NCHW view.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if ACROSS:
        row = row[None, :]
        cols = cols[:, None]
    else:
        row = row[:, None]
        cols = cols[None, :]
    return row, cols


@triton.jit
def resize_forward_kernel(
    x_ptr,  # (B, H, W, C)
    out_ptr,  # (B, OH, OW, C)
    x_sb, x_sh, x_sw, x_sc,
    o_sb, o_sh, o_sw, o_sc,
    rows,  # B·OH·OW
    channels,
    height, width, out_height, out_width,
    CORNERS: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS output tokens × BLOCK_C channels, each from its four neighbours."""
    row, cols = tile_indices(ACROSS, ROWS, BLOCK_C)
    mask = (row < rows) & (cols < channels)
    x = row % out_width
    y = row // out_width % out_height
    batch = row // (out_width * out_height)
    value = load_tokens(
        x_ptr, batch, y, x, cols, mask, x_sb, x_sh, x_sw, x_sc, height, width, out_height, out_width, True, CORNERS
    )  # fmt: skip
    at = batch.to(tl.int64) * o_sb + y.to(tl.int64) * o_sh + x.to(tl.int64) * o_sw
    tl.store(out_ptr + at + cols.to(tl.int64) * o_sc, value, mask=mask)


@triton.jit
def first_reader(i, n_in, n_out, CORNERS: tl.constexpr):
    """An output index at or just before the first one whose taps include input `i`."""
    if CORNERS:
        first = tl.maximum(i - 1, 0) * (n_out - 1) // tl.maximum(n_in - 1, 1)
    else:
        first = tl.maximum((2 * i - 1) * n_out - n_in, 0) // (2 * n_in)
    return first


@triton.jit
def reader_weight(o, i, n_in, n_out, CORNERS: tl.constexpr):
    """Weight of input `i` in output `o`; 0 where `o` does not read `i` or lies outside."""
    i0, i1, weight = taps(o, n_in, n_out, CORNERS)
    total = tl.where(i0 == i, 1.0 - weight, 0.0) + tl.where(i1 == i, weight, 0.0)
    return tl.where(o < n_out, total, 0.0)


@triton.jit
def resize_backward_kernel(
    grad_ptr,  # (B, OH, OW, C) gradient of the resized map
    scale_ptr,  # () float32, multiplies everything; unread without HAS_SCALE
    dx_ptr,  # (B, H, W, C)
    g_sb, g_sh, g_sw, g_sc,
    d_sb, d_sh, d_sw, d_sc,
    rows,  # B·H·W
    channels,
    height, width, out_height, out_width,
    reach_y, reach_x,  # how many outputs at most read one input, per axis
    HAS_SCALE: tl.constexpr, CORNERS: tl.constexpr, ACROSS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS input tokens × BLOCK_C channels; each collects from the outputs that read it, in order."""
    row, cols = tile_indices(ACROSS, ROWS, BLOCK_C)
    mask = (row < rows) & (cols < channels)
    x = row % width
    y = row // width % height
    batch = row // (width * height)
    column = cols.to(tl.int64) * g_sc
    plane = batch.to(tl.int64) * g_sb
    first_y = first_reader(y, height, out_height, CORNERS)
    first_x = first_reader(x, width, out_width, CORNERS)
    total = tl.zeros(mask.shape, dtype=tl.float32)
    for dy in range(reach_y):
        oy = first_y + dy
        wy = reader_weight(oy, y, height, out_height, CORNERS)
        line = plane + oy.to(tl.int64) * g_sh
        for dx in range(reach_x):
            ox = first_x + dx
            weight = wy * reader_weight(ox, x, width, out_width, CORNERS)
            reads = mask & (weight != 0.0)
            at = line + ox.to(tl.int64) * g_sw
            grad = tl.load(grad_ptr + at + column, mask=reads, other=0.0).to(tl.float32)
            total += weight * grad
    if HAS_SCALE:
        total *= tl.load(scale_ptr).to(tl.float32)
    at = batch.to(tl.int64) * d_sb + y.to(tl.int64) * d_sh + x.to(tl.int64) * d_sw
    tl.store(dx_ptr + at + cols.to(tl.int64) * d_sc, total, mask=mask)


def launch_resize(x: Tensor, out: Tensor, corners: bool) -> Tensor:
    """Fill `out` (B, OH, OW, C) with the resized `x` (B, H, W, C)."""
    _, height, width, channels = x.shape
    tile, grid, rows, across = _grid(out)
    with device_of(x):
        resize_forward_kernel[grid](
            x, out, *x.stride(), *out.stride(), rows, channels, height, width, out.shape[1], out.shape[2],
            CORNERS=corners, ACROSS=across, ROWS=tile.rows, BLOCK_C=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip
    return out


def launch_resize_backward(grad: Tensor, scale: Tensor | None, out: Tensor, corners: bool) -> Tensor:
    """Fill `out` (B, H, W, C) with the gradient of a resize from its grid to that of `grad`."""
    _, height, width, channels = out.shape
    out_height, out_width = grad.shape[1:3]
    tile, grid, rows, across = _grid(out)
    with device_of(grad):
        resize_backward_kernel[grid](
            grad, grad if scale is None else scale, out, *grad.stride(), *out.stride(), rows, channels,
            height, width, out_height, out_width,
            _reach(height, out_height, corners), _reach(width, out_width, corners),
            HAS_SCALE=scale is not None, CORNERS=corners, ACROSS=across,
            ROWS=tile.rows, BLOCK_C=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip
    return out


def _grid(out: Tensor):
    """Tile, launch grid, tokens, and whether tokens rather than channels are adjacent in memory."""
    across = tokens_adjacent(out)
    tile = RESIZE_TILE_ACROSS if across else resize_tile(out.shape[3])
    rows = out.shape[0] * out.shape[1] * out.shape[2]
    return tile, (triton.cdiv(rows, tile.rows), triton.cdiv(out.shape[3], tile.channels)), rows, across


def _reach(n_in: int, n_out: int, corners: bool) -> int:
    # An input is read by outputs within ±1 input of it: 2·out/in of them, one more for the rounding at either end.
    outputs, inputs = (n_out - 1, max(n_in - 1, 1)) if corners else (n_out, n_in)
    return min(n_out, -(-2 * outputs // inputs) + 2)
