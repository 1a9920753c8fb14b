"""The one table of tile sizes, and the choice between Triton and plain torch."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "torch")
MAX_CHANNELS = 4096  # align_loss holds a whole token in registers; the widest teacher in sight has 1536
MAX_SIDE = 23000  # of a resized map: its taps are computed as (2·o + 1)·in, which must stay below 2³¹


class Tile(NamedTuple):
    """One program's share of a (rows, channels) problem."""

    rows: int
    channels: int
    num_warps: int


# NOT measured on any GPU yet. Chosen by the vector-width rule only: rows·channels / (32·num_warps) ≥ 8 values per
# thread, so that a thread loads 16 bytes of bf16 at once, and ≤ 16, so that two sides and two gradients stay in
# registers. Compiled ahead of time for sm_80, sm_90 and sm_100: no spills, 128-bit loads
# (tests/kernels/test_compile_targets.py). Keys: channels rounded up to a power of two.
ALIGN_TILES = {
    32: Tile(32, 32, 4),
    64: Tile(16, 64, 4),
    128: Tile(8, 128, 4),
    256: Tile(4, 256, 4),
    512: Tile(2, 512, 4),
    1024: Tile(1, 1024, 4),
    2048: Tile(1, 2048, 8),
    4096: Tile(1, 4096, 8),
}
RESIZE_TILES = {width: tile for width, tile in ALIGN_TILES.items() if width <= 512}  # wider maps: several programs
SCALE_TILE = Tile(1, 2048, 4)


def align_tile(channels: int) -> Tile:
    """Tile for `channels` ≤ MAX_CHANNELS."""
    return ALIGN_TILES[max(32, 1 << (channels - 1).bit_length())]


def resize_tile(channels: int) -> Tile:
    """Tile for any number of channels; more than 512 are split over programs."""
    return RESIZE_TILES[min(512, max(32, 1 << (channels - 1).bit_length()))]


def choose_impl(impl: str, *tensors: Tensor, supported: bool = True) -> str:
    """Resolve "auto" to "triton" or "torch" for the tensors' one device and their dtypes.

    "auto" is Triton on CUDA where Triton is installed, no dtype is float64 and `supported` holds; torch elsewhere.
    Raises ValueError for an unknown name, RuntimeError where "triton" was asked for and cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, found {impl!r}")
    installed = importlib.util.find_spec("triton") is not None
    fits = supported and all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors)
    on_cuda = tensors[0].is_cuda
    if impl == "auto":
        return "triton" if on_cuda and installed and fits else "torch"
    if impl == "triton":
        if not installed:
            raise RuntimeError('impl="triton": triton is not installed; install it or use impl="auto"')
        if not fits:
            found = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
            raise RuntimeError(
                f'impl="triton": found {found}; expected float32, bfloat16 '
                f"or float16, at most {MAX_CHANNELS} channels in align_loss and sides of at most {MAX_SIDE} in a "
                'resize; use impl="torch"'
            )
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f'impl="triton": found a tensor on {tensors[0].device}; expected CUDA (or TRITON_INTERPRET=1, set '
                'before triton is imported, to run the kernels in its interpreter); use impl="auto"'
            )
    return impl


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make `tensor`'s GPU the current one for a kernel launch."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
