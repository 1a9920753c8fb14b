"""The fixture `measure` of bench/conftest.py, on steps whose time is known."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kpu_fast.machine import device_name

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ROOT = Path(__file__).resolve().parents[2]
BENCH = """
import time
import pytest
import torch

EXTRA_ROWS = {"other": ["cpu"]}
calls = []

def test_sleep(row, dtype, mode, device, measure, benchmark):
    seconds = {"eager": 0.03, "ours": 0.01}.get(row, 0.02)

    def make():
        return (torch.zeros(4, dtype=dtype, requires_grad=mode != "forward"),)

    def step(x):
        assert x.requires_grad == (mode != "forward")
        time.sleep(seconds)

    measure(make, step, 100 << 20)

@pytest.mark.parametrize("row", ["reference", "plain"])
def test_plain(row, device, measure, benchmark):
    seen = set()

    def step(x):
        seen.add(x.data_ptr())

    measure(lambda: (torch.zeros(1 << 16),), step, 1 << 18)
    benchmark.extra_info["buffers"] = len(seen)
"""


def run(folder, *options, bench=BENCH):
    shutil.copy(ROOT / "bench/conftest.py", folder)
    (folder / "test_known.py").write_text(bench)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={ROOT / 'bench'}",
        "-q",
        "-rs",
        *options,
    ]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def test_rows(tmp_path):
    out = run(tmp_path, "--benchmark-only", "--benchmark-json=out.json", "-k", "cpu")
    found = [bench["extra_info"] for bench in json.loads((tmp_path / "out.json").read_text())["benchmarks"]]
    assert "failed" not in out
    slept = {(info["dtype"], info["mode"], info["row"]): info for info in found if info["op"] == "sleep"}
    assert {key[:2] for key in slept} == {("fp32", "full"), ("fp32", "forward"), ("bf16", "full")}
    for (*_, name), info in slept.items():
        wanted = {"eager": 30, "ours": 10}.get(name, 20)
        assert wanted <= info["ms"] < 1.5 * wanted + 5
        assert info["gb_per_s"] == pytest.approx((100 << 20) / info["ms"] / 1e6)
        assert info["percent_of_copy"] == pytest.approx(100 * info["gb_per_s"] / info["copy_gb_per_s"])
        assert info["threads"] >= 1
        assert info["device"] == device_name(torch.device("cpu"))
    assert slept["fp32", "full", "eager"]["copy_gb_per_s"] == slept["bf16", "full", "ours"]["copy_gb_per_s"]

    plain = {info["row"]: info for info in found if info["op"] == "plain"}
    assert plain.keys() == {"eager", "ours"}  # "reference" is the plain form, "plain" the op itself
    assert plain["ours"]["mode"] == "forward"  # no input takes a gradient
    # Fresh buffers, twice as much as the last-level cache holds.
    assert plain["ours"]["buffers"] == plain["ours"]["passes"]
    assert plain["ours"]["passes"] * (1 << 18) >= 2 * plain["ours"]["cache_bytes"]


def test_a_module_may_walk_over_fewer_buffers_on_a_cpu(tmp_path):
    bench = BENCH + "CPU_PASSES = 3\n"
    run(tmp_path, "--benchmark-only", "--benchmark-json=out.json", "-k", "plain and cpu", bench=bench)
    found = [row["extra_info"] for row in json.loads((tmp_path / "out.json").read_text())["benchmarks"]]
    assert [(info["buffers"], info["passes"]) for info in found] == [(3, 3)] * 2


def test_a_session_without_a_gpu_ends_by_itself(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    # As if the session had begun long ago.
    bench = (
        BENCH
        + """
import time
@pytest.fixture(scope="session", autouse=True)
def long_ago(request):
    request.config.bench_began = time.monotonic() - 1000
"""
    )
    out = run(tmp_path, "--benchmark-only", "-k", "plain and cpu", bench=bench)
    assert "1 passed, 1 skipped" in out  # the fixture runs with the first
    assert "the 270 s of --bench-seconds are over" in out
    assert "2 passed" in run(tmp_path, "--benchmark-only", "--bench-seconds=5000", "-k", "plain and cpu", bench=bench)


def test_time_limit_and_profile(tmp_path):
    out = run(tmp_path, "--benchmark-only", "--bench-seconds=0", "-k", "cpu")
    assert "the 0 s of --bench-seconds are over" in out
    assert "passed" not in out
    out = run(tmp_path, "--bench-profile=torch", "-s", "-k", "cpu-fp32-full-ours")
    rows = json.loads(
        next(line for line in out.splitlines() if "bench-profile: " in line).partition("bench-profile: ")[2]
    )
    assert all(row["us"] >= 0 for row in rows)
    assert "profiled, not timed" in out
