"""The one table of tile sizes, the choice between Triton and plain torch, and the launch of a kernel."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


def _namespace(package: str) -> str:
    """For our operators in torch: of its own for every copy of this package, and for one that is imported anew.

    Registering an operator's name again frees the first registration under those who hold it, and their next call
    reads freed memory.
    """
    name = package.removesuffix(".kernels").replace(".", "__")
    while hasattr(getattr(torch.ops, name), "align_forward"):
        name += "_"
    return name


NAMESPACE = _namespace(__package__)

IMPLS = ("auto", "triton", "torch")
MAX_CHANNELS = 4096  # align_loss holds a whole token in registers; the widest teacher in sight has 1536
MAX_TOKENS = 2**31 - 2**12  # of a map in the kernels, which number them, and a last tile's width more, in int32
MAX_SIDE = 23000  # of a resized map: its taps are computed as (2·o + 1)·in, which must stay below 2³¹


class Tile(NamedTuple):
    """One program's share of a (rows, channels) problem."""

    rows: int
    channels: int
    num_warps: int


class TokenTile(NamedTuple):
    """One program's tokens, each in `pieces` tiles of `chunk` channels."""

    tokens: int
    chunk: int
    pieces: int
    num_warps: int


# What limits these kernels beside memory is the number of instructions they issue, so a thread has 24 or 32 values of
# a token (of up to 64 channels 8 or 16), over which what is done once per token is spread: with 8 values and four
# warps to a token it was 87 instructions per number of 768 bf16 channels, now 25 (an H100 has time for some 51 while
# its memory moves 6 bytes). Three pieces or four fit the usual widths, 2ᵏ and 3·2ᵏ, without padding, and a token of up
# to 1024 channels stays within one warp: its sums need no shared memory. A load moves 8 values, 16 bytes of bf16. On
# an H100 (bench/tune.py) none of 10 to 22 tiles was more than 3 % faster for align_loss, of a resize with its gradient
# 10 %.
# Compiled ahead of time for sm_80, sm_90 and sm_100: tests/kernels/test_compile_targets.py. Keys: channels, at most.
TOKEN_TILES = {
    chunk * pieces: TokenTile(1024 // chunk, chunk, pieces, 4)
    for chunk in (32, 64, 128, 256, 512, 1024)
    for pieces in ((1, 2, 3, 4) if chunk == 32 else (3, 4))
}
RESIZE_CHANNELS = 1024  # of one program; wider maps take several
MAX_RESIZE_CHANNELS = 65535 * 16  # programs of a grid's second axis, of 16 channels where these are not adjacent
SCALE_TILE = Tile(1, 2048, 4)
SCALE_PROGRAMS = 1024  # at most: a factor of 1 ends them all, and starting a program costs more than that
# Views whose tokens, not channels, are adjacent in memory (NCHW). align_loss walks over the channels a chunk at a time
# and waits for memory once a chunk, so chunks are large; of a small map, whose samples are short lines, programs take
# few tokens. Of 19 tiles on an H100 and an H200, "small" is within 2 % of the fastest for 14² tokens; "large" takes
# 0.91 and 0.82 of its time for 100×168, and 1.02 and 1.05 of that of the fastest, which has 224 registers.
ALIGN_TILES_ACROSS = {"small": TokenTile(32, 64, 1, 8), "large": TokenTile(32, 32, 1, 4)}
LARGE_MAP = 1024  # tokens of a sample from which a map is large: somewhere between the two that were measured
FINISH_TILE = Tile(32, 8192, 16)  # rows: losses whose partial sums one launch adds up
MAX_SLOTS = 8  # terms in a launch of align_losses
RESIZE_TILE_ACROSS = TokenTile(64, 16, 1, 4)
# Values per thread: 16 bytes at once of bf16 cells (forward) and of float32 atomic adds (backward), on an H100 the
# fastest of 16 tiles or within 3 % of it. int64 adds ("fixed") come one by one, so a warp's should lie side by side:
# one value per thread took 0.57 to 0.62 of the time of two. One layout serves every load, reduction and atomic of a
# pass, and in heads of 32 channels nothing in its loop goes through shared memory. `rows` are queries; keys: channels
# rounded up.
DEFORM_TILES = {
    what: {channels: Tile(max(1, values * 128 // channels), channels, 4) for channels in (16, 32, 64, 128, 256)}
    for what, values in {"forward": 8, "backward": 4, "fixed": 1}.items()
}
MAX_HEAD_CHANNELS = 256
MAX_MAPS = 8  # of deform_attn: their sizes are arguments of the kernels
# 32 channels of bf16 are two whole 32-byte sectors, and 256 tokens of an NCHW view 512 adjacent bytes; 64 values per
# thread, read once, stay in registers; the 16 bytes per channel that a program writes are 3 % of the 512 it reads. On
# an H100 the fastest of 23 tiles on two of four maps, within 3 % on the others.
MOMENTS_TILE = Tile(256, 32, 4)
MOMENTS_FINISH_TILE = Tile(64, 16, 4)  # rows: parts added up at once


_HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def token_tile(channels: int) -> TokenTile:
    """Tile of whole tokens of `channels` ≤ MAX_CHANNELS."""
    return TOKEN_TILES[min(width for width in TOKEN_TILES if width >= channels)]


def across_tile(tokens: int) -> TokenTile:
    """Tile for NCHW views of so many tokens per sample."""
    return ALIGN_TILES_ACROSS["large" if tokens >= LARGE_MAP else "small"]


def inverse_beta(beta: float) -> float:
    """1/β as the kernels take it: of 0 the largest float32, which makes ±1 of any difference that is not denormal."""
    return 1 / beta if beta > 0 else torch.finfo(torch.float32).max


def resize_tile(channels: int) -> TokenTile:
    """Tile for any number of channels; more than RESIZE_CHANNELS are split evenly over programs."""
    programs = -(-channels // RESIZE_CHANNELS)
    return token_tile(-(-channels // programs))


def deform_tile(channels: int, what: str) -> Tile:
    """Tile for a head of `channels` ≤ MAX_HEAD_CHANNELS; what: a key of DEFORM_TILES."""
    return DEFORM_TILES[what][max(16, 1 << (channels - 1).bit_length())]


def choose_impl(impl: str, *tensors: Tensor, supported: Callable[[], bool] = lambda: True) -> str:
    """Resolve "auto" to "triton" or "torch" for the tensors' one device and their dtypes.

    "auto" is Triton on CUDA where Triton is installed, no dtype is float64 and `supported` holds; torch elsewhere.
    There `supported` is not asked: in `torch.export` the answer would bound sides that are to stay open.
    Raises ValueError for an unknown name, RuntimeError where "triton" was asked for and cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, found {impl!r}")
    on_cuda = tensors[0].is_cuda
    if impl == "torch" or (impl == "auto" and not (on_cuda and _HAS_TRITON)):
        return "torch"
    fits = all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors) and supported()
    if impl == "auto":
        return "triton" if fits else "torch"
    if not _HAS_TRITON:
        raise RuntimeError('impl="triton": triton is not installed; install it or use impl="auto"')
    if not fits:
        found = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        raise RuntimeError(
            f'impl="triton": found {found}; expected float32, bfloat16 '
            f"or float16, at most {MAX_TOKENS} tokens, {MAX_CHANNELS} channels in align_loss, sides of {MAX_SIDE} "
            f"in a resize, {MAX_HEAD_CHANNELS} channels per head and {MAX_MAPS} maps in deform_attn; "
            'use impl="torch"'
        )
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f'impl="triton": found a tensor on {tensors[0].device}; expected CUDA (or TRITON_INTERPRET=1, set '
            'before triton is imported, to run the kernels in its interpreter); use impl="auto"'
        )
    return impl


def coded(numbers: Iterable[int]) -> tuple[int, ...]:
    """2n + 3 of each: what the kernels take, in tuples, for whole numbers that change from step to step.

    Triton compiles anew for an argument that is 1, or a multiple of 16, and do_not_specialize does not reach into
    tuples; these are neither.
    """
    return tuple(2 * n + 3 for n in numbers)


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make `tensor`'s GPU the current one for a kernel launch."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


_compiled: dict[tuple, tuple] = {}
_MAX_COMPILED = 4096


def run_kernel(kernel, programs: tuple[int, int], *arguments, num_warps: int, **constants) -> None:
    """kernel[programs](*arguments, **constants, num_warps=num_warps), where the tensors' GPU is the current one.

    Triton looks at every argument anew in each call, which for kernels with 40 of them takes longer than to launch
    them. Here a call like an earlier one goes straight to what was compiled for that one; `_likeness` says which are
    alike. arguments: tensors, int, float, and tuples of one of these. constants: every tl.constexpr parameter, which
    come last. Debugging switches of Triton and hooks on its kernels count at a kernel's first launch only; hooks on
    launches always do.
    """
    key = kernel.fn, num_warps, *constants.items(), *_likeness(arguments)
    known = _compiled.get(key)
    if known is None:
        from triton.compiler import CompiledKernel

        made = kernel[programs](*arguments, **constants, num_warps=num_warps)
        if isinstance(made, CompiledKernel):  # not in Triton's interpreter, nor where it compiles in other threads
            if len(_compiled) >= _MAX_COMPILED:  # of tuples that never repeat
                _compiled.clear()
            _compiled[key] = made, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return
    made, values = known
    made[(*programs, 1)](*arguments, *values)


def _likeness(arguments: tuple) -> list:
    """What Triton's compilation depends on: of a whole number whether it is 1, a multiple of 16, or needs 64 bits, of a
    float its type, of a tensor its dtype, device and alignment. Tuples of whole numbers are alike where they are equal.
    """
    found: list = []
    for x in arguments:
        kind = type(x)
        if kind is int:
            found.append(x == 1 or 2 * (x % 16 == 0) + 4 * (not -(2**31) <= x < 2**31))
        elif kind is float:
            found.append(float)
        elif kind is tuple:
            found.append(x if type(x[0]) is int else tuple(_likeness(x)))
        elif isinstance(x, Tensor):
            found += x.dtype, x.get_device(), x.data_ptr() % 16 == 0
        else:
            raise TypeError(f"expected a tensor, int, float or a tuple of them, found {kind.__name__}")
    return found
