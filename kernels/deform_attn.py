"""Multi-scale deformable attention: each query reads a few bilinear samples of a feature pyramid."""

# out[b, q, m] = Σ_l Σ_p  weights[b, q, m, l, p] · bilinear(value_l[b, :, m], locations[b, q, m, l, p])
# A location (x, y) in [0, 1] falls on the pixel coordinate (x·W − ½, y·H − ½); what lies outside the map counts as 0.

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def deform_attn_reference(
    value: Tensor, spatial_shapes: Shapes | Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Plain torch form of `deform_attn`; same arguments and result.

    Half-precision values are sampled and summed in fp32, as positions need more than 8 bits; float64 stays float64.
    """
    shapes = _check(value, spatial_shapes, sampling_locations, attention_weights)
    b, _, m, d = value.shape
    q, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32

    grids = (2 * sampling_locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B·M, Q, P, 2)
    weights = attention_weights.to(dtype).permute(3, 0, 2, 1, 4).reshape(len(shapes), b * m, 1, q, points)
    out = value.new_zeros((b * m, d, q), dtype=dtype)
    for level, part in enumerate(value.to(dtype).split([h * w for h, w in shapes], dim=1)):
        maps = part.permute(0, 2, 3, 1).reshape(b * m, d, *shapes[level])
        samples = F.grid_sample(maps, grids[level], mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (samples * weights[level]).sum(-1)  # (B·M, D, Q)
    return out.view(b, m * d, q).transpose(1, 2).contiguous().to(value.dtype)


def deform_attn(
    value: Tensor, spatial_shapes: Shapes | Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention over L maps with M heads and P points per map (Deformable DETR, eq. 3).

    value: (B, S, M, D), the L maps flattened row by row and laid one after the other, S = Σ H_l·W_l.
    spatial_shapes: L pairs (H, W). An (L, 2) integer tensor also works; on a GPU it costs a synchronisation per call.
    sampling_locations: (B, Q, M, L, P, 2), xy in [0, 1] of each map; positions outside read zeros. Give them in fp32.
    attention_weights: (B, Q, M, L, P), used as they are (normalise them over L·P beforehand).
    Returns (B, Q, M·D) in value's dtype. Gradients go to value, locations and weights.
    Raises ValueError when the shapes do not fit together.
    """
    return deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def _check(value: Tensor, spatial_shapes: Shapes | Tensor, locations: Tensor, weights: Tensor) -> list[tuple[int, int]]:
    if value.ndim != 4:
        raise ValueError(f"deform_attn: value must be (B, S, M, D), got shape {tuple(value.shape)}.")
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    if not all(len(shape) == 2 for shape in spatial_shapes):
        raise ValueError(f"deform_attn: spatial_shapes must be pairs (H, W), got {spatial_shapes}.")
    shapes = [(h, w) for h, w in spatial_shapes]
    cells = sum(h * w for h, w in shapes)
    if cells != value.shape[1]:
        raise ValueError(
            f"deform_attn: spatial_shapes {shapes} hold {cells} cells but value has S = {value.shape[1]}; "
            "value must be all maps flattened and concatenated."
        )
    b, _, m, _ = value.shape
    if locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"deform_attn: sampling_locations must be (B, Q, M, L, P, 2), got shape {tuple(locations.shape)}."
        )
    found = (locations.shape[0], locations.shape[2], locations.shape[3])
    if found != (b, m, len(shapes)):
        raise ValueError(
            f"deform_attn: sampling_locations have (B, M, L) = {found}, "
            f"but value and spatial_shapes have {(b, m, len(shapes))}."
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"deform_attn: attention_weights must be (B, Q, M, L, P) = {tuple(locations.shape[:-1])}, "
            f"got {tuple(weights.shape)}."
        )
    return shapes
