"""KPU: Knowledge Preservation and Unification (arXiv 2508.14707), eq. 1-4.

    L_align(X1, X2) = l1 Lcos(x1, x2) + l2 Lcos(V1, V2) + l3 SmoothL1(V1, V2)          (1)   l = (1, 0.9, 0.1)
    L_s2t = 1/T sum_t L_align(h_s2t(X), X_t)                                           (2)   in each teacher's space
    L_t2s = 1/T sum_t L_align(X, h_t2s(X_t))                                           (3)   in the common space
    L_rec = 1/T sum_t L_align(X_t, h_rec(h_t2s(X_t)))                                  (4)   back again
    L_KPU = L_t2s + L_s2t + lambda L_rec

X = {x, V} is the student, X_t a teacher. Each h resizes bilinearly to the grid where the comparison happens and then
runs one MLP per map and one for x. A teacher without x has no l1 term; several maps of one teacher are averaged.

Where L_t2s is on, every h subtracts a running mean from what comes in (`objective.centre`), which its first bias could
do as well: the same functions, learned faster (docs/objectives.md). With `objective.standardize`, X_t stands for the
teacher's standardised features everywhere above (standardize.py); with `objective.balance`, 1/T gives way to shares
that change from step to step (balance.py).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kpu_fast.kernels import AlignTerm, align_losses
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.projector import Centre, FeatureHeads, Projector, move_centres
from kpu_fast.models.student import Student
from kpu_fast.objectives.cells import grid, valid_cells
from kpu_fast.objectives.objective import Objective
from kpu_fast.objectives.standardize import FeatureStandardizer


class KPU(Objective):
    """Everything trainable: the student with its heads h_s2t, and the heads h_t2s and h_rec.

    student: its `heads` name the teachers; the maps that none of them reads are dropped, and its heads may get centres,
    so what others can load is `in_own_spaces()`, not the student itself. specs: what each teacher's features look like.
    cfg: `Config.objective`. weights: teacher name → w_t in 1/T sum_t w_t L_align, 1 where it is not given.
    Raises ValueError, naming the teacher, for features that `objective.standardize` cannot handle.
    """

    def __init__(
        self, student: Student, specs: Mapping[str, FeatureSpec], cfg, weights: Mapping[str, float] | None = None
    ):
        super().__init__(student, specs, {"s2t": 1.0, "t2s": 1.0, "rec": cfg.rec_weight}, weights)
        student.drop_unused_levels()
        self.cfg = cfg
        self.levels = {name: tuple(student.level_for(s) for s in spec.strides) for name, spec in specs.items()}
        common = {name: _common_spec(student, spec, self.levels[name]) for name, spec in specs.items()}
        hidden = student.config["head_hidden"]
        self.h_t2s, self.h_rec = nn.ModuleDict(), nn.ModuleDict()
        if cfg.t2s:
            self.h_t2s.update({name: FeatureHeads(specs[name], common[name], hidden) for name in specs})
        if cfg.rec:
            self.h_rec.update({name: FeatureHeads(common[name], specs[name], hidden) for name in specs})
        if cfg.t2s and cfg.centre:
            for head in self._projectors():
                head.centre = Centre(head.fc1.in_features)
            self.register_buffer("steps", torch.zeros(()))
        if cfg.standardize != "none":
            kind = cfg.standardize
            self.standardize.update({name: FeatureStandardizer(name, specs[name], kind) for name in specs})

    def forward(
        self, images: Tensor, targets: Mapping[str, Features], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What some teachers add to L_KPU: {"<name>/s2t", "<name>/t2s", "<name>/rec"} of each, fp32 scalars.

        images: (B, 3, H, W) in [0, 1]. targets: teacher name → its features of these images; the student runs once.
        valid: (B, H, W) bool, False where the image is padding; None: all of it counts.
        The terms carry their weights, w_t/T and lambda: `total` sums them, `unweighed` gives the bare L_align.
        """
        features = self.student(images)
        cells = _Cells(valid)
        terms = {name: self._terms_of(name, features, target, cells) for name, target in targets.items()}
        losses = align_losses([term for of_one in terms.values() for some in of_one.values() for term in some])
        found: dict[str, Tensor] = {}
        counts = [sum(map(len, of_one.values())) for of_one in terms.values()]
        of_each = losses.split(counts) if len(counts) > 1 else (losses,)  # whose backward is a launch
        for (name, of_one), values in zip(terms.items(), of_each, strict=True):
            sums = values.view(len(of_one), -1).sum(1)  # s2t, t2s and rec compare the same maps, and x or not
            found |= {f"{name}/{term}": value for term, value in zip(of_one, sums.unbind(), strict=True)}
        return found

    def _terms_of(self, name: str, features: Features, target: Features, cells: "_Cells") -> dict[str, list[AlignTerm]]:
        """{"s2t": …, "t2s": …, "rec": …} of one teacher, as far as the objective has them."""
        if name in self.standardize:
            target = self.standardize[name](target)
        teacher_grid = [grid(v) for v in target.maps]
        ours = self.student.project(features, name, teacher_grid)
        terms = {"s2t": self._terms(ours, target, cells.on(teacher_grid), self.weights[f"{name}/s2t"])}
        if self.cfg.t2s:
            ours = Features(features.x, tuple(features.maps[level] for level in self.levels[name]))
            own_grid = [grid(v) for v in ours.maps]
            unified = self.h_t2s[name](target, own_grid)
            terms["t2s"] = self._terms(ours, unified, cells.on(own_grid), self.weights[f"{name}/t2s"])
            if self.cfg.rec:
                back = self.h_rec[name](unified, teacher_grid)
                terms["rec"] = self._terms(back, target, cells.on(teacher_grid), self.weights[f"{name}/rec"])
        return terms

    def after_step(self, batches: int = 1) -> None:
        """The centres move on; see `Objective.after_step`."""
        centres = [head.centre for head in self._projectors() if head.centre is not None]
        if centres:
            self.steps += 1
            move_centres(centres, self.steps, batches)

    def in_own_spaces(self) -> Student:
        """The student as others use it: `project` ends in each teacher's own space, not in the standardised one.

        The way back is one more Linear, so it goes into the weights of each head's last, and a centre goes into the
        bias of its first. The student in training keeps its own; all other weights are shared with it. Under ZeRO 3
        call with the student's parameters gathered.
        """
        with torch.device("meta"):
            student = Student(**self.student.config)
        state = self.student.state_dict()
        student.load_state_dict({name: state[name] for name in student.state_dict()}, assign=True)
        for name, heads in self.student.heads.items():
            for head, own in zip(student.heads[name].projectors(), heads.projectors(), strict=True):
                if own.centre is not None:
                    head.fc1.bias = nn.Parameter(own.plain_bias())
        for name, standardizer in self.standardize.items():
            for last, (weight, bias) in standardizer.undone(student.heads[name]).items():
                last.weight, last.bias = nn.Parameter(weight), nn.Parameter(bias)
        return student

    def _projectors(self) -> list[Projector]:
        groups = (self.student.heads, self.h_t2s, self.h_rec)
        return [head for group in groups for heads in group.values() for head in heads.projectors()]

    def _terms(
        self, source: Features, target: Features, valid: Sequence[Tensor | None], weight: float
    ) -> list[AlignTerm]:
        """weight * L_align, eq. 1, as the terms of a sum; gradient goes to whichever side asks for it.

        The weight goes into the kernels, so that backward reaches each of them with a gradient of 1 and nothing is left
        to scale.
        """
        cfg, share = self.cfg, weight / len(source.maps)
        terms = [
            AlignTerm(v1, v2, share * cfg.cos_weight, share * cfg.l1_weight, cfg.beta, valid=cells)
            for v1, v2, cells in zip(source.maps, target.maps, valid, strict=True)
        ]
        if source.x is not None and target.x is not None:
            terms.append(AlignTerm(source.x, target.x, weight * cfg.x_weight, 0.0))
        return terms


class _Cells:
    """Which cells of a grid count, made once for each grid: then the losses count them once, too."""

    def __init__(self, valid: Tensor | None):
        self.valid, self.known = valid, {}

    def on(self, grids: Sequence[tuple[int, int]]) -> list[Tensor | None]:
        for size in grids:
            if size not in self.known:
                self.known[size] = valid_cells(self.valid, size)
        return [self.known[size] for size in grids]


def _common_spec(student: Student, spec: FeatureSpec, levels: Sequence[int]) -> FeatureSpec:
    """The teacher's features in the common space: the student's width, on the grids of the student's maps."""
    return FeatureSpec(
        x_dim=None if spec.x_dim is None else student.dim,
        map_dims=(student.dim,) * len(spec.map_dims),
        strides=tuple(student.strides[level] for level in levels),
    )
