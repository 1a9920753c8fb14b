"""The figures of one teacher or student; each is measured once and kept as a file."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from kpu_fast.evaluate.result import replaced, settings_of, with_circumstances
from kpu_fast.reproduce import ablation
from kpu_fast.reproduce.report import read_result
from kpu_fast.reproduce.settings import digest_model, zoo_classes
from kpu_fast.reproduce.train import config_of


def score_reference(name: str, args: argparse.Namespace) -> dict:
    """The figures of a teacher, or of the sentinel before any training."""
    model = args.zoo / name
    return kept(args.out / "results" / f"{name}.json", model, lambda: _scores(model, name, args), args)


def score_run(run: str, folder: Path, args: argparse.Namespace) -> dict:
    """The figures of the student in the folder of its run."""
    model = folder / "student"

    def scores() -> dict:
        from kpu_fast.evaluate.std_gap import std_gap

        found = _scores(model, run, args)
        cfg = config_of(run, 0, args)
        if cfg.objective.t2s and len(cfg.teachers) > 1:
            gap = std_gap(folder, batches=ablation.GAP_BATCHES, device=args.device)
            found["gap"] = {space: gap[space]["gap"] for space in ablation.GAPS}
        return found

    return kept(args.out / "results" / f"{folder.name}.json", model, scores, args)


def kept(path: Path, model: Path, make: Callable[[], dict], args: argparse.Namespace) -> dict:
    """What `make` returns, with its circumstances; from `path` where that is of `model` as it is. Fractions."""
    digest = digest_model(model)
    if path.exists() and (before := read_result(path)).get("model_sha256") == digest:
        return before
    scores = with_circumstances("reproduce", {**make(), "model_sha256": digest}, settings_of(args), args.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced("--out", path) as partial:
        partial.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return read_result(path)


def _scores(model: Path, name: str, args: argparse.Namespace) -> dict:
    """Every column that `name` has."""
    from kpu_fast.evaluate.boxes import Mosaics
    from kpu_fast.evaluate.detect import detect, load_detector, see_through
    from kpu_fast.evaluate.encoder import load_encoder
    from kpu_fast.evaluate.images import read_images
    from kpu_fast.evaluate.knn import collect_both, count_classes, nearest
    from kpu_fast.evaluate.linear import MAX_ITER, regress
    from kpu_fast.evaluate.zero_shot import embed_texts, zero_shot
    from kpu_fast.zoo.clip import TEMPLATES

    known = read_images("--images", args.images, args.train_limit)
    unseen = read_images("--test-images", args.test_images, args.test_limit)
    names = zoo_classes(unseen, args.zoo)
    found = {"train_images": len(known), "test_images": len(unseen)}
    if name != "gdino":  # whose teacher has no x
        encoder = load_encoder(model, device=args.device)
        classes, size = count_classes(known, unseen), encoder.image_size
        learnt, asked = collect_both(encoder, known, unseen, size=size, task="x")
        found["knn"] = nearest(learnt, asked, classes, device=args.device)
        found["linear"], iterations = regress(learnt, asked, classes)
        if iterations >= MAX_ITER:
            print(f"warning: {name}: the linear probe has not converged in {iterations} iterations", file=sys.stderr)
        if name not in ("dinov2", "gdino_only"):
            texts = embed_texts(args.zoo / "clip", names, TEMPLATES, device=args.device)
            found["zero_shot"] = zero_shot(encoder, texts, unseen, size=size)["top1"]
    if name not in ("dinov2", "clip", "clip_only"):
        detector = load_detector(args.zoo / "gdino", device=args.device)
        if name != "gdino":
            detector = see_through(detector, encoder, "gdino")
        mosaics = Mosaics(unseen, ablation.MOSAICS_TEST, ablation.CANVAS, ablation.MOSAICS_SEED)
        found["ap"] = detect(detector, mosaics, names)["ap"]
    return found
