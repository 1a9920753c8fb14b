"""What is reported of a step."""

import json
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kpu_fast.engine import monitor
from kpu_fast.engine.distributed import World
from kpu_fast.engine.monitor import Monitor


def test_the_rank_that_waits_for_data_is_named(monkeypatch, tmp_path):
    """Every rank waits for it, so the first one's own wait says nothing."""

    def all_reduce(vector):  # what ranks 1 and 2 hand in: the same losses, waits of 80 and 10 %, no wish to stop
        vector[:-4] *= 3
        vector[-3:-1] = torch.tensor([80.0, 10.0])

    monkeypatch.setattr(monitor.dist, "all_reduce", all_reduce)
    events = []
    place = {"start": 0, "steps": 1, "images_per_step": 6, "others": SimpleNamespace(write_events=events.extend)}
    reports = Monitor(tmp_path, World(0, 3, torch.device("cpu"), 0, None), **place)
    facts = {"lr": 0.1, "step_seconds": 2.0, "data_wait_percent": 1.5}
    one = torch.tensor(1.0)
    reports.push(1, {"clip/s2t": one}, one, 4 * one, {"clip": one / 4}, False, facts)
    assert "data 80% at rank 1" in str(reports._bar)
    reports.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    row.pop("time")
    assert row == {
        "step": 1, "clip/s2t": 1.0, "loss": 1.0, "clip/share": 0.25, "lr": pytest.approx(0.1), "step_seconds": 2.0,
        "data_wait_percent": 80.0, "data_wait_rank": 1, "grad_norm": 4.0, "images_per_second": 3.0,
    }  # fmt: skip
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("run/data_wait_percent")] == [80.0]
    # DeepSpeed's monitors get the same.
    assert {tag for tag, _, _ in events} == set(board.Tags()["scalars"])
    for tag, value, step in events:
        assert [(event.value, event.step) for event in board.Scalars(tag)] == [(pytest.approx(value), step)]
