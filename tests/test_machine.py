import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kpu_fast import machine
from kpu_fast.machine import device_name, is_out_of_memory, memory_advice, missing, usable_device


def test_what_is_missing_is_named():
    assert missing("torch json") is None
    assert missing("torch no_such_thing nor_this").startswith("not installed: no_such_thing, nor_this; pip install")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"--device {name}: cannot be used here"):
        usable_device(name)


def test_a_device_and_its_name():
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    assert device_name(torch.device("cpu")).endswith(f"{threads} thread{'s' * (threads > 1)} (CPU)")


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as of_the_cpu:
        torch.empty(2**60)
    on_a_gpu = "CUDA allocation failed\nCan't allocate 1073741824 bytes on device 0."  # DALI's
    for error in (
        of_the_cpu.value,
        MemoryError(),
        RuntimeError(on_a_gpu),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        assert is_out_of_memory(error)
        assert memory_advice(error, "Buy more.").startswith("out of memory: ")
        assert memory_advice(error, "Buy more.").endswith(" Buy more.")
        assert "\n" not in memory_advice(error, "")
    assert not is_out_of_memory(RuntimeError("Cannot bitcast data-type of size 1 to data-type of size 8"))


@pytest.mark.parametrize(("bf16", "found"), [(30.0, 30.0), (4.0, None), (0.5, None)])
def test_whether_bf16_is_slow_is_measured(bf16, found, monkeypatch):
    """By the fastest of several products; what else this machine does disturbs some of them."""
    times = iter([[9 * bf16, bf16, 5 * bf16], [7.0, 1.0, 2.0]])
    monkeypatch.setattr(machine.timeit, "repeat", lambda product, **_: product() is not None and next(times))
    machine.slow_bf16.cache_clear()
    try:
        assert machine.slow_bf16() == found
    finally:
        machine.slow_bf16.cache_clear()


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    assert usable_device("auto").type == "cpu"
    assert "there is an NVIDIA GPU here that torch" in caplog.text
    caplog.clear()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        usable_device("auto")
    assert caplog.text == ""


def test_the_commit_is_of_the_repository_that_tracks_this_code(tmp_path):
    def git(*command):
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        done = subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    copy = shutil.copy(machine.__file__, tmp_path / "installed.py")
    spec = importlib.util.spec_from_file_location("installed", copy)
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    assert installed.circumstances()["commit"] is None
    git("init")
    git("commit", "--allow-empty", "--message", "someone else's")
    assert installed.circumstances()["commit"] is None
    git("add", "installed.py")
    git("commit", "--message", "ours")
    assert installed.circumstances()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "installed.py").write_text("changed")
    assert installed.circumstances()["commit"] == git("rev-parse", "HEAD") + "-dirty"
