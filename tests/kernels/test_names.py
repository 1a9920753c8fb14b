"""This folder may be imported under several names at once: kpu_fast.kernels, kernels, a copy in other code."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _run(code: str, folder: Path, *more: Path) -> str:
    """What `code` prints, in a fresh Python that has `folder` and `more` on sys.path."""
    before = [path] if (path := os.environ.get("PYTHONPATH")) else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, *map(str, (folder, *more))])}
    with tempfile.TemporaryDirectory() as empty:  # Python puts the current folder first
        done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_leaves_our_operators_alone():
    """transformers looks for its library `kernels`, and finds this folder where the root is on sys.path."""
    code = """
import sys, torch
from kpu_fast.kernels import moments
before = torch._library.custom_ops.OPDEFS["kpu_fast::moments"]
from transformers.utils import is_kernels_available
assert not is_kernels_available()
assert torch._library.custom_ops.OPDEFS["kpu_fast::moments"] is before
print(moments(torch.ones(2, 3, 4)).mean.sum().item(), "kernels" in sys.modules)
"""
    assert _run(code, ROOT) == "4.0 True"


def test_copies_live_side_by_side(tmp_path):
    for name in ("mine", "theirs/losses", "theirs_/losses"):
        shutil.copytree(ROOT / "kernels", tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import torch
import kpu_fast.kernels, mine, theirs.losses, theirs_.losses
a, b = torch.rand(2, 2, 3, 3, 8)
print(len({float(k.align_loss(a, b)) for k in (kpu_fast.kernels, mine, theirs.losses, theirs_.losses)}))
print(*sorted(n for n in torch._library.custom_ops.OPDEFS if n.endswith("moments")))
"""
    assert _run(code, tmp_path) == "1\nkpu_fast::moments mine::moments theirs___losses::moments theirs__losses::moments"


def test_imported_anew():
    code = """
import sys, torch
from kpu_fast.kernels import moments
for name in [name for name in sys.modules if name.startswith("kpu_fast")]:
    del sys.modules[name]
from kpu_fast.kernels import moments as again
print(moments is again, *(f(torch.ones(2, 3, 4)).total.sum().item() for f in (moments, again)))
print(*sorted(n for n in torch._library.custom_ops.OPDEFS if n.endswith("moments")))
"""
    assert _run(code, ROOT) == "False 24.0 24.0\nkpu_fast::moments kpu_fast_::moments"


def test_steps_aside_for_the_library_of_that_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .launch import get_kernel\n")  # a name that we have too
    (tmp_path / "kernels" / "launch.py").write_text("def get_kernel(): return 'from the library'\n")
    code = """
import kpu_fast.kernels
from kernels import get_kernel
import kernels.launch
print(get_kernel(), kernels.launch.get_kernel(), kpu_fast.kernels.align_loss.__module__)
"""
    assert _run(code, ROOT, tmp_path) == "from the library from the library kpu_fast.kernels.align"
