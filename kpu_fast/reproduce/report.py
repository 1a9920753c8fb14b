"""The table and the curves."""

import json
import statistics
from pathlib import Path

from kpu_fast.evaluate.result import EvaluateError, replaced
from kpu_fast.reproduce.ablation import COLUMNS, GAPS, LABELS, MOSAICS_TEST, REFERENCES, RUNS

MARKS = "<!-- table: written by kpu_fast/reproduce -->", "<!-- table: end -->"


def read_results(folder: Path) -> dict[str, list[dict]]:
    """run → the figures of its seeds, in the order of RUNS."""
    found = {run: sorted(folder.glob(f"{run}-*.json")) for run in RUNS}
    return {run: [read_result(path) for path in paths] for run, paths in found.items() if paths}


def read_result(path: Path) -> dict:
    """What `scores.kept` wrote. Raises EvaluateError, naming the file, where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluateError(f"{path}: damaged ({error}); remove it to measure again") from error


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
        gaps = [_spread([s["gap"][space] for s in seeds if "gap" in s], "×") for space in GAPS]
        lines.append(f"| {LABELS[run]} | " + " | ".join([*cells, _percent(means), *gaps, str(len(seeds))]) + " |")
    return "\n".join(lines)


def conditions(configs: list, results: list[dict]) -> str:
    """One line that says under which conditions the table came about.

    configs: of the trainings. results: every file that the table was made from.
    """
    steps = _range(cfg.steps for cfg in configs)
    precision = _range(cfg.precision for cfg in configs)
    batches = {name: teacher.data.batch_size for cfg in configs for name, teacher in cfg.teachers.items()}
    images = " and ".join(f"{count} images of {teacher}" for teacher, count in batches.items())
    known, unseen = (_range(result[key] for result in results) for key in ("train_images", "test_images"))
    dates = _range(result["date"][:10] for result in results)
    devices = ", ".join(sorted({result["device"] for result in results}))
    torch = _range(result["versions"]["torch"] for result in results)
    commits = ", ".join(sorted({_short(result["commit"]) for result in results}))
    return (
        f"{steps} steps of {images} in {precision}; kNN and linear learn from {known} images; {unseen} test images, "
        f"{MOSAICS_TEST} mosaics of them. Evaluated on {devices}, torch {torch}, {dates}, commit {commits}."
    )


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:10] + " with changes" * commit.endswith("-dirty")


def _range(values) -> str:
    low, *rest = sorted(set(values))
    return f"{low}–{rest[-1]}" if rest else str(low)


def _percent(values: list[float | None]) -> str:
    return _spread([100 * value for value in values if value is not None], "")


def _spread(values: list[float], unit: str) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{unit}{spread}"


def split_page(text: str) -> tuple[str, str] | None:
    """What stands before and after the table, or None unless both marker lines are there, once and in order."""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return (before, after) if mark and end and not any(m in before + after for m in MARKS) else None


def write_report(page: Path, text: str) -> None:
    """Put the text between the marker lines of the page."""
    before, after = split_page(page.read_text(encoding="utf-8"))
    with replaced("--report", page) as partial:
        partial.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def save_curves(path: Path, runs: Path) -> None:
    """Draw each run's s2t losses over the steps: one panel per teacher, one line per run.

    A point is the mean over all seeds and a fiftieth of the steps. runs: --out, of which the runs that have a result
    are drawn.
    """
    from matplotlib.figure import Figure

    from kpu_fast.engine.monitor import read_metrics

    figure = Figure(figsize=(10, 3.6))
    axes = figure.subplots(1, 2)
    for axis, teacher in zip(axes, ("clip", "gdino"), strict=True):
        for number, run in enumerate(RUNS):
            done = sorted((runs / "results").glob(f"{run}-[0-9]*.json"))
            seeds = [read_metrics(runs / path.stem) for path in done]
            seeds = [rows for rows in seeds if f"{teacher}/s2t" in rows[-1]]
            if not seeds:
                continue
            width = max(1, len(seeds[0]) // 50)
            stretches = [[row for rows in seeds for row in rows[i : i + width]] for i in range(0, len(seeds[0]), width)]
            steps = [statistics.mean(row["step"] for row in rows) for rows in stretches]
            losses = [statistics.mean(row[f"{teacher}/s2t"] for row in rows) for rows in stretches]
            axis.plot(steps, losses, label=run, linewidth=1.2, color=f"C{number}")
        axis.set_title(f"{teacher}: L_s2t (PHI-S: of standardised features)", fontsize=10)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
