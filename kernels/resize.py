"""Bilinear resize of channels-last maps: forward, and a backward that gathers instead of scattering."""

# out[o] = (1 − λ)·x[i0] + λ·x[i1] along each axis,  i0 = ⌊c⌋,  λ = c − i0,  i1 = min(i0 + 1, in − 1):
#   c = max((o + ½)·in/out − ½, 0), or with align_corners c = o·(in − 1)/(out − 1), and 0 where out = 1
# Backward: dx[i] = Σ_o w(o, i)·dout[o] over the few o that read i, visited in a fixed order, so two runs are bit-equal.

from contextlib import nullcontext
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import MAX_RESIZE_CHANNELS, MAX_SIDE, MAX_TOKENS, NAMESPACE, choose_impl
from .tensors import batch_by_loop, check_float, is_differentiated, is_empty, is_plain, is_transformed, same_grid

LAYOUTS = ("NHWC", "NCHW")
_NO_DERIVATIVE = (
    "resize_bilinear: the derivative of its backward is not implemented here; use resize_bilinear_reference"
)


def resize_bilinear_reference(
    x: Tensor, size: tuple[int, int], *, layout: str = "NHWC", antialias: bool = False, align_corners: bool = False
) -> Tensor:
    """The same resize by `F.interpolate(mode="bilinear")`, in x's own dtype."""
    x = x.permute(0, 3, 1, 2) if layout == "NHWC" else x
    out = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners, antialias=antialias)
    return out.permute(0, 2, 3, 1) if layout == "NHWC" else out


def resize_bilinear(
    x: Tensor,
    size: tuple[int, int],
    *,
    layout: str = "NHWC",
    antialias: bool = False,
    align_corners: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Resize a map (B, H, W, C), or (B, C, H, W) with layout="NCHW", to `size` = (height, width).

    Equal to `F.interpolate(x, size=size, mode="bilinear", align_corners=…, antialias=…)`; any strides,
    no copy to change layout; the result has x's dtype and, where it has several channels and tokens, its channels are
    adjacent in memory exactly when x's are. A size equal to x's returns x itself. float32 inside the kernels. The
    backward is deterministic with impl="triton" and with antialias=True; with impl="torch", and under transforms of
    torch.func whatever impl says, it is PyTorch's own, which uses atomics on CUDA.
    antialias=True multiplies by two small matrices, in float32 or float64, whatever `impl` says; there a NaN or Inf
    spreads over all of its channel, beyond the cells that it touches in F.interpolate.

    Raises ValueError for a wrong rank, size or option and TypeError for integer dtypes and sizes that are not.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, found {layout!r}")
    check_float("x", x)
    if x.dim() != 4 or is_empty(x.shape):
        raise ValueError(f"x: expected a non-empty map of rank 4 ({layout}), found shape {tuple(x.shape)}")
    height, width = _whole_numbers(size)
    if antialias and align_corners:
        raise ValueError("antialias, align_corners: expected at most one of them to be True, found both")
    align_corners = bool(align_corners)  # numpy's own kind, say
    nhwc = x if layout == "NHWC" else x.permute(0, 2, 3, 1)
    grids = (height, width), nhwc.shape[1:3]

    def fits() -> bool:
        sides = all(h <= MAX_SIDE and w <= MAX_SIDE and x.shape[0] * h * w <= MAX_TOKENS for h, w in grids)
        return sides and nhwc.shape[3] <= MAX_RESIZE_CHANNELS

    chosen = "torch" if is_transformed() else choose_impl(impl, x, supported=fits)
    if same_grid(*grids):
        return x
    if antialias:
        out = _resize_antialias(nhwc, height, width)
    elif chosen == "torch":
        out = resize_bilinear_reference(nhwc, (height, width), align_corners=align_corners)
        if channels_last(out) != channels_last(nhwc):  # interpolate goes by the batch's strides too
            out = out.contiguous() if channels_last(nhwc) else out.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    else:
        resize = _resize
        if is_plain(nhwc):
            resize = _ResizeBilinear.apply if torch.is_grad_enabled() and nhwc.requires_grad else _run_resize
        out = resize(nhwc, height, width, align_corners)
    return out if layout == "NHWC" else out.permute(0, 3, 1, 2)


def _whole_numbers(size) -> tuple[int, int]:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f"size: expected (height, width), found {size!r}") from None
    if any(isinstance(side, bool) for side in size):
        raise TypeError(f"size: expected whole numbers, found {tuple(size)}")
    try:
        height, width = (side if isinstance(side, int | torch.SymInt) else index(side) for side in (height, width))
    except TypeError:
        raise TypeError(f"size: expected whole numbers, found {tuple(size)}") from None
    if min(height, width) < 1:
        raise ValueError(f"size: expected (height, width), both at least 1, found {(height, width)}")
    return height, width


