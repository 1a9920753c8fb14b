"""The operators behind align_loss: what is kept from forward to backward, and how autograd and compilers see them."""

import torch
from torch import Tensor

from . import align_torch
from .launch import NAMESPACE
from .resize import channels_last, empty_map, resize_backward, run_resize_backward
from .tensors import batch_by_loop, check_filled, is_differentiated, is_plain, keepable

NO_DOUBLE = (
    "align_loss, align_losses: their backward cannot be differentiated again; "
    "use align_loss_reference with create_graph=True"
)
_OPTIONS = "float cos_weight, float l1_weight, float beta, str resize, bool corners"


def _run_forward(
    source, target, mean, std, valid, cos_weight, l1_weight, beta, resize, corners, cos_over, reduction, triton,
    need_s, need_t,
):  # fmt: skip
    """(loss, share, stats, gradient to source, gradient to target); what is not kept is an empty tensor."""
    check_filled("source", source)
    loss, stats, grad_source, grad_target = _allocate(source, target, resize, cos_over, reduction, need_s, need_t)
    by_map = cos_over == "map"
    grid = align_torch.common_grid(source, target, resize)
    weights = align_torch.final_weights(cos_weight, l1_weight, grid, valid is not None, by_map, reduction)
    share = align_torch.shares(valid, loss, by_map, reduction)
    sums = loss.new_empty((3, *grid)) if by_map else stats
    if triton:
        from .align_launch import launch_forward as run
    else:
        run = align_torch.forward
    # The kernels add up a mean over all tokens themselves; every other result is made of a number per token.
    rows = loss if triton and reduction == "mean" and not by_map else loss.new_empty(grid)
    run(
        source, target, mean, std, valid, share, *weights, beta, resize, corners, by_map,
        rows, sums, grad_source, grad_target,
    )  # fmt: skip
    if by_map:
        torch.sum(sums, (2, 3), keepdim=True, out=stats)
        cos_share = share[0] * cos_weight if share.numel() else weights[0]
        sample = cos_share * (1 - align_torch.cosine(*stats.flatten(1))) + rows.sum((1, 2))
        loss = sample.sum() if reduction == "mean" else sample
    elif reduction == "mean":
        loss = loss if rows is loss else rows.sum()
    else:
        loss = rows.sum((1, 2)) if reduction == "sample" else rows
    return loss, share, stats, grad_source, grad_target


