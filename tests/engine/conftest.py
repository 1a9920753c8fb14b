"""A run small enough to be started many times: two tiny teachers, a tiny student, a dozen made-up photographs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import HELPERS, TRAIN, Run


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((120 + 8 * i, 96), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def tiny(photos, tmp_path_factory) -> Path:
    """The path of a config; a run of it takes its start-up time and little more."""
    config = {
        "name": "tiny",
        "output": "set by the test",
        "steps": 8,
        "precision": "fp32",
        "source": str(photos),
        "student": {
            "vit": {
                "weights": "random",
                "arch": {"dim": 32, "depth": 2, "heads": 2, "patch_size": 14, "image_size": 56},
            },
            "adapter": {"cross_attention": "flash", "interactions": 2, "inner_ratio": 1.0, "inplanes": 8},
            "head_hidden": 32,
        },
        "teachers": {
            "clip": {
                "kind": "clip",
                "weights": "random",
                "arch": {
                    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "image_size": 64, "patch_size": 16, "projection_dim": 24,
                },
                "data": {"batch_size": 4, "size": [64, 64], "threads": 1},
            },
            "gdino": {
                "kind": "grounding_dino",
                "weights": "random",
                "arch": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 2},
                "data": {"batch_size": 2, "size": [64, 96], "fit": "pad", "threads": 1},
            },
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "clip_grad_norm": 1.0},
        "checkpoint": {"every": 2, "keep": 2},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """One thread per process: two ranks on two cores would otherwise fight for them."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "TRITON_INTERPRET")}
    cache = str(tmp_path_factory.mktemp("cache"))
    return kept | {"KPU_FAST_CACHE": cache, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def start(tiny, environment, tmp_path):
    """start(*overrides, ranks=1, launcher=[...], resume=None, skip=0, output=tmp_path) runs kpu_fast/train.py.

    With a launcher by that command, as its users do; else in processes that need not import everything anew.
    """
    started = []

    def run(*overrides: str, ranks=1, launcher=None, resume: str | None = None, skip=0, output: Path | None = None):
        arguments = ["--config", str(tiny), "--set", f"output={output or tmp_path}", *overrides]
        arguments += ["--resume", resume] if resume else []
        arguments += ["--skip", str(skip)] if skip else []
        if launcher is None:
            process = Run(TRAIN, arguments, environment, tmp_path, ranks)
        else:
            process = subprocess.Popen(
                [*launcher, str(TRAIN), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, cwd=tmp_path, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    yield run
    _end(started)


@pytest.fixture
def start_helper(tiny, environment, tmp_path):
    """start_helper("x_worker.py", *arguments, ranks=1) runs a script of tests/helpers on the tiny config."""
    started = []

    def run(name: str, *arguments: str, ranks=1):
        started.append(Run(HELPERS / name, [str(tiny), *arguments], environment, tmp_path, ranks))
        return started[-1]

    yield run
    _end(started)


def _end(started: list[Run | subprocess.Popen]) -> None:
    """Kill what a test has left running, with all that it has started."""
    for process in started:
        if process.poll() is None:
            process.kill() if isinstance(process, Run) else os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture(scope="session")
def whole(tiny, environment, tmp_path_factory) -> Path:
    """A run of 8 steps that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    command = [sys.executable, str(TRAIN), "--config", str(tiny), "--set", f"output={output}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (output / "stdout").write_text(done.stdout)
    (output / "stderr").write_text(done.stderr)
    return output / "tiny"
