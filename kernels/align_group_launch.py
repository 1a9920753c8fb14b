"""Launches of align_group.py's kernels: sorts terms into launches and lays out their tuples."""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .align_group_triton import align_group_kernel, align_group_scale_kernel
from .align_triton import align_finish_kernel
from .launch import (
    FINISH_TILE,
    MAX_SLOTS,
    SCALE_PROGRAMS,
    SCALE_TILE,
    coded,
    device_of,
    inverse_beta,
    run_kernel,
    token_strides,
    token_tile,
)


def launch_group(
    sources, targets, means, stds, valids, cos_weights, l1_weights, betas, grads_source, grads_target, losses
) -> None:
    """Fill losses (T,), and the gradients where they are not empty."""
    classes: dict[tuple, list[int]] = {}
    for i, (s, t) in enumerate(zip(sources, targets, strict=True)):
        options = tuple(x[i] if x[i] is None else x[i].dtype for x in (means, stds, valids))
        wanted = tuple(x[i].numel() > 0 for x in (grads_source, grads_target))
        classes.setdefault((s.dtype, t.dtype, *options, *wanted, token_tile(s.shape[-1])), []).append(i)
    rows = [s.numel() // s.shape[-1] for s in sources]
    channels = [s.shape[-1] for s in sources]
    programs = [triton.cdiv(n, token_tile(c).tokens) for n, c in zip(rows, channels, strict=True)]
    sides = [token_strides(x) for x in (*sources, *targets)]
    samples, strides = [n for n, *_ in sides[: len(rows)]], [steps for _, *steps in sides]
    partial = losses.new_empty(sum(programs))
    counts = _inverse_counts(valids, losses)
    first = [0] * len(rows)  # of each term's partials
    filled = 0
    with device_of(losses):
        for (_, _, has_mean, has_std, has_valid, grad_s, grad_t, tile), members in classes.items():
            for some in _at_most(MAX_SLOTS, members):
                starts = []
                for i in some:
                    starts.append(sum(programs[j] for j in some[: len(starts)]))
                    first[i] = filled + starts[-1]

                def take(values, some=some):
                    # A pointer that a flag keeps the kernel from following still has to be a tensor.
                    return tuple(sources[i] if values[i] is None else values[i] for i in some)

                run_kernel(
                    align_group_kernel, (sum(programs[i] for i in some), 1),
                    take(sources), take(targets),
                    *(take(_dense(x)) for x in (means, stds, valids)),
                    take(grads_source), take(grads_target), counts, partial,
                    coded(starts), coded(take(rows)), coded(take(samples)), coded(some),
                    *(tuple(strides[side + i][d] for i in some) for side in (0, len(rows)) for d in (0, 1)),
                    take(channels), take(cos_weights), take(l1_weights),
                    take(betas), take([inverse_beta(beta) for beta in betas]), filled,
                    HAS_MEAN=has_mean is not None, HAS_STD=has_std is not None, HAS_VALID=has_valid is not None,
                    GRAD_S=grad_s, GRAD_T=grad_t,
                    COUNT=len(some), TOKENS=tile.tokens, CHUNK=tile.chunk, PIECES=tile.pieces,
                    num_warps=tile.num_warps,
                )  # fmt: skip
                filled += sum(programs[i] for i in some)
        for some in _at_most(FINISH_TILE.rows, list(range(len(rows)))):
            run_kernel(
                align_finish_kernel, (len(some), 1),
                partial, losses[some[0] :],
                coded(first[i] for i in some), coded(first[i] + programs[i] for i in some),
                COUNT=len(some), BLOCK=FINISH_TILE.channels, num_warps=FINISH_TILE.num_warps,
            )  # fmt: skip


def launch_group_scale(grads: tuple[Tensor, ...], places: tuple[int, ...], factors: Tensor) -> None:
    """grads[i] *= factors[places[i]], in place; dense gradients of any dtypes."""
    block = SCALE_TILE.channels
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, grad in enumerate(grads):
        by_dtype.setdefault(grad.dtype, []).append(i)
    with device_of(factors):
        for members in by_dtype.values():
            for some in _at_most(MAX_SLOTS, members):
                blocks = [triton.cdiv(grads[i].numel(), block) for i in some]
                share = min(1.0, SCALE_PROGRAMS / sum(blocks))
                programs = [max(1, int(share * n)) for n in blocks]
                run_kernel(
                    align_group_scale_kernel, (sum(programs), 1),
                    tuple(grads[i] for i in some), factors, factors.stride(0),
                    coded(sum(programs[:n]) for n in range(len(some))), coded(programs),
                    coded(places[i] for i in some),
                    tuple(grads[i].numel() for i in some),
                    COUNT=len(some), BLOCK=block, num_warps=SCALE_TILE.num_warps,
                )  # fmt: skip


def _dense(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [x if x is None else x.contiguous().resolve_neg() for x in tensors]


def _inverse_counts(valids: list[Tensor | None], losses: Tensor) -> Tensor:
    """(T,) 1/max(valid tokens, 1), where a term has a mask; a mask shared by terms is counted once."""
    counted: dict[int, Tensor] = {}
    for valid in valids:
        if valid is not None and id(valid) not in counted:
            counted[id(valid)] = valid.sum(dtype=torch.float32)
    if not counted:
        return losses  # unread
    one = next(iter(counted.values()))
    return torch.stack([one if v is None else counted[id(v)] for v in valids]).clamp_(min=1).reciprocal_()


def _at_most(count: int, members: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(members), count):
        yield members[first : first + count]
