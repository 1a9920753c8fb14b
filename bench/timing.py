"""What every benchmark times with: a clock of device or host, a round as one CUDA graph, the rate of a copy."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Clock:
    """Seconds of one round: between two CUDA events in the stream on a GPU, of the wall on a CPU.

    The first event is recorded on an idle device and the last one after the last launch, so time that the device waits
    for launches counts; the final wait of the host does not.
    """

    def __init__(self, device: str):
        self.events = None
        if device == "cuda":
            torch.cuda.synchronize()
            self.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.events[0].record()
        self.began = time.perf_counter()

    def stop(self) -> float:
        if self.events is None:
            return time.perf_counter() - self.began
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def as_graph(walk: Callable) -> Callable:
    """A round as one CUDA graph; results keep their own memory in it, as they do in a plain round."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation is not allowed during the capture
        walk()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = walk()

    def replay():
        graph.replay()
        return held

    return replay


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0 (Linux), 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of `out.copy_(x)`, the best of twelve rounds: the practical ceiling.

    Not of a graph, whose copies are slower (H200: 2/3).
    """
    size = (1 << 30) if device == "cuda" else max(1 << 28, 8 * last_level_cache())
    x = torch.ones(size // 4, device=device)
    out = torch.zeros_like(x)
    seconds = []
    for _ in range(12):
        clock = Clock(device)
        for _ in range(4):
            out.copy_(x)
        seconds.append(clock.stop())
    return 4 * 2 * size / min(seconds)
