"""A DINOv2-shaped ViT from images alone: two distorted views of an image find each other among all others'."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpu_fast.data.labelled import to_batch
from kpu_fast.models.mean_std import IMAGENET_MEAN_STD
from kpu_fast.zoo.clip import attention, centre_crop, write_processor
from kpu_fast.zoo.fit import fit
from kpu_fast.zoo.locality import start_local
from kpu_fast.zoo.pixels import STORED, Pixels, generator, rows_of_step
from kpu_fast.zoo.recipes import Dinov2Recipe

_GREY = (0.299, 0.587, 0.114)
_AREA = 0.25, 1.0  # of a view, as a share of the image


class _Views(nn.Module):
    """The ViT and two projectors that only training uses: one for cls, one for the mean of the patch tokens."""

    def __init__(self, vit: nn.Module, projection: int):
        super().__init__()
        dim = vit.config.hidden_size
        self.vit = vit
        self.of_cls, self.of_patches = (
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, projection)) for _ in range(2)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit(pixel_values=images.to(self.vit.layernorm.weight.dtype)).last_hidden_state
        patches = tokens[:, 1 + self.vit.config.num_register_tokens :].mean(1)
        return self.of_cls(tokens[:, 0]).float(), self.of_patches(patches).float()


def train_dinov2(pixels: Pixels, recipe: Dinov2Recipe, folder: Path, *, device, seed, facts, minutes=None):
    """A Dinov2WithRegistersModel trained on the images of `pixels`, never their labels, and what `fit` tells."""
    torch.manual_seed(seed)
    net = _Views(_network(recipe, device), recipe.projection)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in IMAGENET_MEAN_STD)
    stored = pixels.images.to(device)

    def loss_of_step(net: nn.Module, step: int) -> dict[str, Tensor]:
        random = generator(seed, 6, step)
        rows = rows_of_step(step, recipe.fit.batch, len(pixels), seed)
        images = stored[rows.to(device, non_blocking=True)]
        views = torch.cat([distort(images, random), distort(images, random)])
        size = recipe.image_size if (step + 1) % recipe.whole_every == 0 else recipe.small_size
        cls, patches = net((to_batch(views, size) - mean) / std)
        parts = {"cls": find_pairs(cls, recipe.temperature), "patches": find_pairs(patches, recipe.temperature)}
        return {"loss": parts["cls"] + parts["patches"], **parts}

    told = fit(
        net,
        loss_of_step,
        recipe.fit,
        folder,
        device=device,
        seed=seed,
        name="dinov2",
        facts=facts,
        minutes=minutes,
    )
    return net.vit, told


def find_pairs(embeddings: Tensor, temperature: float) -> Tensor:
    """NT-Xent: rows i and B + i of (2B, D) are views of one image; each is to find the other among 2B − 1 rows."""
    rows = F.normalize(embeddings, dim=-1)
    logits = rows @ rows.T / temperature
    logits.fill_diagonal_(-torch.inf)
    count = len(rows) // 2
    answers = torch.arange(2 * count, device=rows.device).roll(count)
    return F.cross_entropy(logits, answers)


def distort(images: Tensor, random: torch.Generator) -> Tensor:
    """uint8 (B, H, W, 3) → the same shape: a random part enlarged, perhaps flipped, in other colours, perhaps grey.

    random: on the CPU, wherever the images are, so that the same parts and colours are drawn on every device.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(count, generator=random) * (high - low) + low).to(device, non_blocking=True)

    side = uniform(*_AREA).sqrt()
    stretch = uniform(-0.3, 0.3).exp()
    width, height = (side * stretch.sqrt()).clamp(max=1), (side / stretch.sqrt()).clamp(max=1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count, device=device)
    across = torch.stack([width * flip, zero, (1 - width) * uniform(-1, 1)], 1)
    down = torch.stack([zero, height, (1 - height) * uniform(-1, 1)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [count, 3, STORED, STORED], align_corners=False)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def per_image(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    grey = (pixels * torch.tensor(_GREY).view(3, 1, 1).to(device, non_blocking=True)).sum(1, keepdim=True)
    colour = per_image(torch.where(uniform(0, 1) < 0.2, zero, uniform(0.4, 1.6)))
    pixels = grey + colour * (pixels - grey)
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (middle + per_image(uniform(0.5, 1.5)) * (pixels - middle)) * per_image(uniform(0.6, 1.4))
    # A slight cast: each colour by itself.
    cast = torch.randn(count, 3, 1, 1, generator=random).to(device, non_blocking=True)
    pixels = pixels * (1 + 0.1 * cast)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _network(recipe: Dinov2Recipe, device: torch.device) -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=recipe.dim,
        num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads,
        mlp_ratio=recipe.mlp_ratio,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        num_register_tokens=recipe.registers,
    )
    vit = Dinov2WithRegistersModel._from_config(config, attn_implementation=attention(device))
    for module in vit.modules():
        if isinstance(module, nn.Linear):  # transformers' 0.02 is for widths of 768 and many more steps
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
    embeddings = vit.embeddings
    nn.init.normal_(embeddings.position_embeddings, std=0.02)
    layers = [layer.attention for layer in vit.encoder.layer]
    start_local(
        embeddings.patch_embeddings.projection,
        embeddings.position_embeddings[0],
        1,
        [embeddings.cls_token, embeddings.register_tokens],
        [layer.q_proj for layer in layers],
        [layer.k_proj for layer in layers],
        recipe.heads,
    )
    return vit


def save_dinov2(vit: nn.Module, folder: Path) -> None:
    """Write `folder` as Dinov2WithRegistersModel and its image processor do; weights in bf16."""
    vit.to(torch.bfloat16).save_pretrained(folder)
    write_processor(folder, "BitImageProcessor", IMAGENET_MEAN_STD, **centre_crop(vit.config.image_size))
