"""Which objective a config asks for."""

from collections.abc import Callable, Mapping

from kpu_fast.models.features import FeatureSpec
from kpu_fast.models.student import Student
from kpu_fast.objectives.gkd import GKD
from kpu_fast.objectives.kpu import KPU
from kpu_fast.objectives.objective import Objective


def build_objective(
    cfg,
    specs: Mapping[str, FeatureSpec],
    new_student: Callable[[Mapping[str, FeatureSpec]], Student],
    weights: Mapping[str, float] | None = None,
) -> Objective:
    """The trainable module of `cfg`, a `Config.objective`.

    specs: what each teacher's features look like. new_student: specs of the heads that are part of it → student.
    weights: see `Objective`. Raises as the recipe and new_student do.
    """
    if cfg.recipe == "gkd":
        return GKD(new_student({}), specs, cfg, weights)
    return KPU(new_student(specs), specs, cfg, weights)
