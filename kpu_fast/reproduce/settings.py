"""What the figures in one --out depend on: checked before the work, and written down so that they stay of one kind."""

import argparse
import hashlib
import json
from pathlib import Path

from kpu_fast.evaluate.result import EvaluateError, check_writable, replaced
from kpu_fast.machine import usable_device
from kpu_fast.reproduce.ablation import REFERENCES
from kpu_fast.reproduce.report import MARKS
from kpu_fast.reproduce.train import overrides

_KEPT = ("images", "test_images", "steps", "mosaics", "train_limit", "test_limit")


def check(args: argparse.Namespace) -> None:
    """Raises EvaluateError for what would fail after hours; makes the paths of `args` absolute."""
    from kpu_fast.config import ConfigError, load_config
    from kpu_fast.data.labelled import is_cifar
    from kpu_fast.evaluate.images import check_apart, read_images

    for option in ("seeds", "steps", "mosaics", "train_limit", "test_limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise EvaluateError(f"--{option.replace('_', '-')} {value}: expected at least 1")
    for name in REFERENCES:
        if not (args.zoo / name / "model.safetensors").is_file():
            raise EvaluateError(f"--zoo {args.zoo}: no {name}/model.safetensors; python -m kpu_fast.zoo trains one")
    try:
        usable_device(args.device)
    except ValueError as error:
        raise EvaluateError(str(error)) from error
    if is_cifar(args.images.removesuffix(":train")):
        raise EvaluateError(f"--images {args.images}: training reads image files; give a folder or .tar shards")
    check_apart(args.images, args.test_images)
    args.zoo, args.out, args.config = (path.expanduser().resolve() for path in (args.zoo, args.out, args.config))
    known = _classes_of(args.zoo)
    for key, source in (("--images", args.images), ("--test-images", args.test_images)):
        images = read_images(key, source)
        foreign = sorted({name.replace("_", " ") for name in images.classes or ()} - set(known))
        if foreign:
            raise EvaluateError(f"{key}: the zoo's teachers were never told of {', '.join(foreign[:5])}")
    if args.report:
        text = args.report.read_text(encoding="utf-8") if args.report.is_file() else ""
        if not all(mark in text for mark in MARKS):
            raise EvaluateError(f"--report {args.report}: expected a page with the lines {' and '.join(MARKS)}")
        check_writable("--report", args.report)
    try:
        for run in args.runs:
            load_config(args.config, overrides(run, 0, args))
    except ConfigError as error:
        raise EvaluateError(f"--config {error}") from error


def settle(args: argparse.Namespace) -> dict:
    """Write down in --out what its figures depend on, or check that it is what it was; returns it."""
    settings = {f"--{key.replace('_', '-')}": getattr(args, key) for key in _KEPT}
    for key in ("images", "test_images"):
        settings[f"files of --{key.replace('_', '-')}"] = _fingerprint(getattr(args, key))
    files = {f"{name} in the zoo": args.zoo / name / "model.safetensors" for name in REFERENCES}
    for name, path in {"--config": args.config, **files}.items():
        settings[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    path = args.out / "settings.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EvaluateError(f"{path}: damaged ({error}); choose another --out") from error
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise EvaluateError(
                f"--out {args.out}: what is there was made with another {', '.join(changed)}; choose another folder"
            )
        return before
    if args.out.is_dir() and any(args.out.iterdir()):
        raise EvaluateError(f"--out {args.out}: holds files but no settings.json to compare; choose another folder")
    with replaced("--out", path) as partial:
        partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return settings


def class_names(images, zoo: Path) -> tuple[str, ...]:
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


def _fingerprint(source: str) -> str:
    """Of the names, sizes and times of the source's files."""
    from kpu_fast.data.labelled import is_cifar
    from kpu_fast.data.sources import list_files

    archive = source.rpartition(":")[0]
    paths = [Path(archive)] if archive and is_cifar(archive) else [Path(file.path) for file in list_files(source)]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
