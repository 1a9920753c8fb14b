"""Mean and variance of every channel in one pass over the features, mergeable over batches and ranks."""

# n, Σx and Σx² of each channel, in float64. They add up over blocks, batches and ranks, and give mean = Σx/n and
# var = Σx²/n − mean². A block's values never enter Σx² as they are: with m its mean, rounded to float32, d = x − m,
#   Σx = n·m + Σd        Σx² = Σd² + 2m·Σd + n·m²
# where Σd and Σd² are float32 sums of numbers as small as the spread, and the rest is float64. What is left is the
# rounding of Σx² itself, 1e-16·mean² against var: five digits of var remain at mean²/var = 1e10.

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, distributed

from .launch import MAX_TOKENS, NAMESPACE, choose_impl
from .tensors import batch_by_loop, check_filled, check_float, check_tensor, is_empty, is_plain

# Numbers at once in the torch path. Of 2¹⁶…2²¹ within 20 % of the fastest for (32, 14, 14, 768), channels last and
# first, and (4, 100, 168, 192), float32, on 1 thread of a shared x86 server, November 2026.
BLOCK = 1 << 19


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Per-channel statistics, float64 on the features' device: count () = n, total (C,) = Σx, square (C,) = Σx²."""

    count: Tensor
    total: Tensor
    square: Tensor

    @property
    def mean(self) -> Tensor:
        """(C,); 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)

    @property
    def var(self) -> Tensor:
        """(C,) population variance, Σ(x − mean)²/n; 0 where nothing was counted."""
        count = self.count.clamp(min=1)
        mean = self.total / count
        return torch.addcmul(self.square / count, mean, mean, value=-1).clamp_(min=0)

    @property
    def std(self) -> Tensor:
        """(C,) square root of `var`."""
        return self.var.sqrt()

    def merge(self, other: "Moments") -> "Moments":
        """Statistics of both sets of features together. Raises ValueError where their channels differ."""
        if self.total.shape != other.total.shape:
            found = f"{self.total.shape[0]} and {other.total.shape[0]}"
            raise ValueError(f"Moments.merge: expected equal numbers of channels, found {found}")
        return Moments(self.count + other.count, self.total + other.total, self.square + other.square)

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> "Moments":
        """Statistics over all ranks of `group`, whatever each of them holds: one all-reduce of 2·C + 1 numbers.

        Without an initialised process group these same statistics.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        packed = torch.cat([self.count.reshape(1), self.total, self.square])
        distributed.all_reduce(packed, group=group)
        return _unpack(packed)


torch.serialization.add_safe_globals([Moments])  # torch.load reads what torch.save wrote of them


def moments_reference(x: Tensor, *, valid: Tensor | None = None) -> Moments:
    """`moments` by its definition in plain torch, every number in float64."""
    rows = x.detach().double().reshape(-1, x.shape[-1])
    keep = rows.new_ones(len(rows)) if valid is None else valid.reshape(-1).double()
    rows = rows.masked_fill(keep[:, None] == 0, 0)
    return Moments(keep.sum(), rows.sum(0), rows.square().sum(0))


def _run(x, valid, triton):
    """n, Σx and Σx² of x (A, B, N, C) with valid (A, B, N), packed into (1 + 2·C,) float64."""
    check_filled("x", x)
    out = _empty(x)
    if triton:
        from .moments_triton import launch_moments

        launch_moments(x, valid, out)
        return out
    if valid is None:
        out[0].fill_(math.prod(x.shape[:3]))
    else:
        torch.sum(valid, (0, 1, 2), dtype=out.dtype, out=out[0])
    sums = out[1:].view(2, -1).zero_()
    for block, keep in _blocks(x, valid):
        sums += _block_sums(block, keep)
    return out


_moments = torch.library.custom_op(
    f"{NAMESPACE}::moments", _run, mutates_args=(), schema="(Tensor x, Tensor? valid, bool triton) -> Tensor"
)


@_moments.register_fake
def _(x, valid, triton):
    return _empty(x)


batch_by_loop(_moments)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(1 + 2 * x.shape[-1], dtype=torch.float64)


def _unpack(packed: Tensor) -> Moments:
    channels = len(packed) // 2
    count, total, square = packed.split([1, channels, channels])
    return Moments(count.reshape(()), total, square)


