"""Time and memory of the training step, part by part.

    python bench/step.py --config configs/h100_random.json --images random

Runs `--warmup` steps, then `--steps` steps as the training does, without a wait in between (step time, images/s, peak
memory), then a few steps with a wait after every part (share of each part), on a GPU a few more under torch.profiler
(its kernels, and how long it had none), and counts the operations of one (of ten, and their mean, where images come in
buckets). Prints a table and writes one JSON with device and versions to --out. Times mean something on a GPU only; on a
CPU the shares, the memory and the count do.
--images random takes batches that lie on the device instead of decoding: the step without its data, and without DALI.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from flop import RULES
from gpu_visit import slug
from torch.utils.flop_counter import FlopCounterMode

from kpu_fast.config import Config, ConfigError, load_config
from kpu_fast.data.pipeline import Batch
from kpu_fast.engine.build import Parts, RunError, build, open_streams
from kpu_fast.engine.distributed import World, init_distributed
from kpu_fast.engine.loop import train_step
from kpu_fast.engine.result import peak_memory
from kpu_fast.machine import circumstances, device_name
from kpu_fast.train import leave

# The loop's `train_step` marks all but the first. FAMO's second forward is among the optimizer's.
PARTS = ("data", "teachers", "student and losses", "backward", "optimizer")
PRINTED_KERNELS = 25


def main() -> int:
    """Build, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, help="as kpu_fast/train.py takes it")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="the same")
    parser.add_argument("--steps", type=int, default=50, help="that are measured (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default %(default)s)")
    parser.add_argument(
        "--images",
        choices=("source", "random"),
        default="source",
        help="random: made on the device, nothing is decoded",
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_args()
    try:
        cfg = load_config(args.config, args.set)
        world = init_distributed()
        parts = build(cfg, world, indexes={} if args.images == "random" else None)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.images == "random":
        streams = {name: _random_batches(cfg.teachers[name].data, world.device) for name in cfg.streams()}
    else:
        streams = open_streams(cfg, parts.indexes, world, {})
    result = measure(cfg, world, parts, streams, args)
    if world.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"step-{cfg.name}-{slug(result['device'])}.json"
        file.write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(_summary(result))
        print(file)
    return 0


def measure(cfg: Config, world: World, parts: Parts, streams: dict, args: argparse.Namespace) -> dict:
    """The JSON: what a step took, its parts and what it counted, with config, device and versions."""
    for _ in range(args.warmup):
        _step(parts, streams)
    whole = _time_whole(world, parts, streams, args.steps)
    memory = peak_memory(world.device)  # before the count, whose step is not compiled
    shares = _time_parts(world, parts, streams, min(10, args.steps))
    kernels = _profile(parts, streams, min(3, args.steps)) if world.device.type == "cuda" else None
    bucketed = args.images == "source" and any(teacher.data.buckets for teacher in cfg.teachers.values())
    flop = _count_flop(parts, streams, min(10, args.steps) if bucketed else 1)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(world.device),
        "ranks": world.size,
        "step_ms": 1e3 * whole,
        "images_per_second": world.size * cfg.images_per_step() / whole,
        "flop": flop,
        "peak_memory": memory,
        "shares_percent": {part: 100.0 * shares[part] / sum(shares.values()) for part in PARTS},
        "kernels": kernels,
        "images": args.images,
        "steps": args.steps,
        "config": cfg.model_dump(mode="json"),
        **circumstances(),
    }


def _summary(result: dict) -> str:
    flop, seconds, kernels = result["flop"], result["step_ms"] / 1e3, result["kernels"] or []
    lines = [f"{result['device']}: {result['step_ms']:.1f} ms per step, {result['images_per_second']:.1f} images/s"]
    lines += [f"{flop / 1e12:.3g} TFLOP per step and rank, {flop / seconds / 1e12:.3g} TFLOP/s"]
    lines += [f"peak memory: {result['peak_memory']}"]
    lines += [f"  {part:<20}{share:6.1f} %" for part, share in result["shares_percent"].items()]
    if kernels:
        busy, launches = (sum(kernel[what] for kernel in kernels) for what in ("ms", "calls"))
        lines += [f"kernels: {busy:.1f} ms and {launches:.0f} launches per step"]
    for kernel in kernels[:PRINTED_KERNELS]:
        lines += [f"  {kernel['ms']:8.3f} ms {kernel['calls']:7.1f} x  {kernel['name'][:100]}"]
    return "\n".join(lines)


def _random_batches(data, device: torch.device) -> Iterator[Batch]:
    """Two batches in turn; where the images are padded, the right eighth of each is."""
    height, width = data.size
    valid = None
    if data.fit == "pad":
        valid = torch.ones((data.batch_size, height, width), dtype=torch.bool, device=device)
        valid[..., width - width // 8 :] = False
    images = [torch.rand((data.batch_size, 3, height, width), device=device) for _ in range(2)]
    return itertools.cycle(Batch(one, valid) for one in images)


def _step(parts, streams, mark: Callable[[str], None] = lambda part: None) -> None:
    for _ in range(parts.engine.gradient_accumulation_steps()):
        batches = {name: next(stream) for name, stream in streams.items()}
        mark("data")
        train_step(parts, batches, mark)


def _time_whole(world: World, parts, streams, steps: int) -> float:
    """Mean seconds per step of a run of steps that nothing interrupts."""
    _wait(world)
    began = time.perf_counter()
    for _ in range(steps):
        _step(parts, streams)
    _wait(world)
    return (time.perf_counter() - began) / steps


def _time_parts(world: World, parts, streams, steps: int) -> dict[str, float]:
    """Median seconds of each part of a step, waiting for the device after each."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(steps):
        _wait(world)
        last, spent = time.perf_counter(), dict.fromkeys(PARTS, 0.0)

        def mark(part: str) -> None:
            nonlocal last
            _wait(world)
            now = time.perf_counter()
            spent[part] += now - last  # noqa: B023 (called in this turn only)
            last = now

        _step(parts, streams, mark)
        for part in PARTS:
            seconds[part].append(spent[part])
    return {part: statistics.median(values) for part, values in seconds.items()}


def _profile(parts, streams, steps: int) -> list[dict]:
    """The GPU's kernels and copies, the longest together first: {name, calls per step, ms per step}."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            _step(parts, streams)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"name": event.key, "calls": event.count / steps, "ms": event.self_device_time_total / steps / 1e3}
        for event in events
        if event.self_device_time_total > 0
    ]


def _count_flop(parts, streams, steps: int) -> float:
    """Floating-point operations of a step: matrix products, convolutions and torch's attention, as torch counts them.

    The mean of `steps`, as images of other buckets cost another number. What this project's own kernels compute is
    left out.
    """
    with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
        for _ in range(steps):
            _step(parts, streams)
    return counter.get_total_flops() / steps


def flop_counter() -> FlopCounterMode:
    """torch's, with the rules of flop.py."""
    return FlopCounterMode(display=False, custom_mapping=RULES)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


if __name__ == "__main__":
    leave(main())
