"""Triton kernels of deform_attn.py. The formulas, and what each tensor means, stand at the top of that file."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_MAPS, SCALE_TILE, deform_tile, device_of, run_kernel

# Heights and widths go to the kernels as plain numbers, one per map, so a new pyramid needs no copy to the GPU and no
# tensor that a captured CUDA graph would have to keep. Nothing that follows from a pyramid is specialised on 1 or on
# multiples of 16: all pyramids run the same machine code, where heads · channels is a multiple of 16.
_PYRAMID = [*(f"size{level}" for level in range(MAX_MAPS)), "queries", "cells", "l_sb", "w_sb"]


@triton.jit
def _size(
    level,
    shapes_ptr,  # (L, 2) heights and widths, read only where ON_DEVICE
    size0, size1, size2, size3, size4, size5, size6, size7,  # height · 2³² + width
    ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Height and width of one map, int32."""
    if ON_DEVICE:
        height = tl.load(shapes_ptr + 2 * level).to(tl.int32)
        width = tl.load(shapes_ptr + 2 * level + 1).to(tl.int32)
    else:
        size = tl.where(level == 1, size1, size0)
        size = tl.where(level == 2, size2, size)
        size = tl.where(level == 3, size3, size)
        size = tl.where(level == 4, size4, size)
        size = tl.where(level == 5, size5, size)
        size = tl.where(level == 6, size6, size)
        size = tl.where(level == 7, size7, size)
        height = (size >> 32).to(tl.int32)
        width = (size & 0xFFFFFFFF).to(tl.int32)
    return height, width


