"""How every row is measured: the same way for all rows of a group, so that they can be compared. docs/benchmarks.md."""

import ctypes
import functools
import importlib.metadata
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timing import Clock, as_graph, copy_bandwidth, last_level_cache

from kpu_fast.machine import device_name

# device, dtype, mode, rows, from the most to the least wanted: a run with --bench-seconds ends somewhere in this list.
# Each compiled row costs seconds of compilation, so not every combination has one.
COMBINATIONS = (
    ("cpu", "fp32", "full", ("eager", "compile", "ours")),
    ("cpu", "fp32", "forward", ("eager", "ours")),
    ("cpu", "bf16", "full", ("eager", "ours")),
    ("cuda", "bf16", "full", ("eager", "compile", "ours")),
    ("cuda", "bf16", "graph", ("eager", "compile", "ours")),
    ("cuda", "fp32", "full", ("eager", "compile", "ours")),
    ("cuda", "bf16", "forward", ("eager", "ours")),
    ("cuda", "fp16", "full", ("eager", "ours")),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_SECONDS = 270  # of a session without a GPU, whose numbers are ratios on one more CPU
SECONDS = 0.4  # of rounds per row, unless three rounds take longer
# Of a round on a GPU: where one step is a few kernels, what the first launch takes must not count as the kernels' time.
MIN_STEPS = 8
NO_CUDA = "no CUDA device: the GPU rows are not measured here"
# What a row is to the report, where a benchmark of one op against its reference names its rows after the functions.
ALIASES = {"reference": "eager", "F.interpolate": "eager"}


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption(
        "--bench-seconds",
        type=float,
        help=f"start no further row after this many seconds of the session; without a GPU {CPU_SECONDS} unless given",
    )
    group.addoption(
        "--bench-profile",
        choices=("torch", "cuda", "none"),
        help="instead of timing, run one step per row: under torch.profiler, which prints its table (torch), "
        "between cudaProfilerStart and Stop, for ncu --profile-from-start off (cuda), or as it is, which leaves what "
        "it compiled in Triton's and inductor's caches (none)",
    )
    group.addoption(
        "--bench-rows",
        type=Path,
        help="append every row to this file when it has been measured, one JSON a line: what is cut off keeps them",
    )


def pytest_sessionstart(session):
    session.config.bench_began = time.monotonic()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """On the CPU let malloc reuse what was freed, as torch's allocator does on a GPU.

    By default glibc hands tensors above 32 MB back to the system, and the page faults of the next ones take many times
    as long as filling them: all rows would measure that.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def pytest_runtest_setup(item):
    limit = item.config.getoption("--bench-seconds")
    if limit is None and not torch.cuda.is_available():
        limit = CPU_SECONDS
    if limit is not None and time.monotonic() - item.config.bench_began > limit:
        pytest.skip(f"the {limit:g} s of --bench-seconds are over")


def pytest_runtest_makereport(item, call):
    """--bench-rows, after the test: it may still name what `measure` could not know."""
    file = item.config.getoption("--bench-rows")
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if file is None or benchmark is None or call.when != "call" or "ms" not in benchmark.extra_info:
        return
    row = {"name": item.name, "fullname": item.nodeid, "group": benchmark.group, "extra_info": benchmark.extra_info}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Tests that ask for device, dtype, mode and row get COMBINATIONS, and their module's EXTRA_ROWS {row: devices}."""
    if not {"device", "dtype", "mode", "row"} <= set(metafunc.fixturenames):
        return
    extra = getattr(metafunc.module, "EXTRA_ROWS", {})
    cases = []
    for device, dtype, mode, rows in COMBINATIONS:
        marks = [pytest.mark.skip(reason=NO_CUDA)] if device == "cuda" and not torch.cuda.is_available() else []
        for row in (*rows, *(name for name, devices in extra.items() if device in devices)):
            name = f"{device}-{dtype}-{mode}-{row}"
            cases.append(pytest.param(device, DTYPES[dtype], mode, row, marks=marks, id=name))
    # A mark and not metafunc.parametrize: pytest lets a mark replace the parameters of the fixture `device`.
    metafunc.definition.add_marker(pytest.mark.parametrize(("device", "dtype", "mode", "row"), cases))


def pytest_collection_modifyitems(items):
    """The wanted combinations of every op first; the rows of one shape stay side by side, as they are compared."""
    order = {(device, DTYPES[dtype], mode): place for place, (device, dtype, mode, _) in enumerate(COMBINATIONS)}

    def place(item) -> int:
        params = getattr(item, "callspec", SimpleNamespace(params={})).params
        device = params.get("device", "cpu")
        usual = torch.bfloat16 if device == "cuda" else torch.float32
        return order.get((device, params.get("dtype", usual), params.get("mode", "full")), len(order))

    items.sort(key=place)


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_CUDA)
    return request.param


