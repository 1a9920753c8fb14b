"""The MLP heads h that carry features from one model's space to another's (arXiv 2508.14707, sec. 3)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kpu_fast.kernels import resize_bilinear
from kpu_fast.models.features import Features, FeatureSpec


class Projector(nn.Module):
    """Linear – LayerNorm – GELU – Linear on the last axis: (…, in_dim) → (…, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int = 1280):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.norm(self.fc1(x))))


class FeatureHeads(nn.Module):
    """One Projector per map, and one for x where both sides have it: Features of `in_spec` → Features of `out_spec`.

    forward(features, sizes) resizes map i to sizes[i] = (H, W) bilinearly, then projects it (in this order, as in the
    paper). Raises ValueError where the number of maps differs.
    """

    def __init__(self, in_spec: FeatureSpec, out_spec: FeatureSpec, hidden: int = 1280):
        super().__init__()
        if len(in_spec.map_dims) != len(out_spec.map_dims):
            raise ValueError(
                f"FeatureHeads: {len(in_spec.map_dims)} maps come in and {len(out_spec.map_dims)} go out; "
                "give one input map for each output map."
            )
        has_x = in_spec.x_dim is not None and out_spec.x_dim is not None
        self.x = Projector(in_spec.x_dim, out_spec.x_dim, hidden) if has_x else None
        self.maps = nn.ModuleList(
            Projector(i, o, hidden) for i, o in zip(in_spec.map_dims, out_spec.map_dims, strict=True)
        )

    def forward(self, features: Features, sizes: Sequence[tuple[int, int]]) -> Features:
        if not len(features.maps) == len(sizes) == len(self.maps):
            raise ValueError(
                f"FeatureHeads: built for {len(self.maps)} maps, got {len(features.maps)} maps and {len(sizes)} sizes."
            )
        x = None if self.x is None else self.x(features.x)
        maps = [
            head(resize_bilinear(m, tuple(size))) for head, m, size in zip(self.maps, features.maps, sizes, strict=True)
        ]
        return Features(x, tuple(maps))
