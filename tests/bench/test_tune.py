"""bench/tune.py: what it tries reaches the launches, and only while it is tried."""

import importlib
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tune():
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module("tune")


def tables():
    """Everything that a launch reads its tile from, as it is now."""
    from kpu_fast.kernels import align_group_launch, launch, moments_triton

    tokens = [launch.token_tile(channels) for channels in launch.TOKEN_TILES]
    deform = [launch.deform_tile(32, what) for what in launch.DEFORM_TILES]
    across = launch.ALIGN_TILES_ACROSS.values()
    return [*tokens, *deform, *across, align_group_launch.FINISH_TILE, moments_triton.MOMENTS_TILE]


def test_every_tile_is_in_the_table_while_it_is_tried_and_gone_afterwards(tune):
    before = tables()
    for cases in tune.CASES.values():
        for case in cases():
            assert len(set(case.tiles)) == len(case.tiles) > 1, case.name
            assert case.tiles[0] in before, case.name
            for tile in case.tiles:
                during = tune.with_tile(case, tile, tables)
                assert sum(a != b for a, b in zip(during, before, strict=True)) == (tile != case.tiles[0]), case.name
                assert tile in during
            assert tables() == before


def test_a_tile_that_fails_is_noted_and_leaves_the_table_as_it_was(tune, monkeypatch):
    case = next(tune.moments_cases())._replace(make=tuple, tiles=((256, 32, 8), (64, 64, 4)))
    before = tables()

    def seconds(step, buffers):
        if tables()[-1] == (64, 64, 4):
            raise RuntimeError("out of shared memory")
        return 1e-5

    monkeypatch.setattr(tune, "seconds_per_step", seconds)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    first, second = tune.measure(case, copy=2e12, cache=50 << 20)
    assert first["table"]
    assert first["us"] == pytest.approx(10)
    assert first["percent_of_copy"] == pytest.approx(100 * case.counted / 1e-5 / 2e12)
    assert second["error"] == "RuntimeError: out of shared memory"
    assert tables() == before


def test_the_time_of_a_step_is_of_the_median_replay(tune, monkeypatch):
    clock, captured, replays = [0.0], [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Graph:
        def replay(self):
            replays.append(self.seconds)
            clock[0] += self.seconds * (50 if len(replays) in (1, 7, 9) else 0.5)  # half of what it takes launched

    @contextmanager
    def capture(graph):
        before, number = clock[0], len(steps)
        yield
        graph.seconds, clock[0] = clock[0] - before, before
        captured.extend(steps[number:])

    for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": MagicMock}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    for name in ("stream", "current_stream", "synchronize"):
        monkeypatch.setattr(f"torch.cuda.{name}", MagicMock())
    steps = []

    def step(buffer):
        steps.append(buffer)
        clock[0] += 1e-4

    assert tune.seconds_per_step(step, [(1,), (2,), (3,)]) == pytest.approx(0.5e-4)
    assert captured == 3 * [1, 2, 3]  # as many laps as come nearest to REPLAY_MS
    assert len(replays) == tune.REPLAYS


def test_says_what_it_cannot(tune):
    import torch

    done = subprocess.run([sys.executable, ROOT / "bench/tune.py", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown op nothing; expected align, group, across, deform, moments, resize\n"
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, ROOT / "bench/tune.py"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "error: no CUDA device\n")
