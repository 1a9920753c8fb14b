"""Triton kernels of resize.py, and how every kernel finds and reads its tokens."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import RESIZE_TILE_ACROSS, device_of, resize_tile, run_kernel
from .tensors import tokens_adjacent


@triton.jit
def position(o, n_in, n_out, CORNERS: tl.constexpr):
    """Where output index `o` lies among the inputs: numerator and denominator, so that no rounding moves a tap."""
    if CORNERS:
        numerator = o * (n_in - 1)
        denominator = tl.maximum(n_out - 1, 1)
    else:
        numerator = tl.maximum((2 * o + 1) * n_in - n_out, 0)
        denominator = 2 * n_out
    return numerator, denominator


@triton.jit
def taps(o, n_in, n_out, CORNERS: tl.constexpr):
    """Indices i0, i1 and weight λ of output index `o`."""
    numerator, denominator = position(o, n_in, n_out, CORNERS)
    i0 = numerator // denominator
    weight = (numerator - i0 * denominator).to(tl.float32) / (denominator * 1.0)
    return i0, tl.minimum(i0 + 1, n_in - 1), weight


@triton.jit
def token_offset(batch, y, x, stride_b, stride_h, stride_w):
    """Offset of a token, int64."""
    return batch.to(tl.int64) * stride_b + tl.cast(y, tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def places(
    batch, y, x,  # of tokens on the grid (out_height, out_width)
    stride_b, stride_h, stride_w,
    height, width,  # the map's own grid
    out_height, out_width,
    RESIZE: tl.constexpr, CORNERS: tl.constexpr,
):  # fmt: skip
    """Offsets, int64, and weights of what a token is read from: its four neighbours where RESIZE, else itself."""
    if RESIZE:
        plane = batch.to(tl.int64) * stride_b
        y0, y1, wy = taps(y, height, out_height, CORNERS)
        x0, x1, wx = taps(x, width, out_width, CORNERS)
        top = plane + y0.to(tl.int64) * stride_h
        bottom = plane + y1.to(tl.int64) * stride_h
        left = x0.to(tl.int64) * stride_w
        right = x1.to(tl.int64) * stride_w
        at = (top + left, top + right, bottom + left, bottom + right)
        weight = ((1.0 - wy) * (1.0 - wx), (1.0 - wy) * wx, wy * (1.0 - wx), wy * wx)
    else:
        at = (token_offset(batch, y, x, stride_b, stride_h, stride_w),)
        weight = at  # unread
    return at, weight


@triton.jit
def gather(ptr, at, weight, column, mask, RESIZE: tl.constexpr):
    """A float32 tile of the tokens at `places`, 0 outside `mask`; column: offsets of the channels, int64."""
    value = tl.load(ptr + at[0] + column, mask=mask, other=0.0).to(tl.float32)
    if RESIZE:
        value *= weight[0]
        for i in tl.static_range(1, 4):
            value += weight[i] * tl.load(ptr + at[i] + column, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def own_tokens(height, width, FLAT: tl.constexpr, TOKENS: tl.constexpr):
    """This program's sample and TOKENS of its tokens: their numbers in it, lines and columns.

    FLAT: lines follow one another as tokens do. It saves two divisions, and shows the compiler which are adjacent.
    """
    programs = tl.cdiv(height * width, TOKENS)  # of a sample
    batch = tl.program_id(0) // programs
    token = tl.program_id(0) % programs * TOKENS + tl.arange(0, TOKENS)
    if FLAT:
        y = tl.zeros_like(token)
        x = token
    else:
        y = token // width
        x = token % width
    return batch, token, y, x


@triton.jit
def column_or_row(values, COLUMN: tl.constexpr):
    """A vector as a column or a row of a tile."""
    if COLUMN:
        placed = values[:, None]
    else:
        placed = values[None, :]
    return placed


@triton.jit
def resize_forward_kernel(
    x_ptr,  # (B, H, W, C)
    out_ptr,  # (B, OH, OW, C)
    x_sb, x_sh, x_sw, x_sc,
    o_sb, o_sh, o_sw, o_sc,
    channels,
    height, width, out_height, out_width,
    CORNERS: tl.constexpr, ACROSS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS output tokens × PIECES·CHUNK channels, each from its four neighbours."""
    batch, token, y, x = own_tokens(out_height, out_width, False, TOKENS)
    # Neighbouring threads lie along the last dimension: channels, or (ACROSS) the tokens of an NCHW view.
    inside = column_or_row(token < out_height * out_width, not ACROSS)
    y = column_or_row(y, not ACROSS)
    x = column_or_row(x, not ACROSS)
    x_at, weight = places(batch, y, x, x_sb, x_sh, x_sw, height, width, out_height, out_width, True, CORNERS)
    at = token_offset(batch, y, x, o_sb, o_sh, o_sw)
    for i in tl.static_range(PIECES):
        channel = (tl.program_id(1) * PIECES + i) * CHUNK + tl.arange(0, CHUNK)
        cols = column_or_row(channel, ACROSS)
        mask = inside & (cols < channels)
        value = gather(x_ptr, x_at, weight, cols.to(tl.int64) * x_sc, mask, True)
        tl.store(out_ptr + at + cols.to(tl.int64) * o_sc, value, mask=mask)


