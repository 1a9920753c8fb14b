"""The paper's ablation at a size anyone can rerun: trains students from the zoo, evaluates them, writes the table.

    python -m kpu_fast.reproduce --images SOURCE --test-images SOURCE [--runs kpu base_a ...] [--seeds 3]

Every run and every evaluation leaves its own file below --out; what is there is not done again, so an interrupted
command goes on where it was. The test images are read by the evaluation only.
Exit codes: 0 done; 2 an option, images or a folder that cannot be used; 1 a training failed (its own message says why).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kpu_fast.evaluate.result import EvaluateError, replaced

ROOT = Path(__file__).resolve().parents[1]
CONFIG, ZOO = ROOT / "configs/zoo.json", ROOT / "zoo"
# name → what it changes in configs/zoo.json (`--set`). Base_a, b, c and KPU are the paper's ablation.
RUNS: dict[str, tuple[str, ...]] = {
    "base_a": (
        "student.adapter=null",
        "student.freeze_vit=false",
        "objective.t2s=false",
        "objective.rec=false",
    ),
    "base_b": ("objective.t2s=false", "objective.rec=false"),
    "base_c": ("objective.rec=false",),
    "kpu": (),
    "kpu_famo": ("objective.balance=famo",),
    "kpu_teacher_drop": ("objective.balance=teacher_drop",),
    "kpu_phi_s": ("objective.standardize=phi_s",),
    "clip_only": ("teachers.gdino=null",),
    "gdino_only": ("teachers.clip=null",),
}
LABELS = {
    "base_a": "Base_a: whole ViT trained, s2t",
    "base_b": "Base_b: frozen ViT + adapter, s2t",
    "base_c": "Base_c: + t2s",
    "kpu": "KPU: + rec",
    "kpu_famo": "KPU, FAMO",
    "kpu_teacher_drop": "KPU, TeacherDrop",
    "kpu_phi_s": "KPU, PHI-S",
    "clip_only": "CLIP only",
    "gdino_only": "GroundingDINO only",
}
REFERENCES = {"clip": "teacher: CLIP", "gdino": "teacher: GroundingDINO", "dinov2": "sentinel, untouched"}
COLUMNS = {"zero_shot": "zero-shot top-1", "knn": "kNN top-1", "linear": "linear top-1", "ap": "AP"}
GAPS = {"own": "own spaces", "common": "common space"}
CANVAS = 192  # of the mosaics GroundingDINO learns and is tested on
MOSAICS_TEST, MOSAICS_SEED = 300, 10**6  # that no training mosaic has
MARKS = "<!-- table: written by kpu_fast/reproduce.py -->", "<!-- table: end -->"


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, write; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        args.out.mkdir(parents=True, exist_ok=True)
        mosaics = make_mosaics(args.images, args.out / "mosaics", args.mosaics)
        references = {name: evaluate_reference(name, args) for name in REFERENCES}
        for seed in range(args.seeds):
            for run in args.runs:
                if not train(run, seed, mosaics, args):
                    return 1
                evaluate_run(run, seed, args)
    except (EvaluateError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    text = table(references, read_results(args.out / "results"))
    print(text)
    if args.report:
        write_report(args.report, text)
        save_curves(args.report.parent / "img/reproduction.png", args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kpu_fast.reproduce", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", default=str(ZOO / "images/train.tar"), help="labelled images to train on (labels: kNN and linear)")
    add("--test-images", default=str(ZOO / "images/test.tar"), help="labelled images that nothing is trained on")
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    add("--seeds", type=int, default=3, help="trainings of each run (default %(default)s)")
    add("--steps", type=int, help="of each training (default: those of configs/zoo.json)")
    add("--mosaics", type=int, default=4000, help="images for GroundingDINO to teach on (default %(default)s)")
    add("--train-limit", type=int, default=5000, help="images that kNN and linear learn from (default %(default)s)")
    add("--test-limit", type=int, default=2000, help="images to test on (default %(default)s)")
    add("--out", type=Path, default=Path("runs/reproduce"), help="default %(default)s")
    add("--report", type=Path, metavar="PAGE", help="also write the table between the marker lines of this page")
    add("--device", default="cpu", help="of the evaluations (default %(default)s)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for option in ("seeds", "mosaics", "train_limit", "test_limit"):
        if getattr(args, option) < 1:
            raise EvaluateError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 1")
    missing = [name for name in REFERENCES if not (ZOO / name / "config.json").is_file()]
    if missing:
        raise EvaluateError(f"{ZOO}: no {' and '.join(missing)}; python -m kpu_fast.zoo trains them")
    text = args.report.read_text(encoding="utf-8") if args.report and args.report.is_file() else ""
    if args.report and not all(mark in text for mark in MARKS):
        raise EvaluateError(f"--report {args.report}: expected a page with the lines {' and '.join(MARKS)}")
    from kpu_fast.evaluate.images import check_apart

    check_apart(args.images, args.test_images)


# ------------------------------------------------------------------------------------------------------------ training


def make_mosaics(source: str, folder: Path, count: int) -> Path:
    """`count` mosaics of the source's images as PNGs in `folder`; unlabelled images for GroundingDINO to teach on."""
    from PIL import Image
    from tqdm import tqdm

    from kpu_fast.evaluate.images import read_images
    from kpu_fast.zoo.mosaic import make_mosaic

    images = read_images("--images", source)
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc="mosaics", unit="img", delay=0.5):
        path = folder / f"{i:06d}.png"
        if not path.exists():
            pixels, _, _ = make_mosaic(images, 0, i, CANVAS)
            Image.fromarray(pixels).save(folder / ".partial", format="png")
            os.replace(folder / ".partial", path)
    return folder


