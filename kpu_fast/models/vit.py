"""DINOv2-compatible vision transformer, with or without registers (arXiv 2304.07193, 2309.16588)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpu_fast.models.attention import activate_backend, attention
from kpu_fast.models.hub import WeightsError, find_folder, import_transformers, load_net, read_json

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_EPS = 1e-6
_KEY = "student.vit.weights"


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


class Attention(nn.Module):
    """Multi-head self-attention with one Linear for q, k and v. (B, N, D) → (B, N, D)."""

    def __init__(self, dim: int, heads: int, backend: str):
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, d // self.heads)
        # Taken apart in the order of memory: backward then puts the three gradients together in one copy, not two.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # 3 × (B, heads, N, d)
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
    """x += ls1 ⊙ Attention(LN x); x += ls2 ⊙ MLP(LN x)."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, swiglu: bool, layer_scale: float, backend: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, heads, backend)
        self.ls1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = SwiGLU(dim, mlp_hidden) if swiglu else MLP(dim, mlp_hidden)
        self.ls2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.ls1, self.attn(self.norm1(x)))
        return torch.addcmul(x, self.ls2, self.mlp(self.norm2(x)))


class Embeddings(nn.Module):
    """Images to tokens: patch embedding, cls, registers, learned positions.

    A module of its own, called as one: ZeRO 3 brings a module's parameters together when the module is called.
    """

    def __init__(self, patch_size: int, dim: int, registers: int, image_size: int):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        self.patch = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))  # cls, then the patches
        # Only DINOv2's own pre-training reads it; kept, never trained, so that a checkpoint comes out as it went in.
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

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, H, W) in [0, 1] and turn them into tokens (B, prefix + H/p·W/p, D).

        Raises ValueError unless H and W are multiples of the patch size p.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"ViT: images must be (B, 3, H, W), got shape {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"ViT: image height and width must be multiples of patch_size {self.patch_size}, got {height}×{width}."
            )
        patches = self.patch(normalise(images, self.patch.weight.dtype))  # (B, D, H/p, W/p)
        positions = self.positions_on(*patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2) + positions[:, 1:]  # (B, N, D)
        prefix = [(self.cls_token + positions[:, :1]).expand(images.shape[0], -1, -1)]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(images.shape[0], -1, -1))
        return torch.cat([*prefix, patches], dim=1)  # (B, prefix + N, D)


class ViT(nn.Module):
    """DINOv2's vision transformer.

    patch_size: pixels. dim, depth, heads: width, blocks, attention heads. registers: extra tokens after cls.
    image_size: pixels a side of the square the learned positions were made for; they are resized to any other grid.
    swiglu: SwiGLU instead of the GELU MLP (ViT-g). layer_scale: start value. attention: see `models.attention`.
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
        attention: str = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        for name, value, least in (
            ("patch_size", patch_size, 1),
            ("dim", dim, 1),
            ("depth", depth, 1),
            ("heads", heads, 1),
            ("image_size", image_size, 1),
            ("registers", registers, 0),
        ):
            if value < least:
                raise ValueError(f"ViT: {name} must be {least} or more, got {value}.")
        if dim % heads:
            raise ValueError(f"ViT: dim {dim} must be a multiple of heads {heads}.")
        if image_size % patch_size:
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
        self.patch_size, self.dim, self.depth, self.heads = patch_size, dim, depth, heads
        self.prefix = 1 + registers  # tokens before the patches
        self.activation_checkpointing = activation_checkpointing

        self.embed = Embeddings(patch_size, dim, registers, image_size)
        hidden = int(dim * mlp_ratio)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, swiglu, layer_scale, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.embed.positions, std=0.02)
        nn.init.normal_(self.embed.cls_token, std=1e-6)
        if self.embed.register_tokens is not None:
            nn.init.normal_(self.embed.register_tokens, std=1e-6)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Final-normed cls (B, D) and patch map (B, H/p, W/p, D) of images (B, 3, H, W) in [0, 1]."""
        tokens = self.embed(images)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no random state to keep.
                tokens = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens)
        tokens = self.norm(tokens)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return tokens[:, 0], tokens[:, self.prefix :].unflatten(1, grid)

    @classmethod
    def from_hf(cls, weights: str | Path | nn.Module) -> "ViT":
        """A ViT with the weights of transformers' Dinov2Model or Dinov2WithRegistersModel.

        weights: a hub id (facebook/dinov2-base, facebook/dinov2-with-registers-base, …), a local folder, or the model,
        also with a classifier around it.
        A hub id is looked up in the local cache first. Raises WeightsError when the weights cannot be had, are damaged
        or incomplete, do not belong to their config.json, or are not a DINOv2; a mask token may be missing.
        """
        model = weights if isinstance(weights, nn.Module) else _load_hf(weights)
        arch = _hf_arch(model.config)
        model = getattr(model, model.config.model_type, model)  # a classifier holds the ViT inside
        try:
            vit = cls(**arch)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{_KEY}: the config of {_source(model.config)} describes no ViT: {error}") from error
        try:
            vit.load_state_dict(_hf_state(model.state_dict(), vit.depth))
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            problem = f"the weights of {_source(model.config)} are not those of its config ({reason})"
            raise WeightsError(f"{_KEY}: {problem}") from error
        return vit


