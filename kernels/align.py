"""L_align: cosine + smooth-L1 between two feature maps, with the resize and the standardisation fused (KPU, eq. 1)."""

# Tokens i of the common grid, channels j, s the source, t = (target − mean) / std, both already on that grid:
#   ŝ = max(|s_i|, ε), t̂ = max(|t_i|, ε), ε = 1e-8, cos_i = s_i·t_i / (ŝ t̂)
#   token_i = w_cos·(1 − cos_i) + w_l1·(1/C) Σ_j φ_β(s_ij − t_ij)
#   φ_β(d) = d²/(2β) for |d| < β, |d| − β/2 otherwise; φ_0(d) = |d|
# Gradient, u_i the weight of token i in the result times the upstream gradient:
#   dL/ds_ij = −u_i·w_cos·[|s_i| > ε]·(t_ij/(ŝ t̂) − cos_i·s_ij/ŝ²) + (u_i·w_l1/C)·φ'_β(s_ij − t_ij)
#   dL/dt_ij = the same with s and t exchanged; d/dtarget = dL/dt / std
# The bracket: a vector of no length has no direction, so its cosine gives no gradient (torch's would be ~5e7).
# cos_over="map": one cosine per sample, over all its valid H·W·C numbers; its token weights become sample weights.
#
# "mean" makes the gradient in the forward pass, while both tokens are in registers, and the backward only scales it;
# elsewhere three sums per token (s·t, s·s, t·t) are kept and the gradient is made in the backward. So is that of
# float16, which would lose a gradient of size 1/(N·C) to underflow before a loss scaler could save it.

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .align_op import align
from .align_torch import EPS, compute_dtype
from .launch import IMPLS, MAX_CHANNELS, MAX_SIDE, MAX_TOKENS, choose_impl
from .resize import LAYOUTS, resize_bilinear_reference
from .tensors import check_filled, check_float, check_tensor, is_transformed, same_grid


