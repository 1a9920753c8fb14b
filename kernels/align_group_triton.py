"""Kernels of align_group.py: many small losses in one launch."""

# A launch has up to MAX_SLOTS terms, given as tuples. A program finds its term by its number and picks that term's
# pointers and sizes; from there on it is the kernel of align_triton.py for tokens whose channels are adjacent.
# Whole numbers that change from step to step come coded as 2n + 3 (launch.py).

import triton
import triton.language as tl

from .align_triton import cosine, load_pieces, scale_blocks, store_gradients, token_sums


@triton.jit
def pick(values, starts, program, COUNT: tl.constexpr):
    """values[i] of the term i that `program` works on; starts: its first program, coded."""
    found = values[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(2 * program + 3 >= starts[i], values[i], found)
    return found


@triton.jit
def pick_coded(values, starts, program, COUNT: tl.constexpr):
    """The same of numbers that came as 2n + 3."""
    return (pick(values, starts, program, COUNT) - 3) // 2


@triton.jit(do_not_specialize=["first_partial"])
def align_group_kernel(
    s_ptrs, t_ptrs,  # (samples, tokens of a sample, C), each
    mean_ptrs, std_ptrs,  # (C,)
    valid_ptrs,  # (rows,) bool
    gs_ptrs, gt_ptrs,  # (rows, C) dense, out
    count_ptr,  # (terms,) float32: 1/valid tokens
    partial_ptr,  # float32, out: what this program's tokens add to their term
    starts, rows, samples, places,  # coded: first program, tokens, tokens of a sample, and number of the term
    s_samples, s_tokens, t_samples, t_tokens,  # strides
    channels, cos_weights, l1_weights, betas, inv_betas,
    first_partial,
    HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one term."""
    program = tl.program_id(0)
    s_ptr = pick(s_ptrs, starts, program, COUNT)
    t_ptr = pick(t_ptrs, starts, program, COUNT)
    mean_ptr = pick(mean_ptrs, starts, program, COUNT)
    std_ptr = pick(std_ptrs, starts, program, COUNT)
    valid_ptr = pick(valid_ptrs, starts, program, COUNT)
    gs_ptr = pick(gs_ptrs, starts, program, COUNT)
    gt_ptr = pick(gt_ptrs, starts, program, COUNT)
    size = pick(channels, starts, program, COUNT)
    tokens = pick_coded(rows, starts, program, COUNT)
    of_sample = pick_coded(samples, starts, program, COUNT)
    beta = pick(betas, starts, program, COUNT)
    inv_beta = pick(inv_betas, starts, program, COUNT)
    share = 1.0 / tokens
    if HAS_VALID:
        share = tl.load(count_ptr + pick_coded(places, starts, program, COUNT))
    cos_weight = pick(cos_weights, starts, program, COUNT) * share
    l1_weight = pick(l1_weights, starts, program, COUNT) * share / size

    first = (program - pick_coded(starts, starts, program, COUNT)) * TOKENS
    s_sample = pick(s_samples, starts, program, COUNT)
    s_token = pick(s_tokens, starts, program, COUNT)
    t_sample = pick(t_samples, starts, program, COUNT)
    t_token = pick(t_tokens, starts, program, COUNT)
    row = first + tl.arange(0, TOKENS)
    inside = row < tokens
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    sample = (row // of_sample).to(tl.int64)
    token = (row % of_sample).to(tl.int64)
    s_at = ((sample * s_sample + token * s_token)[:, None],)
    t_at = ((sample * t_sample + token * t_token)[:, None],)
    s, t = load_pieces(
        s_ptr, t_ptr, mean_ptr, std_ptr, s_at, s_at, t_at, t_at, counts[:, None], 1, 1, size,
        0, HAS_MEAN, HAS_STD, CHUNK, PIECES,
    )  # fmt: skip
    st, ss, tt, smooth = token_sums(s, t, beta, inv_beta, PIECES)
    u_cos = tl.where(counts, cos_weight, 0.0)
    u_l1 = tl.where(counts, l1_weight, 0.0)
    total = tl.where(counts, u_cos * (1.0 - cosine(st, ss, tt)) + u_l1 * smooth, 0.0)
    tl.store(partial_ptr + first_partial + program, tl.sum(total))
    if GRAD_S or GRAD_T:
        at = row.to(tl.int64)[:, None] * size
        for i in tl.static_range(PIECES):
            store_gradients(
                gs_ptr, gt_ptr, at, at, s[i], t[i], std_ptr, i * CHUNK + tl.arange(0, CHUNK),
                st[:, None], ss[:, None], tt[:, None], u_cos[:, None], u_l1[:, None], inv_beta,
                1, 1, size, inside[:, None], GRAD_S, GRAD_T, HAS_STD, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["factor_stride"])
def align_group_scale_kernel(
    grad_ptrs,  # (numel,) each, scaled in place
    factor_ptr,  # (terms,) float32
    factor_stride,
    starts, programs, places,  # coded: first program, programs, and number of the term
    numels,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad *= its term's factor; a factor of 1 reads nothing."""
    program = tl.program_id(0)
    factor = tl.load(factor_ptr + pick_coded(places, starts, program, COUNT) * factor_stride).to(tl.float32)
    if factor != 1.0:
        scale_blocks(
            pick(grad_ptrs, starts, program, COUNT), factor, pick(numels, starts, program, COUNT),
            program - pick_coded(starts, starts, program, COUNT), pick_coded(programs, starts, program, COUNT), BLOCK,
        )  # fmt: skip
