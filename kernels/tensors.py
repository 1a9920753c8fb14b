"""What the functions ask of the tensors they are given: dtype, layout, and what traces, transforms or wraps them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
