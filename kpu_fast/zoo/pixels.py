"""All training images in one array, and batches cut from it by step number."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kpu_fast.data.labelled import LabelledImages, to_batch

STORED = 32  # pixels: what CIFAR's images have; others are reduced to it
_SHIFT = 3  # pixels by which a crop may move


@dataclass(frozen=True)
class Pixels:
    """uint8 images (N, STORED, STORED, 3), their class numbers (N,), and the classes' names; [i] as LabelledImages."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.images[i].numpy(), int(self.labels[i])

    def digest(self) -> str:
        """A SHA-256 of the images and their class numbers: other images, or others in their order, have another."""
        known = hashlib.sha256()
        for values in (self.images, self.labels):
            known.update(values.contiguous().numpy())
        return known.hexdigest()


def read(images: LabelledImages, classes: tuple[str, ...]) -> Pixels:
    """Decode every image of `images`."""
    stored = np.empty((len(images), STORED, STORED, 3), np.uint8)
    for i in tqdm(range(len(images)), desc=f"reading {len(images):,} images", unit="img", leave=False):
        pixels, _ = images[i]
        if pixels.shape != stored.shape[1:]:
            pixels = (to_batch([pixels], STORED)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        stored[i] = pixels
    return Pixels(torch.from_numpy(stored), torch.tensor(images.labels), classes)


def rows_of_step(step: int, batch: int, count: int, seed: int) -> Tensor:
    """Which images step `step` (from 0) takes; the order is one that (seed, epoch) alone decides.

    Every batch is whole, so an epoch takes each image at most once and leaves out count % batch, others each time. With
    fewer images than a batch, every step takes them all.
    """
    per_epoch = max(1, count // batch)
    epoch, part = divmod(step, per_epoch)
    order = torch.randperm(count, generator=generator(seed, 1, epoch))
    return order[part * batch : (part + 1) * batch]


def generator(*numbers: int) -> torch.Generator:
    """A random generator that `numbers` alone decide: with it a step is the same whenever it is run."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def crop_and_flip(images: Tensor, random: torch.Generator) -> Tensor:
    """uint8 (B, H, W, 3): each moved by up to 3 pixels with its border mirrored, half of them flipped."""
    count, height, width, _ = images.shape
    padded = F.pad(images.permute(0, 3, 1, 2).float(), (_SHIFT,) * 4, mode="reflect").to(torch.uint8)
    top, left = torch.randint(0, 2 * _SHIFT + 1, (2, count, 1), generator=random)
    flip = torch.rand(count, 1, generator=random) < 0.5
    columns = torch.arange(width).expand(count, -1)
    columns = torch.where(flip, columns.flip(1), columns) + left
    rows = torch.arange(height) + top
    return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
