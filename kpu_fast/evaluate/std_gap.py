"""How far the teachers' features lie apart in scale, in their own spaces and in the common one (KPU, arXiv 2508.14707).

    sigma_t = sqrt(mean over all tokens and channels of (v - mean)²)     v: all maps of teacher t over many images
    gap = largest sigma_t / smallest sigma_t                            the paper: 33.4 in own spaces, 4.5 in common

mean is one number, over all tokens and channels too. Own space: the features as the teacher gives them. Common space:
h_t2s of them (standardised first where the run does that), on the student's grids, as in L_t2s.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from kpu_fast.config_objective import KPUConfig
from kpu_fast.engine.run_folder import NOT_A_RECORD, RESOLVED, read_recorded
from kpu_fast.engine.trained import TrainedError, find_checkpoint, load_state
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.kernels import Moments, moments
from kpu_fast.machine import is_out_of_memory
from kpu_fast.models.hub import WeightsError
from kpu_fast.models.student import Student
from kpu_fast.models.teachers import build_teacher
from kpu_fast.objectives.cells import grid, valid_cells
from kpu_fast.objectives.kpu import KPU

BATCHES = 50


@torch.inference_mode()
def std_gap(
    run: Path,
    *,
    checkpoint: str | None = None,
    batches: int = BATCHES,
    images: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict:
    """The gap of a run's teachers in own spaces and, where the run has h_t2s, in the common space.

    run: runs/NAME, with config.resolved.json and checkpoints. checkpoint: "step-…" (None: the newest). batches: of each
    teacher, read and cropped as in the run, from its own images or from `images` (a source of unlabelled images).
    Raises EvaluateError where the run, its teachers' weights or the images cannot be used.
    """
    settings = _read_settings(Path(run))
    try:
        folder = find_checkpoint(Path(run), checkpoint)
        state = load_state(folder)
    except TrainedError as error:
        raise EvaluateError(f"--checkpoint: {error}") from error
    device = torch.device(device)
    try:
        teachers = {
            name: build_teacher(name, cfg, device=device, dtype=dtype, image_size=cfg.data.size)
            for name, cfg in settings.teachers.items()
        }
        specs = {name: teacher.spec for name, teacher in teachers.items()}
        module = KPU(Student.from_config(settings.student, specs), specs, settings.objective)
    except (WeightsError, ValueError) as error:
        raise EvaluateError(f"--run {run}: {error}") from error
    _load(module, state, folder)
    module.to(device).eval()
    module.h_t2s.to(dtype)
    own, common = {}, {}
    # All of them live until the numbers are read: a GPU may be at a batch of one that the host is done with.
    streams = {name: _open(name, cfg.data, images, device, seed) for name, cfg in settings.teachers.items()}
    for name, stream in streams.items():
        for _ in tqdm(range(batches), desc=f"std-gap: {name}", unit="batch", dynamic_ncols=True, delay=0.5):
            try:
                batch = next(stream)
            except (OSError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                raise EvaluateError(f"teachers.{name}.data: {error}") from error
            features = teachers[name](batch.images)
            _add(own, name, features.maps, batch.valid)
            if name not in module.h_t2s:
                continue
            target = module.standardize[name](features) if name in module.standardize else features
            strides = [module.student.strides[level] for level in module.levels[name]]
            sizes = [tuple(side // stride for side in batch.images.shape[2:]) for stride in strides]
            _add(common, name, module.h_t2s[name](target, sizes).maps, batch.valid)
    seen = {name: batches * cfg.data.batch_size for name, cfg in settings.teachers.items()}
    sizes = {name: list(cfg.data.size) for name, cfg in settings.teachers.items()}
    buckets = {name: cfg.data.buckets for name, cfg in settings.teachers.items()}
    gaps = {"own": _gap(own), "common": _gap(common) if common else None}
    return {**gaps, "images": seen, "size": sizes, "buckets": buckets, "checkpoint": str(folder)}


def deviation(parts: list[Moments]) -> float:
    """Standard deviation over all tokens and channels of all parts, about one mean.

    Raises EvaluateError where it is not finite.
    """
    count = sum(float(part.count) * len(part.total) for part in parts)
    mean = sum(float(part.total.sum()) for part in parts) / count
    # Per channel about its own mean, then the channels' means about the common one: nothing large is subtracted.
    spread = sum(float((part.count * (part.var + (part.mean - mean) ** 2)).sum()) for part in parts)
    found = (spread / count) ** 0.5
    if not found < float("inf"):
        raise EvaluateError("NaN or Inf in the features")
    return found


def _add(sums: dict[str, list[Moments]], name: str, maps, valid) -> None:
    new = [moments(v, valid=valid_cells(valid, grid(v))) for v in maps]
    sums[name] = [a.merge(b) for a, b in zip(sums[name], new, strict=True)] if name in sums else new


def _gap(sums: dict[str, list[Moments]]) -> dict:
    try:
        spread = {name: deviation(parts) for name, parts in sums.items()}
        maps = {name: [deviation([part]) for part in parts] for name, parts in sums.items()}
    except ZeroDivisionError as error:
        raise EvaluateError("no token counts: the images are all padding") from error
    least = min(spread.values())
    return {"gap": max(spread.values()) / least if least else None, "std": spread, "std_of_maps": maps}


def _read_settings(run: Path) -> SimpleNamespace:
    """The blocks of config.resolved.json that rebuild a run's models and streams, as objects with attributes."""
    try:
        tree = read_recorded(run)
        # "auto": the run's attention kernel may not be had here, and the student itself is not run.
        vit = SimpleNamespace(**tree["student"]["vit"])
        student = SimpleNamespace(**{**tree["student"], "vit": vit, "attention": "auto"})
        teachers = {name: SimpleNamespace(**teacher) for name, teacher in tree["teachers"].items()}
        for teacher in teachers.values():
            teacher.data = SimpleNamespace(**{**teacher.data, "size": tuple(teacher.data["size"])})
        objective = SimpleNamespace(**{**KPUConfig().model_dump(), **tree["objective"]})
        settings = SimpleNamespace(student=student, teachers=teachers, objective=objective)
    except NOT_A_RECORD as error:
        raise EvaluateError(
            f"--run {run}: {run / RESOLVED} cannot be used ({type(error).__name__}: {error}); name the folder of a run"
        ) from error
    if objective.recipe != "kpu":
        raise EvaluateError(f'--run {run}: a run of recipe "{objective.recipe}"; only KPU has a common space')
    return settings