@pytest.fixture
def compiled(device):
    """compiled(function): `torch.compile` of it for exactly the shapes it meets first; skips where that cannot run."""

    def run(function: Callable) -> Callable:
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            try:
                get_cpp_compiler()
            except Exception as error:  # torch raises a private class of its own here
                pytest.skip(f"torch.compile needs a C++ compiler on the CPU: {error}")
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return run


@functools.cache
def _circumstances(device: str) -> dict:
    """What a row carries so that it can be read alone."""
    versions = {name: _version(name) for name in ("torch", "triton", "liger-kernel", "msda-triton")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return versions | {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "cache_bytes": properties.L2_cache_size,
        }
    return versions | {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture
def measure(benchmark, device, request):
    """measure(make, step, counted): time `step(*make())` and note its rate for `counted` bytes.

    make: fresh inputs. step: one forward, or forward and backward; what it returns is kept while the others run, so
    that results do not land where the last ones were. counted: the bytes that have to move at least.
    A round walks over enough fresh buffers to leave the last-level cache twice, on a CPU over at most
    its module's CPU_PASSES; a row takes at least three rounds.
    The test's parameters row, shape, dtype and mode name the row; mode "graph" replays a round as one CUDA graph.
    """

    def run(make: Callable[[], tuple], step: Callable, counted: int) -> None:
        mode = request.node.callspec.params.get("mode")
        facts = _circumstances(device)
        passes = max(1, math.ceil(2 * facts["cache_bytes"] / counted))
        if device == "cpu":
            passes = min(passes, getattr(request.module, "CPU_PASSES", passes))
        first = make()
        step(*first)  # compiles what is compiled
        if request.config.getoption("--bench-profile"):
            _profile(request.config.getoption("--bench-profile"), lambda: step(*first))
            pytest.skip("profiled, not timed")
        copy = copy_bandwidth(device)
        peak = _peak_memory(lambda: step(*first)) if device == "cuda" else None
        buffers = [first, *(make() for _ in range(passes - 1))]
        laps = math.ceil(MIN_STEPS / passes) if device == "cuda" else 1

        def walk():
            for _ in range(laps):
                held = [step(*inputs) for inputs in buffers]
            return held

        once = as_graph(walk) if mode == "graph" else walk
        seconds: list[float] = []

        def timed():
            clock = Clock(device)
            held = once()
            seconds.append(clock.stop())
            return held

        timed()
        rounds = min(50, max(3, math.ceil(SECONDS / seconds[0])))
        benchmark.pedantic(timed, rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        per_step = statistics.median(seconds[-rounds:]) / (passes * laps)
        benchmark.extra_info.update(
            _names(request.node, first, mode), **facts, passes=passes, rounds=rounds, counted_bytes=counted,
            ms=1e3 * per_step, gb_per_s=counted / per_step / 1e9, copy_gb_per_s=copy / 1e9,
            percent_of_copy=100 * counted / per_step / copy, peak_bytes=peak,
        )  # fmt: skip

    return run


def _names(node, inputs: tuple, mode: str) -> dict:
    """op, shape, row, dtype and mode of a test, from its name, its parameters and the first floating input."""
    op = node.originalname.removeprefix("test_")
    params = node.callspec.params
    row = params["row"] if isinstance(params["row"], str) else params["row"].__name__
    floating = [x for x in _tensors(inputs) if x.is_floating_point()]
    if mode is None:
        mode = "full" if any(x.requires_grad for x in floating) else "forward"
    extra = [str(value) for key, value in params.items() if key not in ("device", "row", "shape", "dtype", "mode")]
    return {
        "op": op,
        "shape": ", ".join([str(params.get("shape", "")), *extra]).strip(", "),
        "row": ALIASES.get(row, "ours" if op in row else row),
        "dtype": next(name for name, known in DTYPES.items() if known == floating[0].dtype),
        "mode": mode,
    }


def _tensors(values):
    nested = itertools.chain.from_iterable(
        _tensors(value) if isinstance(value, (tuple, list)) else [value] for value in values
    )
    return [value for value in nested if isinstance(value, torch.Tensor)]


def _peak_memory(step: Callable) -> int:
    """Bytes that a step needs beyond its inputs, results included, at its highest point."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _profile(how: str, step: Callable) -> None:
    """One step for a profiler: its own table as one line of JSON on stdout, or the range that ncu looks at."""
    if how == "none":  # the first step has compiled everything
        return
    on_gpu = torch.cuda.is_available()
    if how == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, time_of))[:12]
    rows = [{"name": event.key, "calls": event.count, "us": round(getattr(event, time_of), 1)} for event in events]
    print("bench-profile: " + json.dumps(rows))
