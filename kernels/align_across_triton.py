"""The kernel of align.py for views whose tokens are adjacent in memory (NCHW): threads lie along the tokens."""

# A program cannot hold all channels of 32 tokens in registers, so it walks over them a chunk at a time: once for the
# sums, once more for the gradient, when its share of both sides comes out of the L2 cache.

import triton
import triton.language as tl

from .align_triton import load_sides, load_sums, smooth_l1, store_gradients, store_sums, token_weights
from .resize_triton import own_tokens, token_offset


@triton.jit
def align_across_kernel(
    u_ptr,  # (B, H, W) float32 upstream gradient; unread where FORWARD
    s_ptr, t_ptr,  # (B, H, W, C), lines evenly spaced
    mean_ptr, std_ptr,  # (C,)
    valid_ptr,  # (B, H, W) bool
    share_ptr,  # (2, B) float32; unread without HAS_SHARE
    rows_ptr,  # (B, H, W), or where SUM (programs,), float32, out: what these add to the loss; FORWARD only
    stats_ptr,  # (3, B, H, W) float32, s·t, s·s, t·t: out where FORWARD and STATS, else in; (3, B) in where BY_MAP
    gs_ptr, gt_ptr,  # (B, H, W, C), out
    u_sb, u_sw,
    s_sb, s_sw, s_sc, t_sb, t_sw, t_sc,
    gs_sb, gs_sw, gs_sc, gt_sb, gt_sw, gt_sc,
    rows, samples, tokens, channels,  # B·H·W, B, H·W, C
    cos_weight, l1_weight, beta, inv_beta,
    FORWARD: tl.constexpr,
    HAS_SHARE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    BY_MAP: tl.constexpr, STATS: tl.constexpr, SUM: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr,  # divides `tokens` and the strides of samples and channels
):  # fmt: skip
    """One program: TOKENS tokens of a sample. FORWARD: their loss, and gradient if wanted; else the gradient alone."""
    # Of its arguments Triton knows multiples of 16 only: of a map of 14² it would load tokens one by one.
    tokens = tokens // WIDE * WIDE
    s_sb, s_sc = s_sb // WIDE * WIDE, s_sc // WIDE * WIDE
    t_sb, t_sc = t_sb // WIDE * WIDE, t_sc // WIDE * WIDE
    gs_sb, gs_sc = gs_sb // WIDE * WIDE, gs_sc // WIDE * WIDE
    gt_sb, gt_sc = gt_sb // WIDE * WIDE, gt_sc // WIDE * WIDE
    batch, token, _, _ = own_tokens(1, tokens, True, TOKENS)
    token = token[None, :]
    inside = token < tokens
    row = batch.to(tl.int64) * tokens + token
    counts, u_cos, u_l1 = token_weights(
        share_ptr, valid_ptr, row, batch, inside, samples, channels, cos_weight, l1_weight, HAS_SHARE, HAS_VALID
    )
    s_at = (token_offset(batch, 0, token, s_sb, 0, s_sw),)
    t_at = (token_offset(batch, 0, token, t_sb, 0, t_sw),)

    if FORWARD:
        st_tile = tl.zeros((CHUNK, TOKENS), dtype=tl.float32)
        ss_tile = tl.zeros((CHUNK, TOKENS), dtype=tl.float32)
        tt_tile = tl.zeros((CHUNK, TOKENS), dtype=tl.float32)
        smooth_tile = tl.zeros((CHUNK, TOKENS), dtype=tl.float32)
        for first in range(0, channels, CHUNK):
            channel = first + tl.arange(0, CHUNK)
            s, t = load_sides(
                s_ptr, t_ptr, mean_ptr, std_ptr, s_at, s_at, t_at, t_at, channel, inside,
                s_sc, t_sc, channels, 0, HAS_MEAN, HAS_STD, True,
            )  # fmt: skip
            if HAS_VALID:  # after the load: a mask that differs from token to token would make it load them one by one
                s = tl.where(counts, s, 0.0)
                t = tl.where(counts, t, 0.0)
            st_tile += s * t
            ss_tile += s * s
            tt_tile += t * t
            smooth_tile += smooth_l1(s - t, beta, inv_beta)
        st = tl.sum(st_tile, axis=0)[None, :]
        ss = tl.sum(ss_tile, axis=0)[None, :]
        tt = tl.sum(tt_tile, axis=0)[None, :]
        smooth = tl.sum(smooth_tile, axis=0)[None, :]
        store_sums(
            rows_ptr, stats_ptr, row, rows, st, ss, tt, smooth, u_cos, u_l1, counts, inside, BY_MAP, STATS, SUM
        )  # fmt: skip
    else:
        st, ss, tt = load_sums(stats_ptr, row, batch, rows, samples, inside, BY_MAP)
        upstream = tl.load(u_ptr + token_offset(batch, 0, token, u_sb, 0, u_sw), mask=counts, other=0.0).to(tl.float32)
        u_cos *= upstream
        u_l1 *= upstream

    if GRAD_S or GRAD_T:
        gs_at = token_offset(batch, 0, token, gs_sb, 0, gs_sw)
        gt_at = token_offset(batch, 0, token, gt_sb, 0, gt_sw)
        for first in range(0, channels, CHUNK):
            channel = first + tl.arange(0, CHUNK)
            s, t = load_sides(
                s_ptr, t_ptr, mean_ptr, std_ptr, s_at, s_at, t_at, t_at, channel, inside,
                s_sc, t_sc, channels, 0, HAS_MEAN, HAS_STD, True,
            )  # fmt: skip
            if HAS_VALID:
                s = tl.where(counts, s, 0.0)
                t = tl.where(counts, t, 0.0)
            store_gradients(
                gs_ptr, gt_ptr, gs_at, gt_at, s, t, std_ptr, channel, st, ss, tt, u_cos, u_l1, inv_beta,
                gs_sc, gt_sc, channels, inside, GRAD_S, GRAD_T, HAS_STD, True,
            )  # fmt: skip