def _blocks(x: Tensor, valid: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Blocks (b, n, C) with (b, n, 1) of `valid` that stay in the CPU's cache; on a GPU as few as strides allow."""
    _, _, width, channels = x.shape
    block = BLOCK if x.device.type == "cpu" else x.numel()
    lines = max(1, block // (width * channels))
    tokens = width if lines > 1 else max(1, block // channels)
    for a in range(x.shape[0]):
        for first in range(0, x.shape[1], lines):
            for token in range(0, width, tokens):
                at = a, slice(first, first + lines), slice(token, token + tokens)
                yield x[at], None if valid is None else valid[at][..., None]


def _block_sums(block: Tensor, keep: Tensor | None) -> Tensor:
    """(2, C) float64: Σx and Σx² of one block, by the formula at the top of this file."""
    compute = torch.promote_types(block.dtype, torch.float32)
    block = block.to(compute)
    if keep is None:
        count = block.shape[0] * block.shape[1]
        mean = block.sum((0, 1)) / count
        deviation = block - mean
    else:
        count = keep.sum(dtype=torch.float64)
        block = torch.where(keep, block, 0)  # not a product: padding may hold NaN
        mean = (block.sum((0, 1)) / count.clamp(min=1)).to(compute)
        deviation = torch.addcmul(block, keep.to(compute), mean, value=-1)  # a product is several times faster
    rest = deviation.sum((0, 1)).double()
    squares = deviation.square_().sum((0, 1)).double()
    mean = mean.double()
    return torch.stack([count * mean + rest, squares + 2 * mean * rest + count * mean**2])


def moments(x: Tensor, *, valid: Tensor | None = None, impl: str = "auto") -> Moments:
    """Count, sum and sum of squares of every channel of x (…, C), in one pass over memory.

    x: at least (N, C), any strides (NCHW as `.permute(0, 2, 3, 1)`), a floating dtype of 16 bits or more. A block's
    sum, and that of its squared deviations from its mean, is float32 (float64 for float64), everything else float64.
    Where such a sum overflows the result is Inf or NaN; NaN and Inf come through.
    valid: bool of shape x.shape[:-1]; False tokens do not count, whatever they hold. With no valid token at all the
    count is 0, and so are mean and variance.

    The statistics are constants: no gradient flows through them. Two runs are bit-equal. No host sync. A tensor of more
    than four dimensions whose strides do not join is copied.
    Raises ValueError for shapes and devices that do not fit, TypeError for dtypes.
    """
    check_float("x", x)
    if x.dim() < 2 or is_empty(x.shape):
        raise ValueError(f"x: expected (…, C) with at least one token and one channel, found shape {tuple(x.shape)}")
    if valid is not None:
        check_tensor("valid", valid)
        if valid.shape != x.shape[:-1]:
            raise ValueError(f"valid: expected shape {tuple(x.shape[:-1])}, found {tuple(valid.shape)}")
        if valid.dtype != torch.bool:
            raise TypeError(f"valid: expected torch.bool, True where a token counts, found {valid.dtype}")
        if valid.device != x.device:
            raise ValueError(f"valid: expected the device of x, {x.device}, found {valid.device}; move it first")
    chosen = choose_impl(impl, x, supported=lambda: math.prod(x.shape[:-1]) <= MAX_TOKENS)
    x, compute = x.detach(), _moments
    if is_plain(x, valid):
        compute = _run  # the dispatcher between costs more than a small map itself
        x, valid = _in_memory_order(x, valid)
    x = _four_dimensions(x)
    valid = None if valid is None else valid.reshape(x.shape[:3])
    return _unpack(compute(x, valid, chosen == "triton"))


def _in_memory_order(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with leading dimensions as x has them in memory, where more tokens join so; their order decides nothing."""
    order = sorted(range(x.dim() - 1), key=lambda i: -x.stride(i))
    ordered = x.permute(*order, -1)
    if _four_dimensions(ordered).shape[2] <= _four_dimensions(x).shape[2]:
        return x, valid
    return ordered, None if valid is None else valid.permute(order)


def _four_dimensions(x: Tensor) -> Tensor:
    """(A, B, N, C) view with N as long as the strides allow: all tokens of a dense map, H·W of an NCHW view."""
    sizes, strides = list(x.shape), list(x.stride())
    for i in range(x.dim() - 2, 0, -1):
        # A dimension of one element has no stride of its own.
        if sizes[i - 1] == 1 or sizes[i] == 1 or strides[i - 1] == strides[i] * sizes[i]:
            strides[i - 1] = strides[i - 1] if sizes[i] == 1 else strides[i]
            sizes[i - 1] *= sizes[i]
            del sizes[i], strides[i]
    if len(sizes) > 4:
        return x.reshape(1, 1, -1, x.shape[-1])
    return x.view(*[1] * (4 - len(sizes)), *sizes)
