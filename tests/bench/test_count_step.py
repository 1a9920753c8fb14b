"""bench/count_step.py: bytes, operations and launches of a step, against numbers worked out by hand."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for library in ("pydantic", "transformers", "tqdm"):
    pytest.importorskip(library, reason=f"{library} is not installed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("count_step")


def test_operators_are_counted_as_they_move_memory(tool):
    counting = tool.Counting(bandwidth=1e9, rate=1e12)
    with counting:
        x = torch.empty(4, 8, 16, dtype=torch.bfloat16, device="meta")
        y = x.view(32, 16).t()  # nothing moves
        counting.part = "sum"
        x + torch.empty(16, dtype=torch.bfloat16, device="meta").expand(4, 8, 16)  # what is expanded lies there once
        counting.part = "in place"
        x.mul_(2)
        counting.part = "copy"
        x.copy_(x.clone())  # reads one and writes the other, twice
        counting.part = "product"
        x.view(32, 16) @ y
    found = {part: (count.launches, count.bytes, count.flop) for (part,), count in counting.by(0).items()}
    assert found == {
        "sum": (1, 2 * (512 + 16 + 512), 0),
        "in place": (1, 2 * (512 + 512), 0),
        "copy": (2, 4 * 2 * 512, 0),
        "product": (1, 2 * (512 + 512 + 32 * 32), 2 * 32 * 16 * 32),
    }
    seconds = {part: count.seconds for (part,), count in counting.by(0).items()}
    assert seconds["sum"] == pytest.approx(2080 / 1e9)


@pytest.mark.parametrize("cross_attention", ["flash", "deformable"])
def test_a_step_uses_the_kernels_of_a_gpu_and_nothing_else_changes(tool, cross_attention, monkeypatch):
    switches = [f"student.adapter.cross_attention={cross_attention}", "precision=bf16"]
    cfg = tool.load_config(ROOT / "configs/random.json", switches)
    before = torch.nn.functional.scaled_dot_product_attention
    seen, kind_of = [], tool._kind
    monkeypatch.setattr(tool, "_kind", lambda function, name: seen.append(name) or kind_of(function, name))
    counting = tool.count_step(cfg, 3e12, 790e12)
    assert torch.nn.functional.scaled_dot_product_attention is before
    kinds = {kind: count for (kind,), count in counting.by(1).items()}
    assert kinds["attention"].flop > 0
    assert seen.count("align_group_forward") == len(cfg.teachers)  # which the torch path does not have
    assert ("deform_attn_forward" in seen) == (cross_attention == "deformable")
    (whole,) = counting.by().values()
    parts = counting.by(0)
    assert sum(count.bytes for count in parts.values()) == whole.bytes
    assert parts[("backward",)].flop > sum(c.flop for (p,), c in parts.items() if p.endswith("student and losses"))


@pytest.mark.parametrize(("channels", "ours"), [(256, True), (257, False)])
def test_what_the_kernels_do_not_take_is_counted_as_torch_does_it(tool, channels, ours):
    value = torch.empty(1, 16, 2, channels, device="meta")
    locations, weights = torch.empty(1, 5, 2, 1, 4, 2, device="meta"), torch.empty(1, 5, 2, 1, 4, device="meta")
    counting = tool.Counting(bandwidth=1e9, rate=1e12)
    with tool._as_on_a_gpu(upstream_of_one=True), counting:
        tool.kpu_fast.kernels.deform_attn(value, [(4, 4)], locations, weights)
    assert (("this project's kernels",) in counting.by(1)) == ours


def test_what_a_balance_adds(tool):
    plain, famo = (
        tool.count_step(tool.load_config(ROOT / "configs/random.json", [f"objective.balance={b}"]), 3e12, 790e12)
        for b in ("equal", "famo")
    )
    forwards = sum(c.flop for (part,), c in plain.by(0).items() if part.endswith("student and losses"))
    assert famo.by(0)[("famo: what the step did",)].flop == forwards
    assert famo.by(0)[("backward",)].bytes > plain.by(0)[("backward",)].bytes  # kept gradients times their shares


def test_teachers_on_the_same_images_cost_one_student(tool):
    apart, shared = (
        tool.count_step(tool.load_config(ROOT / "configs/random.json", more), 3e12, 790e12).by(0)
        for more in ([], ["teachers.dinov2.images_of=clip"])
    )
    teachers = [(f"{name}: teacher",) for name in ("clip", "gdino", "dinov2")]
    assert all(apart[part].flop == shared[part].flop for part in teachers)
    clip, dinov2 = (apart[(f"{name}: student and losses",)] for name in ("clip", "dinov2"))
    both = shared[("clip, dinov2: student and losses",)]
    assert clip.flop < both.flop < 0.7 * (clip.flop + dinov2.flop)
    assert shared[("backward",)].launches < 0.8 * apart[("backward",)].launches


def test_command():
    command = [sys.executable, str(ROOT / "bench/count_step.py"), "--config", str(ROOT / "configs/random.json")]
    command += ["--set", "precision=bf16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backward" in done.stdout
    assert "floor, ms" in done.stdout
    assert "this project's kernels" in done.stdout
    done = subprocess.run([*command, "--set", "steps=none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    done = subprocess.run([*command[:-1], "precision=fp32"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--rate" in done.stderr
