"""Tables and a picture from what was measured:  python bench/report.py [JSON …] [--write]

Reads pytest-benchmark's JSON of this folder's benchmarks, step.py's, and gpu_visit.py's, which holds both; without a
name every JSON in bench/results but tune.py's. One report per device: times, GB/s and memory on a GPU; ratios alone on
a CPU. The picture, and what --write puts into README.md and docs/benchmarks.md, are of one device.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from report_picture import draw

BEGIN, END = "<!-- bench: written by bench/report.py -->", "<!-- bench: end -->"
ROOT = Path(__file__).resolve().parent.parent
README, DETAILS, PICTURE = "README.md", "docs/benchmarks.md", "docs/img/roofline.png"
MODES = ("graph", "full", "forward")  # the first that was measured stands for a shape in the short table
DTYPES = ("bf16", "fp32", "fp16")
BASELINES = ("eager", "compile")
MODE_TEXT = {"graph": "as a CUDA graph", "full": "forward + backward", "forward": "forward"}
COLUMNS = ("op", "shape", "row", "dtype", "mode", "device", "ms", "gb_per_s", "copy_gb_per_s", "percent_of_copy")


class ReportError(ValueError):
    """A file that cannot be reported; the message names it."""


class Group(NamedTuple):
    """The rows that were measured on the same inputs: {"ours": …, "eager": …, "compile": …}, each an extra_info."""

    op: str
    shape: str
    dtype: str
    mode: str
    rows: dict[str, dict]

    def ratio(self, row: str) -> float:
        """How many times ours is faster than `row`, which was measured."""
        return self.rows[row]["ms"] / self.rows["ours"]["ms"]

    def times(self, row: str) -> str:
        """The same as text, a dash where it was not measured."""
        return "–" if row not in self.rows else _two_digits(self.ratio(row))


class Measured(NamedTuple):
    """What one table is made of."""

    groups: list[Group]
    steps: list[dict]
    device: str
    circumstances: str

    @property
    def on_gpu(self) -> bool:
        """Whether absolute numbers say something."""
        return not _is_cpu(self.device)


def main() -> int:
    """Read, print or write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", nargs="*", type=Path, help="default: every JSON in bench/results but tune-*")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--write",
        action="store_true",
        help=f"the table into {README}, the rows without a graph into {DETAILS}, each between the page's two marker "
        "comments; else print both",
    )
    how.add_argument("--all", action="store_true", help="every dtype and mode, not one line per shape")
    parser.add_argument("--picture", type=Path, help=f"default, where there is one device: {PICTURE}")
    args = parser.parse_args()
    try:
        found = [read(files) for files in by_device(args.json or _results())]
        if len(found) > 1 and (args.write or args.picture):
            devices = ", ".join(measured.device for measured in found)
            raise ReportError(f"--write and --picture are of one device, found {devices}; give the files of one")
        if args.write:
            insert(ROOT / README, table(found[0]))
            insert(ROOT / DETAILS, launched(found[0]))
        else:
            texts = [part(measured, every=args.all) for measured in found for part in (table, launched)]
            print("\n\n".join(filter(None, texts)))
        if len(found) == 1 and found[0].groups:
            _picture(found[0], args.picture or ROOT / PICTURE)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _results() -> list[Path]:
    """The JSON in bench/results but tune.py's, which compare ours with ours. Raises ReportError where there is none."""
    found = sorted(file for file in (ROOT / "bench/results").glob("*.json") if not file.name.startswith("tune-"))
    if not found:
        raise ReportError("no JSON given and none in bench/results; measure first: pytest bench/ --benchmark-json FILE")
    return found


def by_device(files: list[Path]) -> list[list[Path]]:
    """The files of each device. Raises ReportError, naming the file, where one cannot be read or holds several."""
    found = defaultdict(list)
    for file in files:
        found[read([file]).device].append(file)
    return list(found.values())


def read(files: list[Path]) -> Measured:
    """Everything in `files`, of one device. Raises ReportError, naming file and reason."""
    groups, steps, notes = {}, [], set()
    for file in files:
        try:
            found, steps_here, notes_here = _read_file(file)
            table(Measured(_ordered(found), steps_here, "", ""), every=True)  # asks for all that a table needs
        except ReportError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ReportError(
                f"{file}: not of the form that the benchmarks write ({problem}); measure it again"
            ) from error
        again = found.keys() & groups.keys()
        if again:
            raise ReportError(
                f"{file}: {' '.join(min(again))} is in another file too; a ratio needs one run: give one file"
            )
        groups |= found
        steps += steps_here
        notes |= notes_here
    rows = {row["device"] for group in groups.values() for row in group.rows.values()}
    devices = sorted(rows | {step["device"] for step in steps})
    if len(devices) > 1:
        raise ReportError(f"one table holds one device, found {', '.join(devices)}; give their files one by one")
    return Measured(_ordered(groups), steps, devices[0], "; ".join(sorted(notes)))


