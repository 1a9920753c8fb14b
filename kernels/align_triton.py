"""Triton kernels of align.py. The formulas, and what each tensor means, stand at the top of that file."""

import triton
import triton.language as tl

from .resize_triton import column_or_row, gather, own_tokens, places, token_offset


@triton.jit
def load_sides(
    s_ptr, t_ptr,  # (B, SH, SW, C), (B, TH, TW, C)
    mean_ptr, std_ptr,  # (C,)
    s_at, s_weight, t_at, t_weight,  # of each side, what `places` gives for the tokens
    channel,  # (CHUNK,)
    mask,  # of the tokens: a column, or a row where ACROSS
    s_sc, t_sc, channels,
    RESIZE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Source and standardised target on the common grid; float32 tiles, 0 outside `mask` and beyond `channels`."""
    cols = column_or_row(channel, ACROSS)
    mask = mask & (cols < channels)
    s = gather(s_ptr, s_at, s_weight, cols.to(tl.int64) * s_sc, mask, RESIZE == 1)
    t = gather(t_ptr, t_at, t_weight, cols.to(tl.int64) * t_sc, mask, RESIZE == 2)
    if HAS_MEAN:
        t = t - load_constants(mean_ptr, channel, mask, channels, 0.0, ACROSS)
    if HAS_STD:
        t = t / load_constants(std_ptr, channel, mask, channels, 1.0, ACROSS)
    if HAS_MEAN or HAS_STD:
        t = tl.where(mask, t, 0.0)
    return s, t


@triton.jit
def load_pieces(
    s_ptr, t_ptr, mean_ptr, std_ptr, s_at, s_weight, t_at, t_weight, mask, s_sc, t_sc, channels,  # as in load_sides
    RESIZE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """`load_sides` of whole tokens: PIECES tiles (TOKENS, CHUNK) of each side."""
    s_pieces = ()
    t_pieces = ()
    for i in tl.static_range(PIECES):
        s, t = load_sides(
            s_ptr, t_ptr, mean_ptr, std_ptr, s_at, s_weight, t_at, t_weight, i * CHUNK + tl.arange(0, CHUNK),
            mask, s_sc, t_sc, channels, RESIZE, HAS_MEAN, HAS_STD, False,
        )  # fmt: skip
        s_pieces += (s,)
        t_pieces += (t,)
    return s_pieces, t_pieces


@triton.jit
def load_constants(ptr, channel, mask, channels, beyond: tl.constexpr, ACROSS: tl.constexpr):
    """(C,) constants in float32, for a tile of these channels, `beyond` where there are none."""
    if ACROSS:
        values = tl.load(ptr + channel, mask=channel < channels, other=beyond).to(tl.float32)[:, None]
    else:  # by the tile, though its tokens read the same: then each thread has its own, and none passes through others
        values = tl.load(ptr + tl.broadcast_to(channel[None, :], mask.shape), mask=mask, other=beyond).to(tl.float32)
    return values


# With c = φ'_β(d) = max(−1, min(d/β, 1)), φ_β(d) = c·(d − β·c/2). For β = 0, 1/β comes as the largest finite number.
@triton.jit
def smooth_l1_slope(difference, inv_beta):
    """φ'_β."""
    return tl.clamp(difference * inv_beta, -1.0, 1.0)


@triton.jit
def smooth_l1(difference, beta, inv_beta):
    """φ_β."""
    slope = smooth_l1_slope(difference, inv_beta)
    return slope * (difference - 0.5 * beta * slope)


@triton.jit
def token_sums(s, t, beta, inv_beta, PIECES: tl.constexpr):
    """s·t, s·s, t·t and Σφ_β(s − t) of each token, (TOKENS,), from its pieces."""
    # Columns beyond C hold 0 on both sides, and φ_β(0) = 0 for every β.
    st = s[0] * t[0]
    ss = s[0] * s[0]
    tt = t[0] * t[0]
    smooth = smooth_l1(s[0] - t[0], beta, inv_beta)
    for i in tl.static_range(1, PIECES):
        st += s[i] * t[i]
        ss += s[i] * s[i]
        tt += t[i] * t[i]
        smooth += smooth_l1(s[i] - t[i], beta, inv_beta)
    return tl.sum(st, axis=1), tl.sum(ss, axis=1), tl.sum(tt, axis=1), tl.sum(smooth, axis=1)


@triton.jit
def cosine(st, ss, tt):
    """From the three sums, norms clamped."""
    return st / (tl.maximum(tl.sqrt(ss), 1e-8) * tl.maximum(tl.sqrt(tt), 1e-8))


@triton.jit
def token_weights(
    share_ptr, valid_ptr, row, batch, inside, samples, channels, cos_weight, l1_weight,
    HAS_SHARE: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Which tokens count; and what a cosine and one channel's smooth-L1 of each weigh in the result, 0 where not."""
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    l1_weight = l1_weight / channels
    if HAS_SHARE:
        cos_weight *= tl.load(share_ptr + batch)
        l1_weight *= tl.load(share_ptr + samples + batch)
    return counts, tl.where(counts, cos_weight, 0.0), tl.where(counts, l1_weight, 0.0)


@triton.jit
def store_sums(
    rows_ptr, stats_ptr, row, rows, st, ss, tt, smooth, u_cos, u_l1, counts, inside,
    BY_MAP: tl.constexpr, STATS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """What each token, or where SUM all of this program's together, add to the loss; and the three sums if kept."""
    value = u_l1 * smooth
    if not BY_MAP:
        value += u_cos * (1.0 - cosine(st, ss, tt))
    value = tl.where(counts, value, 0.0)
    if SUM:
        tl.store(rows_ptr + tl.program_id(0), tl.sum(value))
    else:
        tl.store(rows_ptr + row, value, mask=inside)
    if STATS:
        plane = tl.cast(rows, tl.int64)
        tl.store(stats_ptr + row, st, mask=inside)
        tl.store(stats_ptr + plane + row, ss, mask=inside)
        tl.store(stats_ptr + 2 * plane + row, tt, mask=inside)


@triton.jit
def load_sums(stats_ptr, row, batch, rows, samples, inside, BY_MAP: tl.constexpr):
    """The three sums that were kept of each token, or of its sample."""
    stat = row
    plane = tl.cast(rows, tl.int64)
    if BY_MAP:
        stat = tl.zeros_like(row) + batch
        plane = tl.cast(samples, tl.int64)
    st = tl.load(stats_ptr + stat, mask=inside, other=0.0)
    ss = tl.load(stats_ptr + plane + stat, mask=inside, other=0.0)
    tt = tl.load(stats_ptr + 2 * plane + stat, mask=inside, other=0.0)
    return st, ss, tt


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
    s, t,
    std_ptr, channel,  # (CHUNK,)
    st, ss, tt,  # sums over the channels
    u_cos, u_l1,  # weights, 0 where a token does not count
    inv_beta,
    gs_sc, gt_sc, channels, mask,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, HAS_STD: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Both gradients, from a tile of both sides and per-token values that broadcast to it."""
    slope = smooth_l1_slope(s - t, inv_beta) * u_l1
    cols = column_or_row(channel, ACROSS)
    mask = mask & (cols < channels)
    if GRAD_S:
        a, b = cosine_gradient(st, ss, tt, u_cos)
        tl.store(gs_ptr + gs_at + cols.to(tl.int64) * gs_sc, a * s + b * t + slope, mask=mask)
    if GRAD_T:
        a, b = cosine_gradient(st, tt, ss, u_cos)
        grad = a * t + b * s - slope
        if HAS_STD:
            grad = grad / load_constants(std_ptr, channel, mask, channels, 1.0, ACROSS)
        tl.store(gt_ptr + gt_at + cols.to(tl.int64) * gt_sc, grad, mask=mask)


@triton.jit
def align_along_kernel(
    u_ptr,  # (B, H, W) float32 upstream gradient, often expanded; unread where FORWARD
    s_ptr, t_ptr,  # (B, SH, SW, C), (B, TH, TW, C)
    mean_ptr, std_ptr,  # (C,)
    valid_ptr,  # (B, H, W) bool
    share_ptr,  # (2, B) float32; unread without HAS_SHARE
    rows_ptr,  # (B, H, W), or where SUM (programs,), float32, out: what these add to the loss; FORWARD only
    stats_ptr,  # (3, B, H, W) float32, s·t, s·s, t·t: out where FORWARD and STATS, else in; (3, B) in where BY_MAP
    gs_ptr, gt_ptr,  # (B, H, W, C), out
    u_sb, u_sh, u_sw,
    s_sb, s_sh, s_sw, s_sc, t_sb, t_sh, t_sw, t_sc,
    gs_sb, gs_sh, gs_sw, gs_sc, gt_sb, gt_sh, gt_sw, gt_sc,
    rows, samples, channels,  # B·H·W, B, C
    s_height, s_width, t_height, t_width, height, width,
    cos_weight, l1_weight, beta, inv_beta,
    FORWARD: tl.constexpr, FLAT: tl.constexpr, RESIZE: tl.constexpr, CORNERS: tl.constexpr,
    HAS_SHARE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    BY_MAP: tl.constexpr, STATS: tl.constexpr, SUM: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS whole tokens. FORWARD: the loss of each, and its gradient if wanted while both sides are in
    registers; else the gradient alone, from the kept sums."""
    batch, token, y, x = own_tokens(height, width, FLAT, TOKENS)
    inside = token < height * width
    row = batch.to(tl.int64) * (height * width) + token
    counts, u_cos, u_l1 = token_weights(
        share_ptr, valid_ptr, row, batch, inside, samples, channels, cos_weight, l1_weight, HAS_SHARE, HAS_VALID
    )
    line = y[:, None]
    column = x[:, None]
    s_at, s_weight = places(
        batch, line, column, s_sb, s_sh, s_sw, s_height, s_width, height, width, RESIZE == 1, CORNERS
    )
    t_at, t_weight = places(
        batch, line, column, t_sb, t_sh, t_sw, t_height, t_width, height, width, RESIZE == 2, CORNERS
    )
    if FORWARD:
        s_pieces, t_pieces = load_pieces(
            s_ptr, t_ptr, mean_ptr, std_ptr, s_at, s_weight, t_at, t_weight, counts[:, None], s_sc, t_sc, channels,
            RESIZE, HAS_MEAN, HAS_STD, CHUNK, PIECES,
        )  # fmt: skip
        st, ss, tt, smooth = token_sums(s_pieces, t_pieces, beta, inv_beta, PIECES)
        store_sums(
            rows_ptr, stats_ptr, row, rows, st, ss, tt, smooth, u_cos, u_l1, counts, inside, BY_MAP, STATS, SUM
        )  # fmt: skip
    else:
        st, ss, tt = load_sums(stats_ptr, row, batch, rows, samples, inside, BY_MAP)
        upstream = tl.load(u_ptr + token_offset(batch, y, x, u_sb, u_sh, u_sw), mask=counts, other=0.0).to(tl.float32)
        u_cos *= upstream
        u_l1 *= upstream

    if GRAD_S or GRAD_T:
        gs_at = token_offset(batch, line, column, gs_sb, gs_sh, gs_sw)
        gt_at = token_offset(batch, line, column, gt_sb, gt_sh, gt_sw)
        for i in tl.static_range(PIECES):
            channel = i * CHUNK + tl.arange(0, CHUNK)
            if FORWARD:
                s = s_pieces[i]
                t = t_pieces[i]
            else:
                s, t = load_sides(
                    s_ptr, t_ptr, mean_ptr, std_ptr, s_at, s_weight, t_at, t_weight, channel,
                    counts[:, None], s_sc, t_sc, channels, RESIZE, HAS_MEAN, HAS_STD, False,
                )  # fmt: skip
            store_gradients(
                gs_ptr, gt_ptr, gs_at, gt_at, s, t, std_ptr, channel,
                st[:, None], ss[:, None], tt[:, None], u_cos[:, None], u_l1[:, None], inv_beta,
                gs_sc, gt_sc, channels, inside[:, None], GRAD_S, GRAD_T, HAS_STD, False,
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
        scale_blocks(grad_ptr, factor, numel, tl.program_id(0), tl.num_programs(0), BLOCK)


@triton.jit
def scale_blocks(grad_ptr, factor, numel, program, programs, BLOCK: tl.constexpr):
    """grad *= factor for every programs-th block, from the program-th on."""
    for block in range(program, (numel - 1) // BLOCK + 1, programs):  # not cdiv: numel may be all that an int32 holds
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, grad * factor, mask=at < numel)


@triton.jit
def align_finish_kernel(
    partial_ptr,  # float32, what each program of the launches before found
    loss_ptr,  # (losses,) float32, out
    starts, ends,  # of each loss's partials, coded as 2n + 3 (launch.py)
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one loss's partials, always in the same order."""
    loss = tl.program_id(0)
    begin = starts[0]
    end = ends[0]
    for i in tl.static_range(1, COUNT):
        begin = tl.where(loss == i, starts[i], begin)
        end = tl.where(loss == i, ends[i], end)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = (begin - 3) // 2
    end = (end - 3) // 2
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < end, other=0.0)
    tl.store(loss_ptr + loss, tl.sum(total))
