"""ViT-Adapter: multi-scale maps from a plain ViT (arXiv 2205.08534), with deformable or dense cross-attention.

Spatial tokens c = (c2, c3, c4) of a small convolutional stem exchange with the ViT's patch tokens x, K times:

    x ← x + γ ⊙ Cross(LN x, LN c)        injector, γ = 0 at the start
    x ← blocks of the ViT
    c ← c + Cross(LN c, LN x);  c ← c + ConvFFN(LN c)        extractor (three of them in the last interaction)

Not published, and off by default: an injector of its own lets the cls token read c once more, after the last of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpu_fast.kernels import deform_attn, resize_bilinear
from kpu_fast.models.attention import activate_backend, attention
from kpu_fast.models.features import Features
from kpu_fast.models.vit import Rotations, ViT, normalise, resize_to_stride_16

STRIDES = (4, 8, 16, 32)
CROSS_ATTENTIONS = ("flash", "deformable")

_EPS = 1e-6
_HEAD_DIM = 64  # of flash cross-attention: what the fused kernels are fastest at
_EXTRA_EXTRACTORS = 2

Grid = tuple[int, int]


class Sampling(NamedTuple):
    """Where the queries of deformable attention stand on the maps they read.

    reference: (1, Q, 1, 1, 1, 2) xy in [0, 1]. cell: (L, 1, 2), xy size of one cell. shapes: (H, W) of the L maps.
    """

    reference: Tensor
    cell: Tensor
    shapes: tuple[Grid, ...]


def sampling(query_shapes: tuple[Grid, ...], shapes: tuple[Grid, ...], device: torch.device) -> Sampling:
    """Queries at the cell centres of maps of `query_shapes` (row by row, map after map) reading maps of `shapes`."""
    centres = []
    for height, width in query_shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        centres.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    # Filled on the device: a tensor of Python numbers would be copied to it and wait for the GPU at every forward.
    cell = torch.stack([torch.full((), 1 / n, device=device) for height, width in shapes for n in (width, height)])
    return Sampling(torch.cat(centres)[None, :, None, None, None], cell.view(len(shapes), 1, 2), shapes)


class DeformableCrossAttention(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, eq. 3): each query reads `points` samples of each of L maps.

    forward(query (B, Q, D), memory (B, S, D), where: Sampling) → (B, Q, D).
    """

    def __init__(self, dim: int, inner: int, heads: int, levels: int, points: int):
        super().__init__()
        if inner % heads:
            raise ValueError(f"Adapter: inner dimension {inner} must be a multiple of heads {heads}.")
        self.heads, self.levels, self.points = heads, levels, points
        # Offsets (x, y) and weights of all samples from one product: the queries are read once, and their gradient is
        # one product instead of a sum of two.
        self.samples = nn.Linear(dim, heads * levels * points * 3)
        self.value = nn.Linear(dim, inner)
        self.out = nn.Linear(inner, dim)

    def reset_parameters(self) -> None:
        """Head h looks in direction 2πh/heads, its p-th point p cells away on a square ring, all weighted alike."""
        nn.init.zeros_(self.samples.weight)
        nn.init.zeros_(self.samples.bias)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (heads, 2)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        ring = direction[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            offsets = ring.expand(-1, self.levels, -1, -1).flatten()
            self.samples.bias[: len(offsets)].copy_(offsets)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, memory: Tensor, where: Sampling) -> Tensor:
        b, q, _ = query.shape
        value = self.value(memory).unflatten(-1, (self.heads, -1))  # (B, S, heads, inner / heads)
        count = self.heads * self.levels * self.points
        offsets, weights = self.samples(query).split([2 * count, count], dim=-1)
        offsets = offsets.unflatten(-1, (self.heads, self.levels, self.points, 2))
        # Positions in fp32, as `where` is: bf16 has 8 bits, which is coarser than a cell on a grid of a hundred.
        locations = torch.addcmul(where.reference, offsets, where.cell)
        weights = weights.unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.view(b, q, self.heads, self.levels, self.points)
        return self.out(deform_attn(value, where.shapes, locations, weights))


