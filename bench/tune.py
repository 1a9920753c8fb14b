"""Which tiles are fastest on this GPU:  python bench/tune.py [align group across deform moments resize]

Times every op of kernels/ on shapes of a KPU step with the tiles of kernels/launch.py and with others near them, by
replays of one CUDA graph over buffers that leave the L2 cache, and prints per shape the table's tile and the best ones,
as a share of what a copy reaches. Writes tune-<device>.json to --out. Other processes compile first, one per core.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import test_align
import test_deform_attn
import test_resize
import test_step_losses
import torch
from gpu_visit import circumstances, slug
from kpu_fast.kernels import (
    align_group_launch,
    deform_attn,
    launch,
    moments,
    moments_triton,
    resize_bilinear,
    resize_triton,
)
from kpu_fast.kernels.launch import Tile, TokenTile
from timing import Clock, as_graph, copy_bandwidth

BF16 = torch.bfloat16
BATCH = 4  # of deform_attn, as in test_deform_attn.py
REPLAYS, REPLAY_MS = 15, 1.0
ALIGN = (  # pairs of test_align.py and a dtype
    ("gdino map 100x168x192", BF16),
    ("gdino map 50x84x384", BF16),
    ("gdino map 25x42x768", BF16),
    ("clip map 32x14x14x768", BF16),
    ("clip map 32x16x16x768 to 14x14", BF16),
    ("t2s gdino 100x168x768", BF16),
    ("t2s gdino 100x168x768", torch.float32),
    ("roofline 64x64x1024", BF16),
)
RESIZES = ("32x16x16x768 to 14x14", "25x42x384 to 50x84", "roofline 64x64x1024 to 60x60")


class Case(NamedTuple):
    """One op on one shape: fresh inputs, one step of forward and backward, its least bytes, and the tiles to try."""

    name: str
    make: Callable[[], tuple]
    step: Callable
    counted: int
    tiles: tuple  # the table's first
    use: Callable  # of a tile: a list of context managers that put it into the table


def token_tiles(channels: int) -> Iterator[TokenTile]:
    """Tiles that hold tokens of these channels: 12 to 64 values a thread, at most a third of them padding."""
    yield launch.token_tile(channels)
    for pieces, chunk in itertools.product((1, 3, 4, 6), (32, 64, 128, 256, 512, 1024)):
        if not channels <= chunk * pieces <= channels * 4 / 3 or (pieces == 1) != (chunk >= 1024):
            continue
        for values, warps in (
            (12, 4),
            (16, 4),
            (24, 1),
            (24, 2),
            (24, 4),
            (24, 8),
            (32, 2),
            (32, 4),
            (32, 8),
            (48, 4),
            (64, 4),
        ):
            tokens, rest = divmod(values * 32 * warps, chunk * pieces)
            if rest == 0 and tokens and tokens & (tokens - 1) == 0:
                yield TokenTile(tokens, chunk, pieces, warps)


def use_token_tile(channels: int):
    """use of a Case: `tile` for this number of channels."""
    width = min(width for width in launch.TOKEN_TILES if width >= channels)
    return lambda tile: [patch.dict(launch.TOKEN_TILES, {width: tile})]


def align_cases() -> Iterator[Case]:
    for name, dtype in ALIGN:
        pair = test_align.PAIRS[name]
        resize = "source" if pair.source != pair.target else None

        def make(pair=pair, dtype=dtype):
            return (
                torch.randn(pair.source, device="cuda", dtype=dtype, requires_grad=True),
                torch.randn(pair.target, device="cuda", dtype=dtype, requires_grad=pair.both),
            )

        def step(source, target, resize=resize, both=pair.both):
            loss = test_align.ours(source, target, resize)
            return torch.autograd.grad(loss, (source, target) if both else source)

        source, target = (torch.Size(side).numel() for side in pair[:2])
        counted = (source + target + source + (target if pair.both else 0)) * dtype.itemsize
        channels = pair.source[-1]
        tiles = tuple(dict.fromkeys(token_tiles(channels)))
        yield Case(f"align {name} {str(dtype)[6:]}", make, step, counted, tiles, use_token_tile(channels))


def across_cases() -> Iterator[Case]:
    others = []
    for tokens, chunk, warps in itertools.product((32, 64, 128, 256), (8, 16, 32, 64), (4, 8)):
        if 8 <= tokens * chunk / (32 * warps) <= 32:
            others.append(TokenTile(tokens, chunk, 1, warps))
    for shape, size in (((32, 768, 14, 14), "small"), ((4, 192, 100, 168), "large")):

        def make(shape=shape):
            return tuple(torch.randn(shape, device="cuda", dtype=BF16, requires_grad=grad) for grad in (True, False))

        def step(source, target):
            loss = test_align.ours(source.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1), None)
            return torch.autograd.grad(loss, source)

        yield Case(
            f"align NCHW {shape}", make, step, 6 * math.prod(shape),
            tuple(dict.fromkeys([launch.ALIGN_TILES_ACROSS[size], *others])),
            lambda tile, size=size: [patch.dict(launch.ALIGN_TILES_ACROSS, {size: tile})],
        )  # fmt: skip


def group_cases() -> Iterator[Case]:
    terms = test_step_losses.pairs("cuda")
    weights = [(cos_weight, l1_weight) for _, cos_weight, l1_weight, _ in terms]

    def make():
        return test_step_losses.random_sides(terms, "cuda", BF16)

    def step(*sides):
        return test_step_losses.gradients(test_step_losses.ours, sides, weights)

    counted = sum(torch.Size(size).numel() * (8 if both else 6) for size, _, _, both in terms)
    tiles = [launch.FINISH_TILE]
    tiles += [Tile(launch.FINISH_TILE.rows, width, warps) for width in (2048, 4096, 8192, 16384) for warps in (8, 16)]
    tiles = tuple(dict.fromkeys(tiles))

    def use(tile):
        return [patch.object(align_group_launch, "FINISH_TILE", tile)]

    yield Case("step_losses", make, step, counted, tiles, use)


def deform_cases() -> Iterator[Case]:
    channels = test_deform_attn.CHANNELS
    for name, attention in test_deform_attn.ATTENTIONS.items():
        maps = attention.maps

        def make(attention=attention):
            return test_deform_attn.random_inputs(attention, BATCH, "cuda", BF16, grad=True)

        def forward(value, locations, weights, upstream, maps=maps):
            with torch.no_grad():
                return deform_attn(value, maps, locations, weights)

        def full(value, locations, weights, upstream, maps=maps, deterministic=False):
            out = deform_attn(value, maps, locations, weights, deterministic=deterministic)
            return torch.autograd.grad(out, (value, locations, weights), upstream)

        def fixed(*inputs, full=full):
            return full(*inputs, deterministic=True)

        once = test_deform_attn.counted_bytes(attention, BATCH, BF16.itemsize)
        for what, step, counted in (
            ("forward", forward, once),
            ("backward", full, 2 * once),
            ("fixed", fixed, 2 * once),
        ):
            tiles = [launch.deform_tile(channels, what)]
            for values, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
                tiles.append(Tile(values * 32 * warps // channels, channels, warps))

            def use(tile, what=what):
                return [patch.dict(launch.DEFORM_TILES[what], {channels: tile})]

            yield Case(f"deform {what} {name}", make, step, counted, tuple(dict.fromkeys(tiles)), use)


def moments_cases() -> Iterator[Case]:
    tiles = [launch.MOMENTS_TILE]
    for rows, channels, warps in itertools.product((32, 64, 128, 256, 512), (32, 64, 128, 256), (4, 8)):
        if 8 <= rows * channels / (32 * warps) <= 64:
            tiles.append(Tile(rows, channels, warps))
    for shape in ((4, 100, 168, 192), (32, 14, 14, 768)):
        for nchw in (False, True):

            def make(shape=shape, nchw=nchw):
                if not nchw:
                    return (torch.randn(shape, device="cuda", dtype=BF16),)
                batch, height, width, channels = shape
                return (torch.randn((batch, channels, height, width), device="cuda", dtype=BF16).permute(0, 2, 3, 1),)

            def step(x):
                found = moments(x)
                return found.mean, found.var

            yield Case(
                f"moments {'NCHW' if nchw else 'NHWC'} {shape}", make, step, 2 * math.prod(shape),
                tuple(dict.fromkeys(tiles)), lambda tile: [patch.object(moments_triton, "MOMENTS_TILE", tile)],
            )  # fmt: skip


def resize_cases() -> Iterator[Case]:
    for name in RESIZES:
        shape, size, _ = test_resize.SHAPES[name]
        channels = shape[-1]
        out = (shape[0], *size, channels)

        def make(shape=shape, out=out):
            x = torch.randn(shape, device="cuda", dtype=BF16, requires_grad=True)
            return x, torch.randn(out, device="cuda", dtype=BF16)

        def forward(x, upstream, size=size):
            with torch.no_grad():
                return resize_bilinear(x, size)

        def full(x, upstream, size=size):
            return torch.autograd.grad(resize_bilinear(x, size), x, upstream)

        moved = 2 * (math.prod(shape) + math.prod(out))
        for what, step, counted in (("forward", forward, moved), ("full", full, 2 * moved)):
            tiles = tuple(dict.fromkeys([resize_triton.resize_tile(channels), *token_tiles(channels)]))
            yield Case(f"resize {what} {name}", make, step, counted, tiles, use_token_tile(channels))


CASES = {
    "align": align_cases, "group": group_cases, "across": across_cases, "deform": deform_cases,
    "moments": moments_cases, "resize": resize_cases,
}  # fmt: skip


def with_tile(case: Case, tile, function: Callable):
    """function() while the table holds `tile`."""
    with ExitStack() as stack:
        for change in case.use(tile):
            stack.enter_context(change)
        launch.token_tile.cache_clear()
        try:
            return function()
        finally:
            launch.token_tile.cache_clear()


def seconds_per_step(step: Callable, buffers: list[tuple]) -> float:
    """Median over replays of one CUDA graph that walks over the buffers for at least REPLAY_MS."""

    def walk(laps: int = 1) -> list:
        for _ in range(laps):
            held = [step(*inputs) for inputs in buffers]
        return held

    walk()
    clock = Clock("cuda")
    walk()
    laps = max(1, min(16, round(REPLAY_MS / (1e3 * clock.stop()))))
    replay = as_graph(lambda: walk(laps))
    times = []
    for _ in range(REPLAYS):  # without a wait in between, so that none begins on an idle device
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in times[1:]) / 1e3 / laps / len(buffers)


def compile_share(cases: list[Case], part: int, parts: int) -> None:
    """Run each part-th variant once, which leaves its kernels in Triton's cache."""
    work = [(case, tile) for case in cases for tile in case.tiles]
    for case, tile in work[part::parts]:
        try:
            with_tile(case, tile, lambda case=case: case.step(*case.make()))
        except Exception:  # reported where it is timed
            continue