def train(run: str, seed: int, mosaics: Path, args: argparse.Namespace) -> bool:
    """Train one student unless its export is there; False if the training failed."""
    name = f"{run}-{seed}"
    if (args.out / name / "student/config.json").is_file():
        return True
    settings = [f"name={name}", f"output={args.out}", f"seed={seed}", f"source={json.dumps(args.images)}", *RUNS[run]]
    if "teachers.gdino=null" not in settings:
        settings.append(f"teachers.gdino.data.source={json.dumps(str(mosaics))}")
    if args.steps is not None:
        settings.append(f"steps={args.steps}")
        settings.append(f"optimizer.warmup_steps={min(20, args.steps)}")
    command = [sys.executable, str(ROOT / "kpu_fast/train.py"), "--config", str(CONFIG), "--resume", "auto"]
    print(f"--- {name}", flush=True)
    return subprocess.run([*command, "--set", *settings], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate_reference(name: str, args: argparse.Namespace) -> dict:
    """The figures of a teacher, or of the sentinel before any training."""
    return _kept(args.out / "results" / f"{name}.json", lambda: _scores(ZOO / name, name, args))


def evaluate_run(run: str, seed: int, args: argparse.Namespace) -> dict:
    """The figures of a trained student."""
    folder = args.out / f"{run}-{seed}"

    def scores() -> dict:
        from kpu_fast.evaluate.std_gap import std_gap

        found = _scores(folder / "student", run, args)
        if run not in ("base_a", "base_b", "clip_only", "gdino_only"):  # two teachers, and a common space
            gap = std_gap(folder, batches=10, device=args.device)
            found["gap"] = {space: gap[space]["gap"] for space in GAPS}
        return found

    return _kept(args.out / "results" / f"{run}-{seed}.json", scores)


def _scores(model: Path, name: str, args: argparse.Namespace) -> dict:
    """Every column that `name` has; as fractions."""
    from kpu_fast.evaluate.boxes import Mosaics
    from kpu_fast.evaluate.detect import detect, load_detector, see_through
    from kpu_fast.evaluate.encoder import load_encoder
    from kpu_fast.evaluate.images import read_images
    from kpu_fast.evaluate.knn import collect, count_classes, nearest
    from kpu_fast.evaluate.linear import regress
    from kpu_fast.evaluate.zero_shot import class_names, embed_texts, zero_shot
    from kpu_fast.zoo.clip import TEMPLATES

    known = read_images("--images", args.images, args.train_limit)
    unseen = read_images("--test-images", args.test_images, args.test_limit)
    names = class_names(unseen, None if unseen.classes else ZOO / "images/classes.txt")
    found = {}
    if name != "gdino":  # whose teacher has no x
        encoder = load_encoder(model, device=args.device)
        classes, size = count_classes(known, unseen), encoder.image_size
        learnt, asked = (collect(encoder, images, size=size, description="x") for images in (known, unseen))
        found["knn"] = nearest(learnt, asked, classes, device=args.device)
        found["linear"], _ = regress(learnt, asked, classes)
        if name not in ("dinov2", "gdino_only"):
            texts = embed_texts(ZOO / "clip", names, TEMPLATES, device=args.device)
            found["zero_shot"] = zero_shot(encoder, texts, unseen, size=size)["top1"]
    if name not in ("dinov2", "clip", "clip_only"):
        detector = load_detector(ZOO / "gdino", device=args.device)
        if name != "gdino":
            detector = see_through(detector, encoder, "gdino")
        mosaics = Mosaics(unseen, MOSAICS_TEST, CANVAS, MOSAICS_SEED)
        found["ap"] = detect(detector, mosaics, names)["ap"]
    return found


def _kept(path: Path, make: Callable[[], dict]) -> dict:
    if not path.exists():
        scores = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced("--out", path) as partial:
            partial.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------------- report


def read_results(folder: Path) -> dict[str, list[dict]]:
    """run → the figures of its seeds, in the order of RUNS."""
    found = {run: sorted(folder.glob(f"{run}-*.json")) for run in RUNS}
    return {run: [json.loads(path.read_text()) for path in paths] for run, paths in found.items() if paths}


def table(references: dict[str, dict], results: dict[str, list[dict]]) -> str:
    """Markdown: a row per teacher and per run, percent, mean ± standard deviation over seeds."""
    heads = [*COLUMNS.values(), "mean", *(f"std gap, {space}" for space in GAPS.values()), "seeds"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, label in REFERENCES.items():
        cells = [_percent([references[name].get(column)]) for column in COLUMNS]
        lines.append(f"| {label} | " + " | ".join([*cells, "", *("" for _ in GAPS), ""]) + " |")
    for run, seeds in results.items():
        cells = [_percent([scores.get(column) for scores in seeds]) for column in COLUMNS]
        whole = all(scores.get(column) is not None for scores in seeds for column in COLUMNS)
        means = [statistics.mean(s[c] for c in COLUMNS) for s in seeds] if whole else [None]
        gaps = [_times([scores["gap"][space] for scores in seeds if "gap" in scores]) for space in GAPS]
        lines.append(f"| {LABELS[run]} | " + " | ".join([*cells, _percent(means), *gaps, str(len(seeds))]) + " |")
    return "\n".join(lines)


def _percent(values: list[float | None]) -> str:
    values = [100 * value for value in values if value is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _times(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    return f"{statistics.mean(values):.1f}×" if values else "–"


def write_report(page: Path, text: str) -> None:
    """Put the table between the marker lines of the page."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def save_curves(path: Path, runs: Path) -> None:
    """Draw each run's s2t losses over the steps, mean over seeds: one panel per teacher, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from kpu_fast.engine.monitor import read_metrics

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, teacher in zip(axes, ("clip", "gdino"), strict=True):
        for run in RUNS:
            seeds = [read_metrics(folder) for folder in sorted(runs.glob(f"{run}-[0-9]*"))]
            seeds = [rows for rows in seeds if rows and f"{teacher}/s2t" in rows[-1]]
            if not seeds:
                continue
            steps = [row["step"] for row in seeds[0]]
            losses = [statistics.mean(row[f"{teacher}/s2t"] for row in at) for at in zip(*seeds, strict=False)]
            axis.plot(steps[: len(losses)], losses, label=run, linewidth=1.1)
        axis.set_title(f"{teacher}: L_s2t", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
