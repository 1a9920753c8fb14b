"""What the figures in one --out depend on: checked before the work, and written down so that they stay of one kind."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from kpu_fast.evaluate.result import EvaluateError, check_writable, replaced
from kpu_fast.machine import slow_bf16, usable_device
from kpu_fast.reproduce.ablation import CANVAS, GAP_BATCHES, MOSAICS_SEED, MOSAICS_TEST, REFERENCES
from kpu_fast.reproduce.report import MARKS, split_page
from kpu_fast.reproduce.train import config_of

_KEPT = ("steps", "mosaics", "train_limit", "test_limit")
_PRECISION = "precision instead of --config's"
_HEAD = 1 << 20  # bytes of each image file or shard that are compared


def check(args: argparse.Namespace) -> None:
    """Raises EvaluateError for what would fail after hours; makes the paths of `args` absolute, its device a device."""
    from kpu_fast.data.cifar import cifar_part
    from kpu_fast.data.sources import normalise
    from kpu_fast.evaluate.images import check_apart, read_images

    for option in ("seeds", "steps", "mosaics", "train_limit", "test_limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise EvaluateError(f"--{option.replace('_', '-')} {value}: expected at least 1")
    for name in REFERENCES:
        if not (args.zoo / name / "model.safetensors").is_file():
            raise EvaluateError(f"--zoo {args.zoo}: no {name}/model.safetensors; python -m kpu_fast.zoo trains one")
    try:
        args.device = usable_device(args.device)
    except ValueError as error:
        raise EvaluateError(str(error)) from error
    if cifar_part(args.images):
        raise EvaluateError(f"--images {args.images}: training reads image files; give a folder or .tar shards")
    check_apart(args.images, args.test_images, ("--images", "--test-images"))
    args.zoo, args.out, args.config = (path.expanduser().resolve() for path in (args.zoo, args.out, args.config))
    args.images, args.test_images = (normalise(source)[0] for source in (args.images, args.test_images))
    known = _classes_of(args.zoo)
    for key, source in (("--images", args.images), ("--test-images", args.test_images)):
        images = read_images(key, source)
        foreign = sorted({name.replace("_", " ") for name in images.classes or ()} - set(known))
        if foreign:
            raise EvaluateError(f"{key}: the zoo's teachers were never told of {', '.join(foreign[:5])}")
    if args.report:
        args.report = args.report.expanduser().resolve()
        if not args.report.is_file() or split_page(args.report.read_text(encoding="utf-8")) is None:
            raise EvaluateError(f"--report {args.report}: expected a page with the lines {' and '.join(MARKS)}, once")
        check_writable("--report", args.report)
    args.precision = _precision(args)
    for run in args.runs:
        if (recipe := config_of(run, 0, args).objective.recipe) != "kpu":
            raise EvaluateError(f'--config {args.config}: its objective.recipe is "{recipe}"; the ablation is KPU\'s')


def _precision(args: argparse.Namespace) -> str | None:
    """Of all trainings in this --out, as its first command chose: fp32 where a CPU is slow in bf16, else --config's."""
    path = args.out / "settings.json"
    if path.is_file():
        with contextlib.suppress(ValueError):  # damaged: `settle` says so
            return json.loads(path.read_text(encoding="utf-8")).get(_PRECISION)
    cfg = config_of(args.runs[0], 0, args)
    times = slow_bf16() if cfg.precision == "bf16" and not torch.cuda.is_available() else None
    if times is None:
        return None
    print(f"in fp32: this CPU multiplies in bf16 {times:.0f} times as slowly", flush=True)
    return "fp32"


def settle(args: argparse.Namespace) -> None:
    """Write down in --out what its figures depend on, or check that it is what it was."""
    settings = {f"--{key.replace('_', '-')}": getattr(args, key) for key in _KEPT}
    settings |= {"canvas": CANVAS, "test mosaics": [MOSAICS_TEST, MOSAICS_SEED], "gap batches": GAP_BATCHES}
    for key in ("images", "test_images"):
        settings[f"--{key.replace('_', '-')}"] = _fingerprint(getattr(args, key))
    for name in REFERENCES:
        settings[f"{name} in the zoo"] = digest_model(args.zoo / name)
    settings["--config"] = _digest([args.config])
    settings[_PRECISION] = args.precision
    path = args.out / "settings.json"
    with _alone(args.out):
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise EvaluateError(f"{path}: damaged ({error}); choose another --out") from error
            changed = [key for key in settings if before.get(key) != settings[key]]
            if changed:
                what = ", ".join(changed)
                raise EvaluateError(
                    f"--out {args.out}: what is there was made with different {what}; choose another folder"
                )
            return
        if any(not path.name.startswith(".") for path in args.out.iterdir()):
            raise EvaluateError(f"--out {args.out}: holds files but no settings.json to compare; choose another folder")
        with replaced("--out", path) as partial:
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def zoo_classes(images, zoo: Path) -> tuple[str, ...]:
    """The classes' names by number: the images' own, else the zoo's, in its order."""
    names = images.classes or _classes_of(zoo)
    if max(images.labels) >= len(names):
        raise EvaluateError(
            f"--test-images: an image is of class {max(images.labels)}, the zoo has {len(names)} classes"
        )
    return tuple(name.replace("_", " ") for name in names)


def _classes_of(zoo: Path) -> list[str]:
    path = zoo / "clip/training.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["classes"]
    except (OSError, ValueError, KeyError) as error:
        raise EvaluateError(f"--zoo: {path} does not tell CLIP's classes ({error})") from error


def digest_model(folder: Path) -> str:
    """Of a model as it is loaded: weights, configs, tokenizers; not the card."""
    return _digest(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One command at a time: several may share --out."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(paths: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in paths)).hexdigest()


def _fingerprint(source: str) -> str:
    """Of the source's files, wherever they lie: names below the folder they share, sizes, first _HEAD bytes."""
    from kpu_fast.data.cifar import cifar_part
    from kpu_fast.data.labelled import source_files

    files = source_files(source)
    top = os.path.commonpath([os.path.dirname(file.path) for file in files])
    seen = hashlib.sha256(str(cifar_part(source)).encode())
    for file in files:
        seen.update(json.dumps([os.path.relpath(file.path, top), file.size]).encode())
        with contextlib.suppress(FileNotFoundError), open(file.path, "rb") as content:  # a dead link, which is left out
            seen.update(content.read(_HEAD))
    return seen.hexdigest()
