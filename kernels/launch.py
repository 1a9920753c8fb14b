"""The one table of tile sizes, and the choice between Triton and plain torch."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


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


def check_tensor(name: str, x) -> None:
    """Raise TypeError unless x is a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        found = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name}: expected a dense tensor, found {found}; pad it, with a mask, or make it dense")


def check_float(name: str, x: Tensor) -> None:
    """Raise TypeError unless x is a tensor of a floating-point dtype that torch computes with."""
    check_tensor(name, x)
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise TypeError(f"{name}: expected a floating-point dtype of 16 bits or more, found {x.dtype}; convert it")


# Private to torch; a release without one of them is taken to have nothing of the kind active.
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
# What torch.autograd.grad(is_grads_batched=True) hands to a backward.
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call on these (or None) needs no operator: nothing compiles, traces, transforms or wraps it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transforms() or _modes():
        return False
    # The kernels read memory as it is, so a view with a negative bit goes through the dispatcher, which resolves it.
    return all(
        type(x) in (Tensor, torch.nn.Parameter)
        and not (x.is_neg() or x.is_meta or x._is_zerotensor() or _is_batched(x))
        for x in tensors
        if x is not None
    )


def keepable(x: Tensor | None) -> Tensor | None:
    """x, or a copy of what was made under torch.inference_mode(): autograd keeps no such tensor."""
    return x.clone() if x is not None and x.is_inference() else x


def same_grid(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two (H, W) are equal; False in `torch.export`, where asking would fix sides that are to stay open."""
    return not torch.compiler.is_exporting() and tuple(one) == tuple(other)


def is_empty(shape: Sequence[int]) -> bool:
    """Whether a side is 0; in `torch.export` one that is to stay open is not asked, nor one that values decide."""
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return any(type(side) is int and side == 0 for side in shape)
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # brings sympy, for half a second

        return any(guard_or_false(side == 0) for side in shape)
    return 0 in shape


def check_filled(name: str, x: Tensor) -> None:
    """Raise ValueError for what is empty; the operators ask again, as a compiled call sees it only when it runs."""
    if is_empty(x.shape):
        raise ValueError(f"{name}: expected at least one sample, token and channel, found shape {tuple(x.shape)}")


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way.

    The operators have no rules for these, so plain torch takes over.
    """
    return _transforms() or getattr(forward_ad, "_current_level", -1) >= 0


def is_differentiated() -> bool:
    """Whether a derivative is being taken of what runs now: forward mode, or a transform of torch.func but vmap."""
    stack = torch._C._functorch.get_interpreter_stack() if _transforms() else None
    kinds = torch._C._functorch.TransformType
    above = any(level.key() in (kinds.Grad, kinds.Jvp) for level in stack or ())
    return above or getattr(forward_ad, "_current_level", -1) >= 0


def batch_by_loop(operator) -> None:
    """Let vmap call `operator` once for each element: what `torch.autograd.grad(is_grads_batched=True)` needs."""

    def rule(info, in_dims, *args):
        def element(x, dim, i):
            if not isinstance(dim, int):  # not mapped: None, and of a list of numbers a list of them
                return x
            return x.select(dim, i) if info.batch_size else x.sum(dim)  # of nothing: zeros

        calls = [[element(*one, i) for one in zip(args, in_dims, strict=True)] for i in range(max(1, info.batch_size))]
        outs = [operator(*call) for call in calls]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs)[: info.batch_size], 0
        stacked = tuple(torch.stack(some)[: info.batch_size] for some in zip(*outs, strict=True))
        return stacked, (0,) * len(stacked)

    operator.register_vmap(rule)


def tokens_adjacent(x: Tensor) -> bool:
    """Whether neighbouring tokens of a (B, H, W, C) view lie nearer to each other than neighbouring channels: NCHW."""
    steps = [x.stride(dim) for dim in (1, 2) if x.shape[dim] > 1 and x.stride(dim) > 0]  # 0: one token, expanded
    return bool(steps) and x.shape[3] > 1 and min(steps) < x.stride(3)


def flat_stride(x: Tensor) -> int | None:
    """The stride from one token of (B, H, W) or (B, H, W, C) to the next, lines included; None where there is none."""
    if x.shape[2] == 1:
        return x.stride(1)
    return x.stride(2) if x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2) else None


def token_strides(x: Tensor) -> tuple[int, int, int] | None:
    """(tokens of a sample, stride of samples, stride of tokens) of (B, H, W, C), (B, N, C) or (B, C).

    None where channels are not adjacent, or lines not evenly spaced.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    if x.dim() == 2:
        tokens, sample, token = x.shape[0], 0, x.stride(0)
    else:
        tokens, sample = x.shape[1:-1].numel(), x.stride(0) if x.shape[0] > 1 else 0
        token = x.stride(1) if x.dim() == 3 else flat_stride(x)
    return None if token is None else (tokens, sample, token if tokens > 1 else 0)


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
