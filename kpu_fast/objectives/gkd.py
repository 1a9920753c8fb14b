"""GKD: Generalizable Knowledge Distillation (arXiv 2603.02554), the distillation of features; a ViT learns as a whole.

    L_token   = MSE(h_token(x), x_t)
    L_feature = MSE([h_token(x), h_feature(V)], [x_t, V_t])        all 1 + N tokens alike
    L_patch   = MSE(h_patch(V'), V_t)                              V': of some images with patches masked, see below
    L_GKD     = 1/T sum_t (token_weight L_token + feature_weight L_feature + patch_weight L_patch)

{x, V} is the student, {x_t, V_t} a teacher. Each h is query-based soft distillation (QSD): the student's tokens, on the
teacher's grid, look among the teacher's for what is like them, and take what the student itself has at those places,

    h(V) = softmax(Q V_t^T) Val        Q = Linear(LN(V)), Val = Linear(LN(V)); one head, no scale

For a lone token that is Val, which is what h_token is. V' is V with the first `mask_images` of the batch seen through
a mask, each without its own random `mask_patches`; the rest of V' is V itself. All of it is one forward of the student,
of the batch and its masked images. What is our choice: docs/gkd.md.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from kpu_fast.kernels import AlignTerm, align_losses, resize_bilinear
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.student import Student
from kpu_fast.objectives.cells import grid
from kpu_fast.objectives.objective import Objective

# Smooth-L1 is d² / (2 beta) below it, which features do not reach, and a power of two scales without rounding.
_BETA = 2.0**20


class SoftHead(nn.Module):
    """QSD: tokens (B, N, in_dim) of the student, theirs (B, N, out_dim) of the teacher → (B, N, out_dim).

    query: False leaves Val alone, and the teacher's tokens are not looked at.
    """

    def __init__(self, in_dim: int, out_dim: int, query: bool):
        super().__init__()
        self.query = _projection(in_dim, out_dim) if query else None
        self.value = _projection(in_dim, out_dim)

    def forward(self, tokens: Tensor, theirs: Tensor) -> Tensor:
        value = self.value(tokens)
        if self.query is None:
            return value
        # Not `models.attention`: logits without a scale are in the hundreds, which bf16's plain products would round,
        # and heads as wide as a teacher are no flash kernel's.
        q, k, v = (part[:, None] for part in (self.query(tokens), theirs.to(value.dtype), value))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]


def _projection(in_dim: int, out_dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim))


class _Heads(nn.Module):
    """What one teacher is compared with: h_token where it has an x, h_feature and h_patch of each of its maps."""

    def __init__(self, dim: int, spec: FeatureSpec, cfg):
        super().__init__()
        self.token = self.feature = self.patch = None
        if spec.x_dim is not None and (cfg.token_weight or cfg.feature_weight):
            self.token = _projection(dim, spec.x_dim)
        if cfg.feature_weight:
            self.feature = nn.ModuleList(SoftHead(dim, out, cfg.query) for out in spec.map_dims)
        if cfg.patch_weight:
            self.patch = nn.ModuleList(SoftHead(dim, out, cfg.query) for out in spec.map_dims)


class GKD(Objective):
    """Everything trainable: the student, a bare ViT, with its mask token, and the heads.

    student: without an adapter and without heads. specs: what each teacher's features look like. cfg:
    `Config.objective`. weights: teacher name → w_t in 1/T sum_t w_t L_t, 1 where it is not given.
    Raises ValueError for a student with an adapter.
    """

    def __init__(
        self, student: Student, specs: Mapping[str, FeatureSpec], cfg, weights: Mapping[str, float] | None = None
    ):
        if student.adapter is not None:
            raise ValueError("GKD: the student has an adapter; it is to be a bare ViT.")
        factors = {"token": cfg.token_weight, "feature": cfg.feature_weight, "patch": cfg.patch_weight}
        super().__init__(student, specs, factors, weights)
        self.cfg = cfg
        self.heads = nn.ModuleDict({name: _Heads(student.dim, spec, cfg) for name, spec in specs.items()})
        if cfg.patch_weight:
            student.vit.embed.mask_token.requires_grad_(True)

    def forward(
        self, images: Tensor, targets: Mapping[str, Features], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What some teachers add to L_GKD: {"<name>/token", "<name>/feature", "<name>/patch"} of each, fp32 scalars.

        images: (B, 3, H, W) in [0, 1]. targets: teacher name → its features of these images; the student runs once.
        The terms carry their weights; a term whose weight is 0, or that the teacher has no x for, is not there.
        Raises ValueError where some of an image is padding (`valid`): the student would look for tokens of nothing; and
        for a batch of which `mask_images` is none.
        """
        if valid is not None:
            raise ValueError('GKD: found padded images; give their teacher data.fit "crop".')
        if self.cfg.patch_weight:
            x, clean, partly = self._see_and_see_partly(images)
        else:
            x, (clean,) = self.student(images)
            partly = None
        terms = {}
        for name, target in targets.items():
            for term, some in self._terms_of(name, x, clean, partly, target).items():
                terms[f"{name}/{term}"] = some
        losses = align_losses([term for some in terms.values() for term in some])
        parts = losses.split([len(some) for some in terms.values()])
        return {key: part.sum() for key, part in zip(terms, parts, strict=True)}

    def _see_and_see_partly(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, V and V' of B images, by one forward; where nothing reads x and V, they are of those not masked alone."""
        hidden = self._draw_masks(images)  # (M, N)
        only_masked = 0 if self.cfg.token_weight or self.cfg.feature_weight else len(hidden)
        whole = len(images) - only_masked
        seen = torch.cat([images[only_masked:], images[: len(hidden)]])
        # Not F.pad, which inductor puts into one loop with the comparison, and its C++ does not compile (torch 2.13).
        masked = torch.cat([hidden.new_zeros(whole, hidden.shape[1]), hidden])
        x, (patches,) = self.student(seen, masked)
        clean = patches[:whole]
        return x[:whole], clean, torch.cat([patches[whole:], clean[len(hidden) - only_masked :]])

    def _draw_masks(self, images: Tensor) -> Tensor:
        """(M, N) bool: the patches that the first M images are seen without, for each as many at random."""
        stride = self.student.strides[0]
        patches = images.shape[-2] // stride * (images.shape[-1] // stride)
        count, lacking = self.cfg.masked(len(images), patches)
        if not count:
            raise ValueError(f"GKD: mask_images {self.cfg.mask_images} of {len(images)} images is none.")
        ranks, rank = 1, 0
        if distributed.is_available() and distributed.is_initialized():
            ranks, rank = distributed.get_world_size(), distributed.get_rank()
        # Every rank draws for all: their generators stay in the same state, as TeacherDrop needs them.
        order = torch.rand(ranks, count, patches, device=images.device)[rank].argsort(-1)
        return order < lacking

    def _terms_of(
        self, name: str, x: Tensor, clean: Tensor, partly: Tensor | None, target: Features
    ) -> dict[str, list[AlignTerm]]:
        """{"token": …, "feature": …, "patch": …} of one teacher. clean, partly: V and V'."""
        heads, terms = self.heads[name], {}
        token = None if heads.token is None else heads.token(x)
        if token is not None and self.cfg.token_weight:
            terms["token"] = [_mse(token, target.x, self.weights[f"{name}/token"])]
        for term, v, of_maps in (("feature", clean, heads.feature), ("patch", partly, heads.patch)):
            if of_maps is None:
                continue
            terms[term], weight = [], self.weights[f"{name}/{term}"] / len(target.maps)
            for head, theirs in zip(of_maps, target.maps, strict=True):
                theirs, tokens = theirs.flatten(1, 2), resize_bilinear(v, grid(theirs)).flatten(1, 2)
                share = 1.0  # of the map's N tokens among those that this term compares
                if term == "feature" and token is not None:
                    share = theirs.shape[1] / (1 + theirs.shape[1])
                    terms[term].append(_mse(token, target.x, weight * (1 - share)))
                terms[term].append(_mse(head(tokens, theirs), theirs, weight * share))
        return terms


def _mse(source: Tensor, target: Tensor, weight: float) -> AlignTerm:
    return AlignTerm(source, target, 0.0, weight * 2 * _BETA, _BETA)