def _load(module: KPU, state: dict[str, torch.Tensor], folder: Path) -> None:
    try:
        found = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of another shape
        reason = " ".join(str(error).split())[:200]
        raise EvaluateError(f"--checkpoint: {folder}: is of another run ({reason})") from error
    # Only what leads into the common space is read here.
    missing = [key for key in found.missing_keys if key.startswith(("h_t2s.", "standardize."))]
    if missing:
        raise EvaluateError(f"--checkpoint: {folder}: lacks {', '.join(missing[:3])}; it is of another run")


def _open(name: str, data: SimpleNamespace, images: str | None, device: torch.device, seed: int):
    from kpu_fast.data.pipeline import Stream
    from kpu_fast.data.scan import load_or_scan

    data.source = data.source if images is None else images
    try:
        return Stream(data, load_or_scan(data.source), rank=0, world_size=1, device=device, seed=seed)
    except (OSError, ValueError, ImportError) as error:
        raise EvaluateError(f"teachers.{name}.data: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `std-gap` beside those of every evaluation."""
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run's folder, such as runs/h100")
    parser.add_argument("--checkpoint", metavar="step-N", help="one of the run's (default: the newest)")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of each teacher (default %(default)s)")
    parser.add_argument("--images", metavar="SOURCE", help="other images than the run's own; need no labels")


def run(args: argparse.Namespace) -> dict:
    """`std-gap` as the command line asks for it."""
    if args.batches < 1:
        raise EvaluateError(f"--batches {args.batches}: expected at least 1")
    common = {"batches": args.batches, "images": args.images, "seed": args.seed}
    return std_gap(args.run, checkpoint=args.checkpoint, device=args.device, dtype=args.dtype, **common)
