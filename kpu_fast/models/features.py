"""What flows between rooms: image-level and map-level features, and the description of a model that makes them."""

import math
from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """Features of a batch, X = {x, V} in the paper's words.

    x: (B, D) one vector per image, or None where the model has none.
    maps: (B, H, W, C) channels-last feature maps, finest first.
    """

    x: Tensor | None
    maps: tuple[Tensor, ...]


class FeatureSpec(NamedTuple):
    """What a model's `Features` look like, known before any batch is seen.

    x_dim: channels of x, or None. map_dims: channels of each map. strides: input pixels per cell of each map.
    """

    x_dim: int | None
    map_dims: tuple[int, ...]
    strides: tuple[float, ...]


def cells(pixels: int, stride: float) -> int:
    """How many cells of `stride` pixels a side of an image has: the nearest number, half a cell counts, at least 1."""
    return max(1, math.floor(pixels / stride + 0.5))
