"""The MLP heads h that carry features from one model's space to another's (arXiv 2508.14707, sec. 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from kpu_fast.kernels import resize_bilinear
from kpu_fast.models.features import Features, FeatureSpec

_RATE = 0.05  # of a running mean: it remembers some 20 steps


class Centre(nn.Module):
    """x − m on the last axis of x (…, dim), m a running mean of x that stays as it is during a step.

    A Linear behind it computes nothing that its bias could not do as well, but learns faster where all x have a large
    part in common. In training `seen` adds up the means of the x that come; `move_centres` brings m, which starts at 0,
    nearer.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("seen", torch.zeros(dim), persistent=False)  # zero after every step

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen.add_(x.detach().mean(tuple(range(x.dim() - 1)), dtype=self.seen.dtype))
        return x - self.mean.to(x.dtype)


@torch.no_grad()
def move_centres(centres: Sequence[Centre], steps: Tensor, batches: int = 1) -> None:
    """After a step, on every rank: each mean goes 1 / steps of the way to what all ranks saw, later a twentieth.

    steps: 0-dim, how many there have been, this one included, on the centres' device: the host waits for nothing.
    batches: how often each centre was called in this one.
    """
    seen = torch.cat([centre.seen for centre in centres])
    torch._foreach_zero_([centre.seen for centre in centres])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(seen)
        batches *= distributed.get_world_size()
    seen /= batches
    weight = steps.reciprocal().clamp(min=_RATE).to(seen.dtype)
    for centre, part in zip(centres, seen.split([len(centre.mean) for centre in centres]), strict=True):
        centre.mean.lerp_(part, weight)


class Projector(nn.Module):
    """Linear – LayerNorm – GELU – Linear on the last axis: (…, in_dim) → (…, out_dim).

    centre: None, or while it is trained a `Centre` of what comes in.
    With `size` = (H, W), a map (B, h, w, in_dim) is moved to that grid first: (B, H, W, out_dim). Bilinear weights sum
    to 1, so a resize and a Linear with bias may change places, and fc1 runs on whichever grid has fewer tokens.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden: int = 1280):
        super().__init__()
        self.centre: Centre | None = None
        self.fc1 = nn.Linear(in_dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, out_dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            x = self._first(x)
        elif size[0] * size[1] <= x.shape[1] * x.shape[2]:
            x = self._first(resize_bilinear(x, size))
        else:
            # On one CPU thread, forward + backward in float32 to 768 channels, the other order took 1.1 times as long
            # for 14² → 16² and 1.5 times for 25×42 → 50×84 with 768 channels, 1.1 times for the latter with 192, whose
            # own resize is cheap. fc1 first took 1.1 times as long for 16² → 14², 2.3 times for 50×84 → 25×42 and
            # 5 times for 64² → 14² with 256. Not measured on any GPU yet.
            x = resize_bilinear(self._first(x), size)
        return self.fc2(F.gelu(self.norm(x)))

    def _first(self, x: Tensor) -> Tensor:
        return self.fc1(x if self.centre is None else self.centre(x))

    @torch.no_grad()
    def plain_bias(self) -> Tensor:
        """The bias with which fc1 gives without the centre what it gives behind it."""
        bias, weight = self.fc1.bias.double(), self.fc1.weight.double()
        mean = self.centre.mean.to(self.fc1.weight.dtype).double()  # rounded as in the forward
        return (bias - weight @ mean).to(self.fc1.bias.dtype)


class FeatureHeads(nn.Module):
    """One Projector per map, and one for x where both sides have it: Features of `in_spec` → Features of `out_spec`.

    forward(features, sizes) resizes map i to sizes[i] = (H, W) bilinearly and projects it: the paper's order in effect
    (see Projector for the one in use). Raises ValueError where the number of maps differs.
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

    def projectors(self) -> list[Projector]:
        """All of them, that of x first."""
        return [*([] if self.x is None else [self.x]), *self.maps]

    def forward(self, features: Features, sizes: Sequence[tuple[int, int]]) -> Features:
        if not len(features.maps) == len(sizes) == len(self.maps):
            raise ValueError(
                f"FeatureHeads: built for {len(self.maps)} maps, got {len(features.maps)} maps and {len(sizes)} sizes."
            )
        x = None if self.x is None else self.x(features.x)
        maps = [head(m, tuple(size)) for head, m, size in zip(self.maps, features.maps, sizes, strict=True)]
        return Features(x, tuple(maps))
