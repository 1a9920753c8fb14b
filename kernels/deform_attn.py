"""Multi-scale deformable attention: each query reads a few bilinear samples of a feature pyramid."""

# out[b, q, m] = Σ_l Σ_p a·S,  a = weights[b, q, m, l, p],  S = bilinear(value_l[b, :, m], locations[b, q, m, l, p])
# A location (x, y) in [0, 1] falls on the pixel (u, v) = (x·W − ½, y·H − ½). i = ⌊u⌋, f = u − i, j = ⌊v⌋, g = v − j:
#   S = (1−g)·((1−f)·V[j, i] + f·V[j, i+1]) + g·((1−f)·V[j+1, i] + f·V[j+1, i+1]),   V = 0 outside the map
# Gradient, G = dL/dout[b, q, m] and <·,·> the sum over the head's channels:
#   dL/da = <G, S>
#   dL/dx = a·W·((1−g)·<G, V[j, i+1] − V[j, i]> + g·<G, V[j+1, i+1] − V[j+1, i]>)
#   dL/dy = a·H·((1−f)·<G, V[j+1, i] − V[j, i]> + f·<G, V[j+1, i+1] − V[j, i+1]>)
#   dL/dV[j, i] = Σ a·(1−g)(1−f)·G over every sample that reads the cell; the other three corners likewise
# The last sum is a scatter. Float atomics add in the order in which programs happen to run. Whole numbers have the same
# sum in any order, so the deterministic form adds int64 multiples of a step that no sum can overflow:
#   step = 2^(⌈log2 Q·P⌉ − 58) · 2^⌊log2 max|G|⌋ · 2^⌊log2 max|a|⌋, as one cell is a corner of at most Q·P samples.

from collections.abc import Sequence
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .launch import MAX_HEAD_CHANNELS, MAX_MAPS, NAMESPACE, choose_impl
from .tensors import batch_by_loop, check_float, is_differentiated, is_empty, is_plain, is_transformed, keepable

Shapes = Sequence[tuple[int, int]]

_NO_DOUBLE = "deform_attn: its backward cannot be differentiated; use deform_attn_reference with create_graph=True"


def deform_attn_reference(
    value: Tensor, spatial_shapes: Shapes | Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`deform_attn` in plain torch with autograd: one `grid_sample` per map. Same arguments and result.

    Computed in float32, as positions need more than 8 bits, or in float64 where an input is.
    """
    _check_tensors(value, sampling_locations, attention_weights)
    pairs = _pairs(spatial_shapes, value, sampling_locations)
    b, _, m, d = value.shape
    q, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = torch.float32
    if torch.float64 in (value.dtype, sampling_locations.dtype, attention_weights.dtype):
        dtype = torch.float64

    # grid_sample gives NaN at an infinite location; clamped, it reads zeros like any other outside the map.
    lost = sampling_locations.isnan().any(-1)
    locations = sampling_locations.to(dtype).masked_fill(lost[..., None], -3).clamp(-2, 3)
    weights = attention_weights.to(dtype).masked_fill(lost, torch.nan)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B·M, Q, P, 2)
    weights = weights.permute(3, 0, 2, 1, 4).reshape(len(pairs), b * m, 1, q, points)
    out = value.new_zeros((b * m, d, q), dtype=dtype)
    for level, part in enumerate(value.to(dtype).split([h * w for h, w in pairs], dim=1)):
        maps = part.permute(0, 2, 3, 1).reshape(b * m, d, *pairs[level])
        samples = F.grid_sample(maps, grids[level], mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (samples * weights[level]).sum(-1)  # (B·M, D, Q)
    return out.view(b, m * d, q).transpose(1, 2).contiguous().to(value.dtype)


_INPUTS = "Tensor value, Tensor? shapes, SymInt[] sizes, Tensor locations, Tensor weights"


def _run_forward(value, shapes, sizes, locations, weights, deterministic):
    """shapes: (L, 2) on value's device, or None for `sizes` = (H_1, W_1, H_2, …). deterministic: of the backward."""
    from .deform_attn_triton import launch_forward

    out = _empty_out(value, locations)
    launch_forward(value, shapes, _two_by_two(sizes), locations, weights, out)
    return out


_forward = torch.library.custom_op(
    f"{NAMESPACE}::deform_attn_forward",
    _run_forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool deterministic) -> Tensor",
)


@_forward.register_fake
def _(value, shapes, sizes, locations, weights, deterministic):
    return _empty_out(value, locations)


def _empty_out(value: Tensor, locations: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, locations.shape[1], heads * channels))


