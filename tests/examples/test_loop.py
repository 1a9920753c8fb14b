import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kpu_fast.models import Student

ROOT = Path(__file__).resolve().parents[2]


def test_a_loop_of_ones_own_learns_what_train_py_learns(tmp_path):
    """The example and train.py begin with the same weights and images, and take the same steps."""
    config, dino = tmp_path / "three.json", {"kind": "dinov2", "weights": "zoo/dinov2", "images_of": "clip"}
    config.write_text(json.dumps({"extends": str(ROOT / "configs" / "zoo.json"), "teachers": {"dino": dino}}))
    loop = [sys.executable, "examples/loop.py", str(config), "3", str(tmp_path / "own")]
    done = subprocess.run(loop, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = [json.loads(re.search(r"\{.*\}", line)[0].replace("'", '"')) for line in done.stdout.splitlines()]
    changes = ["steps=3", "optimizer.warmup_steps=1", "precision=fp32", "name=run"]
    train = ["kpu_fast/train.py", "--config", str(config), "--set", *changes, f"output={tmp_path}"]
    done = subprocess.run([sys.executable, *train], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [list(row.values()) for row in own] == [[round(r[name], 4) for name in own[0]] for r in rows]
    weights = [Student.from_pretrained(tmp_path / folder).state_dict() for folder in ("own", "run/student")]
    for name, weight in weights[0].items():
        # Adam makes much of the rounding of a gradient near 0; a step moves weights by up to 5e-3.
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=2e-5)


class Levels(nn.Module):
    """What timm's feature extractors are: a list of maps, and what they look like."""

    def __init__(self, channels_last=False):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 4 * stride, stride, stride) for stride in (8, 16))
        self.feature_info = SimpleNamespace(channels=lambda: [32, 64], reduction=lambda: [8, 16])
        if channels_last:
            self.output_fmt = "NHWC"

    def forward(self, x):
        maps = [convolution(x) for convolution in self.convolutions]
        return [m.permute(0, 2, 3, 1) for m in maps] if hasattr(self, "output_fmt") else maps


@pytest.fixture
def own_teacher(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import own_teacher

    return own_teacher


def test_a_teacher_of_ones_own_takes_part(own_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    teacher = own_teacher.TimmTeacher(Levels(), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    own_teacher.distil(teacher, "configs/zoo.json", "2", str(tmp_path / "student"))
    rows = [
        json.loads(re.search(r"\{.*\}", line)[0].replace("'", '"')) for line in capsys.readouterr().out.splitlines()
    ]
    assert {"own/s2t", "own/t2s", "own/rec", "clip/s2t", "gdino/s2t"} <= set(rows[-1])
    assert rows[1]["own/s2t"] < rows[0]["own/s2t"]
    student = Student.from_pretrained(tmp_path / "student")
    images = torch.rand(1, 3, 64, 64)
    (fine, coarse) = student.project(student(images), "own").maps
    assert (fine.shape, coarse.shape) == ((1, 8, 8, 32), (1, 4, 4, 64))


def test_timms_two_layouts_are_one(own_teacher):
    torch.manual_seed(0)
    one = Levels()
    other = Levels(channels_last=True)
    other.load_state_dict(one.state_dict())
    images, statistics = torch.rand(2, 3, 32, 64), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    found = [own_teacher.TimmTeacher(net, *statistics)(images).maps for net in (one, other)]
    normalised = (images - torch.tensor(statistics[0]).view(3, 1, 1)) / torch.tensor(statistics[1]).view(3, 1, 1)
    for a, b, m in zip(*found, one(normalised), strict=True):
        assert torch.equal(a, m.permute(0, 2, 3, 1))
        assert torch.equal(b, a)
        assert not a.requires_grad