def _read_file(file: Path) -> tuple[dict[tuple, Group], list[dict], set[str]]:
    """Groups by their key, steps, and what the caption says about them."""
    content = _load(file)
    groups, steps, of_groups, of_steps = {}, [], set(), set()
    for part in _parts(content):
        date, commit = _date_and_commit(content, part)
        found = _group(file, part.get("benchmarks", []))
        groups |= found
        of_groups |= {_note(group.rows["ours"], date, commit) for group in found.values()}
        if "step_ms" in part:
            steps.append(part)
            of_steps.add(_note(part["versions"], date, commit))
    if not groups and not steps:
        raise ReportError(f"{file}: no pair of rows ours and eager; was it made by pytest bench/ --benchmark-only?")
    return groups, steps, of_groups or of_steps  # a step's sentence has its own date


def _note(versions: dict, date: str, commit: str) -> str:
    return f"torch {versions['torch']}, triton {versions['triton']}, {date}, commit {commit}"


def _ordered(groups: dict[tuple, Group]) -> list[Group]:
    return sorted(groups.values(), key=lambda group: (DTYPES.index(group.dtype), MODES.index(group.mode)))


def _group(file: Path, benchmarks: list[dict]) -> dict[tuple, Group]:
    """{(op, shape, dtype, mode): Group} of those that hold a row of ours and one of eager."""
    found = defaultdict(dict)
    for bench in benchmarks:
        info = bench.get("extra_info", {})
        if "counted_bytes" not in info:  # loading images, where no bytes are counted
            continue
        missing = [column for column in COLUMNS if column not in info]
        if missing:
            raise ReportError(f"{file}: {bench.get('name')} has no {', '.join(missing)}; measure it again")
        key = tuple(info[column] for column in ("op", "shape", "dtype", "mode"))
        if info["row"] in found[key]:
            raise ReportError(f"{file}: holds {' '.join(key)}, row {info['row']}, twice; measure it again")
        found[key][info["row"]] = info
    return {key: Group(*key, rows) for key, rows in found.items() if {"ours", "eager"} <= rows.keys()}


