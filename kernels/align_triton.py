"""Triton kernels of align.py. The formulas, and what each tensor means, stand at the top of that file."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import SCALE_TILE, align_tile, device_of
from .resize_triton import load_rows

_RESIZE = {"none": 0, "source": 1, "target": 2}


@triton.jit
def _load_sides(
    s_ptr, t_ptr,  # (B, SH, SW, C), (B, TH, TW, C)
    mean_ptr, std_ptr,  # (C,)
    batch, y, x, cols, mask,
    s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
    s_height, s_width, t_height, t_width, height, width, channels,
    RESIZE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr,
):  # fmt: skip
    """Source and standardised target on the common grid, and std; (ROWS, BLOCK_C) float32, 0 outside `mask`."""
    s = load_rows(
        s_ptr, batch, y, x, cols, mask, s_sb, s_sh, s_sw, s_sc, s_height, s_width, height, width, RESIZE == 1
    )  # fmt: skip
    t = load_rows(
        t_ptr, batch, y, x, cols, mask, t_sb, t_sh, t_sw, t_sc, t_height, t_width, height, width, RESIZE == 2
    )  # fmt: skip
    std = tl.full(cols.shape, 1.0, tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)
        t = t - mean[None, :]
    if HAS_STD:
        std = tl.load(std_ptr + cols, mask=cols < channels, other=1.0).to(tl.float32)
        t = t / std[None, :]
    if HAS_MEAN or HAS_STD:
        t = tl.where(mask, t, 0.0)
    return s, t, std


@triton.jit
def _store_gradients(
    gs_ptr, gt_ptr,  # (B, H, W, C) on the common grid
    s, t, std,  # (ROWS, BLOCK_C), (ROWS, BLOCK_C), (BLOCK_C,)
    st, ss, tt,  # (ROWS,) sums over the channels
    u_cos, u_l1,  # (ROWS,) weights, 0 where a token does not count
    beta, inv_beta,
    batch, y, x, cols, mask,
    gs_sb, gs_sh, gs_sw, gs_sc, gt_sb, gt_sh, gt_sw, gt_sc,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, HAS_STD: tl.constexpr,
):  # fmt: skip
    s_norm = tl.maximum(tl.sqrt(ss), 1e-8)
    t_norm = tl.maximum(tl.sqrt(tt), 1e-8)
    cross = u_cos / (s_norm * t_norm)
    along = cross * st
    difference = s - t
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    slope = tl.where(tl.abs(difference) < beta, difference * inv_beta, sign) * u_l1[:, None]
    if GRAD_S:
        has_length = s_norm > 1e-8
        a = tl.where(has_length, cross, 0.0)[:, None]
        b = tl.where(has_length, along / (s_norm * s_norm), 0.0)[:, None]
        at = batch.to(tl.int64) * gs_sb + y.to(tl.int64) * gs_sh + x.to(tl.int64) * gs_sw
        tl.store(gs_ptr + at[:, None] + cols[None, :].to(tl.int64) * gs_sc, b * s - a * t + slope, mask=mask)
    if GRAD_T:
        has_length = t_norm > 1e-8
        a = tl.where(has_length, cross, 0.0)[:, None]
        b = tl.where(has_length, along / (t_norm * t_norm), 0.0)[:, None]
        grad = b * t - a * s - slope
        if HAS_STD:
            grad = grad / std[None, :]
        at = batch.to(tl.int64) * gt_sb + y.to(tl.int64) * gt_sh + x.to(tl.int64) * gt_sw
        tl.store(gt_ptr + at[:, None] + cols[None, :].to(tl.int64) * gt_sc, grad, mask=mask)


@triton.jit
def align_forward_kernel(
    s_ptr, t_ptr,  # (B, SH, SW, C), (B, TH, TW, C)
    mean_ptr, std_ptr,  # (C,)
    valid_ptr,  # (B, H, W) bool
    share_ptr,  # (2, B) float32
    rows_ptr,  # (B, H, W) float32, out: what each token adds to the loss
    stats_ptr,  # (3, B, H, W) float32, out: s·t, s·s, t·t
    gs_ptr, gt_ptr,  # (B, H, W, C), out
    s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
    gs_sb, gs_sh, gs_sw, gs_sc, gt_sb, gt_sh, gt_sw, gt_sc,
    rows, samples, channels,  # B·H·W, B, C
    s_height, s_width, t_height, t_width, height, width,
    cos_weight, l1_weight, beta, inv_beta,
    RESIZE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    BY_MAP: tl.constexpr, STATS: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole tokens; the loss of each, and its gradient while both sides are in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    inside = row < rows
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    x = row % width
    y = row // width % height
    batch = row // (width * height)
    read = counts[:, None] & (cols < channels)[None, :]
    s, t, std = _load_sides(
        s_ptr, t_ptr, mean_ptr, std_ptr, batch, y, x, cols, read,
        s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
        s_height, s_width, t_height, t_width, height, width, channels, RESIZE, HAS_MEAN, HAS_STD,
    )  # fmt: skip
    st = tl.sum(s * t, axis=1)
    ss = tl.sum(s * s, axis=1)
    tt = tl.sum(t * t, axis=1)
    size = tl.abs(s - t)
    smooth = tl.sum(tl.where(size < beta, 0.5 * size * size * inv_beta, size - 0.5 * beta), axis=1)
    smooth = smooth / channels  # columns beyond C hold 0 on both sides, and φ_β(0) = 0 for every β

    u_cos = tl.load(share_ptr + batch, mask=counts, other=0.0) * cos_weight
    u_l1 = tl.load(share_ptr + samples + batch, mask=counts, other=0.0) * l1_weight
    value = u_l1 * smooth
    if not BY_MAP:
        value += u_cos * (1.0 - st / (tl.maximum(tl.sqrt(ss), 1e-8) * tl.maximum(tl.sqrt(tt), 1e-8)))
    tl.store(rows_ptr + row, tl.where(counts, value, 0.0), mask=inside)
    if STATS:
        plane = tl.cast(rows, tl.int64)
        tl.store(stats_ptr + row, st, mask=inside)
        tl.store(stats_ptr + plane + row, ss, mask=inside)
        tl.store(stats_ptr + 2 * plane + row, tt, mask=inside)
    if GRAD_S or GRAD_T:
        _store_gradients(
            gs_ptr, gt_ptr, s, t, std, st, ss, tt, u_cos, u_l1 / channels, beta, inv_beta,
            batch, y, x, cols, inside[:, None] & (cols < channels)[None, :],
            gs_sb, gs_sh, gs_sw, gs_sc, gt_sb, gt_sh, gt_sw, gt_sc, GRAD_S, GRAD_T, HAS_STD,
        )  # fmt: skip


@triton.jit
def align_backward_kernel(
    u_ptr,  # (B, H, W) float32 upstream gradient, often expanded
    s_ptr, t_ptr, mean_ptr, std_ptr, valid_ptr, share_ptr,  # as in the forward
    stats_ptr,  # (3, B, H, W), or (3, B) where BY_MAP
    gs_ptr, gt_ptr,  # (B, H, W, C), out
    u_sb, u_sh, u_sw,
    s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
    gs_sb, gs_sh, gs_sw, gs_sc, gt_sb, gt_sh, gt_sw, gt_sc,
    rows, samples, channels,
    s_height, s_width, t_height, t_width, height, width,
    cos_weight, l1_weight, beta, inv_beta,
    RESIZE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    BY_MAP: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole tokens, read again; their gradient from the three kept sums."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    inside = row < rows
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    x = row % width
    y = row // width % height
    batch = row // (width * height)
    read = counts[:, None] & (cols < channels)[None, :]
    s, t, std = _load_sides(
        s_ptr, t_ptr, mean_ptr, std_ptr, batch, y, x, cols, read,
        s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
        s_height, s_width, t_height, t_width, height, width, channels, RESIZE, HAS_MEAN, HAS_STD,
    )  # fmt: skip
    if BY_MAP:
        stat = batch
        plane = tl.cast(samples, tl.int64)
    else:
        stat = row
        plane = tl.cast(rows, tl.int64)
    st = tl.load(stats_ptr + stat, mask=inside, other=0.0)
    ss = tl.load(stats_ptr + plane + stat, mask=inside, other=0.0)
    tt = tl.load(stats_ptr + 2 * plane + stat, mask=inside, other=0.0)
    at = batch.to(tl.int64) * u_sb + y.to(tl.int64) * u_sh + x.to(tl.int64) * u_sw
    upstream = tl.load(u_ptr + at, mask=counts, other=0.0).to(tl.float32)
    u_cos = upstream * tl.load(share_ptr + batch, mask=counts, other=0.0) * cos_weight
    u_l1 = upstream * tl.load(share_ptr + samples + batch, mask=counts, other=0.0) * l1_weight
    _store_gradients(
        gs_ptr, gt_ptr, s, t, std, st, ss, tt, u_cos, u_l1 / channels, beta, inv_beta,
        batch, y, x, cols, inside[:, None] & (cols < channels)[None, :],
        gs_sb, gs_sh, gs_sw, gs_sc, gt_sb, gt_sh, gt_sw, gt_sc, GRAD_S, GRAD_T, HAS_STD,
    )  # fmt: skip


@triton.jit
def align_scale_kernel(
    grad_ptr,  # (numel,) scaled in place
    factor_ptr,  # () float32
    numel,
    BLOCK: tl.constexpr,
):
    """grad *= factor; a factor of 1 reads nothing."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, grad * factor, mask=at < numel)


