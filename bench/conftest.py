"""Timing shared by the benchmarks: same buffers, same passes for every row of a group, so that rows are a ratio."""

import math
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU rows are not measured here")
    return request.param


def _version(name: str) -> str:
    try:
        return __import__(name).__version__
    except ImportError:
        return "not installed"


@pytest.fixture
def measure(benchmark, device):
    """measure(make, step, counted): time `step(*make())`, forward and backward, and note the GB/s of `counted` bytes.

    One round walks over enough fresh buffers to leave the last-level cache twice, then waits for the device.
    `counted` is what has to move at least: every input read once, every wanted gradient written once.
    """

    def run(make: Callable[[], tuple], step: Callable, counted: int) -> None:
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            name, cache = properties.name, properties.L2_cache_size
        else:
            name, cache = f"CPU, {torch.get_num_threads()} threads", 0
        passes = max(1, math.ceil(2 * cache / counted))
        buffers = [make() for _ in range(passes)]

        def once() -> None:
            for inputs in buffers:
                step(*inputs)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=7, warmup_rounds=2)
        benchmark.extra_info.update(
            device=name, torch=torch.__version__, triton=_version("triton"), passes=passes, counted_bytes=counted
        )
        if benchmark.stats is not None:
            benchmark.extra_info["gb_per_s"] = round(counted * passes / benchmark.stats.stats.median / 1e9, 2)

    return run