def _two_by_two(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _run_gradients(
    grad, value, shapes, sizes, locations, weights, deterministic, need_value, need_locations, need_weights
):
    """Gradients to value, locations and weights, each contiguous and in its dtype; empty where not needed."""
    from .deform_attn_triton import launch_backward, launch_unfix

    # The float sums become the gradient to value themselves; only int64 ones need it beside them.
    grad_value, grad_locations, grad_weights = _empty_gradients(
        value, locations, weights, need_value and deterministic, need_locations, need_weights
    )
    total, largest, unit = grad_value, None, 1.0
    if need_value and deterministic:
        total = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
        largest = tuple(torch.linalg.vector_norm(x, torch.inf) for x in (grad, weights))
        unit = 2.0 ** (58 - (locations.shape[1] * locations.shape[4] - 1).bit_length())
    elif need_value:
        total = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    heads = grad.unflatten(2, value.shape[2:])  # (B, Q, M, D)
    launch_backward(
        heads, value, shapes, _two_by_two(sizes), locations, weights, largest, unit, total, grad_locations, grad_weights
    )
    if largest is not None:
        launch_unfix(total, largest, unit, grad_value)
    elif need_value:
        grad_value = total.to(value.dtype)
    return grad_value, grad_locations, grad_weights


_gradients = torch.library.custom_op(
    f"{NAMESPACE}::deform_attn_backward",
    _run_gradients,
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, bool deterministic, bool need_value, bool need_locations, bool need_weights)"
    " -> (Tensor, Tensor, Tensor)",
)


@_gradients.register_fake
def _(grad, value, shapes, sizes, locations, weights, deterministic, need_value, need_locations, need_weights):
    return _empty_gradients(value, locations, weights, need_value, need_locations, need_weights)


batch_by_loop(_gradients)


def _empty_gradients(value, locations, weights, *needed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        x.new_empty(x.shape if need else 0) for x, need in zip((value, locations, weights), needed, strict=True)
    )


def _save(ctx, inputs, output):
    value, shapes, ctx.sizes, locations, weights, ctx.deterministic = inputs
    ctx.save_for_backward(*(keepable(x) for x in (value, shapes, locations, weights)))


def _backward(ctx, grad, direct=False):
    if torch.is_grad_enabled() or is_differentiated():
        raise RuntimeError(_NO_DOUBLE)
    value, shapes, locations, weights = ctx.saved_tensors
    needed = [ctx.needs_input_grad[place] for place in (0, 3, 4)]
    plain = direct and is_plain(grad, value, shapes, locations, weights)
    gradients = _run_gradients if plain else _gradients
    found = gradients(grad, value, shapes, ctx.sizes, locations, weights, ctx.deterministic, *needed)
    to_value, to_locations, to_weights = (g if need else None for g, need in zip(found, needed, strict=True))
    return to_value, None, None, to_locations, to_weights, None


_forward.register_autograd(_backward, setup_context=_save)


class _DeformAttn(torch.autograd.Function):
    """The operator for `is_plain` tensors without the dispatcher between, as in align_op.py."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        return _run_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad, direct=True)


def deform_attn(
    value: Tensor,
    spatial_shapes: Shapes | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention over L maps with M heads and P points per map (Deformable DETR, eq. 3).

    value: (B, S, M, D), the L maps flattened row by row and laid one after the other, S = Σ H_l·W_l.
    spatial_shapes: L pairs (H, W), or an (L, 2) integer tensor. One on value's GPU is read there by the kernels without
    a wait: whether it adds up to S is then not checked, and cells beyond S read as zeros.
    sampling_locations: (B, Q, M, L, P, 2), xy in [0, 1] of each map. Outside the map, infinity included, reads zeros;
    NaN makes the head's output NaN for that query and passes no gradient to value or the location. Give them in fp32.
    attention_weights: (B, Q, M, L, P), used as they are (normalise them over L·P beforehand).
    Any strides; floating dtypes that may differ; computed in float32, in float64 (torch path) where an input is.
    deterministic: bit-equal gradients from run to run, at the price of int64 sums for the gradient to value; None
    follows `torch.are_deterministic_algorithms_enabled()`. A NaN or Inf in the upstream gradient or in
    attention_weights then makes the whole gradient to value NaN.
    impl: "auto" | "triton" | "torch"; the kernels take heads of up to 256 channels and up to 8 maps. Under torch.func
    transforms and forward-mode differentiation `deform_attn_reference` takes over; its grid_sample raises
    NotImplementedError at a forward-mode tangent of value or the locations. The kernels' gradient cannot itself be
    differentiated.

    Returns (B, Q, M·D) in value's dtype. Gradients go to those of value, locations and weights that require one.
    Raises ValueError for shapes that do not fit together, TypeError for integer and 8-bit inputs, RuntimeError for a
    gradient to value on CUDA by the torch path with deterministic=True.
    """
    _check_tensors(value, sampling_locations, attention_weights)
    levels, channels = sampling_locations.shape[3], value.shape[3]
    chosen = choose_impl(
        impl,
        value,
        sampling_locations,
        attention_weights,
        supported=lambda: channels <= MAX_HEAD_CHANNELS and levels <= MAX_MAPS,
    )
    if chosen == "torch" or is_transformed():
        _refuse_grid_sample_backward(value, deterministic)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            value = keepable(value)
        return deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    shapes, sizes = None, []
    if isinstance(spatial_shapes, Tensor) and spatial_shapes.device == value.device:
        shapes = _check_shape_tensor(spatial_shapes, levels)
    else:
        sizes = [side for pair in _pairs(spatial_shapes, value, sampling_locations) for side in pair]
    inputs = value, sampling_locations, attention_weights
    attend = _forward
    if is_plain(*inputs, shapes):
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        attend = _DeformAttn.apply if recorded else _run_forward
    return attend(value, shapes, sizes, sampling_locations, attention_weights, deterministic)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes | Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """`deform_attn` with the arguments of `MSDeformAttnFunction.apply` (Deformable DETR, ViT-Adapter, mmcv).

    level_start_index and im2col_step are not needed: the maps lie one after the other, and nothing is unfolded.
    """
    return deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


