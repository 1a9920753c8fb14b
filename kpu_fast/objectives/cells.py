"""Grids of feature maps, and which of their cells padding leaves to count."""

import torch
from torch import Tensor
from torch.nn import functional as F


def grid(v: Tensor) -> tuple[int, int]:
    """(H, W) of a map (B, H, W, C)."""
    return v.shape[1], v.shape[2]


def valid_cells(valid: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """(B, H, W) pixel mask to (B, h, w): a cell counts if the pixel at its centre does."""
    if valid is None:
        return None
    # A bool is a byte of 0 or 1: seen as one it can be picked, and nothing has to be converted. In what inductor writes
    # for a GPU it is one bit, which cannot be seen as a byte, and there conversion costs nothing.
    if torch.compiler.is_compiling():
        return _pick(valid.to(torch.uint8), size).to(torch.bool)
    return _pick(valid.view(torch.uint8), size).view(torch.bool)


def _pick(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels[:, None], size=size, mode="nearest-exact")[:, 0]