_forward = torch.library.custom_op(
    f"{NAMESPACE}::align_forward",
    _run_forward,
    mutates_args=(),
    schema="(Tensor source, Tensor target, Tensor? mean, Tensor? std, Tensor? valid, "
    f"{_OPTIONS}, str cos_over, str reduction, bool triton, bool need_source, bool need_target)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward.register_fake
def _(
    source, target, mean, std, valid, cos_w, l1_w, beta, resize, corners, cos_over, reduction, triton, need_s, need_t
):
    loss, stats, grad_s, grad_t = _allocate(source, target, resize, cos_over, reduction, need_s, need_t)
    share = loss.new_empty(0 if valid is None or reduction == "token" else (2, source.shape[0]))
    return loss, share, stats, grad_s, grad_t


def _allocate(source, target, resize, cos_over, reduction, need_source, need_target):
    """Uninitialised (loss, stats, gradient to source, to target) of one call; empty where not kept."""
    grid = align_torch.common_grid(source, target, resize)
    shape = {"mean": (), "sample": grid[:1], "token": grid}[reduction]
    loss = source.new_empty(shape, dtype=align_torch.compute_dtype(source, target))
    early = gradient_in_forward(source, target, cos_over, reduction, need_source, need_target)
    stats = loss.new_empty(0)
    if cos_over == "map":
        stats = loss.new_empty((3, grid[0], 1, 1))
    elif not early and (need_source or need_target):
        stats = loss.new_empty((3, *grid))
    grad_source, grad_target = _allocate_gradients(source, target, resize, early and need_source, early and need_target)
    return loss, stats, grad_source, grad_target


def _allocate_gradients(source, target, resize, need_source, need_target):
    """Gradients on the common grid: like the side itself, or channels-last where the side will be resized."""
    grad_source, grad_target = source.new_empty(0), target.new_empty(0)
    if need_source:
        resized = resize == "source"
        grad_source = source.new_empty((*target.shape[:3], source.shape[3])) if resized else torch.empty_like(source)
    if need_target:
        resized = resize == "target"
        grad_target = target.new_empty((*source.shape[:3], target.shape[3])) if resized else torch.empty_like(target)
    return grad_source, grad_target


def gradient_in_forward(
    source: Tensor, target: Tensor, cos_over: str, reduction: str, need_source: bool, need_target: bool
) -> bool:
    """Whether the forward makes the gradient, or keeps what the backward needs to make it."""
    half = (need_source and source.dtype == torch.float16) or (need_target and target.dtype == torch.float16)
    return reduction == "mean" and cos_over == "token" and not half


def _run_recompute(
    upstream, source, target, mean, std, valid, share, stats, cos_w, l1_w, beta, resize, corners, triton, need_s, need_t
):
    """Gradients from the kept sums; upstream is (), (B,) or (B, H, W)."""
    grads = _allocate_gradients(source, target, resize, need_s, need_t)
    grid = align_torch.common_grid(source, target, resize)
    by_map, reduction = stats.shape[2:] != grid[1:], {0: "mean", 1: "sample", 3: "token"}[upstream.dim()]
    weights = align_torch.final_weights(cos_w, l1_w, grid, valid is not None, by_map, reduction)
    per_token = (upstream[:, None, None] if upstream.dim() == 1 else upstream).expand(grid)
    if triton:
        from .align_launch import launch_backward as run
    else:
        run = align_torch.backward
    run(per_token, source, target, mean, std, valid, share, stats, *weights, beta, resize, corners, *grads)
    moved = resize == "source" and need_s, resize == "target" and need_t
    return tuple(
        run_resize_backward(grad, None, *x.shape[1:3], channels_last(x), corners, triton) if back else grad
        for x, grad, back in zip((source, target), grads, moved, strict=True)
    )


_recompute = torch.library.custom_op(
    f"{NAMESPACE}::align_backward",
    _run_recompute,
    mutates_args=(),
    schema="(Tensor upstream, Tensor source, Tensor target, Tensor? mean, Tensor? std, Tensor? valid, Tensor share, "
    f"Tensor stats, {_OPTIONS}, bool triton, bool need_source, bool need_target) -> (Tensor, Tensor)",
)


@_recompute.register_fake
def _(
    upstream, source, target, mean, std, valid, share, stats, cos_w, l1_w, beta, resize, corners, triton, need_s, need_t
):
    grad_source, grad_target = _allocate_gradients(source, target, resize, need_s, need_t)
    if resize == "source" and need_s:
        grad_source = empty_map(source, *source.shape[1:3], channels_last(source))
    if resize == "target" and need_t:
        grad_target = empty_map(target, *target.shape[1:3], channels_last(target))
    return grad_source, grad_target


batch_by_loop(_recompute)


def _scale(grad, factor, triton):
    """Multiply a dense gradient by a scalar tensor; on the GPU a factor of 1 ends the kernel before it reads."""
    if triton:
        from .align_launch import launch_scale

        launch_scale(grad, factor)
    elif grad.device.type != "cpu" or factor != 1:
        grad.mul_(factor.reshape(1))  # as in `scaled`


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, a scalar tensor, rounded once, to grad's dtype."""
    # One dimension makes torch multiply in the wider dtype; a factor of none it would first round to bfloat16.
    return (grad * factor.reshape(1)).to(grad.dtype)


def _save(ctx, inputs, output):
    source, target, mean, std, valid, *weights, resize, corners, cos_over, reduction, triton, need_s, need_t = inputs
    _, share, stats, *grads = output
    ctx.set_materialize_grads(False)
    ctx.early = gradient_in_forward(source, target, cos_over, reduction, need_s, need_t)
    ctx.sides = tuple((*side.shape[1:3], channels_last(side)) for side in (source, target))
    ctx.weights, ctx.resize, ctx.corners, ctx.triton = weights, resize, corners, triton
    ctx.needs = need_s, need_t
    if ctx.early:
        ctx.save_for_backward(*grads)
    elif need_s or need_t:
        # Running statistics may move on before the backward, which needs those of the forward.
        mean, std = (x if x is None else x.clone() for x in (mean, std))
        source, target, valid = (keepable(x) for x in (source, target, valid))
        ctx.save_for_backward(source, target, mean, std, valid, share, stats)


def _backward(ctx, upstream, recompute, gather):
    if torch.is_grad_enabled() or is_differentiated():
        raise RuntimeError(NO_DOUBLE)
    grads = (None, None)
    if upstream is not None and ctx.early:
        grads = tuple(
            _scaled(ctx, grad, upstream, gather, name, side) if needed else None
            for name, side, grad, needed in zip(
                ("source", "target"), ctx.sides, ctx.saved_tensors, ctx.needs, strict=True
            )
        )
    elif upstream is not None and any(ctx.needs):
        saved = ctx.saved_tensors
        if recompute is _run_recompute and not is_plain(*saved):
            recompute = _recompute  # of hooks on saved tensors, say
        grads = recompute(upstream, *saved, *ctx.weights, ctx.resize, ctx.corners, ctx.triton, *ctx.needs)
        grads = tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True))
    return (*grads, *[None] * 13)


def _scaled(ctx, grad: Tensor, upstream: Tensor, gather, name: str, side: tuple) -> Tensor:
    if ctx.resize == name:
        gather = gather if is_plain(grad) else resize_backward  # of hooks on saved tensors, say
        return gather(grad, upstream, *side, ctx.corners, ctx.triton)
    if not may_overwrite(grad, upstream):
        return scaled(grad, upstream)
    _scale(grad, upstream, ctx.triton)
    return grad


# Private to torch; where a release has no such call, the gradient is scaled into a new tensor.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def may_overwrite(grad: Tensor, upstream: Tensor) -> bool:
    """Whether a kept gradient may be scaled in place, as one stretch of memory.

    Not if a second walk over the graph needs it, if anything traces it, or if a hook on saved tensors gave it back with
    gaps or repetitions.
    """
    return is_plain(grad, upstream) and not _graph_is_kept() and _is_dense(grad)


def _is_dense(x: Tensor) -> bool:
    """Whether the numbers of x fill one stretch of memory, each once, in any order of dimensions."""
    if x.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def _save_operator(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


_forward.register_autograd(
    lambda ctx, upstream, *_: _backward(ctx, upstream, _recompute, resize_backward), setup_context=_save_operator
)


class _AlignLoss(torch.autograd.Function):
    """The operator for `is_plain` tensors without the dispatcher between, which costs more than a small loss itself."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _run_forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, upstream):
        if upstream is None or is_plain(upstream):
            return _backward(ctx, upstream, _run_recompute, run_resize_backward)
        return _backward(ctx, upstream, _recompute, resize_backward)


def align(source: Tensor, target: Tensor, *inputs) -> Tensor:
    """The loss of checked (B, H, W, C) sides; further inputs as in the schema of kpu_fast::align_forward."""
    if is_plain(source, target):
        *_, need_source, need_target = inputs
        recorded = need_source or need_target
        return _AlignLoss.apply(source, target, *inputs) if recorded else _run_forward(source, target, *inputs)[0]
    return _forward(source, target, *inputs)[0]