def launch_forward(
    source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, by_map,
    rows, stats, grad_source, grad_target,
):  # fmt: skip
    """As align_torch.forward: fill rows, and stats and the gradients where they are not empty."""
    tile = align_tile(source.shape[3])
    with device_of(source):
        align_forward_kernel[(triton.cdiv(rows.numel(), tile.rows),)](
            source, target, *_constants(source, mean, std, valid), share, rows, stats, grad_source, grad_target,
            *source.stride(), *target.stride(), *_strides(grad_source), *_strides(grad_target),
            rows.numel(), *_sizes(source, target, resize), cos_weight, l1_weight, beta, 1 / beta if beta > 0 else 0.0,
            **_flags(mean, std, valid, resize, by_map, grad_source, grad_target), STATS=stats.numel() > 0,
            ROWS=tile.rows, BLOCK_C=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip


def launch_backward(
    upstream, source, target, mean, std, valid, share, stats, cos_weight, l1_weight, beta, resize,
    grad_source, grad_target,
):  # fmt: skip
    """As align_torch.backward: fill the gradients that are not empty."""
    if not (grad_source.numel() or grad_target.numel()):
        return
    tile = align_tile(source.shape[3])
    by_map = stats.shape[2:] != upstream.shape[1:]
    with device_of(source):
        align_backward_kernel[(triton.cdiv(upstream.numel(), tile.rows),)](
            upstream, source, target, *_constants(source, mean, std, valid), share, stats, grad_source, grad_target,
            *upstream.stride(),
            *source.stride(), *target.stride(), *_strides(grad_source), *_strides(grad_target),
            upstream.numel(), *_sizes(source, target, resize),
            cos_weight, l1_weight, beta, 1 / beta if beta > 0 else 0.0,
            **_flags(mean, std, valid, resize, by_map, grad_source, grad_target),
            ROWS=tile.rows, BLOCK_C=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip


def launch_scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor in place, for a dense gradient in any order of dimensions."""
    block = SCALE_TILE.channels
    with device_of(grad):
        align_scale_kernel[(triton.cdiv(grad.numel(), block),)](
            grad, factor, grad.numel(), BLOCK=block, num_warps=SCALE_TILE.num_warps
        )


def _constants(source, mean, std, valid):
    # A pointer that a flag keeps the kernel from following still has to be a tensor.
    return (
        source if mean is None else mean.contiguous(),
        source if std is None else std.contiguous(),
        source if valid is None else valid.contiguous(),
    )


def _strides(grad: Tensor):
    return grad.stride() if grad.dim() == 4 else (0, 0, 0, 0)


def _sizes(source, target, resize):
    """samples, channels, both sides' grids and the common one."""
    grid = (target if resize == "source" else source).shape[1:3]
    return source.shape[0], source.shape[3], *source.shape[1:3], *target.shape[1:3], *grid


def _flags(mean, std, valid, resize, by_map, grad_source, grad_target):
    return {
        "RESIZE": _RESIZE[resize],
        "HAS_MEAN": mean is not None,
        "HAS_STD": std is not None,
        "HAS_VALID": valid is not None,
        "BY_MAP": by_map,
        "GRAD_S": grad_source.numel() > 0,
        "GRAD_T": grad_target.numel() > 0,
    }
