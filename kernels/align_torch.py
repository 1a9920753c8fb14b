"""The torch path of align.py: the same forward and backward as its kernels, in blocks that stay in the CPU's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .resize import resize_bilinear_reference
from .tensors import flat_stride, tokens_adjacent

EPS = 1e-8  # torch.nn.functional.cosine_similarity's
# Numbers per side at once, so that a block's passes run in the cache. Of 2¹⁸…2²² the fastest for (32, 16, 16, 768)
# float32 on 2 threads of a shared x86 server (32 MiB of L3), November 2026: half of it costs 10 %, twice 15 %.
BLOCK = 3 << 18


def compute_dtype(source: Tensor, target: Tensor) -> torch.dtype:
    """float64 when an input is, else float32."""
    return torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)


def common_grid(source: Tensor, target: Tensor, resize: str) -> torch.Size:
    """(B, H, W) of the grid on which the two are compared."""
    return (target if resize == "source" else source).shape[:3]


def final_weights(cos_weight: float, l1_weight: float, grid, masked: bool, by_map: bool, reduction: str):
    """The two weights times what one cosine, and one token's smooth-L1, weigh in the result where all weigh the same.

    grid: (B, H, W). Where a mask makes samples differ, the weights as they are: the rest is in `shares`.
    """
    if masked or reduction == "token":
        return cos_weight, l1_weight
    batch, height, width = grid
    samples = batch if reduction == "mean" else 1
    tokens = samples * height * width
    return cos_weight / (samples if by_map else tokens), l1_weight / tokens


def shares(valid: Tensor | None, like: Tensor, by_map: bool, reduction: str) -> Tensor:
    """(2, B): what one cosine, and one token's smooth-L1, of sample b weigh in the result. Never syncs.

    Empty where every sample weighs the same (`final_weights`). like: a tensor of the device and dtype.
    """
    if valid is None or reduction == "token":
        return like.new_empty(0)
    share = like.new_empty((2, len(valid)))
    count = valid.flatten(1).sum(1).to(share.dtype)  # (B,)
    if not by_map:
        return share.copy_((count.sum() if reduction == "mean" else count).clamp(min=1).reciprocal())
    filled = (count > 0).to(share.dtype)
    share[0] = filled / filled.sum().clamp(min=1) if reduction == "mean" else filled
    share[1] = share[0] / count.clamp(min=1)
    return share


def cosine(st: Tensor, ss: Tensor, tt: Tensor) -> Tensor:
    """s·t / (max(|s|, ε)·max(|t|, ε)) from the three sums."""
    return st / (ss.sqrt().clamp(min=EPS) * tt.sqrt().clamp(min=EPS))


def forward(
    source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, corners, by_map,
    rows, stats, grad_source, grad_target,
):  # fmt: skip
    """Fill rows (B, H, W), and stats (3, B, H, W) and the gradients where they are not empty."""
    weights = _token_weights(rows.new_ones(()).expand(rows.shape), share, valid, cos_weight, l1_weight, source)
    sums = rows.new_empty((4, *rows.shape))  # Σφ, s·t, |s|, |t|: what is left to do with them is done once, at the end
    for at, s, t, scratch in _blocks(source, target, mean, std, valid, resize, corners):
        u_cos, u_l1 = (weight[at].reshape(-1, 1) for weight in weights)
        smooth, st, s_norm, t_norm = (some[at].view(-1, 1) for some in sums)
        torch.linalg.vector_norm(s, dim=1, keepdim=True, out=s_norm)
        torch.linalg.vector_norm(t, dim=1, keepdim=True, out=t_norm)
        torch.sum(_smooth_l1(s, t, beta, scratch), 1, keepdim=True, out=smooth)
        grads = _part(grad_source, at), _part(grad_target, at)
        made = _gradients(s, t, std, None, s_norm, t_norm, u_cos, u_l1, beta, scratch, *grads)
        if made is None:
            torch.sum(torch.mul(s, t, out=scratch), 1, keepdim=True, out=st)
        else:
            st.copy_(made)
    smooth, st, s_norm, t_norm = sums
    u_cos, u_l1 = weights
    torch.mul(u_l1, smooth, out=rows)
    if not by_map:
        rows += u_cos * (1 - st / (s_norm.clamp(min=EPS) * t_norm.clamp(min=EPS)))
    if stats.numel():
        torch.stack((st, s_norm.square(), t_norm.square()), out=stats)


def backward(
    upstream, source, target, mean, std, valid, share, stats, cos_weight, l1_weight, beta, resize, corners,
    grad_source, grad_target,
):  # fmt: skip
    """Fill the gradients that are not empty; upstream is (B, H, W)."""
    by_map = stats.shape[2:] != upstream.shape[1:]
    weights = _token_weights(upstream, share, valid, cos_weight, l1_weight, source)
    stats = stats.expand(3, *upstream.shape)  # (3, B, 1, 1) where the cosine is one per sample
    for at, s, t, scratch in _blocks(source, target, mean, std, valid, resize, corners):
        u_cos, u_l1 = (weight[at].reshape(-1, 1) for weight in weights)
        st, ss, tt = stats[:, at[0], at[1]].reshape(3, -1, 1)
        grads = _part(grad_source, at), _part(grad_target, at)
        _gradients(s, t, std, st if by_map else None, ss.sqrt(), tt.sqrt(), u_cos, u_l1, beta, scratch, *grads)


def _blocks(
    source, target, mean, std, valid, resize, corners
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor]]:
    """(where, source, target, scratch): a few samples, or a few lines of one, on the common grid, standardised.

    The three are (tokens, C), dense, in the dtype that is computed in; padding is 0, scratch is anything.
    """
    (batch, height, width), channels = common_grid(source, target, resize), source.shape[3]
    compute = compute_dtype(source, target)
    block = BLOCK if source.device.type == "cpu" else source.numel() + target.numel()
    samples = min(batch, max(1, block // (height * width * channels)))
    lines = height if samples > 1 else min(height, max(1, block // (width * channels)))
    scratch = source.new_empty((samples * lines * width, channels), dtype=compute)
    mean = None if mean is None else mean.to(compute)
    std = None if std is None else std.to(compute)
    for first in range(0, batch, samples):
        some = slice(first, first + samples)
        s = _on_grid(source[some], resize == "source", height, width, corners, compute)
        t = _on_grid(target[some], resize == "target", height, width, corners, compute)
        for line in range(0, height, lines):
            at = some, slice(line, line + lines)
            s_block, t_block = (side[:, at[1]].to(compute).reshape(-1, channels).contiguous() for side in (s, t))
            t_block = t_block if mean is None else t_block - mean
            t_block = t_block if std is None else t_block / std
            if valid is not None:
                # Not a product: padding may hold NaN.
                padding = ~valid[at].reshape(-1, 1)
                s_block, t_block = s_block.masked_fill(padding, 0), t_block.masked_fill(padding, 0)
            yield at, s_block, t_block, scratch[: len(s_block)]


def _on_grid(side: Tensor, moves: bool, height: int, width: int, corners: bool, compute: torch.dtype) -> Tensor:
    """(b, height, width, C) of `side`, resized if it moves; what lay token beside token comes back channels-last."""
    if not moves:
        return _channels_last(side, compute)
    # Of the two maps the smaller is transposed. F.interpolate is 15 to 20 times as fast channels-last (24² → 14², 27²
    # and 64² × 768 float32, 1 thread of a shared x86 server, torch 2.13.0, November 2026).
    if side.shape[1] * side.shape[2] < height * width:
        side = _channels_last(side, compute)
    return _channels_last(resize_bilinear_reference(side.to(compute), (height, width), align_corners=corners), compute)


def _channels_last(side: Tensor, compute: torch.dtype) -> Tensor:
    """The (b, h, w, C) view itself, or a dense copy in the dtype that is computed in where tokens are adjacent."""
    if side.device.type != "cpu" or not tokens_adjacent(side) or flat_stride(side) is None:
        return side
    side = side.to(compute)
    out = side.new_empty(side.shape)
    for sample, copy in zip(side, out, strict=True):  # torch copies a matrix in tiles, 64² tokens 3 times as fast
        copy.flatten(0, 1).copy_(sample.flatten(0, 1))
    return out


def _part(grad: Tensor, at: tuple[slice, slice]) -> Tensor:
    return grad[at] if grad.numel() else grad


def _token_weights(upstream, share, valid, cos_weight, l1_weight, source) -> tuple[Tensor, Tensor]:
    """Upstream gradient times weight, of the cosine and of one channel's smooth-L1; (B, H, W), 0 on padding."""
    upstream = upstream if valid is None else upstream.masked_fill(~valid, 0)
    l1_weight = l1_weight / source.shape[3]
    if share.numel():
        cos_share, l1_share = share[:, :, None, None]
        cos_weight, l1_weight = cos_weight * cos_share, l1_weight * l1_share
    return upstream * cos_weight, upstream * l1_weight


