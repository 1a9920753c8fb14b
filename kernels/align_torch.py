"""The torch path of align.py: the same forward and backward as its kernels, on whole tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import resize_bilinear_reference

EPS = 1e-8  # torch.nn.functional.cosine_similarity's


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
    s, t = _common_grid(source, target, mean, std, valid, resize)
    st, ss, tt = (s * t).sum(-1), (s * s).sum(-1), (t * t).sum(-1)  # (B, H, W)
    smooth = F.smooth_l1_loss(s, t, beta=beta, reduction="none").mean(-1)
    cos_share, l1_share = share[:, :, None, None]
    torch.mul(smooth, l1_weight * l1_share, out=rows)
    if not by_map:
        rows += cos_weight * cos_share * (1 - cosine(st, ss, tt))
    if valid is not None:
        rows.masked_fill_(~valid, 0)
    if stats.numel():
        torch.stack((st, ss, tt), out=stats)
    upstream = rows.new_ones(()).expand(rows.shape)
    _gradients(s, t, std, valid, (st, ss, tt), share, upstream, cos_weight, l1_weight, beta, grad_source, grad_target)


def backward(
    upstream, source, target, mean, std, valid, share, stats, cos_weight, l1_weight, beta, resize,
    grad_source, grad_target,
):  # fmt: skip
    """Fill the gradients that are not empty; upstream is (B, H, W)."""
    s, t = _common_grid(source, target, mean, std, valid, resize)
    _gradients(s, t, std, valid, stats, share, upstream, cos_weight, l1_weight, beta, grad_source, grad_target)


def _common_grid(source, target, mean, std, valid, resize) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(source, target)
    s, t = source.to(compute), target.to(compute)
    if resize == "source":
        s = resize_bilinear_reference(s, t.shape[1:3])
    elif resize == "target":
        t = resize_bilinear_reference(t, s.shape[1:3])
    t = t if mean is None else t - mean.to(compute)
    t = t if std is None else t / std.to(compute)
    if valid is not None:
        # Not a product: padding may hold NaN.
        s, t = s.masked_fill(~valid[..., None], 0), t.masked_fill(~valid[..., None], 0)
    return s, t


def _gradients(s, t, std, valid, stats, share, upstream, cos_weight, l1_weight, beta, grad_source, grad_target):
    if not (grad_source.numel() or grad_target.numel()):
        return
    st, ss, tt = stats
    s_norm, t_norm = ss.sqrt().clamp(min=EPS), tt.sqrt().clamp(min=EPS)
    if valid is not None:
        upstream = upstream.masked_fill(~valid, 0)
    u_cos = upstream * (cos_weight * share[0])[:, None, None]
    u_l1 = upstream * (l1_weight / s.shape[-1] * share[1])[:, None, None]
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
