"""Train the teachers one after the other, measure them, and put each into its folder when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kpu_fast.data.labelled import LabelledImages
from kpu_fast.evaluate.boxes import Mosaics
from kpu_fast.evaluate.detect import detect, load_detector
from kpu_fast.evaluate.encoder import load_encoder
from kpu_fast.evaluate.images import check_apart, draw
from kpu_fast.evaluate.knn import knn
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.evaluate.zero_shot import embed_texts, zero_shot
from kpu_fast.machine import device_name
from kpu_fast.zoo.card import write_card
from kpu_fast.zoo.clip import TEMPLATES, check_captions, save_clip, train_clip
from kpu_fast.zoo.dinov2 import save_dinov2, train_dinov2
from kpu_fast.zoo.fit import ZooError
from kpu_fast.zoo.gdino import check_prompt, save_gdino, train_gdino
from kpu_fast.zoo.pixels import STORED, Pixels, read
from kpu_fast.zoo.recipes import GdinoRecipe, Zoo
from kpu_fast.zoo.sample import write_samples

NAMES = ("clip", "gdino", "dinov2")
_BANK = 10_000  # training images among which kNN looks: the whole set would take as long as some training
_MOSAICS_SEED = 1  # of the mosaics of test images, of which there are any number
_WORK = ".training"


def build_zoo(
    images: LabelledImages,
    test_images: LabelledImages,
    out: Path,
    *,
    classes: tuple[str, ...] | None = None,
    only: tuple[str, ...] = NAMES,
    minutes: float | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    seed: int = 0,
    zoo: Zoo | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Train `only` on `images`, measure on `test_images`; returns the figures by teacher.

    out/NAME appears when it is whole; until then the work is in out/.training, from where an interrupted run goes on.
    A teacher that out already holds is left alone. classes: the names by number, for sources that have none.
    Underscores in names become spaces. minutes: budget of each teacher, in place of the recipe's steps. Raises
    ZooError, SourceError for an image, or OSError for a file that cannot be read or written.
    """
    zoo = zoo or Zoo.on(device.type)
    classes = _check(images, test_images, classes, only)
    with _alone(out):
        todo = [name for name in only if not _finished(out / name, say)]
        samples = out / "images"
        if not todo and samples.exists():
            return {}
        train, test = read(images, classes), read(test_images, classes)
        if not samples.exists():  # after reading: by now every image has been decoded once
            new = out / _WORK / "images.new"
            shutil.rmtree(new, ignore_errors=True)
            write_samples(new, images, test_images, classes)
            os.replace(new, samples)
        figures = {}
        for name in todo:
            recipe = _within(getattr(zoo, name), len(train))
            facts = {
                "train": {"source": _shown(images.source), "images": len(train)},
                "test": {"source": _shown(test_images.source), "images": len(test)},
                "classes": list(classes),
                "pixels": STORED,
                "seed": seed,
                "device": device_name(device),
                "recipe": asdict(recipe),
            }
            figures[name] = _make(name, recipe, train, test, out, facts, device, seed, minutes)
            say(f"{out / name}: " + ", ".join(f"{key} {row['value']:.4f}" for key, row in figures[name].items()))
        return figures


def _make(name, recipe, train: Pixels, test: Pixels, out: Path, facts: dict, device, seed, minutes) -> dict:
    work = out / _WORK / name
    agreed = {"recipe": facts["recipe"], "images": train.digest(), "classes": facts["classes"]}
    common = {"device": device, "seed": seed, "facts": agreed, "minutes": minutes}
    new = out / _WORK / f"{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if name == "clip":
        model, tokenizer, told = train_clip(train, recipe, work, **common)
        save_clip(model, tokenizer, new)
    elif name == "gdino":
        model, tokenizer, told = train_gdino(train, recipe, work, **common)
        save_gdino(model, tokenizer, new, recipe)
    else:
        model, told = train_dinov2(train, recipe, work, **common)
        save_dinov2(model, new)
    try:
        figures = _measure(name, recipe, new, train, test, device, seed)
    except EvaluateError as error:
        raise ZooError(f"{name} cannot be measured ({error}); remove {work} to train it again") from error
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    write_card(new, name, facts, told, figures)
    _join_metrics(work, new / "metrics.jsonl")
    for file in new.iterdir():
        file.chmod(0o644)  # safetensors makes its files readable for their owner alone
    os.replace(new, out / name)
    return figures