@triton.jit
def first_reader(i, n_in, n_out, CORNERS: tl.constexpr):
    """The first output index beyond input i − 1, so the first that may read input `i`."""
    if CORNERS:
        before = (i - 1) * (n_out - 1)
        step = tl.maximum(n_in - 1, 1)
    else:
        before = (2 * i - 1) * n_out - n_in
        step = 2 * n_in
    return tl.where((i == 0) | (before < 0), 0, tl.maximum(before, 0) // step + 1)


@triton.jit
def reader_weight(o, i, n_in, n_out, CORNERS: tl.constexpr):
    """Weight of input `i` in output `o`, as in `taps`; 0 where `o` does not read `i` or lies outside."""
    numerator, denominator = position(o, n_in, n_out, CORNERS)
    beyond = numerator - i * denominator
    weight = tl.where(beyond < 0, beyond + denominator, beyond).to(tl.float32) / (denominator * 1.0)
    # Of an output before it, `i` is the second tap; of one after it the first, and the last input is both.
    weight = tl.where(beyond < 0, weight, tl.where(i == n_in - 1, 1.0, 1.0 - weight))
    reads = (o < n_out) & (beyond > -denominator) & (beyond < denominator)
    return tl.where(reads, weight, 0.0)


@triton.jit
def resize_backward_kernel(
    grad_ptr,  # (B, OH, OW, C) gradient of the resized map
    scale_ptr,  # () float32, multiplies everything; unread without HAS_SCALE
    dx_ptr,  # (B, H, W, C)
    g_sb, g_sh, g_sw, g_sc,
    d_sb, d_sh, d_sw, d_sc,
    channels,
    height, width, out_height, out_width,
    reach_y, reach_x,  # how many outputs at most read one input, per axis
    HAS_SCALE: tl.constexpr, CORNERS: tl.constexpr, ACROSS: tl.constexpr,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS input tokens × PIECES·CHUNK channels; each collects from its outputs, in order."""
    batch, token, y, x = own_tokens(height, width, False, TOKENS)
    inside = column_or_row(token < height * width, not ACROSS)
    y = column_or_row(y, not ACROSS)
    x = column_or_row(x, not ACROSS)
    first_y = first_reader(y, height, out_height, CORNERS)
    first_x = first_reader(x, width, out_width, CORNERS)
    first = tl.program_id(1) * (PIECES * CHUNK)
    cols = ()
    totals = ()
    for i in tl.static_range(PIECES):
        cols += (column_or_row(first + i * CHUNK + tl.arange(0, CHUNK), ACROSS),)
        totals += (tl.zeros((inside & (cols[i] < channels)).shape, dtype=tl.float32),)
    for dy in range(reach_y):
        oy = first_y + dy
        wy = reader_weight(oy, y, height, out_height, CORNERS)
        for dx in range(reach_x):
            ox = first_x + dx
            weight = wy * reader_weight(ox, x, width, out_width, CORNERS)
            reads = inside & (weight != 0.0)
            at = (token_offset(batch, oy, ox, g_sb, g_sh, g_sw),)
            added = ()
            for i in tl.static_range(PIECES):
                grad = gather(grad_ptr, at, at, cols[i].to(tl.int64) * g_sc, reads & (cols[i] < channels), False)
                added += (totals[i] + weight * grad,)
            totals = added
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    at = token_offset(batch, y, x, d_sb, d_sh, d_sw)
    for i in tl.static_range(PIECES):
        tl.store(dx_ptr + at + cols[i].to(tl.int64) * d_sc, totals[i] * scale, mask=inside & (cols[i] < channels))


def launch_resize(x: Tensor, out: Tensor, corners: bool) -> Tensor:
    """Fill `out` (B, OH, OW, C) with the resized `x` (B, H, W, C)."""
    grid, sizes = _grid(out)
    with device_of(x):
        run_kernel(
            resize_forward_kernel, grid,
            x, out, *x.stride(), *out.stride(), x.shape[3], *x.shape[1:3], *out.shape[1:3], CORNERS=corners, **sizes,
        )  # fmt: skip
    return out


def launch_resize_backward(grad: Tensor, scale: Tensor | None, out: Tensor, corners: bool) -> Tensor:
    """Fill `out` (B, H, W, C) with the gradient of a resize from its grid to that of `grad`."""
    grid, sizes = _grid(out)
    reach = (_reach(n_in, n_out, corners) for n_in, n_out in zip(out.shape[1:3], grad.shape[1:3], strict=True))
    with device_of(grad):
        run_kernel(
            resize_backward_kernel, grid,
            grad, grad if scale is None else scale, out, *grad.stride(), *out.stride(), out.shape[3],
            *out.shape[1:3], *grad.shape[1:3], *reach, HAS_SCALE=scale is not None, CORNERS=corners, **sizes,
        )  # fmt: skip
    return out


def _grid(out: Tensor):
    """The launch grid, and how a program is laid out: along the channels, or the tokens where these are adjacent."""
    samples, height, width, channels = out.shape
    across = tokens_adjacent(out)
    tile = RESIZE_TILE_ACROSS if across else resize_tile(channels)
    grid = samples * triton.cdiv(height * width, tile.tokens), triton.cdiv(channels, tile.chunk * tile.pieces)
    sizes = {"TOKENS": tile.tokens, "CHUNK": tile.chunk, "PIECES": tile.pieces, "num_warps": tile.num_warps}
    return grid, {"ACROSS": across, **sizes}


def _reach(n_in: int, n_out: int, corners: bool) -> int:
    # The outputs between input i − 1 and i + 1, exclusive: their distance is in/out of an input's.
    outputs, inputs = (n_out - 1, max(n_in - 1, 1)) if corners else (n_out, n_in)
    return min(n_out, max(1, -(-2 * outputs // inputs)))
