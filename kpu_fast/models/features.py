"""What flows between rooms: image-level and map-level features, and the description of a model that makes them."""

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
