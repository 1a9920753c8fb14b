"""Launches of align_group.py's kernels: sorts terms into launches and lays out their tuples."""

import functools
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

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
    Tile,
    coded,
    device_of,
    inverse_beta,
    run_kernel,
    token_tile,
)
from .tensors import token_strides


def launch_group(
    sources, targets, means, stds, valids, cos_weights, l1_weights, betas, grads_source, grads_target, losses
) -> None:
    """Fill losses (T,), and the gradients where they are not empty."""
    options = means, stds, valids
    plan = _plan(
        tuple((x.shape, x.stride(), x.dtype) for x in (*sources, *targets)),
        tuple(x if x is None else x.dtype for values in options for x in values),
        tuple(x.numel() > 0 for x in (*grads_source, *grads_target)),
        tuple(token_tile(x.shape[-1]) for x in sources),
        FINISH_TILE,
        MAX_SLOTS,
    )
    partial = losses.new_empty(plan.programs)
    counts = _inverse_counts(valids, losses)
    # A pointer that a flag keeps the kernel from following still has to be a tensor.
    options = [[s if x is None else _dense(x) for x, s in zip(values, sources, strict=True)] for values in options]
    tensors = sources, targets, *options, grads_source, grads_target
    weights = cos_weights, l1_weights, betas, [inverse_beta(beta) for beta in betas]
    with device_of(losses):
        for take, programs, numbers, strides_and_channels, first, constants in plan.launches:
            run_kernel(
                align_group_kernel, (programs, 1),
                *map(take, tensors), counts, partial, *numbers, *strides_and_channels, *map(take, weights), first,
                **constants,
            )  # fmt: skip
        for start, firsts, lasts in plan.finishes:
            run_kernel(
                align_finish_kernel, (len(firsts), 1),
                partial, losses[start:], firsts, lasts,
                COUNT=len(firsts), BLOCK=FINISH_TILE.channels, num_warps=FINISH_TILE.num_warps,
            )  # fmt: skip


class _Plan(NamedTuple):
    """What of launch_group follows from shapes, strides, dtypes and from what is wanted."""

    programs: int  # of all launches together, each with a partial sum
    launches: list[tuple]  # taker of its terms, programs, coded numbers, strides and channels, first partial, constants
    finishes: list[tuple]  # first term, coded first partials, coded ends


@functools.lru_cache(maxsize=1024)
def _plan(sides: tuple, options: tuple, wanted: tuple, tiles: tuple, finish: Tile, slots: int) -> _Plan:
    """sides: shape, stride and dtype of the sources, then of the targets. options: dtypes or None of all means, then
    of all stds, then of all valids. wanted: gradients to the sources, then to the targets. tiles: of each term. slots:
    terms of a launch, at most.
    """
    terms = len(tiles)
    classes: dict[tuple, list[int]] = {}
    for i, tile in enumerate(tiles):
        dtypes = sides[i][2], sides[terms + i][2]
        classes.setdefault((*dtypes, *options[i::terms], *wanted[i::terms], tile), []).append(i)
    shapes = [shape for shape, *_ in sides[:terms]]
    rows = [shape[:-1].numel() for shape in shapes]
    programs = [triton.cdiv(n, tile.tokens) for n, tile in zip(rows, tiles, strict=True)]
    views = [token_strides(torch.empty_strided(shape, stride, device="meta")) for shape, stride, _ in sides]
    samples, strides = [n for n, *_ in views[:terms]], [steps for _, *steps in views]
    first = [0] * terms  # of each term's partials
    launches, filled = [], 0
    for (_, _, has_mean, has_std, has_valid, grad_s, grad_t, tile), members in classes.items():
        for some in _at_most(slots, members):
            starts = [sum(programs[j] for j in some[:n]) for n in range(len(some))]
            for i, start in zip(some, starts, strict=True):
                first[i] = filled + start
            numbers = coded(starts), *(coded(values[i] for i in some) for values in (rows, samples)), coded(some)
            steps = [tuple(strides[side + i][d] for i in some) for side in (0, terms) for d in (0, 1)]
            constants = {
                "HAS_MEAN": has_mean is not None, "HAS_STD": has_std is not None, "HAS_VALID": has_valid is not None,
                "GRAD_S": grad_s, "GRAD_T": grad_t, "COUNT": len(some),
                "TOKENS": tile.tokens, "CHUNK": tile.chunk, "PIECES": tile.pieces, "num_warps": tile.num_warps,
            }  # fmt: skip
            count = sum(programs[i] for i in some)
            channels = tuple(shapes[i][-1] for i in some)
            launches.append((_taker(some), count, numbers, (*steps, channels), filled, constants))
            filled += count
    finishes = [
        (some[0], coded(first[i] for i in some), coded(first[i] + programs[i] for i in some))
        for some in _at_most(finish.rows, list(range(terms)))
    ]
    return _Plan(filled, launches, finishes)


def launch_group_scale(grads: tuple[Tensor, ...], places: tuple[int, ...], factors: Tensor) -> None:
    """grads[i] *= factors[places[i]], in place; dense gradients of any dtypes."""
    kinds = tuple((grad.dtype, grad.numel()) for grad in grads)
    with device_of(factors):
        plan = _scale_plan(kinds, places, SCALE_TILE, SCALE_PROGRAMS, MAX_SLOTS)
        for take, programs, firsts, counts, factor_of, sizes in plan:
            run_kernel(
                align_group_scale_kernel, (programs, 1),
                take(grads), factors, factors.stride(0), firsts, counts, factor_of, sizes,
                COUNT=len(sizes), BLOCK=SCALE_TILE.channels, num_warps=SCALE_TILE.num_warps,
            )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _scale_plan(kinds: tuple, places: tuple[int, ...], tile: Tile, most: int, slots: int) -> list[tuple]:
    """Per launch: its gradients of a list, programs, coded first programs, counts and places, sizes.

    kinds: dtype and size of each gradient. most: programs of a launch, or one for each gradient. slots: gradients of
    a launch, at most.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, (dtype, _) in enumerate(kinds):
        by_dtype.setdefault(dtype, []).append(i)
    launches = []
    for members in by_dtype.values():
        for some in _at_most(slots, members):
            sizes = tuple(kinds[i][1] for i in some)
            blocks = [triton.cdiv(size, tile.channels) for size in sizes]
            share = min(1.0, most / sum(blocks))
            programs = [max(1, int(share * n)) for n in blocks]
            firsts = coded(sum(programs[:n]) for n in range(len(some)))
            factor_of = coded(places[i] for i in some)
            launches.append((_taker(some), sum(programs), firsts, coded(programs), factor_of, sizes))
    return launches


def _taker(some: Sequence[int]) -> Callable[[Sequence], tuple]:
    """What picks the members `some` of a list, as a tuple."""
    return itemgetter(*some) if len(some) > 1 else lambda values: (values[some[0]],)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous().resolve_neg()


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