def align_loss_reference(
    source: Tensor,
    target: Tensor,
    *,
    cos_weight: float = 0.9,
    l1_weight: float = 0.1,
    beta: float = 1.0,
    resize: str | None = None,
    align_corners: bool = False,
    target_mean: Tensor | None = None,
    target_std: Tensor | None = None,
    cos_over: str = "token",
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`align_loss` in plain torch with autograd, computed in the inputs' own dtype (use float64 to judge others)."""
    if resize == "source" and source.dim() == 4:
        source = resize_bilinear_reference(source, target.shape[1:3], align_corners=align_corners)
    if resize == "target" and source.dim() == 4:
        target = resize_bilinear_reference(target, source.shape[1:3], align_corners=align_corners)
    target = target if target_mean is None else target - target_mean
    target = target if target_std is None else target / target_std
    common = torch.promote_types(source.dtype, target.dtype)
    keep = torch.ones(source.shape[:-1], dtype=torch.bool, device=source.device) if valid is None else valid
    source = source.to(common).masked_fill(~keep[..., None], 0)
    target = target.to(common).masked_fill(~keep[..., None], 0)

    smooth = F.smooth_l1_loss(source, target, beta=beta, reduction="none").mean(-1)  # (B, H, W)
    batch = keep.shape[0]
    count = keep.reshape(batch, -1).sum(1)  # (B,)
    if cos_over == "map":
        cosine = _cosine_reference(source.flatten(1), target.flatten(1))  # (B,)
        l1 = smooth.reshape(batch, -1).sum(1) / count.clamp(min=1)
        sample = torch.where(count > 0, cos_weight * (1 - cosine) + l1_weight * l1, 0)
        return sample if reduction == "sample" else sample.sum() / (count > 0).sum().clamp(min=1)
    token = torch.where(keep, cos_weight * (1 - _cosine_reference(source, target)) + l1_weight * smooth, 0)
    if reduction == "token":
        return token
    if reduction == "sample":
        return token.reshape(batch, -1).sum(1) / count.clamp(min=1)
    return token.sum() / count.sum().clamp(min=1)


def _cosine_reference(s: Tensor, t: Tensor) -> Tensor:
    eps = max(EPS, torch.finfo(s.dtype).tiny)  # 1e-8 is 0 in float16
    s_norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    t_norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    s = torch.where(s_norm > eps, s, s.detach()) / s_norm.clamp(min=eps)
    t = torch.where(t_norm > eps, t, t.detach()) / t_norm.clamp(min=eps)
    return (s * t).sum(-1)


def align_loss(
    source: Tensor,
    target: Tensor,
    *,
    cos_weight: float = 0.9,
    l1_weight: float = 0.1,
    beta: float = 1.0,
    resize: str | None = None,
    align_corners: bool = False,
    target_mean: Tensor | None = None,
    target_std: Tensor | None = None,
    cos_over: str = "token",
    valid: Tensor | None = None,
    reduction: str = "mean",
    layout: str = "NHWC",
    impl: str = "auto",
) -> Tensor:
    """cos_weight·(1 − cosine) + l1_weight·smooth-L1 between two feature maps (KPU eq. 1; AM-RADIO's and theia's too).

    source, target: (B, H, W, C), (B, N, C) or (B, C), or with layout="NCHW" (B, C, H, W); any strides, floating dtypes
    that may differ, up to 4096 channels in the kernels (more take the torch path); gradients to either or both.
    resize: "source" | "target" bilinearly moves that side to the other's grid; None: grids match. align_corners: as in
    `F.interpolate`.
    target_mean, target_std: (C,) make the target (target − mean) / std; constants, no gradient; std must not be 0.
    cos_over: "token" takes one cosine per token, "map" one per sample over its flattened H·W·C.
    valid: bool, shape of the common grid, (B, H, W), (B, N) or (B,); False tokens count neither in sum nor in mean and
    get gradient 0 whatever they hold. With no valid token at all the result and the gradients are 0.
    reduction: "mean" → (): over all valid tokens (with cos_over="map": over samples that have one); "sample" → (B,):
    over each sample's valid tokens; "token" → the common grid's shape, 0 where invalid.

    Returns float32, or float64 when a side is float64. All arithmetic is float32 (float64) inside. Norms are clamped
    at 1e-8 as PyTorch clamps them: the cosine of a shorter side shrinks with its length, to 0 for a zero vector, and
    that side takes no gradient from it. Two runs are bit-equal, except with impl="torch" and a resize on CUDA. The
    gradient cannot itself be differentiated. Under torch.func transforms and forward-mode differentiation
    `align_loss_reference` takes over, in float32 (float64).
    The weights are numbers, constants to torch.compile: to schedule one, multiply the loss. A gradient made in the
    forward is scaled in place: a forward captured in a CUDA graph of its own takes one backward per replay.
    Raises ValueError for shapes, grids, devices and options that do not fit, TypeError for dtypes, RuntimeError where
    impl="triton" cannot run.
    """
    check_weights(cos_weight, l1_weight, beta)
    check_choices(resize, cos_over, reduction, layout, impl)
    if layout == "NCHW":
        source, target = _channels_last("source", source), _channels_last("target", target)
    check_tensors(source, target, resize, target_mean, target_std, valid)
    rank = source.dim()
    shape = (target if resize == "source" else source).shape[:-1]
    if rank == 2:  # B one-token samples are one sample of B tokens: "sample" is "token", and a map is a token
        cos_over, reduction = "token", "token" if reduction == "sample" else reduction
        source, target = source[None, :, None], target[None, :, None]
        valid = None if valid is None else valid[None, :, None]
    elif rank == 3:
        source, target = source[:, :, None], target[:, :, None]
        valid = None if valid is None else valid[:, :, None]
    if is_transformed():
        compute = compute_dtype(source, target)
        loss = align_loss_reference(
            source.to(compute), target.to(compute), cos_weight=cos_weight, l1_weight=l1_weight, beta=beta,
            resize=resize, align_corners=align_corners,
            target_mean=None if target_mean is None else target_mean.detach().to(compute),
            target_std=None if target_std is None else target_std.detach().to(compute),
            cos_over=cos_over, valid=valid, reduction=reduction,
        )  # fmt: skip
        return loss.reshape(shape) if reduction == "token" else loss
    moved = "none" if resize is None or same_grid(source.shape[1:3], target.shape[1:3]) else resize
    recording = torch.is_grad_enabled()
    loss = align(
        source, target, target_mean, target_std, valid, float(cos_weight), float(l1_weight), float(beta),
        moved, bool(align_corners), cos_over, reduction, takes_triton(impl, source, target, moved != "none"),
        recording and source.requires_grad, recording and target.requires_grad,
    )  # fmt: skip
    return loss.reshape(shape) if reduction == "token" else loss


class AlignLoss(nn.Module):
    """`align_loss` with its options fixed; `target_mean` and `target_std` become non-persistent buffers.

    They move with the module and keep their dtype: the arithmetic is float32 beside maps of any dtype.
    """

    def __init__(
        self,
        *,
        cos_weight: float = 0.9,
        l1_weight: float = 0.1,
        beta: float = 1.0,
        resize: str | None = None,
        align_corners: bool = False,
        target_mean: Tensor | None = None,
        target_std: Tensor | None = None,
        cos_over: str = "token",
        reduction: str = "mean",
        layout: str = "NHWC",
        impl: str = "auto",
    ):
        super().__init__()
        weights = {"cos_weight": cos_weight, "l1_weight": l1_weight, "beta": beta}
        choices = {"resize": resize, "cos_over": cos_over, "reduction": reduction, "layout": layout, "impl": impl}
        check_weights(**weights)
        check_choices(**choices)
        self.options = weights | choices | {"align_corners": align_corners}
        self.register_buffer("target_mean", target_mean, persistent=False)
        self.register_buffer("target_std", target_std, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "AlignLoss":
        given = {"target_mean": self.target_mean, "target_std": self.target_std}
        super()._apply(fn, recurse)
        for name, before in given.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != before.dtype:  # a cast of the model around would round them
                setattr(self, name, before.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(self, source: Tensor, target: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Same shapes, results and errors as `align_loss`."""
        mean, std = self.target_mean, self.target_std
        return align_loss(source, target, target_mean=mean, target_std=std, valid=valid, **self.options)


def takes_triton(impl: str, source: Tensor, target: Tensor, resized: bool = False) -> bool:
    """Whether `align_loss` runs these sides in its kernels; raises where "triton" was asked for and cannot."""

    def fits() -> bool:
        sides = not resized or all(side <= MAX_SIDE for x in (source, target) for side in x.shape[1:3])
        return sides and all(
            x.shape[-1] <= MAX_CHANNELS and math.prod(x.shape[:-1]) <= MAX_TOKENS for x in (source, target)
        )

    return choose_impl(impl, source, target, supported=fits) == "triton"


def check_weights(cos_weight, l1_weight, beta) -> None:
    """Raise what `align_loss` promises for numbers that do not fit."""
    for name, found in (("cos_weight", cos_weight), ("l1_weight", l1_weight), ("beta", beta)):
        if type(found) is float:
            continue
        if isinstance(found, Tensor):  # reading it would wait for the GPU and lose its gradient
            raise TypeError(f"{name}: expected a number, found a tensor; multiply the loss by it instead")
        # Numbers first: Dynamo cannot trace hasattr of one that it made a symbol.
        if not isinstance(found, int | float | torch.SymInt | torch.SymFloat) and not hasattr(found, "__float__"):
            raise TypeError(f"{name}: expected a number, found {found!r}")
    if not (beta == 0 or 1e-30 <= beta <= 1e30):  # it and 1/beta have to be float32
        raise ValueError(f"beta: expected 0 or a number from 1e-30 to 1e30, found {beta}")


def check_choices(resize, cos_over, reduction, layout, impl) -> None:
    """Raise what `align_loss` promises for choices that do not fit."""
    for name, found, allowed in (
        ("impl", impl, IMPLS),
        ("resize", resize, ("source", "target", None)),
        ("cos_over", cos_over, ("token", "map")),
        ("reduction", reduction, ("mean", "sample", "token")),
        ("layout", layout, LAYOUTS),
    ):
        if found not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, found {found!r}")
    if cos_over == "map" and reduction == "token":
        raise ValueError('reduction: expected "mean" or "sample" with cos_over="map" (one cosine), found "token"')


def _channels_last(name: str, x: Tensor) -> Tensor:
    check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f'{name}: expected (B, C, H, W) with layout="NCHW", found shape {tuple(x.shape)}')
    return x.permute(0, 2, 3, 1)


def check_tensors(source, target, resize, mean, std, valid) -> None:
    """Raise what `align_loss` promises for tensors that do not fit together."""
    for name, x in (("source", source), ("target", target)):
        check_float(name, x)
        if x.dim() not in (2, 3, 4):
            raise ValueError(f"{name}: expected (B, H, W, C), (B, N, C) or (B, C), found shape {tuple(x.shape)}")
        check_filled(name, x)
    both = f"source {tuple(source.shape)} and target {tuple(target.shape)}"
    if source.dim() != target.dim() or source.shape[0] != target.shape[0]:
        raise ValueError(f"source, target: expected equal rank and batch, found {both}")
    if source.shape[-1] != target.shape[-1]:
        nchw = source.dim() == 4 and source.shape[1] == target.shape[1] and source.shape[2] != target.shape[2]
        fix = 'maps (B, C, H, W) take layout="NCHW"' if nchw else "project one"
        raise ValueError(f"source, target: expected equal channels (last dimension), found {both}; {fix}")
    if (resize is None or source.dim() != 4) and source.shape != target.shape:
        fix = "only (B, H, W, C) maps can be resized"
        if source.dim() == 4:
            fix = 'align_loss with resize="source" or "target" brings one to the grid of the other'
        raise ValueError(f"source, target: expected equal grids, found {both}; {fix}")
    grid = tuple((target if resize == "source" else source).shape[:-1])
    for name, x, shape in (
        ("target", target, tuple(target.shape)),
        ("target_mean", mean, (source.shape[-1],)),
        ("target_std", std, (source.shape[-1],)),
        ("valid", valid, grid),
    ):
        if x is None:
            continue
        check_tensor(name, x)
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {tuple(x.shape)}")
        if x.device != source.device:
            raise ValueError(f"{name}: expected the device of source, {source.device}, found {x.device}; move it first")
        if name == "valid" and x.dtype != torch.bool:
            raise TypeError(f"valid: expected torch.bool, True where a token counts, found {x.dtype}")
        if name.startswith("target_"):
            check_float(name, x)
            if x.requires_grad:
                raise TypeError(f"{name}: expected a constant, found requires_grad=True; detach it")
