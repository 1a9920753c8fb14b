"""bench/gpu_visit.py, the same way on a CPU: every stage runs, a failing one ends alone, one JSON is left."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import os
import pytest
import kpu_fast
import kpu_fast.kernels

def test_this_checkout():
    assert os.path.samefile(os.path.dirname(kpu_fast.kernels.__file__), {kernels!r})
    assert "kpu_fast_visit_" in kpu_fast.__file__  # found without an installation

def test_off_the_path():
    import sys
    assert not any(os.path.realpath(entry or ".") == {root!r} for entry in sys.path)

def test_wrong():
    assert 1 == 2, "told in the JSON"

def test_left_out():
    pytest.skip("for this reason")
"""


def visit_module():
    spec = importlib.util.spec_from_file_location("bench_gpu_visit", ROOT / "bench/gpu_visit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def visit(*options):
    command = [sys.executable, str(ROOT / "bench/gpu_visit.py"), "--dry-run", *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, env=alone, capture_output=True, text=True, timeout=200)


def test_dry_run(tmp_path):
    tests = tmp_path / "test_stub.py"
    tests.write_text(TESTS.format(kernels=str(ROOT / "kernels"), root=str(ROOT)))
    out = tmp_path / "out"
    select = "cpu-fp32-forward and 16x16x768"
    benches = str(ROOT / "bench/test_resize.py")
    done = visit("--out", str(out), "--tests", str(tests), "--benches", benches, "--select", select, "--commit", "abc")
    assert done.returncode == 1, done.stderr  # a test failed
    (file,) = out.iterdir()
    result = json.loads(file.read_text())
    assert str(file) in done.stdout
    assert result["commit"] == "abc"
    assert result["device"].startswith("CPU")
    sections = result["sections"]
    assert list(sections) == ["tests", "warm", "benches", "step", "profile"]
    assert sections["warm"]["exit"] is None

    assert sections["tests"]["exit"] == 1
    assert sections["tests"]["result"]["counts"] == {"passed": 2, "failure": 1, "skipped": 1}
    assert "told in the JSON" in sections["tests"]["result"]["failed"][0]
    assert sections["tests"]["result"]["skipped"] == {"for this reason": 1}

    assert sections["benches"]["exit"] == 0
    rows = {bench["extra_info"]["row"]: bench["extra_info"] for bench in sections["benches"]["result"]["benchmarks"]}
    assert rows.keys() == {"eager", "ours"}
    assert f"{rows['ours']['percent_of_copy']:.1f} % of copy" in done.stdout

    if sections["step"]["exit"] is None:
        assert "not installed" in sections["step"]["note"]
    else:
        assert sections["step"]["exit"] == 0, sections["step"]["note"]
        assert sections["step"]["result"]["step_ms"] > 0
        assert sections["step"]["result"]["images"] == "source"

    assert sections["profile"]["exit"] == 0, sections["profile"]
    assert sections["profile"]["result"]["by"] == "torch.profiler"
    assert "forward-ours" in sections["profile"]["result"]["row"]
    assert any("upsample_bilinear" in kernel["name"] for kernel in sections["profile"]["result"]["kernels"])


def test_a_stage_that_hangs_ends_alone(tmp_path):
    tests = tmp_path / "test_stub.py"
    tests.write_text("import time\ndef test_first():\n    pass\ndef test_hang():\n    time.sleep(1000)\n")
    broken = tmp_path / "test_broken.py"
    broken.write_text("raise ImportError('of the bench')\n")
    stages = ["--stages", "tests", "benches", "profile"]
    done = visit("--out", str(tmp_path / "out"), "--tests", str(tests), "--benches", str(broken), *stages)
    assert done.returncode == 1
    sections = json.loads(next((tmp_path / "out").iterdir()).read_text())["sections"]
    assert sections["tests"]["exit"] == 124
    assert "ended after its" in sections["tests"]["result"]["failed"][0]
    assert sections["tests"]["result"]["counts"]["passed"] == 1  # what was known when time ran out
    assert sections["benches"]["exit"] != 0
    assert sections["profile"] == {
        "exit": None, "note": "no benchmark to profile; compute-sanitizer: no GPU", "result": {},
        "seconds": sections["profile"]["seconds"], "date": sections["profile"]["date"],
    }  # fmt: skip


def test_a_visit_that_is_cut_off_keeps_its_rows(tmp_path):
    benches = str(ROOT / "bench/test_resize.py")
    command = [sys.executable, str(ROOT / "bench/gpu_visit.py"), "--dry-run", "--stages", "benches", "profile"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with subprocess.Popen(
        [*command, "--benches", benches, "--out", str(tmp_path / "out")],
        env=alone | {"TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        until = time.monotonic() + 100
        while not any(file.stat().st_size for file in tmp_path.glob("*/rows.jsonl")) and time.monotonic() < until:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 1
    sections = json.loads(next((tmp_path / "out").iterdir()).read_text())["sections"]
    assert sections["benches"]["exit"] == 143
    assert "ended by SIGTERM" in sections["benches"]["note"]
    rows = sections["benches"]["result"]["benchmarks"]
    assert rows
    assert all(row["extra_info"]["ms"] > 0 for row in rows)
    assert sections["profile"]["exit"] != 0


NCU = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
cat > "$2" <<'END'
==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_align_fwd(a, b)","gpu__time_duration.sum","us","12.5"
"0","1","_align_fwd(a, b)","dram__bytes.sum","Mbyte","28,9"
"1","1","_scale","gpu__time_duration.sum","us","2.0"
END
"""
SANITIZER = """#!/bin/sh
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 3
for program; do :; done
[ -f "$program" ] || exit 4
echo "========= ERROR SUMMARY: 1 error"
exit 9
"""


@pytest.fixture
def profiling(tmp_path, monkeypatch):
    """profiling(): the profile stage as on a GPU, with whatever `ncu` and `compute-sanitizer` lie in tmp_path/bin."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    module = visit_module()

    def run():
        (tmp_path / "scratch").mkdir()
        stage = module.Visit(tmp_path / "scratch", SimpleNamespace(dry_run=False), {"profile": 60})
        row = {"row": "ours", "percent_of_copy": 40.0}
        stage.worst = {"name": "row of ours", "fullname": "bench/none.py::test", "extra_info": row}
        return stage.profile()

    return run


def test_tools_of_a_gpu(tmp_path, profiling):
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    section = profiling()
    first = {"name": "_align_fwd(a, b)", "time": "12.5 us", "bytes of device memory": "28,9 Mbyte"}
    assert section["result"]["kernels"] == [first, {"name": "_scale", "time": "2.0 us"}]
    assert section["result"]["by"] == "ncu"
    assert section["result"]["memcheck"]["exit"] == 9
    assert "1 error" in section["result"]["memcheck"]["tail"]
    assert section["exit"] == 9


def test_ncu_that_is_not_permitted(tmp_path, profiling):
    refused = "==ERROR== ERR_NVGPUCTRPERM - no permission"
    (tmp_path / "bin" / "ncu").write_text(NCU.partition("cat >")[0] + f'echo "{refused}" > "$2"\nexit 1\n')
    (tmp_path / "bin" / "ncu").chmod(0o755)
    section = profiling()
    assert section["result"]["ncu"] == refused  # and torch.profiler was asked in its place
    assert section["result"]["by"] == "torch.profiler"
    assert "compute-sanitizer: not here" in section["note"]


@pytest.fixture
def short_visit(tmp_path, monkeypatch, capsys):
    """short_visit(commit, *stages) → (the JSON's stages, standard error), of stages that do nothing but end."""
    module = visit_module()
    for name in ("tests", "benches"):
        monkeypatch.setattr(module.Visit, name, lambda self: {"exit": 0, "note": "new", "result": {}})
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)

    def run(commit, *stages):
        options = ["--dry-run", "--out", str(tmp_path / "out"), "--stages", *stages]
        monkeypatch.setattr(sys, "argv", ["gpu_visit.py", *options, *(["--commit", commit] if commit else [])])
        assert module.main() == 0
        (file,) = (tmp_path / "out").iterdir()
        return file, json.loads(file.read_text())["sections"], capsys.readouterr().err

    return run


def test_the_other_stages_of_an_earlier_visit_stay(short_visit):
    file, sections, _ = short_visit("abc", "benches")
    before = json.loads(file.read_text())
    del before["sections"]["benches"]["date"]  # as files of before are
    before["sections"]["benches"]["note"] = "old"
    file.write_text(json.dumps(before | {"date": "2026-01-01"}))
    _, sections, told = short_visit("abc", "tests")
    assert list(sections) == ["tests", "benches"]
    assert (sections["benches"]["note"], sections["benches"]["date"]) == ("old", "2026-01-01")
    assert (sections["tests"]["note"], told) == ("new", "")
    _, sections, told = short_visit("abc", "benches")
    assert [section["note"] for section in sections.values()] == ["new", "new"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"commit": "def"}, "differs in commit; "),
        ({"torch": "1.0", "driver": "1"}, "differs in driver, torch; "),
        ({"sections": []}, "cannot be read (AttributeError"),
        ({"sections": {"benches": 1}}, "cannot be read (TypeError"),
    ],
)
def test_stages_of_other_circumstances_do_not_stay(short_visit, change, told):
    file, _, _ = short_visit("abc", "benches")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    _, sections, err = short_visit("abc", "tests")
    assert list(sections) == ["tests"]
    assert err.startswith(f"{file}: {told}")
    assert "its stages are not kept" in err


