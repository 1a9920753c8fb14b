"""Sizes and budgets of the zoo's three teachers: the one place with numbers to change."""

from dataclasses import dataclass, field, replace

from kpu_fast.zoo.fit import Fit


@dataclass(frozen=True)
class ClipRecipe:
    """A CLIP: image tower, text tower, shared space."""

    fit: Fit = field(default_factory=lambda: Fit(steps=2200, batch=128, muon_lr=3e-3, lr=2e-3))
    image_size: int = 128
    patch_size: int = 16
    dim: int = 128
    depth: int = 5
    heads: int = 4
    mlp: int = 384
    text_dim: int = 128
    text_depth: int = 2
    projection: int = 128


@dataclass(frozen=True)
class GdinoRecipe:
    """A GroundingDINO with a Swin backbone; the backbone begins as a classifier of the same images."""

    classify: Fit = field(default_factory=lambda: Fit(steps=900, batch=128, muon_lr=3e-3, lr=2e-3))
    fit: Fit = field(
        default_factory=lambda: Fit(steps=2200, batch=8, muon_lr=1e-3, lr=5e-4, warmup=100, bf16_copy=False)
    )
    canvas: int = 192
    embed_dim: int = 32
    depths: tuple[int, ...] = (1, 1, 3, 1)
    dim: int = 64
    queries: int = 20
    encoder_layers: int = 1
    decoder_layers: int = 2
    text_dim: int = 64
    text_depth: int = 1
    test_mosaics: int = 500


@dataclass(frozen=True)
class Dinov2Recipe:
    """A ViT that learns without classes."""

    fit: Fit = field(default_factory=lambda: Fit(steps=1000, batch=256, muon_lr=3e-3, lr=2e-3))
    temperature: float = 0.2
    projection: int = 128
    image_size: int = 128
    small_size: int = 96  # of the views in all steps but every `whole_every`-th: fewer tokens, more images per minute
    whole_every: int = 5
    patch_size: int = 16
    dim: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 3
    registers: int = 2


@dataclass(frozen=True)
class Zoo:
    """All three."""

    clip: ClipRecipe = field(default_factory=ClipRecipe)
    gdino: GdinoRecipe = field(default_factory=GdinoRecipe)
    dinov2: Dinov2Recipe = field(default_factory=Dinov2Recipe)

    @classmethod
    def on(cls, device_type: str) -> "Zoo":
        """All three for "cpu" or "cuda". A GPU has time for the steps of large batches (246 epochs of CIFAR-10) that
        learning without classes asks for; the other two know enough of ten classes after few.
        """
        if device_type == "cpu":
            return cls()
        dinov2 = Dinov2Recipe()
        return cls(dinov2=replace(dinov2, fit=replace(dinov2.fit, steps=12_000, batch=1024, warmup=300)))
