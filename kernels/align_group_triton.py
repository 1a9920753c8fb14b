"""Kernels of align_group.py: many small losses in one launch."""

# A launch has up to MAX_SLOTS terms, given as tuples. A program finds its term by its number and picks that term's
# pointers and sizes; from there on it is the kernel of align_triton.py for dense tokens.

import triton
import triton.language as tl

from .align_triton import cosine, smooth_l1, standardise, store_gradients


@triton.jit
def pick(values, starts, program, COUNT: tl.constexpr):
    """values[i] of the term i that `program` works on; starts: its first program."""
    found = values[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(program >= starts[i], values[i], found)
    return found


@triton.jit(do_not_specialize=["starts", "rows", "places", "first_partial"])
def align_group_kernel(
    s_ptrs, t_ptrs,  # (rows, C) dense, each
    mean_ptrs, std_ptrs,  # (C,)
    valid_ptrs,  # (rows,) bool
    gs_ptrs, gt_ptrs,  # (rows, C) dense, out
    count_ptr,  # (terms,) float32: 1/valid tokens
    partial_ptr,  # float32, out: what this program's tokens add to their term
    starts, rows, places,  # first program, tokens, and number of the term
    channels, cos_weights, l1_weights, betas, inv_betas,
    first_partial,
    HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, HAS_VALID: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr,
    COUNT: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: TURNS × ROWS tokens of one term."""
    program = tl.program_id(0)
    s_ptr = pick(s_ptrs, starts, program, COUNT)
    t_ptr = pick(t_ptrs, starts, program, COUNT)
    mean_ptr = pick(mean_ptrs, starts, program, COUNT)
    std_ptr = pick(std_ptrs, starts, program, COUNT)
    valid_ptr = pick(valid_ptrs, starts, program, COUNT)
    gs_ptr = pick(gs_ptrs, starts, program, COUNT)
    gt_ptr = pick(gt_ptrs, starts, program, COUNT)
    size = pick(channels, starts, program, COUNT)
    tokens = pick(rows, starts, program, COUNT)
    beta = pick(betas, starts, program, COUNT)
    inv_beta = pick(inv_betas, starts, program, COUNT)
    share = 1.0 / tokens
    if HAS_VALID:
        share = tl.load(count_ptr + pick(places, starts, program, COUNT))
    cos_weight = pick(cos_weights, starts, program, COUNT) * share
    l1_weight = pick(l1_weights, starts, program, COUNT) * share / size

    first = (program - pick(starts, starts, program, COUNT)) * (TURNS * ROWS)
    channel = tl.arange(0, BLOCK_C)
    cols = channel[None, :]
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for turn in range(TURNS):
        row = first + turn * ROWS + tl.arange(0, ROWS)
        inside = row < tokens
        counts = inside
        if HAS_VALID:
            counts = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
        at = row.to(tl.int64)[:, None] * size
        mask = counts[:, None] & (cols < size)
        s = tl.load(s_ptr + at + cols, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + at + cols, mask=mask, other=0.0).to(tl.float32)
        t, std = standardise(t, mean_ptr, std_ptr, channel, mask, size, HAS_MEAN, HAS_STD, False)
        st = tl.sum(s * t, axis=1)
        ss = tl.sum(s * s, axis=1)
        tt = tl.sum(t * t, axis=1)
        smooth = tl.sum(smooth_l1(s - t, beta, inv_beta), axis=1)
        u_cos = tl.where(counts, cos_weight, 0.0)
        u_l1 = tl.where(counts, l1_weight, 0.0)
        total += tl.where(counts, u_cos * (1.0 - cosine(st, ss, tt)) + u_l1 * smooth, 0.0)
        if GRAD_S or GRAD_T:
            store_gradients(
                gs_ptr, gt_ptr, at, at, s, t, std, st[:, None], ss[:, None], tt[:, None], u_cos[:, None], u_l1[:, None],
                beta, inv_beta, cols, 1, 1, inside[:, None] & (cols < size), GRAD_S, GRAD_T, HAS_STD,
            )  # fmt: skip
    tl.store(partial_ptr + first_partial + program, tl.sum(total))


@triton.jit(do_not_specialize=["starts", "ends"])
def align_group_finish_kernel(
    partial_ptr,  # float32, what each program of the launches before found
    loss_ptr,  # (terms,) float32, out
    starts, ends,  # of each term's partials
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one term's partials, always in the same order."""
    term = tl.program_id(0)
    begin = starts[0]
    end = ends[0]
    for i in tl.static_range(1, COUNT):
        begin = tl.where(term == i, starts[i], begin)
        end = tl.where(term == i, ends[i], end)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < end, other=0.0)
    tl.store(loss_ptr + term, tl.sum(total))


@triton.jit(do_not_specialize=["starts", "places", "factor_stride"])
def align_group_scale_kernel(
    grad_ptrs,  # (numel,) each, scaled in place
    factor_ptr,  # (terms,) float32
    factor_stride,
    starts, numels, places,  # first program, numbers, and number of the term
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad *= its term's factor; a factor of 1 reads nothing."""
    program = tl.program_id(0)
    factor = tl.load(factor_ptr + pick(places, starts, program, COUNT) * factor_stride).to(tl.float32)
    if factor != 1.0:
        grad_ptr = pick(grad_ptrs, starts, program, COUNT)
        numel = pick(numels, starts, program, COUNT)
        at = (program - pick(starts, starts, program, COUNT)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, grad * factor, mask=at < numel)