class DenseCrossAttention(nn.Module):
    """Softmax cross-attention over all tokens of the other side, with heads of 64 channels.

    forward(query (B, Q, D), memory (B, S, D), where) → (B, Q, D); `where` is not needed, every token is read.
    """

    def __init__(self, dim: int, inner: int, backend: str):
        super().__init__()
        self.heads = max(1, inner // _HEAD_DIM)
        if inner % self.heads:
            raise ValueError(f"Adapter: inner dimension {inner} must be a multiple of {_HEAD_DIM} (or below it).")
        self.backend = backend
        self.q = nn.Linear(dim, inner)
        # No bias: softmax ignores one on the keys (Adam would make a random walk of its rounding noise), and one on the
        # values adds to that of `out`.
        self.kv = nn.Linear(dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim)

    def reset_parameters(self) -> None:
        """Xavier weights, zero biases."""
        for linear in (self.q, self.kv, self.out):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.q.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, query: Tensor, memory: Tensor, where: Sampling | None) -> Tensor:
        q = self.q(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q, 64)
        parts = self.kv(memory).unflatten(-1, (2, self.heads, -1)).unbind(2)
        k, v = (part.transpose(1, 2) for part in parts)  # 2 × (B, heads, S, 64)
        out = attention(q, k, v, backend=self.backend)
        return self.out(out.transpose(1, 2).flatten(2))


def _conv_norm_relu(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, group_norm(outputs), nn.ReLU(inplace=True)]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, up to 32 groups of two channels or more: one channel alone would lose any bias added before it."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 2)), channels)


class SpatialPrior(nn.Module):
    """Convolutional stem: images (B, 3, H, W) → maps (B, D, H/s, W/s) at strides s = 4, 8, 16, 32."""

    def __init__(self, dim: int, inplanes: int):
        super().__init__()
        n = inplanes
        self.stem = nn.Sequential(
            *_conv_norm_relu(3, n, 2),
            *_conv_norm_relu(n, n, 1),
            *_conv_norm_relu(n, n, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm_relu(n, 2 * n, 2))
        self.conv3 = nn.Sequential(*_conv_norm_relu(2 * n, 4 * n, 2))
        self.conv4 = nn.Sequential(*_conv_norm_relu(4 * n, 4 * n, 2))
        self.to_dim = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in (n, 2 * n, 4 * n, 4 * n))

    def forward(self, images: Tensor, finest: bool) -> list[Tensor | None]:
        """The four maps, the first of them None unless `finest`."""
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        maps = (c1 if finest else None, c2, c3, c4)
        return [None if c is None else to_dim(c) for to_dim, c in zip(self.to_dim, maps, strict=True)]


class Injector(nn.Module):
    """x + γ ⊙ Cross(LN x, LN c). x: (B, N, D) patch tokens; c: (B, 21n, D) spatial tokens. γ = 0 at the start."""

    def __init__(self, dim: int, cross: nn.Module):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=_EPS)
        self.memory_norm = nn.LayerNorm(dim, eps=_EPS)
        self.cross = cross
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, c: Tensor, where: Sampling | None) -> Tensor:
        return torch.addcmul(x, self.gamma, self.cross(self.query_norm(x), self.memory_norm(c), where))


