"""A clone beside another installed kpu_fast: which of the two runs, and who says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path) -> Path:
    """The package and the kernels as a clone has them; `kpu_fast` that these tests run with lies elsewhere."""
    for name in ("kpu_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def _python(*command: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=folder, env=os.environ, capture_output=True, text=True)


def test_kernels_are_those_of_the_clone_that_one_stands_in(clone):
    code = "import kpu_fast, kpu_fast.kernels as k; print(kpu_fast.__file__, k.__file__)"
    found = [Path(file) for file in _python("-c", code, folder=clone).stdout.split()]
    assert found == [clone / "kpu_fast/__init__.py", clone / "kernels/__init__.py"]


def test_an_installed_copy_keeps_its_own_kernels(clone):
    (clone / "kernels").rename(clone / "kpu_fast/kernels")  # as in a wheel
    shutil.copytree(ROOT / "kernels", clone / "kernels")
    code = "import kpu_fast.kernels as k; print(k.__file__)"
    assert Path(_python("-c", code, folder=clone).stdout.strip()) == clone / "kpu_fast/kernels/__init__.py"


def test_train_py_says_that_another_kpu_fast_runs(clone):
    command = ["kpu_fast/train.py", "--config", "nothing.json"]
    warning, error = _python(*command, folder=clone).stderr.splitlines()
    assert warning.startswith(f"warning: this is {clone}/kpu_fast's train.py")
    assert str(ROOT / "kpu_fast") in warning
    assert error.startswith("error: nothing.json: cannot be read")
    assert len(_python(*command, folder=ROOT).stderr.splitlines()) == 1
