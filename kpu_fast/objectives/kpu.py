"""KPU: Knowledge Preservation and Unification (arXiv 2508.14707), eq. 1-4.

    L_align(X1, X2) = l1 Lcos(x1, x2) + l2 Lcos(V1, V2) + l3 SmoothL1(V1, V2)          (1)   l = (1, 0.9, 0.1)
    L_s2t = 1/T sum_t L_align(h_s2t(X), X_t)                                           (2)   in each teacher's space
    L_t2s = 1/T sum_t L_align(X, h_t2s(X_t))                                           (3)   in the common space
    L_rec = 1/T sum_t L_align(X_t, h_rec(h_t2s(X_t)))                                  (4)   back again
    L_KPU = L_t2s + L_s2t + lambda L_rec

X = {x, V} is the student, X_t a teacher. Each h resizes bilinearly to the grid where the comparison happens and then
runs one MLP per map and one for x. A teacher without x has no l1 term; several maps of one teacher are averaged.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpu_fast.kernels import align_loss
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.projector import FeatureHeads
from kpu_fast.models.student import Student


class KPU(nn.Module):
    """Everything trainable: the student with its heads h_s2t, and the heads h_t2s and h_rec.

    student: its `heads` name the teachers. specs: what each teacher's features look like. cfg: `Config.objective`.
    """

    def __init__(self, student: Student, specs: Mapping[str, FeatureSpec], cfg):
        super().__init__()
        self.student = student
        self.cfg = cfg
        self.levels = {name: tuple(student.level_for(s) for s in spec.strides) for name, spec in specs.items()}
        common = {name: _common_spec(student, spec, self.levels[name]) for name, spec in specs.items()}
        hidden = student.config["head_hidden"]
        self.h_t2s, self.h_rec = nn.ModuleDict(), nn.ModuleDict()
        if cfg.t2s:
            self.h_t2s.update({name: FeatureHeads(specs[name], common[name], hidden) for name in specs})
        if cfg.rec:
            self.h_rec.update({name: FeatureHeads(common[name], specs[name], hidden) for name in specs})

    def forward(self, name: str, images: Tensor, target: Features, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Loss terms of one teacher: {"<name>/s2t", "<name>/t2s", "<name>/rec"}, fp32 scalars, not yet weighed.

        images: (B, 3, H, W) in [0, 1]. target: the teacher's features of the same images.
        valid: (B, H, W) bool, False where the image is padding; None: all of it counts.
        """
        features = self.student(images)
        teacher_grid = [_grid(v) for v in target.maps]
        terms = {"s2t": self._align(self.student.project(features, name, teacher_grid), target, valid)}
        if self.cfg.t2s:
            ours = Features(features.x, tuple(features.maps[level] for level in self.levels[name]))
            unified = self.h_t2s[name](target, [_grid(v) for v in ours.maps])
            terms["t2s"] = self._align(ours, unified, valid)
            if self.cfg.rec:
                terms["rec"] = self._align(self.h_rec[name](unified, teacher_grid), target, valid)
        return {f"{name}/{term}": value for term, value in terms.items()}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """L_KPU of all teachers' terms: a scalar, every teacher weighing the same."""
        weights = {"s2t": 1.0, "t2s": 1.0, "rec": self.cfg.rec_weight}
        weighed = torch.stack([weights[key.rpartition("/")[2]] * value for key, value in terms.items()])
        return weighed.sum() / len(self.levels)

    def _align(self, source: Features, target: Features, valid: Tensor | None) -> Tensor:
        """L_align, eq. 1. Gradient goes to whichever side asks for it."""
        maps = [
            align_loss(
                v1,
                v2,
                cos_weight=self.cfg.cos_weight,
                l1_weight=self.cfg.l1_weight,
                beta=self.cfg.beta,
                valid=valid_cells(valid, _grid(v2)),
            )
            for v1, v2 in zip(source.maps, target.maps, strict=True)
        ]
        loss = torch.stack(maps).mean()
        if source.x is None or target.x is None:
            return loss
        return loss + align_loss(source.x, target.x, cos_weight=self.cfg.x_weight, l1_weight=0.0)


def valid_cells(valid: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """(B, H, W) pixel mask to (B, h, w): a cell counts if the pixel at its centre does."""
    if valid is None:
        return None
    return F.interpolate(valid[:, None].to(torch.uint8), size=grid, mode="nearest-exact")[:, 0].bool()


def _grid(v: Tensor) -> tuple[int, int]:
    return v.shape[1], v.shape[2]


def _common_spec(student: Student, spec: FeatureSpec, levels: Sequence[int]) -> FeatureSpec:
    """The teacher's features in the common space: the student's width, on the grids of the student's maps."""
    return FeatureSpec(
        x_dim=None if spec.x_dim is None else student.dim,
        map_dims=(student.dim,) * len(spec.map_dims),
        strides=tuple(student.strides[level] for level in levels),
    )
