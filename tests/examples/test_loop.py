import json
import re
import subprocess
import sys
from pathlib import Path

import torch

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
