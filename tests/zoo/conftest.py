"""Images of coloured shapes, which tiny networks tell apart after a few steps, and recipes for such networks."""

import numpy as np
import pytest
import torch
from PIL import Image

from kpu_fast.zoo.fit import Fit
from kpu_fast.zoo.recipes import ClipRecipe, Dinov2Recipe, GdinoRecipe, Zoo

CLASSES = {"red ball": (220, 40, 40), "box": (40, 60, 220), "stick": (40, 200, 60)}


def shape(name, random):
    pixels = random.integers(0, 60, (32, 32, 3)).astype(np.uint8)
    top, left = random.integers(4, 16, 2)
    if name == "stick":
        pixels[:, left : left + 5] = CLASSES[name]
    elif name == "box":
        pixels[top : top + 12, left : left + 12] = CLASSES[name]
    else:
        rows, columns = np.ogrid[:32, :32]
        pixels[(rows - top - 6) ** 2 + (columns - left - 6) ** 2 < 40] = CLASSES[name]
    return pixels


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with train/CLASS/*.png (24 of each) and test/CLASS/*.png (10 of each); CLASS has no spaces."""
    root = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 10)):
        for name in CLASSES:
            folder = root / split / name.replace(" ", "_")
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(shape(name, random)).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny():
    """A zoo that trains in seconds."""
    vit = dict(image_size=64, dim=32, depth=2, heads=2)
    fit = Fit(steps=3, batch=8, muon_lr=3e-3, lr=2e-3, warmup=2)
    detect = Fit(steps=3, batch=2, muon_lr=1e-3, lr=5e-4, warmup=2, bf16_copy=False)
    swin = dict(canvas=64, embed_dim=16, depths=(1, 1, 1, 1))
    return Zoo(
        ClipRecipe(fit=fit, mlp=64, text_dim=32, text_depth=1, projection=24, **vit),
        GdinoRecipe(classify=fit, fit=detect, dim=32, queries=8, text_dim=32, test_mosaics=3, **swin),
        Dinov2Recipe(fit=fit, **vit),
    )
