"""bench/timing.py: what a copy reaches, on a clock that is known."""

from types import SimpleNamespace

import pytest
import timing
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def test_the_copy_bandwidth_is_of_bytes_read_and_written_in_the_best_round(monkeypatch):
    clock, copied = [0.0], []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.copy_.default:
                copied.append(args[0].nbytes)
                rate = 5e9 if 9 <= len(copied) <= 12 else 4e9  # the third round of four
                clock[0] += 2 * copied[-1] / rate
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(timing, "last_level_cache", lambda: 64 << 20)
    with Copies():
        assert timing.copy_bandwidth("meta") == pytest.approx(5e9)
    assert copied == [8 * (64 << 20)] * 48