@triton.jit
def _neighbours(x, y, height, width, start, cells):
    """The four cells around (x, y): their rows in value, whether each exists, and the fractions of x and y.

    No other row is ever read or written: what the sizes and the location say is held against `cells` once more, as
    sizes that lie on the GPU are not checked by the host. NaN, infinite and far positions have no neighbours.
    """
    near = (x >= -1.0) & (x < width) & (y >= -1.0) & (y < height)
    x = tl.where(near, x, 0.0)  # before the conversion to int32, which far positions would overflow
    y = tl.where(near, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    fx = x - left
    fy = y - top
    x0 = left.to(tl.int32)
    y0 = top.to(tl.int32)
    r00 = start + y0 * width + x0
    r01 = r00 + 1
    r10 = r00 + width
    r11 = r10 + 1
    has_left = near & (x0 >= 0)
    has_right = near & (x0 + 1 < width)
    in00 = has_left & (y0 >= 0) & (r00 >= 0) & (r00 < cells)
    in01 = has_right & (y0 >= 0) & (r01 >= 0) & (r01 < cells)
    in10 = has_left & (y0 + 1 < height) & (r10 >= 0) & (r10 < cells)
    in11 = has_right & (y0 + 1 < height) & (r11 >= 0) & (r11 < cells)
    return r00, r01, r10, r11, in00, in01, in10, in11, fx, fy


@triton.jit
def _cell(
    value_ptr,  # one sample's and head's (S, D)
    row, exists,  # (ROWS,)
    cols, v_ss, v_sc, channels,
):  # fmt: skip
    """(ROWS, BLOCK_D) float32; 0 where the cell does not exist."""
    at = row.to(tl.int64)[:, None] * v_ss + cols[None, :].to(tl.int64) * v_sc
    return tl.load(value_ptr + at, mask=exists[:, None] & (cols < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_PYRAMID)
def deform_forward_kernel(
    value_ptr,  # (B, S, M, D)
    shapes_ptr,  # (L, 2) integers on the GPU, or unread
    loc_ptr,  # (B, Q, M, L, P, 2)
    weight_ptr,  # (B, Q, M, L, P)
    out_ptr,  # (B, Q, M, D) contiguous, out
    size0, size1, size2, size3, size4, size5, size6, size7,
    v_sb, v_ss, v_sm, v_sc,
    l_sb, l_sq, l_sm, l_sl, l_sp, l_sx,
    w_sb, w_sq, w_sm, w_sl, w_sp,
    queries, cells, heads, channels, levels, points,  # Q, S, M, D, L, P; UNROLL divides P
    ON_DEVICE: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries × all channels of one head; neighbouring programs are the heads of the same queries."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % tl.cdiv(queries, ROWS)
    batch = (tl.program_id(0) // heads // tl.cdiv(queries, ROWS)).to(tl.int64)
    query = block * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    live = query < queries
    value_ptr += batch * v_sb + head.to(tl.int64) * v_sm
    l_level = batch * l_sb + head.to(tl.int64) * l_sm + query.to(tl.int64) * l_sq
    w_level = batch * w_sb + head.to(tl.int64) * w_sm + query.to(tl.int64) * w_sq
    total = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    start = 0
    for level in range(levels):
        height, width = _size(
            level, shapes_ptr, size0, size1, size2, size3, size4, size5, size6, size7, ON_DEVICE
        )  # fmt: skip
        l_at = l_level
        w_at = w_level
        for _point in range(0, points, UNROLL):
            for _sample in tl.static_range(UNROLL):
                weight = tl.load(weight_ptr + w_at, mask=live, other=0.0).to(tl.float32)
                x = tl.load(loc_ptr + l_at, mask=live, other=0.0).to(tl.float32) * width - 0.5
                y = tl.load(loc_ptr + l_at + l_sx, mask=live, other=0.0).to(tl.float32) * height - 0.5
                r00, r01, r10, r11, in00, in01, in10, in11, fx, fy = _neighbours(x, y, height, width, start, cells)
                sample = ((1.0 - fy) * (1.0 - fx))[:, None] * _cell(value_ptr, r00, in00, cols, v_ss, v_sc, channels)
                sample += ((1.0 - fy) * fx)[:, None] * _cell(value_ptr, r01, in01, cols, v_ss, v_sc, channels)
                sample += (fy * (1.0 - fx))[:, None] * _cell(value_ptr, r10, in10, cols, v_ss, v_sc, channels)
                sample += (fy * fx)[:, None] * _cell(value_ptr, r11, in11, cols, v_ss, v_sc, channels)
                nowhere = tl.where((x == x) & (y == y), 0.0, float("nan"))  # a NaN location must not pass for a zero
                total += weight[:, None] * sample + nowhere[:, None]
                l_at += l_sp
                w_at += w_sp
        l_level += l_sl
        w_level += w_sl
        start += height * width
    row = (batch * queries + query) * heads + head
    at = row[:, None] * channels + cols[None, :]
    tl.store(out_ptr + at, total, mask=live[:, None] & (cols < channels)[None, :])


@triton.jit
def _power_of_two(largest):
    """A power of two that brings numbers up to `largest` below 4, and its inverse, NaN where `largest` is not finite.

    Read off the exponent bits, so both are exact.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    up = tl.minimum(tl.maximum(254 - exponent, 1), 253)
    scale = (up << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - up) << 23).to(tl.float32, bitcast=True)
    return scale, tl.where(exponent == 255, float("nan"), inverse)


@triton.jit
def _scatter(
    grad_ptr,  # (S, D) of one sample and head, float32 or int64
    row, exists, factor,  # (ROWS,)
    grad,  # (ROWS, BLOCK_D)
    cols, row_stride, channels,
    FIXED: tl.constexpr,
):  # fmt: skip
    share = factor[:, None] * grad
    if FIXED:
        share = tl.where(tl.abs(share) < float("inf"), share, 0.0).to(tl.int64)
    at = row.to(tl.int64)[:, None] * row_stride + cols[None, :]
    tl.atomic_add(grad_ptr + at, share, mask=exists[:, None] & (cols < channels)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=_PYRAMID)
def deform_backward_kernel(
    grad_ptr,  # (B, Q, M, D) gradient of the result
    value_ptr, shapes_ptr, loc_ptr, weight_ptr,  # as in the forward
    grad_max_ptr, weight_max_ptr,  # () largest |grad| and |weight|; read only where FIXED
    gv_ptr,  # (B, S, M, D) contiguous, zeros to add to: float32, or int64 where FIXED
    gl_ptr,  # (B, Q, M, L, P, 2) contiguous, out
    gw_ptr,  # (B, Q, M, L, P) contiguous, out
    size0, size1, size2, size3, size4, size5, size6, size7,
    g_sb, g_sq, g_sm, g_sc,
    v_sb, v_ss, v_sm, v_sc,
    l_sb, l_sq, l_sm, l_sl, l_sp, l_sx,
    w_sb, w_sq, w_sm, w_sl, w_sp,
    queries, cells, heads, channels, levels, points,
    unit,  # float32 power of two; read only where FIXED
    ON_DEVICE: tl.constexpr, GRAD_V: tl.constexpr, GRAD_L: tl.constexpr, GRAD_W: tl.constexpr, FIXED: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the same share of the work as in the forward."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % tl.cdiv(queries, ROWS)
    batch = (tl.program_id(0) // heads // tl.cdiv(queries, ROWS)).to(tl.int64)
    query = block * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    live = query < queries
    g_at = batch * g_sb + head.to(tl.int64) * g_sm + query.to(tl.int64) * g_sq
    g_at = g_at[:, None] + cols[None, :].to(tl.int64) * g_sc
    grad = tl.load(grad_ptr + g_at, mask=live[:, None] & (cols < channels)[None, :], other=0.0).to(tl.float32)
    row_stride = heads * channels
    value_ptr += batch * v_sb + head.to(tl.int64) * v_sm
    gv_ptr += batch * cells * row_stride + head.to(tl.int64) * channels
    l_level = batch * l_sb + head.to(tl.int64) * l_sm + query.to(tl.int64) * l_sq
    w_level = batch * w_sb + head.to(tl.int64) * w_sm + query.to(tl.int64) * w_sq
    first = ((batch * queries + query) * heads + head) * levels * points  # where this query's weights begin
    scatter = grad
    weight_scale = 1.0
    if FIXED:
        grad_scale, _grad_inverse = _power_of_two(tl.load(grad_max_ptr).to(tl.float32))
        weight_scale, _weight_inverse = _power_of_two(tl.load(weight_max_ptr).to(tl.float32))
        scatter = grad * grad_scale * unit
    start = 0
    for level in range(levels):
        height, width = _size(
            level, shapes_ptr, size0, size1, size2, size3, size4, size5, size6, size7, ON_DEVICE
        )  # fmt: skip
        l_at = l_level
        w_at = w_level
        for point in range(0, points, UNROLL):
            to_weights = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)  # in its first UNROLL columns
            to_locations = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)  # in its first 2 · UNROLL columns
            for ahead in tl.static_range(UNROLL):
                weight = tl.load(weight_ptr + w_at, mask=live, other=0.0).to(tl.float32)
                x = tl.load(loc_ptr + l_at, mask=live, other=0.0).to(tl.float32) * width - 0.5
                y = tl.load(loc_ptr + l_at + l_sx, mask=live, other=0.0).to(tl.float32) * height - 0.5
                r00, r01, r10, r11, in00, in01, in10, in11, fx, fy = _neighbours(x, y, height, width, start, cells)
                if GRAD_L or GRAD_W:
                    d00 = tl.sum(grad * _cell(value_ptr, r00, in00, cols, v_ss, v_sc, channels), axis=1)
                    d01 = tl.sum(grad * _cell(value_ptr, r01, in01, cols, v_ss, v_sc, channels), axis=1)
                    d10 = tl.sum(grad * _cell(value_ptr, r10, in10, cols, v_ss, v_sc, channels), axis=1)
                    d11 = tl.sum(grad * _cell(value_ptr, r11, in11, cols, v_ss, v_sc, channels), axis=1)
                    sample = (1.0 - fy) * ((1.0 - fx) * d00 + fx * d01) + fy * ((1.0 - fx) * d10 + fx * d11)
                    along_x = weight * ((1.0 - fy) * (d01 - d00) + fy * (d11 - d10)) * width
                    along_y = weight * ((1.0 - fx) * (d10 - d00) + fx * (d11 - d01)) * height
                    to_weights = tl.where((cols == ahead)[None, :], sample[:, None], to_weights)
                    to_locations = tl.where((cols == 2 * ahead)[None, :], along_x[:, None], to_locations)
                    to_locations = tl.where((cols == 2 * ahead + 1)[None, :], along_y[:, None], to_locations)
                if GRAD_V:
                    factor = weight * weight_scale
                    upper = factor * (1.0 - fy)
                    lower = factor * fy
                    left = 1.0 - fx
                    _scatter(gv_ptr, r00, in00 & live, upper * left, scatter, cols, row_stride, channels, FIXED)
                    _scatter(gv_ptr, r01, in01 & live, upper * fx, scatter, cols, row_stride, channels, FIXED)
                    _scatter(gv_ptr, r10, in10 & live, lower * left, scatter, cols, row_stride, channels, FIXED)
                    _scatter(gv_ptr, r11, in11 & live, lower * fx, scatter, cols, row_stride, channels, FIXED)
                l_at += l_sp
                w_at += w_sp
            if GRAD_W:
                kept = tl.multiple_of(first + level * points + point, UNROLL)
                at = kept[:, None] + cols[None, :]
                tl.store(gw_ptr + at, to_weights, mask=live[:, None] & (cols < UNROLL)[None, :])
            if GRAD_L:
                kept = tl.multiple_of(2 * (first + level * points + point), 2 * UNROLL)
                at = kept[:, None] + cols[None, :]
                tl.store(gl_ptr + at, to_locations, mask=live[:, None] & (cols < 2 * UNROLL)[None, :])
        l_level += l_sl
        w_level += w_sl
        start += height * width


@triton.jit
def deform_unfix_kernel(
    fixed_ptr,  # (numel,) int64
    grad_max_ptr, weight_max_ptr,  # ()
    out_ptr,  # (numel,) out
    numel,
    inverse_unit,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fixed point back to floating point; NaN everywhere where an input of the sums was not finite."""
    _grad_scale, grad_inverse = _power_of_two(tl.load(grad_max_ptr).to(tl.float32))
    _weight_scale, weight_inverse = _power_of_two(tl.load(weight_max_ptr).to(tl.float32))
    # In float64, where no product of the three leaves the range; in float32 a large gradient of small weights would.
    step = grad_inverse.to(tl.float64) * weight_inverse.to(tl.float64) * inverse_unit
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(fixed_ptr + at, mask=at < numel, other=0).to(tl.float64)
    tl.store(out_ptr + at, (total * step).to(tl.float32), mask=at < numel)


def launch_forward(value, shapes, sizes, locations, weights, out) -> None:
    """Fill `out` (B, Q, M·D), contiguous. shapes: (L, 2) on value's device, or None for the pairs `sizes`."""
    grid, options = _tiling(value, locations, "forward")
    with device_of(value):
        run_kernel(
            deform_forward_kernel, grid,
            value, value if shapes is None else shapes.contiguous(), locations, weights, out, *_pack(sizes),
            *value.stride(), *locations.stride(), *weights.stride(), *_counts(value, locations),
            ON_DEVICE=shapes is not None, **options,
        )  # fmt: skip


def launch_backward(
    grad, value, shapes, sizes, locations, weights, largest, unit, grad_value, grad_locations, grad_weights
) -> None:
    """Add to `grad_value` and fill the other gradients, those that are not empty.

    grad: (B, Q, M, D). grad_value: float32, or int64 in steps of 1/unit; then largest = (max |grad|, max |weights|).
    """
    fixed = largest is not None
    grid, options = _tiling(value, locations, "fixed" if fixed else "backward")
    with device_of(value):
        run_kernel(
            deform_backward_kernel, grid,
            grad, value, value if shapes is None else shapes.contiguous(), locations, weights,
            *(largest if fixed else (grad, grad)), grad_value, grad_locations, grad_weights, *_pack(sizes),
            *grad.stride(), *value.stride(), *locations.stride(), *weights.stride(), *_counts(value, locations), unit,
            ON_DEVICE=shapes is not None, GRAD_V=grad_value.numel() > 0, GRAD_L=grad_locations.numel() > 0,
            GRAD_W=grad_weights.numel() > 0, FIXED=fixed, **options,
        )  # fmt: skip


def launch_unfix(fixed: Tensor, largest: tuple[Tensor, Tensor], unit: float, out: Tensor) -> None:
    """Fill `out` with the sums that `fixed` holds in steps of 1/unit."""
    block = SCALE_TILE.channels
    with device_of(fixed):
        run_kernel(
            deform_unfix_kernel, (triton.cdiv(fixed.numel(), block), 1),
            fixed, *largest, out, fixed.numel(), 1 / unit,
            BLOCK=block, num_warps=SCALE_TILE.num_warps,
        )  # fmt: skip


def _tiling(value: Tensor, locations: Tensor, what: str):
    tile = deform_tile(value.shape[3], what)
    programs = triton.cdiv(locations.shape[1], tile.rows) * value.shape[0] * value.shape[2]
    unroll = next(count for count in (4, 2, 1) if locations.shape[4] % count == 0)
    return (programs, 1), {
        "UNROLL": unroll,
        "ROWS": tile.rows,
        "BLOCK_D": tile.channels,
        "num_warps": tile.num_warps,
    }


def _pack(sizes) -> list[int]:
    packed = [(height << 32) + width for height, width in sizes]
    return packed + [1 << 32] * (MAX_MAPS - len(packed))  # the rest only keeps every number an int64


def _counts(value: Tensor, locations: Tensor) -> tuple[int, ...]:
    """Q, S, M, D, L, P."""
    return locations.shape[1], *value.shape[1:], *locations.shape[3:5]
