"""DINOv2's vision transformer, with or without registers, DINOv3's and the plain one that DINO and DeiT have.

arXiv 2304.07193, 2309.16588, 2508.10104; 2010.11929, 2104.14294, 2012.12877.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpu_fast.kernels.tensors import is_plain
from kpu_fast.models.attention import activate_backend, attention
from kpu_fast.models.hub import WeightsError
from kpu_fast.models.mean_std import IMAGENET_MEAN, IMAGENET_STD
from kpu_fast.models.vit_weights import KEY, read_arguments, read_model, read_state, source

_EPS = 1e-6

Rotations = tuple[Tensor, Tensor]  # cosine and sine, each (tokens, channels of a head / 2), fp32


def check_images(images: Tensor) -> None:
    """Raises ValueError unless images are (B, 3, H, W) floats, B > 0: bytes up to 255 would be taken for [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected (B, 3, H, W), found shape {tuple(images.shape)}.")
    if not images.shape[0]:  # not len(), which would make a number of an exported batch
        raise ValueError("images: the batch is empty.")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, expected floating point in [0, 1]; give images.float() / 255.")


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(image − mean) / std per channel (ImageNet) in fp32, then cast. images: (B, 3, H, W) in [0, 1]."""
    # Numbers, not buffers: `.bfloat16()` would round a buffer, and a tensor made here would cost a copy to the device.
    channels = [(c - m) / s for c, m, s in zip(images.float().unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    return torch.stack(channels, dim=1).to(dtype)


def resize_to_stride_16(images: Tensor, patch_size: int) -> Tensor:
    """Resize (B, 3, H, W) to (H/16·patch_size, W/16·patch_size), bicubic with antialias in fp32.

    A ViT of that patch size then has its patches on the stride-16 grid of the image as given.
    Raises ValueError unless H and W are multiples of 16.
    """
    height, width = images.shape[-2:]
    if height % 16 or width % 16:
        raise ValueError(f"image height and width must be multiples of 16, got {height}×{width}.")
    if patch_size == 16:
        return images
    size = (height // 16 * patch_size, width // 16 * patch_size)
    return F.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)


def rotations(height: int, width: int, channels: int, *, theta: float, prefix: int, device) -> Rotations:
    """Where a grid of height × width patches stands, as DINOv3 sees it: the angles that turn queries and keys.

    A patch's centre has coordinates (y, x) in [-1, 1] over the image. Pairs of the `channels` of a head turn by
    2π·y·f or 2π·x·f, f = theta^(-4i/channels); i = 0, 1, … for y, then for x. The `prefix` tokens do not turn.
    """
    exact = {"dtype": torch.float32, "device": device}
    y, x = ((torch.arange(n, **exact) + 0.5) * (2 / n) - 1 for n in (height, width))
    at = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    frequencies = theta ** (torch.arange(channels // 4, **exact) * (-4 / channels))
    angles = (2 * math.pi * at[:, :, None] * frequencies).flatten(1)  # (N, channels / 2)
    angles = F.pad(angles, (0, 0, prefix, 0))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: Rotations) -> Tensor:
    """x (B, heads, N, d), channel i and i + d/2 of every head turned together as a pair.

    Products are fp32. In bf16 the first of two is rounded before the second is added, but where a compiler fuses them.
    """
    if is_plain(x):
        return _Rotate.apply(x, *turn)
    cos, sin = turn
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """`rotate` in four passes that leave nothing in between in memory, which a compiler does by itself."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad, (cos, -sin)), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


class Attention(nn.Module):
    """Multi-head self-attention with one Linear for q, k and v. (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, heads: int, backend: str):
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, turn: Rotations | None) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, d // self.heads)
        # Taken apart in the order of memory: backward then puts the three gradients together in one copy, not two.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # 3 × (B, heads, N, d)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        out = attention(q, k, v, backend=self.backend)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """Linear – GELU – Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """(silu(x·W_gate) ⊙ x·W_up)·W_down, with two thirds of the MLP's hidden width, rounded up to a multiple of 8."""

    def __init__(self, dim: int, mlp_hidden: int):
        super().__init__()
        hidden = (int(mlp_hidden * 2 / 3) + 7) // 8 * 8
        self.gate_up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x += ls1 ⊙ Attention(LN x); x += ls2 ⊙ MLP(LN x). turn: of queries and keys, by where their patches are."""

    def __init__(
        self, dim: int, heads: int, mlp_hidden: int, *, swiglu: bool, layer_scale: float, eps: float, backend: str
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, backend)
        self.ls1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, mlp_hidden) if swiglu else MLP(dim, mlp_hidden)
        self.ls2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor, turn: Rotations | None = None) -> Tensor:
        x = torch.addcmul(x, self.ls1, self.attn(self.norm1(x), turn))
        return torch.addcmul(x, self.ls2, self.mlp(self.norm2(x)))


class Embeddings(nn.Module):
    """Images to tokens: patch embedding, cls, registers, and learned positions unless there are none (DINOv3).

    A module of its own, called as one: ZeRO 3 brings a module's parameters together when the module is called.
    """

    def __init__(self, patch_size: int, dim: int, registers: int, image_size: int, learned_positions: bool):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.patch = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        # Of cls, then of the patches.
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim)) if learned_positions else None
        # Stands for what `masked` hides; kept, also where nothing does, so that a checkpoint comes out as it went in.
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)

    def positions_on(self, height: int, width: int) -> Tensor:
        """Learned positions for a grid of height × width patches, bicubic in fp32. Returns (1, 1 + height·width, D)."""
        if (height, width) == (self.grid, self.grid):
            return self.positions
        cls, patches = self.positions[:, :1], self.positions[:, 1:]
        maps = patches.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        # The released weights with registers were trained with an antialiased resize, those without were not.
        antialias = self.register_tokens is not None
        maps = F.interpolate(maps, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
        return torch.cat([cls, maps.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Normalise images (B, 3, H, W) in [0, 1] and turn them into tokens (B, prefix + H/p·W/p, D).

        masked: (B, H/p·W/p) bool, patches that the mask token takes the place of; their positions stay.
        Raises ValueError unless H and W are multiples of the patch size p and masked is of that shape.
        """
        check_images(images)
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"ViT: image height and width must be multiples of patch_size {self.patch_size}, got {height}×{width}."
            )
        patches = self.patch(normalise(images, self.patch.weight.dtype))  # (B, D, H/p, W/p)
        grid = patches.shape[-2:]
        patches, cls = patches.flatten(2).transpose(1, 2), self.cls_token  # (B, N, D), (1, 1, D)
        if masked is not None:
            if masked.shape != patches.shape[:2] or masked.dtype != torch.bool:
                raise ValueError(
                    f"ViT: masked must be bool and {tuple(patches.shape[:2])}, got {masked.dtype} and shape "
                    f"{tuple(masked.shape)}."
                )
            patches = torch.where(masked[..., None], self.mask_token.to(patches.dtype), patches)
        if self.positions is not None:
            positions = self.positions_on(*grid)
            patches, cls = patches + positions[:, 1:], cls + positions[:, :1]
        prefix = [cls.expand(images.shape[0], -1, -1)]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(images.shape[0], -1, -1))
        return torch.cat([*prefix, patches], dim=1)  # (B, prefix + N, D)


