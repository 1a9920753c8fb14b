"""The torch path of align.py: the same forward and backward as its kernels, in blocks that stay in the CPU's cache."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import resize_bilinear_reference

EPS = 1e-8  # torch.nn.functional.cosine_similarity's
# Numbers per side at once, so that a block's dozen passes run in the cache. Of 2¹⁴…2¹⁹ the fastest or within 20 % of it
# for (1, 50, 84, 384) and (32, 14, 14, 768) float32 on 1 and 2 threads of a shared x86 server, November 2026.
BLOCK = 1 << 18


def compute_dtype(source: Tensor, target: Tensor) -> torch.dtype:
    """float64 when an input is, else float32."""
    return torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)


def shares(valid: Tensor | None, rows: Tensor, by_map: bool, reduction: str) -> Tensor:
    """(2, B): what one cosine, and one token's smooth-L1, of sample b weigh in the result. Never syncs."""
    batch, height, width = rows.shape
    share = rows.new_empty((2, batch))
    if reduction == "token":
        return share.fill_(1)
    if valid is None:
        samples = batch if reduction == "mean" else 1
        share[0].fill_(1 / samples if by_map else 1 / (samples * height * width))
        share[1].fill_(1 / (samples * height * width))
        return share
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
    source, target, mean, std, valid, share, cos_weight, l1_weight, beta, resize, by_map,
    rows, stats, grad_source, grad_target,
):  # fmt: skip
    """Fill rows (B, H, W), and stats (3, B, H, W) and the gradients where they are not empty."""
    upstream = rows.new_ones(()).expand(rows.shape)
    for at, s, t in _blocks(source, target, mean, std, valid, resize):
        sums = (s * t).sum(-1), (s * s).sum(-1), (t * t).sum(-1)  # (b, h, W)
        cos_share, l1_share = share[:, at[0], None, None]
        value = (l1_weight * l1_share) * F.smooth_l1_loss(s, t, beta=beta, reduction="none").mean(-1)
        if not by_map:
            value += cos_weight * cos_share * (1 - cosine(*sums))
        rows[at] = value if valid is None else value.masked_fill_(~valid[at], 0)
        if stats.numel():
            stats[:, at[0], at[1]] = torch.stack(sums)
        weights = _token_weights(upstream, share, valid, at, cos_weight, l1_weight / s.shape[-1])
        _gradients(s, t, std, sums, *weights, beta, _part(grad_source, at), _part(grad_target, at))


def backward(
    upstream, source, target, mean, std, valid, share, stats, cos_weight, l1_weight, beta, resize,
    grad_source, grad_target,
):  # fmt: skip
    """Fill the gradients that are not empty; upstream is (B, H, W)."""
    stats = stats.expand(3, *upstream.shape)  # (3, B, 1, 1) where the cosine is one per sample
    for at, s, t in _blocks(source, target, mean, std, valid, resize):
        weights = _token_weights(upstream, share, valid, at, cos_weight, l1_weight / s.shape[-1])
        sums = stats[:, at[0], at[1]]
        _gradients(s, t, std, sums, *weights, beta, _part(grad_source, at), _part(grad_target, at))


def _blocks(source, target, mean, std, valid, resize) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """(where, source, target): a few samples, or a few rows of one, on the common grid, standardised, padding 0."""
    batch, height, width, channels = (target if resize == "source" else source).shape
    block = BLOCK if source.device.type == "cpu" else source.numel() + target.numel()
    samples = max(1, block // (height * width * channels))
    lines = height if samples > 1 else max(1, block // (width * channels))
    compute = compute_dtype(source, target)
    mean = None if mean is None else mean.to(compute)
    std = None if std is None else std.to(compute)
    for first in range(0, batch, samples):
        some = slice(first, first + samples)
        s, t = source[some], target[some]
        if resize == "source":
            s = resize_bilinear_reference(s.to(compute), (height, width))
        elif resize == "target":
            t = resize_bilinear_reference(t.to(compute), (height, width))
        for line in range(0, height, lines):
            at = some, slice(line, line + lines)
            s_block, t_block = s[:, at[1]].to(compute), t[:, at[1]].to(compute)
            t_block = t_block if mean is None else t_block - mean
            t_block = t_block if std is None else t_block / std
            if valid is not None:
                # Not a product: padding may hold NaN.
                padding = ~valid[at][..., None]
                s_block, t_block = s_block.masked_fill(padding, 0), t_block.masked_fill(padding, 0)
            yield at, s_block, t_block


def _part(grad: Tensor, at: tuple[slice, slice]) -> Tensor:
    return grad[at] if grad.numel() else grad


def _token_weights(upstream, share, valid, at, cos_weight, l1_weight) -> tuple[Tensor, Tensor]:
    """Upstream gradient times weight, of the cosine and of one channel's smooth-L1; (b, h, W), 0 on padding."""
    upstream = upstream[at] if valid is None else upstream[at].masked_fill(~valid[at], 0)
    cos_share, l1_share = share[:, at[0], None, None]
    return upstream * (cos_weight * cos_share), upstream * (l1_weight * l1_share)


def _gradients(s, t, std, sums, u_cos, u_l1, beta, grad_source, grad_target):
    if not (grad_source.numel() or grad_target.numel()):
        return
    st, ss, tt = sums
    s_norm, t_norm = ss.sqrt().clamp(min=EPS), tt.sqrt().clamp(min=EPS)
    difference = s - t
    slope = difference.div_(beta).clamp_(-1, 1) if beta > 0 else difference.sign_()
    slope *= u_l1[..., None]
    cross = -u_cos / (s_norm * t_norm)
    along = u_cos * st / (s_norm * t_norm)
    if grad_source.numel():
        mine = torch.addcmul(slope, t, _where_long(cross, s_norm))
        grad_source.copy_(mine.addcmul_(s, _where_long(along / s_norm**2, s_norm)))
    if grad_target.numel():
        mine = torch.addcmul(-slope, s, _where_long(cross, t_norm))
        mine.addcmul_(t, _where_long(along / t_norm**2, t_norm))
        grad_target.copy_(mine if std is None else mine / std.to(mine.dtype))


def _where_long(coefficient: Tensor, norm: Tensor) -> Tensor:
    """0 where the vector is too short to have a direction; (B, H, W, 1)."""
    return torch.where(norm > EPS, coefficient, 0)[..., None]