def _measure(name: str, recipe, folder: Path, train: Pixels, test: Pixels, device, seed: int) -> dict[str, dict]:
    """What kpu_fast.evaluate finds of the model in `folder`, in fp32: {figure: {"value", "on"}}."""
    if name == "gdino":
        mosaics = Mosaics(test, recipe.test_mosaics, recipe.canvas, _MOSAICS_SEED)
        found = detect(load_detector(folder, device=device), mosaics, test.classes)
        on = f"{recipe.test_mosaics:,} mosaics of test images, {recipe.canvas}×{recipe.canvas} pixels"
        return {key: {"value": found[key.lower()], "on": on} for key in ("AP", "AP50", "AP75")}
    encoder = load_encoder(folder, device=device)
    if name == "clip":
        texts = embed_texts(folder, test.classes, TEMPLATES, device=device)
        found = zero_shot(encoder, texts, test, size=recipe.image_size)
        return {"zero-shot top-1": {"value": found["top1"], "on": f"{len(test):,} test images"}}
    bank = _bank(train, seed)
    found = knn(encoder, bank, test, size=recipe.image_size)
    drawn = " drawn at random" if len(bank) < len(train) else ""
    on = f"{len(test):,} test images, {found['k']} nearest of {len(bank):,} training images{drawn}"
    return {"kNN top-1": {"value": found["top1"], "on": on}}


def _join_metrics(work: Path, target: Path) -> None:
    files = sorted(work.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    target.write_text("".join(path.read_text() for path in files))


def _within(recipe, images: int):
    """`recipe` with batches no larger than the set of images: they are what it really does and the card tells."""
    part = "classify" if isinstance(recipe, GdinoRecipe) else "fit"  # of mosaics there are any number
    fit = getattr(recipe, part)
    return replace(recipe, **{part: replace(fit, batch=min(fit.batch, images))})


def _bank(train: Pixels, seed: int) -> Pixels:
    rows = draw(len(train), _BANK, seed)
    return Pixels(train.images[rows], train.labels[rows], train.classes)


def _check(images: LabelledImages, test_images: LabelledImages, classes, only) -> tuple[str, ...]:
    """The classes' names. Raises ZooError for whatever would be of no use, or fail, after hours of training."""
    try:
        check_apart(images.source, test_images.source, ("--images", "--test-images"))
    except EvaluateError as error:
        raise ZooError(str(error)) from error
    classes = _spaced(classes or images.classes or test_images.classes)
    if not classes:
        raise ZooError(
            f"{images.source!r} does not name its classes; put a classes.txt (one name per line) beside the shards, or "
            "give --classes"
        )
    if not all(classes) or len(set(classes)) < len(classes):
        raise ZooError(f"the classes {classes}: expected names, none empty and none twice ('_' counts as a space)")
    for option, source in (("--images", images), ("--test-images", test_images)):
        if source.classes and _spaced(source.classes) != classes:
            raise ZooError(f"{option} {source.source!r} has the classes {source.classes}, not {classes}")
        if max(source.labels) >= len(classes):
            raise ZooError(
                f"{option} {source.source!r} has an image of class {max(source.labels)}, but {len(classes)} names"
            )
    found = len(set(images.labels))
    if found < 2:
        raise ZooError(
            f"--images {images.source!r} are all of one class: there is nothing to tell apart; give at least 2"
        )
    for name, check in (("clip", check_captions), ("gdino", check_prompt)):
        if name in only:
            check(classes)
    return classes


def _spaced(names) -> tuple[str, ...]:
    """Names as evaluation asks for them: class folders are often called red_ball."""
    return tuple(name.replace("_", " ").strip() for name in names or ())


def _finished(folder: Path, say) -> bool:
    if not folder.exists():
        return False
    if (folder / "training.json").is_file() and (folder / "model.safetensors").is_file():
        say(f"{folder}: is there already and is left as it is; remove it to train it again")
        return True
    raise ZooError(f"{folder}: is in the way: it was not made by this command; remove it or give another --out")


@contextmanager
def _alone(out: Path):
    if out.exists() and not out.is_dir():
        raise ZooError(f"--out {out}: is a file, expected a folder")
    try:
        (out / _WORK).mkdir(parents=True, exist_ok=True)
        lock = (out / _WORK / "lock").open("w")
    except OSError as error:
        raise ZooError(f"--out {out}: cannot be written ({error})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ZooError(f"--out {out}: another run is writing there; wait for it or give another --out") from error
        except OSError:  # some network file systems have no locks
            pass
        yield


def _shown(source: str) -> str:
    """The last two parts of a path: a card is no place for the folders of a machine."""
    return "/".join(source.rstrip("/").split("/")[-2:])