def _load(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ReportError(f"{file}: is no JSON ({error}); the run that wrote it was cut off or failed") from error
    if not isinstance(content, dict) or not ({"benchmarks", "step_ms", "sections"} & content.keys()):
        raise ReportError(f"{file}: expected the JSON of pytest-benchmark, bench/step.py or bench/gpu_visit.py")
    if content.get("benchmarks") == []:
        raise ReportError(f"{file}: holds no benchmark; see what pytest said when it was written")
    return content


def _parts(content: dict) -> list[dict]:
    """The pytest-benchmark and step parts of any of the three kinds of file."""
    if "sections" not in content:
        return [content]
    results = ({"date": s.get("date"), **(s.get("result") or {})} for s in content["sections"].values())
    return [result for result in results if result.get("benchmarks") or "step_ms" in result]


def _date_and_commit(content: dict, part: dict) -> tuple[str, str]:
    date = part.get("date") or content.get("date") or content.get("datetime") or "date unknown"
    info = content.get("commit_info") or {}
    commit = part.get("commit") or content.get("commit") or info.get("id") or "unknown"
    changed = " with changes" if info.get("dirty") or "dirty" in commit else ""
    return date[:10], commit[:10] + changed


def _is_cpu(device: str) -> bool:
    """As kpu_fast.machine names it, and as results of before do."""
    return device.endswith("(CPU)") or device.upper().startswith("CPU")


def table(measured: Measured, *, every: bool = False) -> str:
    """Markdown: caption, a table over all ops, a sentence on the losses of a step, one on a step.

    Where rows were replayed as CUDA graphs, which is the device's time, the table has these alone, unless `every`.
    """
    groups, others = _halves(measured, every)
    lines = [_caption(measured, groups)]
    if groups and groups[0].mode == "graph" and not every:
        lines += ["", "The device's time, each row replayed as a CUDA graph:"]
    lines += _rows(groups, measured.on_gpu, every) if groups else []
    found = *_floors([*groups, *others], measured.on_gpu), *(_step(step, measured.on_gpu) for step in measured.steps)
    return "\n".join([*lines, *(line for sentence in found for line in ("", sentence))])


def launched(measured: Measured, *, every: bool = False) -> str:
    """Markdown: caption and table of the rows that `table` has not, which the host launched one by one; "" if none."""
    _, groups = _halves(measured, every)
    if not groups:
        return ""
    title = "Rows without a graph, with what the host needed to launch them:"
    return "\n".join([_caption(measured, groups), "", title, *_rows(groups, measured.on_gpu, every)])


def _halves(measured: Measured, every: bool) -> tuple[list[Group], list[Group]]:
    """What `table` has, and what is left to `launched`."""
    groups = _by_op(measured.groups if every else _short(measured.groups, measured.on_gpu))
    graphs = [group for group in groups if group.mode == "graph"]
    if every or not graphs:
        return groups, []
    return graphs, [group for group in groups if group.mode != "graph"]


def _rows(groups: list[Group], on_gpu: bool, every: bool) -> list[str]:
    numbers = ["ms", "GB/s", "% of copy"] if on_gpu else ["% of copy"]
    memory = ["peak memory, MB (eager)"] if on_gpu else []
    head = ["", *numbers, *(f"× {row}" for row in BASELINES), *memory]
    further = any(_further(group) for group in groups)
    lines = ["", _line([*head, *["× others"] * further])]
    lines += [_line(["---", *["---:"] * (len(head) - 1), *["---"] * further])]
    return lines + [_line([*_cells(group, on_gpu, every), *[_further(group)] * further]) for group in groups]


def _cells(group: Group, on_gpu: bool, every: bool) -> list[str]:
    ours, eager = group.rows["ours"], group.rows["eager"]
    detail = f", {group.dtype} {group.mode}" if every else ""
    cells = [f"{group.op} {group.shape}{detail}"]
    if on_gpu:
        cells += [f"{ours['ms']:.3g}", f"{ours['gb_per_s']:.0f}"]
    cells += [_two_digits(ours["percent_of_copy"]), *(group.times(row) for row in BASELINES)]
    return [*cells, f"{_megabytes(ours)} ({_megabytes(eager)})"] if on_gpu else cells


def _further(group: Group) -> str:
    rows = sorted(group.rows.keys() - {"ours", *BASELINES})
    return ", ".join(f"{row} {group.times(row)}" for row in rows)


def _short(groups: list[Group], on_gpu: bool) -> list[Group]:
    """One group per op and shape: bf16 on a GPU and fp32 on a CPU, in the first of MODES that it has."""
    dtypes = DTYPES if on_gpu else ("fp32", "bf16")
    best = {}
    for group in groups:
        rank = dtypes.index(group.dtype), MODES.index(group.mode)
        kept = best.get((group.op, group.shape))
        if kept is None or rank < (dtypes.index(kept.dtype), MODES.index(kept.mode)):
            best[group.op, group.shape] = group
    return list(best.values())


def _by_op(groups: list[Group]) -> list[Group]:
    order = {op: place for place, op in enumerate(dict.fromkeys(group.op for group in groups))}
    return sorted(groups, key=lambda group: order[group.op])


def _caption(measured: Measured, groups: list[Group]) -> str:
    what = sorted({f"{group.dtype} {MODE_TEXT[group.mode]}" for group in groups})
    text = f"**{measured.device}**"
    if groups:
        copies = [row["copy_gb_per_s"] for group in measured.groups for row in group.rows.values()]
        text += f" ({'; '.join(what)}), {measured.circumstances}. × is the other's time over ours in the same run; "
        text += "% of copy: counted bytes per second over those of a copy, measured in the same run"
        text += (
            f" ({max(copies):.0f} GB/s)."
            if measured.on_gpu
            else ". A CPU's times are no achievement, so none are shown."
        )
    elif measured.circumstances:
        text += f", {measured.circumstances}"
    return text


def _floors(groups: list[Group], on_gpu: bool) -> list[str]:
    """The paper step's losses as multiples of the time its bytes need at the speed of a copy."""
    lines = []
    for group in groups:
        if group.op != "step_losses":
            continue
        ours = group.rows["ours"]
        multiple = 100 / ours["percent_of_copy"]
        times = f", {ours['ms'] / multiple:.3g} ms at the speed of a copy" if on_gpu else ""
        what = f"All loss terms of a step ({group.shape}, {group.dtype} {group.mode})"
        ratio = f"ours take {multiple:.2f} times as long as a copy of as many"
        lines.append(f"{what}: {ours['counted_bytes'] / 1e6:.0f} MB{times}; {ratio}.")
    return lines


def _step(step: dict, on_gpu: bool) -> str:
    shares = ", ".join(f"{part} {share:.0f} %" for part, share in step["shares_percent"].items())
    compiled = ", compiled" if step["config"]["compile"] else ""
    text = f"Training step, `{step['config']['name']}`{compiled}: {shares}"
    if on_gpu:
        text += f"; {step['step_ms']:.1f} ms, {step['images_per_second']:.0f} images/s, {step['ranks']} rank(s)"
    if step.get("images") == "random":
        text += "; random images on the device, nothing decoded"
    date, commit = _date_and_commit(step, {})
    return f"{text} ({date}, commit {commit})."


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _two_digits(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def _megabytes(row: dict) -> str:
    return f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") is not None else "–"


def insert(page: Path, text: str) -> None:
    """Replace what stands between the two marker comments of `page`. Raises ReportError where they are not."""
    try:
        content = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{page}: cannot be read ({error.strerror})") from error
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ReportError(f"{page}: expected the lines {BEGIN!r} and {END!r} once each, in this order; add them")
    before, after = content[: content.index(BEGIN)], content[content.index(END) :]
    try:
        page.write_text(f"{before}{BEGIN}\n{text}\n{after}", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{page}: cannot be written ({error.strerror})") from error


def _picture(measured: Measured, file: Path) -> None:
    """The rows of `table` drawn. Raises ReportError where `file` cannot be written."""
    groups, _ = _halves(measured, every=False)
    caption = _caption(measured, groups).replace("**", "").partition(". ×")[0]
    figure = draw(groups, caption, measured.on_gpu)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130, format=file.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # ValueError: a suffix of no picture
        raise ReportError(f"--picture {file}: cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
