"""What a run has trained so far, read from a checkpoint: without its teachers, images, ranks or GPUs."""

import json
from pathlib import Path

from torch import Tensor

from kpu_fast.config import Config
from kpu_fast.engine.checkpoint import META, in_one_line, whole_checkpoints
from kpu_fast.engine.monitor import METRICS, read_metrics
from kpu_fast.engine.result import student_card
from kpu_fast.engine.run_folder import NOT_A_RECORD, read_recorded
from kpu_fast.engine.shards import module_state
from kpu_fast.models.features import FeatureSpec
from kpu_fast.models.student import Student
from kpu_fast.objectives.recipe import build_objective


class TrainedError(ValueError):
    """A run's folder has no such checkpoint, or it does not load."""


def load_student(run: Path, checkpoint: str | None = None) -> tuple[Student, str, str]:
    """(student, card, name of the checkpoint): what the run would have exported had it ended there, on the CPU.

    run: runs/NAME. checkpoint: "step-…" (None: the newest). The run may go on meanwhile. Raises TrainedError.
    """
    folder = find_checkpoint(run, checkpoint)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        cfg = Config.model_validate_json(json.dumps(read_recorded(run)))
        own = meta["networks"]["student"]
        specs = {name: FeatureSpec(**spec) for name, spec in meta["heads"].items()}
        module = build_objective(cfg.objective, specs, lambda heads: Student(**own, heads=heads))
    except NOT_A_RECORD as error:
        _see_pruned(folder)
        raise TrainedError(
            f"{folder}: this version of kpu_fast cannot read it ({in_one_line(error)}). The one that wrote it ends the "
            "run there with train.py --resume auto --set steps=<its step>"
        ) from error
    state = load_state(folder)
    if cfg.precision == "bf16":  # stage 3's are the optimiser's fp32
        trained = {name for name, _ in module.named_parameters()}
        state = {name: value.bfloat16() if name in trained else value for name, value in state.items()}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise TrainedError(f"{folder}: is of another run ({in_one_line(error)})") from error
    rows = [row for row in (read_metrics(run) if (run / METRICS).is_file() else []) if row["step"] <= meta["step"]]
    return module.in_own_spaces(), student_card(cfg, rows, meta["step"]), folder.name


def _see_pruned(folder: Path) -> None:
    if not folder.is_dir():
        raise TrainedError(f"{folder}: has just been removed, as the run keeps its newest alone; take a newer one")


def find_checkpoint(run: Path, name: str | None = None) -> Path:
    """The run's checkpoint of that name, or its newest. Raises TrainedError."""
    whole = whole_checkpoints(run / "checkpoints")
    if not (run / "checkpoints").is_dir():
        raise TrainedError(f"{run}: is no folder of a run, which has checkpoints/ in it")
    chosen = [path for path in whole if name in (None, path.name)]
    if not chosen:
        known = f"it has {', '.join(path.name for path in whole)}" if whole else "the run has saved none yet"
        raise TrainedError(f"{name or 'the newest checkpoint'}: not in {run / 'checkpoints'}; {known}")
    return chosen[-1]


def load_state(folder: Path) -> dict[str, Tensor]:
    """The state of the trained module in a checkpoint. Raises TrainedError."""
    try:
        return module_state(folder)
    except Exception as error:  # unpickling and DeepSpeed can raise anything
        _see_pruned(folder)
        raise TrainedError(f"{folder}: does not load ({in_one_line(error)})") from error