def _resize_antialias(x: Tensor, height: int, width: int) -> Tensor:
    """Separable triangle filter as two matrix products: no atomics in the backward, unlike PyTorch's CUDA kernel."""
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = _triangle_weights(x.shape[1], height, x.device, compute)  # (height, H)
    cols = _triangle_weights(x.shape[2], width, x.device, compute)  # (width, W)
    wide = x.to(compute)
    # Autocast would multiply in half precision; on the meta device there is none.
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        if channels_last(x):
            out = torch.matmul(rows, wide.flatten(2)).unflatten(2, x.shape[2:])  # (B, height, W, C)
            return torch.matmul(cols, out).to(x.dtype)
        planes = torch.matmul(wide.permute(0, 3, 1, 2), cols.t())  # (B, C, H, width)
        return torch.matmul(rows, planes).to(x.dtype).permute(0, 2, 3, 1)


def _triangle_weights(n_in: int, n_out: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n_out, n_in) rows of the triangle filter that PyTorch and Pillow use; every row sums to 1."""
    scale = n_in / n_out
    support = torch.sym_max(scale, 1.0)
    center = scale * (torch.arange(n_out, device=device, dtype=dtype)[:, None] + 0.5)
    pixel = torch.arange(n_in, device=device, dtype=dtype)[None, :] + 0.5
    weights = (1 - (pixel - center).abs() / support).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a (B, H, W, C) view are adjacent in memory."""
    return x.stride(3) == 1


def empty_map(like: Tensor, height: int, width: int, adjacent: bool) -> Tensor:
    """Uninitialised (B, height, width, C) in `like`'s dtype; adjacent: its channels in memory, else its tokens."""
    batch, _, _, channels = like.shape
    if adjacent:
        return like.new_empty((batch, height, width, channels))
    return like.new_empty((batch, channels, height, width)).permute(0, 2, 3, 1)


def _run_resize(x, h, w, corners):
    from .resize_triton import launch_resize

    return launch_resize(x, empty_map(x, h, w, channels_last(x)), corners)


_resize = torch.library.custom_op(
    f"{NAMESPACE}::resize_bilinear",
    _run_resize,
    mutates_args=(),
    schema="(Tensor x, SymInt h, SymInt w, bool corners) -> Tensor",
)


@_resize.register_fake
def _(x, h, w, corners):
    return empty_map(x, h, w, channels_last(x))


def run_resize_backward(grad, scale, h, w, adjacent, corners, triton):
    """Gradient (B, h, w, C) of a resize whose output gradient is `grad`, times the scalar tensor `scale`.

    `adjacent`: lay the channels of the result next to each other in memory.
    """
    out = empty_map(grad, h, w, adjacent)
    if triton:
        from .resize_triton import launch_resize_backward

        if channels_last(grad) and not adjacent:  # threads lie along one or the other: dense first, then turned
            return out.copy_(launch_resize_backward(grad, scale, empty_map(grad, h, w, True), corners))
        return launch_resize_backward(grad, scale, out, corners)
    compute = torch.promote_types(grad.dtype, torch.float32)
    batch, height, width, channels = grad.shape
    wide = grad.to(compute) if scale is None else grad.to(compute) * scale
    full = torch.ops.aten.upsample_bilinear2d_backward(
        wide.permute(0, 3, 1, 2), [height, width], [batch, channels, h, w], corners
    )
    return out.copy_(full.permute(0, 2, 3, 1))


resize_backward = torch.library.custom_op(
    f"{NAMESPACE}::resize_bilinear_backward",
    run_resize_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor? scale, SymInt h, SymInt w, bool adjacent, bool corners, bool triton) -> Tensor",
)


@resize_backward.register_fake
def _(grad, scale, h, w, adjacent, corners, triton):
    return empty_map(grad, h, w, adjacent)


def _save_grid(ctx, inputs, output):
    grad, scale, _, _, _, ctx.corners, triton = inputs
    ctx.height, ctx.width = grad.shape[1:3]
    ctx.alone = scale is None and triton  # not a part of align_loss's backward


def _backward_of_backward(ctx, grad):
    if not ctx.alone or is_differentiated():
        raise RuntimeError(_NO_DERIVATIVE)
    to_grad = _resize(grad, ctx.height, ctx.width, ctx.corners)  # the backward is linear, and the forward its adjoint
    return to_grad, *[None] * 6


resize_backward.register_autograd(_backward_of_backward, setup_context=_save_grid)
batch_by_loop(resize_backward)


def _save_shape(ctx, inputs, output):
    x = inputs[0]
    ctx.height, ctx.width, ctx.adjacent, ctx.corners = x.shape[1], x.shape[2], channels_last(x), inputs[3]


def _backward(ctx, grad, direct=False):
    if is_differentiated():
        raise RuntimeError(_NO_DERIVATIVE)
    plain = direct and not torch.is_grad_enabled() and is_plain(grad)
    gather = run_resize_backward if plain else resize_backward
    return gather(grad, None, ctx.height, ctx.width, ctx.adjacent, ctx.corners, True), None, None, None


_resize.register_autograd(_backward, setup_context=_save_shape)


class _ResizeBilinear(torch.autograd.Function):
    """The operator for `is_plain` tensors without the dispatcher between, which costs more than a small map itself."""

    @staticmethod
    def forward(ctx, *inputs):
        _save_shape(ctx, inputs, None)
        return _run_resize(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad, direct=True)
