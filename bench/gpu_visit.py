"""Everything that a GPU should be asked, in 8 minutes:  python bench/gpu_visit.py

Five stages, each in its own processes and its own time: the tests on the device, the benchmarks' compilation, every
benchmark, the training step, and a profile of the worst kernel with compute-sanitizer; a sixth where --stages asks for
it: the step under torch.compile. A stage that fails or runs out of time, or is cut off by SIGTERM, keeps what it has.
Leaves one JSON, <out>/<device>.json, rewritten after every stage; with --stages the others of an earlier visit stay in
it, if device, commit and versions are the same. Runs from a plain checkout and installs nothing; what
is missing (DeepSpeed, DALI, ncu, …) is left out and named. --dry-run goes the same way on a CPU, to test this script.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Their sum without the last: 480.
SECONDS = {"tests": 90, "warm": 60, "benches": 180, "step": 75, "profile": 75, "compiled": 400}
ASKED_FOR = {"compiled"}  # only where --stages names it: 140 s were too few to compile teachers and student on an H100
KEPT_SECONDS = {"tests": 15, "memcheck": 25}  # for each folder still to come, and for memcheck once all is compiled
DRY_SECONDS = {"tests": 15, "benches": 30, "step": 60, "profile": 15}
# The folders of tests that can meet the GPU, and what each needs beside torch and triton.
TESTS = {
    "tests/kernels": ("hypothesis",),
    "tests/data": ("nvidia.dali", "PIL", "skimage", "tqdm"),
    "tests/models": ("transformers", "safetensors"),
    "tests/objectives": ("transformers", "pydantic"),
    "tests/engine": ("transformers", "pydantic", "deepspeed", "nvidia.dali", "tqdm", "tensorboard"),
}
STEP_NEEDS = ("deepspeed", "pydantic", "transformers")
DECODING_NEEDS = ("nvidia.dali", "PIL")
WARM_PROCESSES = 14  # each with a bench's buffers on the GPU, up to 4 GB
PROFILE_FLOOR = 8 << 20  # below, a kernel is as slow as its launch and its profile says nothing
NCU_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "bytes of device memory",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of peak device memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps active",
    "launch__registers_per_thread": "registers",
}


class _Ended(Exception):
    """SIGTERM: the stage that runs keeps what it has, and the others are left out."""


def main() -> int:
    """Run the stages, write after each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the JSON; bench/results, or a temporary one with --dry-run")
    parser.add_argument("--commit", help="what is measured, where the checkout carries no .git")
    parser.add_argument("--tests", nargs="+", help="paths for pytest instead of every folder that can run here")
    parser.add_argument("--benches", nargs="+", default=["bench"], help="paths for pytest")
    parser.add_argument("--select", help="pytest -k for the benches; default: the device")
    parser.add_argument("--stages", nargs="+", choices=SECONDS, default=[s for s in SECONDS if s not in ASKED_FOR])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in a minute")
    args = parser.parse_args()

    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("error: no CUDA device; --dry-run goes the same way on the CPU", file=sys.stderr)
        return 2
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="kpu_fast_visit_"))
    out = args.out or (scratch if args.dry_run else ROOT / "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    visit = Visit(scratch, args, DRY_SECONDS if args.dry_run else SECONDS)
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **circumstances(args.commit, args.dry_run),
    }
    file = out / f"{slug(result['device'])}.json"
    sections = kept_sections(file, result)
    signal.signal(signal.SIGTERM, visit.end)
    for name in args.stages:
        stage_began = time.monotonic()
        try:
            section = getattr(visit, name)()
        except Exception as error:  # one stage must not take the others with it
            section = {"exit": 1, "note": f"{type(error).__name__}: {error}"}
        section["seconds"] = round(time.monotonic() - stage_began, 1)
        section["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        sections[name] = section
        result["sections"] = {stage: sections[stage] for stage in SECONDS if stage in sections}
        result["seconds"] = round(time.monotonic() - began, 1)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
        os.replace(partial, file)
    print(_summary(result))
    print(file)
    if out != scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0 if all(sections[name]["exit"] in (0, None) for name in args.stages) else 1


class Visit:
    """The stages; each returns {"exit": 0, another status, or None where it could not run, "note": …, "result": …}."""

    def __init__(self, scratch: Path, args: argparse.Namespace, seconds: dict[str, int]):
        self.scratch, self.args, self.seconds = scratch, args, seconds
        self.gpu = not args.dry_run
        self.worst: dict | None = None
        self.ended = False
        self.environment = os.environ | {"PYTHONPATH": _importable(scratch / "path"), "PYTHONUNBUFFERED": "1"}

    def tests(self) -> dict:
        """pytest on every folder of tests that can run here; those that cannot are named."""
        deadline = time.monotonic() + self.seconds["tests"]
        folders, left_out = list(self.args.tests or []), []
        for folder, needs in {} if folders else TESTS.items():
            missing = _missing(needs)
            if missing:
                left_out.append(f"{folder}: not installed: {', '.join(missing)}")
            else:
                folders.append(folder)
        counts, failed, skipped, status = {}, [], {}, 0
        kept = min(KEPT_SECONDS["tests"], self.seconds["tests"] / (2 * max(1, len(folders))))
        # Compiles for three GPUs and asks none: nothing for a visit.
        options = ["-q", "-p", "visit_report", f"--ignore={ROOT / 'tests/kernels/test_compile_targets.py'}"]
        if self.gpu and not _missing(("xdist",)):  # for the 700 kernels that these tests compile, about a second each
            options += ["-n", str(min(16, os.cpu_count() or 1))]
        for number, folder in enumerate(folders):
            report = self.scratch / f"tests-{number}.jsonl"
            until = deadline - kept * (len(folders) - 1 - number)
            run = self._pytest([folder, *options], until, extra={"KPU_FAST_VISIT_REPORT": str(report)})
            status = status or run["exit"]
            if not report.exists():
                failed.append(f"{folder}: no result, {run['note'] or run['tail']}")
                continue
            if run["note"]:
                failed.append(f"{folder}: {run['note']}, the rest is not known")
            for name, outcome, message in map(json.loads, _whole_lines(report)):
                counts[outcome] = counts.get(outcome, 0) + 1
                if outcome == "skipped":
                    skipped[message] = skipped.get(message, 0) + 1
                elif outcome != "passed":
                    failed.append(f"{name}: {message}")
        note = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        result = {"counts": counts, "failed": failed[:50], "skipped": skipped, "left_out": left_out}
        return {
            "exit": status,
            "note": note + (f"; {len(left_out)} folders left out" if left_out else ""),
            "result": result,
        }

    def warm(self) -> dict:
        """Compile what the benchmarks' rows need, a process per core, so that the next stage only measures."""
        if not self.gpu or _missing(("xdist",)):
            return {"exit": None, "note": "left out, " + ("not installed: xdist" if self.gpu else "no GPU")}
        select = f"({self.args.select or 'cuda'}) and not eager"  # eager compiles nothing and holds the most memory
        workers = ["-n", str(min(WARM_PROCESSES, os.cpu_count() or 1))]
        options = ["-k", select, "--bench-profile=none", "-q", *workers]
        run = self._pytest([*self._benches(), *options], time.monotonic() + self.seconds["warm"])
        # Nothing to compile (5), or not all of it in time (124): the next stage does the rest itself.
        return {"exit": 0 if run["exit"] in (5, 124) else run["exit"], "note": run["last"]}

    def benches(self) -> dict:
        """Every benchmark; what had been measured when time ran out is kept."""
        rows = self.scratch / "rows.jsonl"
        limit = self.seconds["benches"]
        select = self.args.select or ("cuda" if self.gpu else "cpu")
        options = ["--benchmark-only", "-q", f"--bench-rows={rows}", f"--bench-seconds={0.9 * limit:.0f}"]
        run = self._pytest([*self._benches(), "-k", select, *options], time.monotonic() + limit)
        benchmarks = [json.loads(line) for line in _whole_lines(rows)]
        if not benchmarks:
            return {"exit": run["exit"] or 1, "note": run["note"] or run["tail"][-300:]}
        self.worst = _worst(benchmarks)
        note = f"{len(benchmarks)} rows, {run['last']}"
        return {"exit": run["exit"], "note": note, "result": {"benchmarks": benchmarks}}

    def step(self) -> dict:
        """bench/step.py at the real sizes, random weights; images made here, without DALI tensors of noise."""
        return self._step("step")

    def compiled(self) -> dict:
        """The same with compile=true."""
        return self._step("compiled", "compile=true") if self.gpu else {"exit": None, "note": "left out, no GPU"}

    def end(self, *_) -> None:
        """The handler of SIGTERM; a second one finds the visit ending."""
        if not self.ended:
            self.ended = True
            raise _Ended("ended by SIGTERM")

    def _benches(self) -> list[str]:
        return [*self.args.benches, f"--ignore={ROOT / 'bench/test_data.py'}"]  # that one times images, not kernels

    def _step(self, stage: str, *settings: str) -> dict:
        missing = _missing(STEP_NEEDS)
        if missing:
            return {"exit": None, "note": f"left out, not installed: {', '.join(missing)}"}
        config = "configs/h100_random.json" if self.gpu else "configs/random.json"
        steps = ["--steps", "20"] if self.gpu else ["--steps", "1", "--warmup", "1"]
        command = [sys.executable, str(ROOT / "bench/step.py"), "--config", str(ROOT / config), *steps]
        command += ["--images", "random"] if _missing(DECODING_NEEDS) else ["--set", f"source={self._images()}"]
        command += ["--set", *settings] if settings else []
        out = self.scratch / stage
        run = self._run([*command, "--out", str(out)], time.monotonic() + self.seconds[stage])
        found = sorted(out.glob("*.json"))
        if run["exit"] or not found:
            return {"exit": run["exit"] or 1, "note": run["note"] or run["tail"][-300:]}
        result = json.loads(found[0].read_text(encoding="utf-8"))
        note = f"{result['step_ms']:.0f} ms, {result['images_per_second']:.1f} images/s, images: {result['images']}"
        return {"exit": 0, "note": note, "result": result}

    def profile(self) -> dict:
        """One step of the slowest row of ours under ncu, else torch.profiler; then compute-sanitizer's memcheck."""
        deadline = time.monotonic() + self.seconds["profile"]
        result, notes, status = {}, [], None
        if self.worst is None:
            notes.append("no benchmark to profile")
        else:
            node = f"{ROOT}/{self.worst['fullname']}"
            result["row"], result["percent_of_copy"] = self.worst["name"], self.worst["extra_info"]["percent_of_copy"]
            by_ncu, why_not = self._ncu(node, deadline) if self.gpu else ([], "no GPU")
            if by_ncu:
                result |= {"by": "ncu", "kernels": by_ncu}
            else:
                run = self._pytest([node, "--bench-profile=torch", "-s", "-q"], deadline)
                found = re.search(r"bench-profile: (.*)", run["output"])
                result |= {"by": "torch.profiler", "kernels": json.loads(found[1]) if found else [], "ncu": why_not}
            status = 0 if result["kernels"] else 1
            notes.append(f"{result['by']}: {result['row']}, {result['percent_of_copy']:.0f} % of copy")
        tool = shutil.which("compute-sanitizer") if self.gpu else None
        if tool is None:
            notes.append("compute-sanitizer: not here" if self.gpu else "compute-sanitizer: no GPU")
        else:
            plain = [sys.executable, str(ROOT / "bench/sanitized.py")]
            self._run(plain, deadline - KEPT_SECONDS["memcheck"])  # compiles the kernels
            command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *plain]
            # Without torch's cache every tensor is an allocation of its own, so that a step past its end is seen.
            run = self._run(command, deadline, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            result["memcheck"] = {"exit": run["exit"], "tail": run["tail"]}
            notes.append(f"memcheck: exit {run['exit']}{' ' + run['note'] if run['note'] else ''}")
            status = status or run["exit"]
        return {"exit": status, "note": "; ".join(notes), "result": result}

    def _ncu(self, node: str, deadline: float) -> tuple[list[dict], str]:
        """Per kernel what NCU_METRICS ask for, or nothing and the reason."""
        tool = shutil.which("ncu")
        if tool is None:
            return [], "ncu is not here"
        log = self.scratch / "ncu.csv"
        # The clocks stay as they are: by default ncu locks them.
        options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--log-file", str(log)]
        options += ["--metrics", ",".join(NCU_METRICS)]
        third = time.monotonic() + (deadline - time.monotonic()) / 3
        run = self._pytest([node, "--bench-profile=cuda", "-q"], third, [tool, *options])
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        table = [line for line in lines if line.startswith('"')]
        if not table:
            return [], run["note"] or "; ".join(line for line in lines if line.startswith("==ERROR"))[:300] or run[
                "tail"
            ][-300:]
        kernels: dict[str, dict] = {}
        header, *rows = csv.reader(table)
        for cells in rows:
            row = dict(zip(header, cells, strict=False))
            metric = NCU_METRICS.get(row["Metric Name"])
            if metric:
                kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"]})
                kernel[metric] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
        return list(kernels.values()), ""

    def _images(self) -> Path:
        """As bench/test_data.py has them."""
        from noise import noise_images

        folder = self.scratch / "images"
        folder.mkdir(exist_ok=True)
        noise_images(folder)
        return folder

    def _pytest(self, options: list[str], deadline: float, prefix: list[str] | None = None, extra=None) -> dict:
        # Not `python -m pytest`: that would put the checkout on sys.path, where kernels/ shadows another library.
        start = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main())"
        options = ["-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), *options]
        return self._run([*(prefix or []), sys.executable, "-c", start, *options], deadline, extra)

    def _run(self, command: list[str], deadline: float, extra: dict[str, str] | None = None) -> dict:
        """Run in a process group of its own and end the whole group at the deadline."""
        left = 0.0 if self.ended else deadline - time.monotonic()
        if left <= 1:
            return {"exit": 124, "note": "no time left", "output": "", "tail": "", "last": "no time left"}
        output = self.scratch / "output.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment | (extra or {}), stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status, note = process.wait(timeout=left), ""
            except subprocess.TimeoutExpired:
                status, note = 124, f"ended after its {left:.0f} s"
            except _Ended as error:
                status, note = 143, str(error)
            finally:
                _end_group(process)
        text = output.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return {
            "exit": status,
            "note": note,
            "output": text,
            "tail": text[-3000:],
            "last": note or (lines or [""])[-1][:200],
        }


def _whole_lines(file: Path) -> list[str]:
    """What a process wrote line by line, without the one that its end cut off."""
    return file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if file.exists() else []


def _worst(benchmarks: list[dict]) -> dict | None:
    """Our row that is furthest from a copy, among those that are compared with eager and large enough to profile."""
    rows = {(bench["group"], bench["extra_info"]["row"]): bench for bench in benchmarks if "row" in bench["extra_info"]}
    ours = [bench for (group, row), bench in rows.items() if row == "ours" and (group, "eager") in rows]
    large = [bench for bench in ours if bench["extra_info"]["counted_bytes"] >= PROFILE_FLOOR] or ours
    return min(large, key=lambda bench: bench["extra_info"]["percent_of_copy"], default=None)


def _end_group(process: subprocess.Popen) -> None:
    """End what the process started, compile workers included, and wait for it."""
    for sign, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def _importable(folder: Path) -> str:
    """A folder for PYTHONPATH: our plugin, and this checkout as `kpu_fast`, with kernels/ as kpu_fast.kernels."""
    package = folder / "kpu_fast"
    package.mkdir(parents=True)
    for entry in (ROOT / "kpu_fast").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (folder / "visit_report.py").symlink_to(ROOT / "bench/visit_report.py")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def _missing(modules: tuple[str, ...]) -> list[str]:
    def present(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the parent of a dotted name
            return False

    return [name for name in modules if not present(name)]


def circumstances(commit: str | None, dry_run: bool) -> dict:
    """Device, driver, versions and commit."""
    import torch

    return {
        "device": f"CPU, {torch.get_num_threads()} threads" if dry_run else torch.cuda.get_device_name(0),
        "driver": _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if not _missing(("triton",)) else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "commit": commit or _commit(),
    }


def _commit() -> str | None:
    """None where git does not track this file: the checkout may lie in the folder of another repository."""
    if _said(["git", "ls-files", "--error-unmatch", str(Path(__file__).resolve())]) is None:
        return None
    return _said(["git", "describe", "--always", "--dirty", "--abbrev=40"])


def kept_sections(file: Path, facts: dict) -> dict[str, dict]:
    """The stages of an earlier visit in `file`, where its circumstances are `facts`; else none, and a line says why."""
    if not file.exists():
        return {}
    clean = facts["commit"] is not None and not facts["commit"].endswith("-dirty")
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        sections = {name: {"date": before["date"], **section} for name, section in before["sections"].items()}
        same = {key: before.get(key) == value for key, value in facts.items() if key != "date"}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        print(f"{file}: cannot be read ({type(error).__name__}: {error}); its stages are not kept", file=sys.stderr)
        return {}
    different = [key for key in same if not same[key] or (key == "commit" and not clean)]
    if different:
        names = ", ".join(different) + " (a commit with changes is like no other)" * (not clean)
        print(f"{file}: differs in {names}; its stages are not kept", file=sys.stderr)
        return {}
    return sections


def _said(command: list[str]) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().partition("\n")[0] or None if run.returncode == 0 else None


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _summary(result: dict) -> str:
    lines = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['seconds']:.0f} s"]
    for name, section in result["sections"].items():
        status = "left out" if section["exit"] is None else f"exit {section['exit']}"
        lines.append(f"  {name:<8} {status:<9} {section['seconds']:6.1f} s  {section['note']}")
    for failure in result["sections"].get("tests", {}).get("result", {}).get("failed", [])[:10]:
        lines.append(f"    {failure}")
    benches = result["sections"].get("benches", {}).get("result", {}).get("benchmarks", [])
    ours = [bench["extra_info"] for bench in benches if bench["extra_info"].get("row") == "ours"]
    for info in sorted(ours, key=lambda info: info["percent_of_copy"])[:10]:
        what = f"{info['op']} {info['shape']} {info['dtype']} {info['mode']}"
        lines.append(f"    {what:<60} {info['ms']:9.4f} ms {info['percent_of_copy']:6.1f} % of copy")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
