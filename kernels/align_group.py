"""Several align_loss terms in few launches: a step with many small feature maps waits for the launches."""

# Terms whose dtypes, options and tile of channels agree share a launch (MAX_SLOTS at most). Each program leaves one
# partial sum, and one more launch adds them up, term by term in a fixed order: two runs are bit-equal.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .align import align_loss, check_choices, check_tensors, check_weights, takes_triton
from .align_op import NO_DOUBLE, gradient_in_forward, may_overwrite, scaled
from .launch import NAMESPACE
from .tensors import check_filled, is_differentiated, is_plain, is_transformed, token_strides


class AlignTerm(NamedTuple):
    """One loss of `align_losses`, with the options of `align_loss` that a mean over all tokens on one grid has.

    source, target: (B, H, W, C), (B, N, C) or (B, C) of equal shape; the rest as in `align_loss`.
    """

    source: Tensor
    target: Tensor
    cos_weight: float = 0.9
    l1_weight: float = 0.1
    beta: float = 1.0
    target_mean: Tensor | None = None
    target_std: Tensor | None = None
    valid: Tensor | None = None


def align_losses(terms: Sequence[AlignTerm], *, impl: str = "auto") -> Tensor:
    """(T,) losses of T terms: `align_loss` of each, in a few launches for all of them on a GPU.

    A term is a call of `align_loss` if its channels are not adjacent in memory (NCHW), its lines not evenly spaced, if
    it is of float64 or wider than the kernels take, or if it takes a gradient in float16. Views without a cls token
    share launches.
    Every term has its own upstream gradient; where that is 1, as for the sum of all, the backward reads no gradient.
    Returns float32, or float64 when a side is float64. Raises what `align_loss` raises, with the term's number, and
    ValueError for no terms and for terms on several devices.
    """
    terms = list(terms)
    if not terms:
        raise ValueError("align_losses: expected at least one term, found none")
    check_choices(None, "token", "mean", "NHWC", impl)
    transformed = is_transformed()
    together = []
    for number, term in enumerate(terms):
        if not isinstance(term, AlignTerm):
            raise TypeError(f"term {number}: expected an AlignTerm, found {type(term).__name__}")
        try:
            check_weights(*term[2:5])
            if transformed:
                _check_tensors(term)
            elif _can_share(term, impl):
                together.append(number)
        except (ValueError, TypeError, RuntimeError) as error:
            if type(error) not in (ValueError, TypeError, RuntimeError):  # torch's own, made of more than a message
                raise
            raise type(error)(f"term {number}: {error}") from None
    device = terms[0].source.device
    for number, term in enumerate(terms):
        if term.source.device != device:
            raise ValueError(
                f"term {number}: expected the device of the first, {device}, found {term.source.device}; move it first"
            )
    if len(together) < 2:
        return torch.stack([_alone(term, impl) for term in terms])
    losses = _grouped([terms[i] for i in together])
    if len(together) == len(terms):
        return losses
    found = dict(zip(together, losses.unbind(), strict=True))
    return torch.stack([found[i] if i in found else _alone(term, impl) for i, term in enumerate(terms)])


def _alone(term: AlignTerm, impl: str) -> Tensor:
    source, target, cos_weight, l1_weight, beta, mean, std, valid = term
    options = {"cos_weight": cos_weight, "l1_weight": l1_weight, "beta": beta, "valid": valid, "impl": impl}
    return align_loss(source, target, target_mean=mean, target_std=std, **options)


_known: dict[tuple, bool] = {}
_MAX_KNOWN = 4096


def _can_share(term: AlignTerm, impl: str) -> bool:
    """Whether the term may share launches. Raises what `align_loss` raises for its tensors.

    Terms like an earlier one are not looked at again: on the host that took a fifth of a whole call with its backward.
    """
    alike = _likeness(term, impl)
    known = None if alike is None else _known.get(alike)
    if known is not None:
        return known
    _check_tensors(term)
    sides = term.source, term.target
    shares = takes_triton(impl, *sides) and gradient_in_forward(
        *sides, "token", "mean", *(x.requires_grad for x in sides)
    )
    shares = shares and all(token_strides(x) for x in sides)
    if alike is not None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[alike] = shares
    return shares


def _check_tensors(term: AlignTerm) -> None:
    check_tensors(term.source, term.target, None, term.target_mean, term.target_std, term.valid)