def test_a_commit_with_changes_is_like_no_other(short_visit):
    short_visit("abc-dirty", "benches")
    _, sections, err = short_visit("abc-dirty", "tests")
    assert list(sections) == ["tests"]
    assert "differs in commit (a commit with changes is like no other); its stages" in err


def test_the_commit_is_of_the_repository_that_tracks_the_script(tmp_path):
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]

    def git(*command):
        return subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "bench").mkdir()
    spec = importlib.util.spec_from_file_location(
        "elsewhere", shutil.copy(ROOT / "bench/gpu_visit.py", tmp_path / "bench")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    git("init")
    git("commit", "--allow-empty", "--message", "someone else's")
    assert module.circumstances(None, dry_run=True)["commit"] is None
    assert module.circumstances("abc", dry_run=True)["commit"] == "abc"
    git("add", "bench")
    git("commit", "--message", "ours")
    assert module.circumstances(None, dry_run=True)["commit"] == git("rev-parse", "HEAD").strip()


def test_the_worst_row():
    module = visit_module()

    def bench(group, row, percent, counted):
        return {"group": group, "extra_info": {"row": row, "percent_of_copy": percent, "counted_bytes": counted}}

    large, small = 100 << 20, 1 << 10
    found = [bench("a", "ours", 70, large), bench("a", "eager", 9, large), bench("b", "ours", 60, large)]
    found += [bench("b", "eager", 8, large), bench("c", "ours", 2, small), bench("c", "eager", 1, small)]
    found += [bench("matmul", "ours", 5, large), {"group": "images", "extra_info": {}}]
    assert module._worst(found)["group"] == "b"  # not c, too small, nor matmul, which nothing compares with a copy
    assert module._worst(found[4:6])["group"] == "c"
    assert module._worst([]) is None


def test_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu_visit.py")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no CUDA device; --dry-run" in done.stderr