class MultiScaleDeformableAttention(nn.Module):
    """`deform_attn` with the arguments of the transformers module of this name; no parameters."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Shapes,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _refuse_grid_sample_backward(value: Tensor, deterministic: bool | None) -> None:
    if deterministic and value.is_cuda and value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "deterministic=True: the torch path's gradient to value is grid_sample's, which adds in no fixed order on "
            'CUDA; use impl="triton" (float32, bfloat16 or float16, at most '
            f"{MAX_HEAD_CHANNELS} channels per head and {MAX_MAPS} maps)"
        )


def _check_tensors(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    named = (("value", value), ("sampling_locations", locations), ("attention_weights", weights))
    for name, x in named:
        check_float(name, x)
    if value.ndim != 4:
        raise ValueError(f"value: expected (B, S, M, D), found shape {tuple(value.shape)}")
    if locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(f"sampling_locations: expected (B, Q, M, L, P, 2), found shape {tuple(locations.shape)}")
    for name, x in named:
        if is_empty(x.shape):
            raise ValueError(f"{name}: expected at least one of each, found shape {tuple(x.shape)}")
        if x.device != value.device:
            raise ValueError(f"{name}: expected the device of value, {value.device}, found {x.device}; move it first")
    if (locations.shape[0], locations.shape[2]) != (value.shape[0], value.shape[2]):
        raise ValueError(
            f"sampling_locations: expected B = {value.shape[0]} and M = {value.shape[2]} as in value, "
            f"found shape {tuple(locations.shape)}"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights: expected (B, Q, M, L, P) = {tuple(locations.shape[:-1])}, "
            f"found shape {tuple(weights.shape)}"
        )


def _check_shape_tensor(shapes: Tensor, levels: int) -> Tensor:
    if tuple(shapes.shape) != (levels, 2) or shapes.is_floating_point():
        raise ValueError(
            f"spatial_shapes: expected ({levels}, 2) integers, as many maps as sampling_locations have, "
            f"found {shapes.dtype} of shape {tuple(shapes.shape)}"
        )
    return shapes


def _pairs(spatial_shapes: Shapes | Tensor, value: Tensor, locations: Tensor) -> list[tuple[int, int]]:
    """The sizes as Python numbers, checked against value and locations."""
    levels, cells = locations.shape[3], value.shape[1]
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = _check_shape_tensor(spatial_shapes, levels).tolist()
    try:
        pairs = [tuple(shape) for shape in spatial_shapes]
        # Tensors and numpy's numbers become int: the kernels take nothing else.
        # A side that a compiler keeps open passes for an int already, and index would settle it.
        kept = int | float | torch.SymInt
        pairs = [tuple(n if isinstance(n, kept) else index(n) for n in pair) for pair in pairs]
    except TypeError:
        raise ValueError(f"spatial_shapes: expected a list of pairs (H, W), found {spatial_shapes}") from None
    if any(len(pair) != 2 or isinstance(side, float) or side < 1 for pair in pairs for side in pair):
        raise ValueError(f"spatial_shapes: expected pairs (H, W) of whole numbers from 1 on, found {pairs}")
    if len(pairs) != levels:
        raise ValueError(f"spatial_shapes: expected {levels} maps as in sampling_locations, found {pairs}")
    found = sum(height * width for height, width in pairs)
    if found != cells:
        raise ValueError(
            f"spatial_shapes: expected S = {cells} cells as value has, found {pairs} with {found}; "
            "value must be all maps flattened and concatenated"
        )
    return pairs