def _likeness(term: AlignTerm, impl: str) -> tuple | None:
    """What `_can_share` depends on; None where something traces or wraps the tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    found: list = [impl]
    for x in (term.source, term.target, *term[5:]):
        if x is None:
            found.append(None)
        elif type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and not x.is_nested:
            found += x.shape, x.stride(), x.dtype, x.device, x.requires_grad
        else:
            return None
    return tuple(found)


def _grouped(terms: Sequence[AlignTerm]) -> Tensor:
    recording = torch.is_grad_enabled()
    sources, targets, cos, l1, betas, means, stds, valids = (list(column) for column in zip(*terms, strict=True))
    needs = [[recording and x.requires_grad for x in side] for side in (sources, targets)]
    lists = means, stds, valids, [float(x) for x in cos], [float(x) for x in l1], [float(x) for x in betas], *needs
    if is_plain(*sources, *targets):
        return _AlignLosses.apply(len(terms), lists, *sources, *targets)
    return _forward(sources, targets, *lists)[0]


def _run_forward(sources, targets, means, stds, valids, cos_weights, l1_weights, betas, need_source, need_target):
    """((T,) losses, gradients to the sources, to the targets); a gradient that is not wanted is an empty tensor."""
    from .align_group_launch import launch_group

    for number, source in enumerate(sources):
        check_filled(f"term {number}: source", source)
    losses, grads_source, grads_target = _allocate(sources, targets, need_source, need_target)
    launch_group(
        sources, targets, means, stds, valids, cos_weights, l1_weights, betas, grads_source, grads_target, losses
    )
    return losses, grads_source, grads_target


def _allocate(sources, targets, need_source, need_target):
    losses = sources[0].new_empty(len(sources), dtype=torch.float32)
    grads = (
        [x.new_empty(x.shape if needed else 0) for x, needed in zip(side, need, strict=True)]
        for side, need in ((sources, need_source), (targets, need_target))
    )
    return losses, *grads


_forward = torch.library.custom_op(
    f"{NAMESPACE}::align_group_forward",
    _run_forward,
    mutates_args=(),
    schema="(Tensor[] sources, Tensor[] targets, Tensor?[] means, Tensor?[] stds, Tensor?[] valids, "
    "float[] cos_weights, float[] l1_weights, float[] betas, bool[] need_source, bool[] need_target)"
    " -> (Tensor, Tensor[], Tensor[])",
)


@_forward.register_fake
def _(sources, targets, means, stds, valids, cos_weights, l1_weights, betas, need_source, need_target):
    return _allocate(sources, targets, need_source, need_target)


def _save(ctx, needs, grads):
    ctx.set_materialize_grads(False)
    ctx.needs = needs
    ctx.save_for_backward(*grads)


def _scaled(ctx, upstream) -> list[Tensor | None]:
    """The kept gradients, sources then targets, each times its term's upstream gradient; None where not wanted."""
    if torch.is_grad_enabled() or is_differentiated():
        raise RuntimeError(NO_DOUBLE)
    if upstream is None:
        return [None] * len(ctx.needs)
    places = list(range(len(ctx.needs) // 2)) * 2
    wanted = [(grad, place) for grad, place, need in zip(ctx.saved_tensors, places, ctx.needs, strict=True) if need]
    if not wanted:
        products = iter(())
    elif all(may_overwrite(grad, upstream) for grad, _ in wanted):
        from .align_group_launch import launch_group_scale

        launch_group_scale(*zip(*wanted, strict=True), upstream)
        products = iter([grad for grad, _ in wanted])
    else:
        products = iter([scaled(grad, upstream[place]) for grad, place in wanted])
    return [next(products) if need else None for need in ctx.needs]


def _save_operator(ctx, inputs, output):
    _, grads_source, grads_target = output
    ctx.mark_non_differentiable(*grads_source, *grads_target)
    _save(ctx, (*inputs[-2], *inputs[-1]), (*grads_source, *grads_target))
    # Of a list that holds tensors only torch expects a gradient for each, of any other argument one None.
    ctx.nothing = [[None] * len(x) if all(isinstance(t, Tensor) for t in x) else None for x in inputs[2:]]


def _backward_operator(ctx, upstream, *_):
    grads = _scaled(ctx, upstream)
    half = len(grads) // 2
    return grads[:half], grads[half:], *ctx.nothing


_forward.register_autograd(_backward_operator, setup_context=_save_operator)


class _AlignLosses(torch.autograd.Function):
    """The operator for `is_plain` tensors without the dispatcher between, as in align_op.py."""

    @staticmethod
    def forward(ctx, count, lists, *sides):
        losses, *grads = _run_forward(list(sides[:count]), list(sides[count:]), *lists)
        _save(ctx, (*lists[-2], *lists[-1]), (*grads[0], *grads[1]))
        return losses

    @staticmethod
    def backward(ctx, upstream):
        return None, None, *_scaled(ctx, upstream)
