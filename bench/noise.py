"""Images for benchmarks that have none of their own: of ImageNet's size, and about as costly to decode."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise_images(folder: Path, count: int = 64) -> None:
    """Write `count` JPEG of 500 × 375 into `folder`, the same ones each time: smooth colours with grain, 68 KB each.

    Without the grain they would be of 25 KB and take about two thirds of the time.
    """
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        grained = smooth + rng.normal(0, 12, smooth.shape)
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=88)