def compile_all(names: list[str]) -> None:
    """`compile_share` in one process per core, with this process's options."""
    parts = min(16, os.cpu_count() or 1)
    command = [sys.executable, __file__, *names, "--compile", str(parts)]
    for process in [subprocess.Popen([*command, str(part)]) for part in range(parts)]:
        process.wait()


def measure(case: Case, copy: float, cache: int) -> list[dict]:
    """One row per tile, the table's first."""
    buffers = [case.make() for _ in range(max(1, math.ceil(2 * cache / case.counted)))]
    rows = []
    for tile in case.tiles:
        row = {"case": case.name, "tile": [*map(str, tile)], "table": not rows}
        try:
            seconds = with_tile(case, tile, lambda: seconds_per_step(case.step, buffers))
            row |= {"us": 1e6 * seconds, "percent_of_copy": 100 * case.counted / seconds / copy}
        except Exception as error:  # a tile that does not compile, or asks for too much
            torch.cuda.synchronize()
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        rows.append(row)
    return rows


def main() -> int:
    """Compile, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--commit", help="what is measured, where the checkout carries no .git")
    parser.add_argument("--compile", nargs=2, type=int, help=argparse.SUPPRESS)  # parts, part
    args = parser.parse_args()
    names = args.ops or list(CASES)
    unknown = set(names) - set(CASES)
    if unknown or not torch.cuda.is_available():
        problem = f"unknown op {', '.join(unknown)}; expected {', '.join(CASES)}" if unknown else "no CUDA device"
        print(f"error: {problem}", file=sys.stderr)
        return 2
    cases = [case for name in names for case in CASES[name]()]
    if args.compile:
        compile_share(cases, args.compile[1], args.compile[0])
        return 0
    compile_all(names)
    device = torch.cuda.get_device_properties(0)
    copy = copy_bandwidth("cuda")
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **circumstances(args.commit, dry_run=False),
        "copy_gb_per_s": copy / 1e9,
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"tune-{slug(device.name)}.json"
    print(f"{device.name}: a copy reaches {copy / 1e9:.0f} GB/s")
    for case in cases:
        rows = measure(case, copy, device.L2_cache_size)
        found["rows"] += rows
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        ran = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
        print(f"{case.name}, {case.counted / 1e6:.0f} MB" + f", {len(rows) - len(ran)} failed" * (len(ran) < len(rows)))
        for row in [*(row for row in ran if row["table"]), *ran[:4]]:
            mark = "table" if row["table"] else ""
            print(f"  {mark:<6}{' '.join(row['tile']):<40}{row['us']:9.1f} us {row['percent_of_copy']:6.1f} %")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
