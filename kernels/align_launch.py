"""Launches of align.py's kernels: along the channels, or across them where it is tokens that are adjacent in memory."""

import triton
from torch import Tensor

from .align_across_triton import align_across_kernel
from .align_triton import align_backward_kernel, align_forward_kernel, align_scale_kernel
from .launch import ALIGN_TILE_ACROSS, SCALE_TILE, align_tile, device_of, flat_stride, tokens_adjacent

_RESIZE = {"none": 0, "source": 1, "target": 2}


def launch_forward(
    source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
    rows, stats, grad_source, grad_target,
):  # fmt: skip
    """As align_torch.forward: fill rows, and stats and the gradients where they are not empty."""
    tensors = (source, target, *_constants(source, mean, std, valid), share, rows, stats, grad_source, grad_target)
    weights = cos_weight, l1_weight, beta, 1 / beta if beta > 0 else 0.0
    flags = _flags(mean, std, valid, resize, corners, by_map, grad_source, grad_target)
    views = source, target, grad_source, grad_target
    sizes = rows.numel(), *_sizes(source, target, resize)
    if tokens_adjacent(source) or tokens_adjacent(target):
        _launch_across(rows, tensors, views, sizes, weights, flags | {"FORWARD": True, "STATS": stats.numel() > 0})
        return
    tile = align_tile(source.shape[3])
    with device_of(source):
        align_forward_kernel[(triton.cdiv(rows.numel(), tile.rows),)](
            *tensors, *_strides(views), *sizes, *weights, **flags, STATS=stats.numel() > 0,
            ROWS=tile.rows, BLOCK_C=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip


def launch_backward(
    upstream, source, target, mean, std, valid, share, stats, cos_weight, l1_weight, beta, resize, corners,
    grad_source, grad_target,
):  # fmt: skip
    """As align_torch.backward: fill the gradients that are not empty."""
    if not (grad_source.numel() or grad_target.numel()):
        return
    constants = _constants(source, mean, std, valid)
    weights = cos_weight, l1_weight, beta, 1 / beta if beta > 0 else 0.0
    by_map = stats.shape[2:] != upstream.shape[1:]
    flags = _flags(mean, std, valid, resize, corners, by_map, grad_source, grad_target)
    views = source, target, grad_source, grad_target
    sizes = upstream.numel(), *_sizes(source, target, resize)
    if tokens_adjacent(source) or tokens_adjacent(target):
        tensors = source, target, *constants, share, upstream, stats, grad_source, grad_target
        _launch_across(upstream, tensors, views, sizes, weights, flags | {"FORWARD": False, "STATS": False})
        return
    tile = align_tile(source.shape[3])
    with device_of(source):
        align_backward_kernel[(triton.cdiv(upstream.numel(), tile.rows),)](
            upstream, source, target, *constants, share, stats, grad_source, grad_target,
            *upstream.stride(), *_strides(views), *sizes, *weights, **flags,
            ROWS=tile.rows, BLOCK_C=tile.channels, num_warps=tile.num_warps,
        )  # fmt: skip


def _launch_across(upstream, tensors, views, sizes, weights, flags) -> None:
    """upstream: (B, H, W) gradient of the backward, any tensor of that shape in the forward."""
    rows, samples, channels, *sides, height, width = sizes
    strides = *upstream.stride(), *_strides(views)
    flat = flags["RESIZE"] == 0 and all(flat_stride(x) is not None for x in (upstream, *views) if x.numel())
    if flat:
        strides = *_flattened(upstream), *(stride for x in views for stride in _flattened(x))
        height, width = 1, height * width
    tile = ALIGN_TILE_ACROSS["flat" if flat else "lines"]
    with device_of(upstream):
        align_across_kernel[(samples * triton.cdiv(height * width, tile.rows),)](
            upstream, *tensors, *strides, rows, samples, channels, *sides, height, width, *weights, **flags, FLAT=flat,
            TOKENS=tile.rows, CHUNK=tile.channels, num_warps=tile.num_warps,
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
        source if mean is None else mean.contiguous().resolve_neg(),
        source if std is None else std.contiguous().resolve_neg(),
        source if valid is None else valid.contiguous(),
    )


def _strides(views) -> tuple[int, ...]:
    return tuple(stride for x in views for stride in (x.stride() if x.numel() else (0, 0, 0, 0)))


def _flattened(x: Tensor) -> tuple[int, ...]:
    """Strides of the same view as one line of tokens."""
    return (x.stride(0), 0, flat_stride(x), *x.stride()[3:]) if x.numel() else (0, 0, 0, 0)


def _sizes(source, target, resize):
    """samples, channels, both sides' grids and the common one."""
    grid = (target if resize == "source" else source).shape[1:3]
    return source.shape[0], source.shape[3], *source.shape[1:3], *target.shape[1:3], *grid


def _flags(mean, std, valid, resize, corners, by_map, grad_source, grad_target):
    return {
        "RESIZE": _RESIZE[resize],
        "CORNERS": corners,
        "HAS_MEAN": mean is not None,
        "HAS_STD": std is not None,
        "HAS_VALID": valid is not None,
        "BY_MAP": by_map,
        "GRAD_S": grad_source.numel() > 0,
        "GRAD_T": grad_target.numel() > 0,
    }
