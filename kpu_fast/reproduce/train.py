"""The students: mosaics for GroundingDINO to teach on, and one run of kpu_fast/train.py for each."""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import torch

from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.machine import written_whole
from kpu_fast.reproduce.ablation import CANVAS, RUNS

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
_PLACES = ("source", "weights", "output")


class TrainingFailed(RuntimeError):
    """A training ended without a student; its own message says why."""


def make_mosaics(source: str, folder: Path, count: int) -> Path:
    """`count` mosaics of the source's images as PNGs in `folder`; unlabelled images for GroundingDINO to teach on."""
    from PIL import Image
    from tqdm import tqdm

    from kpu_fast.data.mosaic import make_mosaic
    from kpu_fast.data.sources import SourceError
    from kpu_fast.evaluate.images import read_images

    images = read_images("--images", source)
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc="mosaics", unit="img", delay=0.5):
        path = folder / f"{i:06d}.png"
        if path.exists():
            continue
        try:
            pixels, _, _ = make_mosaic(images, 0, i, CANVAS)
        except SourceError as error:
            raise EvaluateError(f"--images: {error}") from error
        with written_whole(path) as partial:
            Image.fromarray(pixels).save(partial, format="png")
    return folder


def config_of(run: str, seed: int, args: argparse.Namespace):
    """The checked `Config` that `run` trains with. Raises EvaluateError where --config has none."""
    from kpu_fast.config import ConfigError, load_config

    try:
        return load_config(args.config, _overrides(run, seed, args))
    except ConfigError as error:
        raise EvaluateError(f"--config {error}") from error


def _overrides(run: str, seed: int, args: argparse.Namespace) -> list[str]:
    """What `run` sets over the training configuration; every path is absolute, as those of `args` are."""
    from kpu_fast.config import load_config

    values = {
        "name": f"{run}-{seed}",
        "output": str(args.out),
        "seed": seed,
        "source": args.images,
        "student.vit.weights": str(args.zoo / "dinov2"),
    }
    if "teachers.clip=null" not in RUNS[run]:
        values["teachers.clip.weights"] = str(args.zoo / "clip")
        values["teachers.clip.data.source"] = args.images
    if "teachers.gdino=null" not in RUNS[run]:
        values["teachers.gdino.weights"] = str(args.zoo / "gdino")
        values["teachers.gdino.data.source"] = str(args.out / "mosaics")
    if args.precision is not None:
        values["precision"] = args.precision
    if args.steps is not None:
        warmup = load_config(args.config).optimizer.warmup_steps
        values |= {"steps": args.steps, "optimizer.warmup_steps": min(warmup, args.steps)}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()] + list(RUNS[run])


def train(run: str, seed: int, args: argparse.Namespace) -> Path:
    """Train one student unless its export is there; returns the folder of its run.

    Raises TrainingFailed, and EvaluateError where the folder holds a run of another configuration. Ctrl-C and SIGTERM
    end the training with this command, at its next step, with a checkpoint.
    """
    folder = args.out / f"{run}-{seed}"
    _check_same(folder, config_of(run, seed, args))
    if (folder / "student/config.json").is_file():
        return folder
    print(f"--- {folder.name}", flush=True)
    command = [sys.executable, str(TRAIN), "--config", str(args.config), "--resume", "auto"]
    torch.cuda.empty_cache()  # what evaluating held on a GPU is the training's
    child = subprocess.Popen([*command, "--set", *_overrides(run, seed, args)])
    try:
        code = child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if code != 0:
        raise TrainingFailed(f"{folder.name}: the training ended with exit code {code}")
    if not (folder / "student/config.json").is_file():
        raise TrainingFailed(f"{folder.name}: the training was stopped; the same command goes on")
    return folder


def _check_same(folder: Path, cfg) -> None:
    """Raises EvaluateError unless the run in `folder`, if there is one, was begun with `cfg`."""
    from kpu_fast.engine.run_folder import RESOLVED, differences, recorded

    if not (folder / RESOLVED).is_file():
        return
    before = recorded(folder)
    if before is None:
        raise EvaluateError(f"{folder / RESOLVED}: damaged; remove {folder} to train again")
    # Not by where things lie: what lies there is compared by its contents, in settings.json.
    changed = [key for key in differences(before, cfg.model_dump(mode="json")) if key.rpartition(".")[2] not in _PLACES]
    if changed:
        raise EvaluateError(f"{folder}: was trained with different {', '.join(changed)}; choose another --out")