class ConvFFN(nn.Module):
    """Linear – depthwise 3×3, shared by the three scales – GELU – Linear. (B, 21n, D) → (B, 21n, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, c: Tensor, shapes: tuple[Grid, ...]) -> Tensor:
        parts = []
        for part, shape in zip(self.fc1(c).split([h * w for h, w in shapes], dim=1), shapes, strict=True):
            maps = self.depthwise(part.unflatten(1, shape).permute(0, 3, 1, 2))  # (B, hidden, H, W)
            parts.append(maps.permute(0, 2, 3, 1).flatten(1, 2))
        return self.fc2(F.gelu(torch.cat(parts, dim=1)))


class Extractor(nn.Module):
    """c + Cross(LN c, LN x), then c + ConvFFN(LN c). c: (B, 21n, D) spatial tokens; x: (B, N, D) patch tokens."""

    def __init__(self, dim: int, cross: nn.Module, ffn_hidden: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=_EPS)
        self.memory_norm = nn.LayerNorm(dim, eps=_EPS)
        self.cross = cross
        self.ffn_norm = nn.LayerNorm(dim, eps=_EPS)
        self.ffn = ConvFFN(dim, ffn_hidden)

    def forward(self, c: Tensor, x: Tensor, where: Sampling | None, shapes: tuple[Grid, ...]) -> Tensor:
        c = c + self.cross(self.query_norm(c), self.memory_norm(x), where)
        return c + self.ffn(self.ffn_norm(c), shapes)


class Interaction(nn.Module):
    """Injector, a stretch of ViT blocks, extractors. The blocks belong to the ViT and are handed in."""

    def __init__(self, injector: Injector, extractors: list[Extractor]):
        super().__init__()
        self.injector = injector
        self.extractors = nn.ModuleList(extractors)

    def forward(
        self,
        x: Tensor,  # (B, prefix + N, D)
        c: Tensor,  # (B, 21n, D)
        blocks: list[nn.Module],
        turn: Rotations | None,  # of the blocks' queries and keys
        prefix: int,
        to_patches: Sampling | None,
        to_spatial: Sampling | None,
        shapes: tuple[Grid, ...],
    ) -> tuple[Tensor, Tensor]:
        x = torch.cat([x[:, :prefix], self.injector(x[:, prefix:], c, to_patches)], dim=1)
        for block in blocks:
            x = block(x, turn)
        patches = x[:, prefix:]
        for extractor in self.extractors:
            c = extractor(c, patches, to_spatial, shapes)
        return x, c


class Adapter(nn.Module):
    """ViT-Adapter around a ViT of width `dim` and `depth` blocks.

    cross_attention: "deformable" is the published adapter; "flash" is dense softmax cross-attention, another
    architecture with other weights. interactions: K, must divide depth. heads, points: of deformable attention
    (flash has inner/64 heads). inner_ratio: width inside cross-attention over dim. ffn_ratio: ConvFFN's over dim.
    inplanes: channels of the stem. x_injector: at the end cls reads the spatial tokens itself, by dense attention in
    both architectures (one query costs little); without it, cls meets them only in the ViT's blocks, which are frozen.
    attention: see `models.attention`. activation_checkpointing: keep only each interaction's inputs and recompute the
    rest, its ViT blocks included, in backward.

    forward(images (B, 3, H, W) in [0, 1], vit, levels) → Features: x (B, D), the ViT's normed cls, and of the maps
    (B, H/s, W/s, D) at strides s = 4, 8, 16, 32 those that `levels` names, by default all.
    Raises ValueError unless H and W are multiples of 32.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        heads: int,
        cross_attention: str = "flash",
        interactions: int = 4,
        points: int = 4,
        inner_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        inplanes: int = 64,
        x_injector: bool = False,
        attention: str = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if cross_attention not in CROSS_ATTENTIONS:
            raise ValueError(f"Adapter: cross_attention {cross_attention!r} is not one of {CROSS_ATTENTIONS}.")
        if depth % interactions:
            raise ValueError(f"Adapter: interactions {interactions} must divide the ViT's depth {depth}.")
        activate_backend(attention)
        self.deformable = cross_attention == "deformable"
        self.activation_checkpointing = activation_checkpointing
        inner, hidden = int(dim * inner_ratio), int(dim * ffn_ratio)

        def cross(levels: int) -> nn.Module:
            if self.deformable:
                return DeformableCrossAttention(dim, inner, heads, levels, points)
            return DenseCrossAttention(dim, inner, attention)

        self.spatial_prior = SpatialPrior(dim, inplanes)
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        counts = [1] * (interactions - 1) + [1 + _EXTRA_EXTRACTORS]
        self.interactions = nn.ModuleList(
            Interaction(Injector(dim, cross(levels=3)), [Extractor(dim, cross(levels=1), hidden) for _ in range(count)])
            for count in counts
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleList(group_norm(dim) for _ in STRIDES)
        self._reset_parameters()
        self.x_injector, self.injects_x = None, x_injector
        if x_injector:  # last, so that of one seed all else starts with the same weights
            self.x_injector = Injector(dim, DenseCrossAttention(dim, inner, attention))
            self.x_injector.cross.reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, DeformableCrossAttention | DenseCrossAttention):
                module.reset_parameters()

    def level_parameters(self, level: int) -> list[nn.Parameter]:
        """Parameters that only the output map `level` (0 is the finest) uses, to be frozen where no loss reads it."""
        modules = [self.norms[level]]
        if level == 0:
            modules += [self.spatial_prior.to_dim[0], self.up]
        return [parameter for module in modules for parameter in module.parameters()]

    def skip_x_injector(self) -> None:
        """Where no loss reads x: neither run nor train what makes x only. x is then what it is without it."""
        if self.x_injector is not None:
            self.x_injector.requires_grad_(False)
        self.injects_x = False

    def forward(self, images: Tensor, vit: ViT, levels: Sequence[int] = range(len(STRIDES))) -> Features:
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"Adapter: image height and width must be multiples of 32, got {height}×{width}.")
        grid = (height // 16, width // 16)
        shapes = tuple((height // s, width // s) for s in STRIDES[1:])

        c1, *coarse = self.spatial_prior(normalise(images, self.level_embed.dtype), finest=0 in levels)
        tokens = [c.permute(0, 2, 3, 1).flatten(1, 2) + e for c, e in zip(coarse, self.level_embed, strict=True)]
        c = torch.cat(tokens, dim=1)  # (B, 21n, D), n = H·W/32²
        x = vit.embed(resize_to_stride_16(images, vit.patch_size))  # (B, prefix + 4n, D)
        turn = vit.turn(*grid, images.device)

        to_patches = to_spatial = None
        if self.deformable:
            to_patches = sampling((grid,), shapes, images.device)
            to_spatial = sampling(shapes, (grid,), images.device)
        every_block = list(vit.blocks)
        stretch = len(every_block) // len(self.interactions)
        for i, interaction in enumerate(self.interactions):
            blocks = every_block[i * stretch : (i + 1) * stretch]
            arguments = (x, c, blocks, turn, vit.prefix, to_patches, to_spatial, shapes)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Nothing in an interaction is random, so there is no random state to keep.
                x, c = checkpoint(interaction, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, c = interaction(*arguments)
        patches = x[:, vit.prefix :].unflatten(1, grid)
        cls = x[:, :1]
        if self.injects_x:
            cls = self.x_injector(cls, c, None)
        return Features(vit.norm(cls[:, 0]), self._fuse(c1, c, patches, shapes, levels))

    def _fuse(self, c1: Tensor | None, c: Tensor, patches: Tensor, shapes, levels: Sequence[int]) -> tuple[Tensor, ...]:
        """Norm of spatial map + resized patch map, per level. c1: (B, D, H/4, W/4); patches: (B, H/16, W/16, D)."""
        spatial: list[Tensor | None] = [None]
        spatial += [
            part.unflatten(1, shape)
            for part, shape in zip(c.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
        ]  # (B, H/s, W/s, D)
        if c1 is not None:
            # The channels-last term first: a sum takes the memory layout of its first term.
            spatial[0] = (self.up(spatial[1].permute(0, 3, 1, 2)) + c1).permute(0, 2, 3, 1)
        maps = []
        for level in levels:
            fused = resize_bilinear(patches, tuple(spatial[level].shape[1:3])) + spatial[level]
            normed = self.norms[level](fused.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            # On CUDA GroupNorm returns NCHW memory; heads, resizes and losses all read whole cells.
            maps.append(normed.contiguous())
        return tuple(maps)
