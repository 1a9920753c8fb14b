"""Triton kernels of align.py. The formulas, and what each tensor means, stand at the top of that file."""

import triton
import triton.language as tl

from .resize_triton import load_tokens


@triton.jit
def load_sides(
    s_ptr, t_ptr,  # (B, SH, SW, C), (B, TH, TW, C)
    mean_ptr, std_ptr,  # (C,)
    batch, y, x,  # as in load_tokens
    channel,  # (BLOCK_C,) or (CHUNK,)
    mask,  # of the tokens, in the shape of y and x
    s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
    s_height, s_width, t_height, t_width, height, width, channels,
    RESIZE: tl.constexpr, CORNERS: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Source and standardised target on the common grid, and std; float32 tiles, 0 outside `mask`."""
    cols = across_or_along(channel, ACROSS)
    mask = mask & (cols < channels)
    s = load_tokens(
        s_ptr, batch, y, x, cols, mask, s_sb, s_sh, s_sw, s_sc, s_height, s_width, height, width, RESIZE == 1, CORNERS
    )  # fmt: skip
    t = load_tokens(
        t_ptr, batch, y, x, cols, mask, t_sb, t_sh, t_sw, t_sc, t_height, t_width, height, width, RESIZE == 2, CORNERS
    )  # fmt: skip
    t, std = standardise(t, mean_ptr, std_ptr, channel, mask, channels, HAS_MEAN, HAS_STD, ACROSS)
    return s, t, std


@triton.jit
def across_or_along(channel, ACROSS: tl.constexpr):
    """A vector over channels as a column where tokens lie along the last dimension, else as a row."""
    if ACROSS:
        placed = channel[:, None]
    else:
        placed = channel[None, :]
    return placed


@triton.jit
def standardise(
    t, mean_ptr, std_ptr, channel, mask, channels,
    HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """(t − mean)/std, 0 outside `mask`; and std."""
    std = tl.full(channel.shape, 1.0, tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        t = t - across_or_along(mean, ACROSS)
    if HAS_STD:
        std = tl.load(std_ptr + channel, mask=channel < channels, other=1.0).to(tl.float32)
    std = across_or_along(std, ACROSS)
    if HAS_STD:
        t = t / std
    if HAS_MEAN or HAS_STD:
        t = tl.where(mask, t, 0.0)
    return t, std


@triton.jit
def smooth_l1(difference, beta, inv_beta):
    """φ_β."""
    size = tl.abs(difference)
    return tl.where(size < beta, 0.5 * size * size * inv_beta, size - 0.5 * beta)


@triton.jit
def smooth_l1_slope(difference, beta, inv_beta):
    """φ'_β."""
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    return tl.where(tl.abs(difference) < beta, difference * inv_beta, sign)


@triton.jit
def cosine(st, ss, tt):
    """From the three sums, norms clamped."""
    return st / (tl.maximum(tl.sqrt(ss), 1e-8) * tl.maximum(tl.sqrt(tt), 1e-8))


@triton.jit
def cosine_gradient(st, mine, other, u_cos):
    """a, b: the gradient of u_cos·(1 − cos) to x is a·x + b·y, from s·t, x·x and y·y."""
    norm = tl.maximum(tl.sqrt(mine), 1e-8)
    other_norm = tl.maximum(tl.sqrt(other), 1e-8)
    b = tl.where(norm > 1e-8, -u_cos / (norm * other_norm), 0.0)
    return -b * st / (norm * norm), b


@triton.jit
def store_gradients(
    gs_ptr, gt_ptr,  # (B, H, W, C) on the common grid
    gs_at, gt_at,  # offsets of the tokens, int64
    s, t, std,
    st, ss, tt,  # sums over the channels
    u_cos, u_l1,  # weights, 0 where a token does not count
    beta, inv_beta,
    cols, gs_sc, gt_sc, mask,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, HAS_STD: tl.constexpr,
):  # fmt: skip
    """Both gradients, from a tile of both sides and per-token values that broadcast to it."""
    slope = smooth_l1_slope(s - t, beta, inv_beta) * u_l1
    if GRAD_S:
        a, b = cosine_gradient(st, ss, tt, u_cos)
        tl.store(gs_ptr + gs_at + cols.to(tl.int64) * gs_sc, a * s + b * t + slope, mask=mask)
    if GRAD_T:
        a, b = cosine_gradient(st, tt, ss, u_cos)
        grad = a * t + b * s - slope
        if HAS_STD:
            grad = grad / std
        tl.store(gt_ptr + gt_at + cols.to(tl.int64) * gt_sc, grad, mask=mask)


@triton.jit
def token_offset(batch, y, x, stride_b, stride_h, stride_w):
    """Offset of a token, int64."""
    return batch.to(tl.int64) * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


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
    RESIZE: tl.constexpr, CORNERS: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    BY_MAP: tl.constexpr, STATS: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole tokens; the loss of each, and its gradient while both sides are in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    cols = channel[None, :]
    inside = row < rows
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    x = row % width
    y = row // width % height
    batch = row // (width * height)
    s, t, std = load_sides(
        s_ptr, t_ptr, mean_ptr, std_ptr, batch[:, None], y[:, None], x[:, None], channel, counts[:, None],
        s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
        s_height, s_width, t_height, t_width, height, width, channels, RESIZE, CORNERS, HAS_MEAN, HAS_STD, False,
    )  # fmt: skip
    st = tl.sum(s * t, axis=1)
    ss = tl.sum(s * s, axis=1)
    tt = tl.sum(t * t, axis=1)
    # Columns beyond C hold 0 on both sides, and φ_β(0) = 0 for every β.
    smooth = tl.sum(smooth_l1(s - t, beta, inv_beta), axis=1)

    u_cos = tl.load(share_ptr + batch, mask=counts, other=0.0) * cos_weight
    u_l1 = tl.load(share_ptr + samples + batch, mask=counts, other=0.0) * l1_weight / channels
    value = u_l1 * smooth
    if not BY_MAP:
        value += u_cos * (1.0 - cosine(st, ss, tt))
    tl.store(rows_ptr + row, tl.where(counts, value, 0.0), mask=inside)
    if STATS:
        plane = tl.cast(rows, tl.int64)
        tl.store(stats_ptr + row, st, mask=inside)
        tl.store(stats_ptr + plane + row, ss, mask=inside)
        tl.store(stats_ptr + 2 * plane + row, tt, mask=inside)
    if GRAD_S or GRAD_T:
        store_gradients(
            gs_ptr, gt_ptr,
            token_offset(batch, y, x, gs_sb, gs_sh, gs_sw)[:, None],
            token_offset(batch, y, x, gt_sb, gt_sh, gt_sw)[:, None],
            s, t, std, st[:, None], ss[:, None], tt[:, None], u_cos[:, None], u_l1[:, None], beta, inv_beta,
            cols, gs_sc, gt_sc, inside[:, None] & (cols < channels), GRAD_S, GRAD_T, HAS_STD,
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
    RESIZE: tl.constexpr, CORNERS: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    BY_MAP: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole tokens, read again; their gradient from the three kept sums."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    cols = channel[None, :]
    inside = row < rows
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    x = row % width
    y = row // width % height
    batch = row // (width * height)
    s, t, std = load_sides(
        s_ptr, t_ptr, mean_ptr, std_ptr, batch[:, None], y[:, None], x[:, None], channel, counts[:, None],
        s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
        s_height, s_width, t_height, t_width, height, width, channels, RESIZE, CORNERS, HAS_MEAN, HAS_STD, False,
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
    upstream = tl.load(u_ptr + token_offset(batch, y, x, u_sb, u_sh, u_sw), mask=counts, other=0.0).to(tl.float32)
    u_cos = upstream * tl.load(share_ptr + batch, mask=counts, other=0.0) * cos_weight
    u_l1 = upstream * tl.load(share_ptr + samples + batch, mask=counts, other=0.0) * l1_weight / channels
    store_gradients(
        gs_ptr, gt_ptr,
        token_offset(batch, y, x, gs_sb, gs_sh, gs_sw)[:, None],
        token_offset(batch, y, x, gt_sb, gt_sh, gt_sw)[:, None],
        s, t, std, st[:, None], ss[:, None], tt[:, None], u_cos[:, None], u_l1[:, None], beta, inv_beta,
        cols, gs_sc, gt_sc, inside[:, None] & (cols < channels), GRAD_S, GRAD_T, HAS_STD,
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