class ViT(nn.Module):
    """The vision transformer of DINOv2 or, with `rope_theta`, of DINOv3; with `layer_scale` 1 the plain one.

    patch_size: pixels. dim, depth, heads: width, blocks, attention heads. mlp_ratio: hidden width of a block's MLP over
    dim. registers: extra tokens after cls.
    image_size: pixels a side of the square the learned positions were made for; they are resized to any other grid.
    With rope_theta the side that is usual for its images.
    swiglu: SwiGLU instead of the GELU MLP (ViT-g, ViT-H+). layer_scale: start value. eps: of the LayerNorms.
    rope_theta: queries and keys are turned by where their patch is (`rotations`), and no position is learned.
    attention: see `models.attention`.
    activation_checkpointing: `forward` keeps only each block's input and recomputes the rest in backward.

    Tokens are ordered cls, registers, patches row by row. `config` holds what `ViT(**config)` needs to build it again.
    Raises ValueError where sizes do not divide or are none.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        registers: int = 0,
        image_size: int = 518,
        swiglu: bool = False,
        layer_scale: float = 1.0,
        rope_theta: float | None = None,
        eps: float = _EPS,
        attention: str = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        for name, value, least in (
            ("patch_size", patch_size, 1),
            ("dim", dim, 1),
            ("depth", depth, 1),
            ("heads", heads, 1),
            ("mlp_ratio · dim", hidden, 1),
            ("image_size", image_size, 1),
            ("registers", registers, 0),
        ):
            if value < least:
                raise ValueError(f"ViT: {name} must be {least} or more, got {value}.")
        if dim % heads:
            raise ValueError(f"ViT: dim {dim} must be a multiple of heads {heads}.")
        if rope_theta is not None and dim // heads % 4:
            raise ValueError(f"ViT: with rope_theta each head must have a multiple of 4 channels, got {dim // heads}.")
        if rope_theta is not None and not rope_theta > 0:
            raise ValueError(f"ViT: rope_theta must be above 0, got {rope_theta}.")
        if rope_theta is None and image_size % patch_size:
            raise ValueError(f"ViT: image_size {image_size} must be a multiple of patch_size {patch_size}.")
        activate_backend(attention)
        self.config = {
            "patch_size": patch_size,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "registers": registers,
            "image_size": image_size,
            "swiglu": swiglu,
            "layer_scale": layer_scale,
        }
        newer = {"rope_theta": rope_theta, "eps": eps}
        if newer != {"rope_theta": None, "eps": _EPS}:  # else the config is what exports and checkpoints before had
            self.config |= newer
        self.rope_theta = rope_theta
        self.patch_size, self.dim, self.depth, self.heads = patch_size, dim, depth, heads
        self.prefix = 1 + registers  # tokens before the patches
        self.activation_checkpointing = activation_checkpointing

        self.embed = Embeddings(patch_size, dim, registers, image_size, learned_positions=rope_theta is None)
        of_block = dict(swiglu=swiglu, layer_scale=layer_scale, eps=eps, backend=attention)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, **of_block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.embed.positions is not None:
            nn.init.trunc_normal_(self.embed.positions, std=0.02)
        nn.init.normal_(self.embed.cls_token, std=1e-6)
        if self.embed.register_tokens is not None:
            nn.init.normal_(self.embed.register_tokens, std=1e-6)

    def turn(self, height: int, width: int, device) -> Rotations | None:
        """What the blocks turn queries and keys by on a grid of height × width patches; None: positions are learned."""
        if self.rope_theta is None:
            return None
        channels = self.dim // self.heads
        return rotations(height, width, channels, theta=self.rope_theta, prefix=self.prefix, device=device)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Final-normed cls (B, D) and patch map (B, H/p, W/p, D) of images (B, 3, H, W) in [0, 1].

        masked: (B, H/p·W/p) bool, True for patches that are not to be seen.
        """
        tokens = self.embed(images, masked)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        turn = self.turn(*grid, images.device)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no random state to keep.
                tokens = checkpoint(block, tokens, turn, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, turn)
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, self.prefix :].unflatten(1, grid)

    @classmethod
    def from_hf(cls, weights: str | Path | nn.Module) -> "ViT":
        """A ViT with the weights of transformers' Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel or ViTModel.

        weights: a hub id (facebook/dinov2-base, facebook/dino-vits16, …), a local folder, or the model; but for a
        DINOv3 also with a classifier around it.
        A hub id is looked up in the local cache first. Raises WeightsError when the weights cannot be had, are damaged
        or incomplete, do not belong to their config.json, or are of another model; a mask token may be missing.
        """
        model = weights if isinstance(weights, nn.Module) else read_model(weights)
        arguments = read_arguments(model.config)
        model = getattr(model, model.config.model_type, model)  # a classifier holds the ViT inside
        try:
            vit = cls(**arguments)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{KEY}: the config of {source(model.config)} describes no ViT: {error}") from error
        try:
            vit.load_state_dict(read_state(model.state_dict(), vit.depth, model.config.model_type))
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            problem = f"the weights of {source(model.config)} are not those of its config ({reason})"
            raise WeightsError(f"{KEY}: {problem}") from error
        return vit