def _smooth_l1(s: Tensor, t: Tensor, beta: float, out: Tensor) -> Tensor:
    if beta == 0:
        return torch.sub(s, t, out=out).abs_()
    return torch.ops.aten.smooth_l1_loss.out(s, t, 0, beta, out=out)


def _gradients(
    s, t, std, st, s_norm, t_norm, u_cos, u_l1, beta, scratch, grad_source, grad_target
) -> Tensor | None:  # fmt: skip
    """Fill the gradients that are not empty. Without st it is each token's own; it comes back if it was needed."""
    if not (grad_source.numel() or grad_target.numel()):
        return None
    if beta == 0:
        slope = torch.sub(s, t, out=scratch).sign_().mul_(u_l1)
    else:
        slope = torch.ops.aten.smooth_l1_loss_backward.grad_input(u_l1, s, t, 0, beta, grad_input=scratch)
    made = st
    if grad_source.numel():
        grad, made = _cosine_gradient(s, t, st, s_norm, t_norm, u_cos)
        _put(grad_source, grad, slope, 1, None)
    if grad_target.numel():
        grad, made = _cosine_gradient(t, s, st, t_norm, s_norm, u_cos)
        _put(grad_target, grad, slope, -1, std)
    return made


def _cosine_gradient(mine, other, st, norm, other_norm, u_cos) -> tuple[Tensor, Tensor]:
    """Gradient of u_cos·(1 − cosine) to `mine`, (tokens, C); and s·t, (tokens, 1)."""
    has_length, norm, other_norm = norm > EPS, norm.clamp(min=EPS), other_norm.clamp(min=EPS)
    weight = torch.where(has_length, -u_cos / other_norm, 0)
    if st is None and mine.device.type == "cpu":
        # Weight normalisation, w = g·v/|v|, has this very gradient, and PyTorch makes it in one pass over the token:
        # dv = g/|v|·(dw − v·(dw·v)/|v|²), dg = dw·v/|v|.
        grad, projection = torch.ops.aten._weight_norm_interface_backward(other, mine, weight, norm, 0)
        # The norm of numbers above 1.8e19 is infinite, and 0·Inf no number.
        return grad, torch.where(projection == 0, 0, projection * norm)
    st = (mine * other).sum(1, keepdim=True) if st is None else st
    weight = weight / norm
    return (other * weight).addcmul_(mine, -weight * st / norm**2), st


def _put(grad: Tensor, cosine_part: Tensor, slope: Tensor, sign: int, std: Tensor | None) -> None:
    """grad = (cosine_part + sign·slope) / std, in the layout and dtype of `grad`, (b, h, W, C)."""
    if std is None and grad.is_contiguous() and grad.dtype == cosine_part.dtype:
        torch.add(cosine_part, slope, alpha=sign, out=grad.view(cosine_part.shape))
        return
    whole = cosine_part.add_(slope, alpha=sign)
    whole = whole if std is None else whole.div_(std.to(whole.dtype))
    grad.copy_(whole.view(grad.shape))