def _load_hf(weights: str | Path) -> nn.Module:
    folder = find_folder(_KEY, weights)
    model_type = read_json(_KEY, folder / "config.json").get("model_type")
    _check_model_type(model_type, folder)
    hf = import_transformers(_KEY)
    net_class = hf.Dinov2Model if model_type == "dinov2" else hf.Dinov2WithRegistersModel
    return load_net(_KEY, net_class, folder, dtype=torch.float32)


def _check_model_type(model_type, source) -> None:
    if model_type not in ("dinov2", "dinov2_with_registers"):
        raise WeightsError(
            f"{_KEY}: {source} holds a model of type {model_type!r}; expected dinov2 or dinov2_with_registers, "
            "such as facebook/dinov2-base"
        )


def _source(config) -> str:
    return config.name_or_path or "the model"


def _side(config, key: str) -> int:
    """A size in pixels; transformers takes (height, width) as well, and ours must be square."""
    value = getattr(config, key)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise WeightsError(f"{_KEY}: {key} is {value!r} in the config of {_source(config)}, only squares work")
    return sides.pop()


def _hf_arch(config) -> dict:
    source = _source(config)
    _check_model_type(config.model_type, source)
    for key, expected in (("hidden_act", "gelu"), ("qkv_bias", True), ("layer_norm_eps", _EPS), ("num_channels", 3)):
        if getattr(config, key) != expected:
            raise WeightsError(
                f"{_KEY}: {key} is {getattr(config, key)!r} in the config of {source}, only {expected!r} works"
            )
    if config.model_type == "dinov2_with_registers" and not config.num_register_tokens:
        # Positions are resized with antialias in that model and without in Dinov2Model; ours asks the registers which.
        raise WeightsError(f"{_KEY}: num_register_tokens is 0 in the config of {source}, only 1 or more works")
    return {
        "patch_size": _side(config, "patch_size"),
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_ratio": config.mlp_ratio,
        "registers": getattr(config, "num_register_tokens", 0),
        "image_size": _side(config, "image_size"),
        "swiglu": config.use_swiglu_ffn,
        "layer_scale": config.layerscale_value,
    }


# Ours: theirs, where one tensor becomes one tensor. transformers renamed some of them during version 5; both are read.
_HF_NAMES = {
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
    "mlp.down": ("mlp.down_proj", "mlp.weights_out"),
    "mlp.gate_up": ("mlp.weights_in",),
}
_HF_FUSED = {
    "attn.qkv": (
        [f"attention.{n}_proj" for n in "qkv"],
        [f"attention.attention.{n}" for n in ("query", "key", "value")],
    ),
    "mlp.gate_up": (["mlp.gate_proj", "mlp.up_proj"],),
}


def _hf_state(hf: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    state = {
        "embed.cls_token": hf["embeddings.cls_token"],
        "embed.positions": hf["embeddings.position_embeddings"],
        "embed.patch.weight": hf["embeddings.patch_embeddings.projection.weight"],
        "embed.patch.bias": hf["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": hf["layernorm.weight"],
        "norm.bias": hf["layernorm.bias"],
    }
    # transformers leaves the mask token out where the config says use_mask_token = false.
    state["embed.mask_token"] = hf.get("embeddings.mask_token", torch.zeros_like(hf["embeddings.cls_token"][0]))
    if "embeddings.register_tokens" in hf:
        state["embed.register_tokens"] = hf["embeddings.register_tokens"]
    for i in range(depth):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for n in (1, 2):
            state[f"{ours}.ls{n}"] = hf[f"{theirs}.layer_scale{n}.lambda1"]
        for kind in ("weight", "bias"):
            for name, candidates in _HF_NAMES.items():
                for candidate in candidates:
                    if f"{theirs}.{candidate}.{kind}" in hf:
                        state[f"{ours}.{name}.{kind}"] = hf[f"{theirs}.{candidate}.{kind}"]
            for name, groups in _HF_FUSED.items():
                for group in groups:
                    if f"{theirs}.{group[0]}.{kind}" in hf:
                        state[f"{ours}.{name}.{kind}"] = torch.cat([hf[f"{theirs}.{part}.{kind}"] for part in group])
    return state
