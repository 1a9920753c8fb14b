"""Images per second on the CPU: a Stream against a plain Pillow loop that does the same work on one thread.

    pytest bench/test_data.py --benchmark-only        # img/s is in the extra_info column of --benchmark-json

The images are made here (JPEG, 500 × 375, smooth with noise, ImageNet's size); KPU_FAST_BENCH_IMAGES names others.
"""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noise import noise_images
from PIL import Image, ImageOps

from kpu_fast.data.pipeline import Stream
from kpu_fast.data.sampler import Sampler
from kpu_fast.data.scan import load_or_scan

BATCH = 32
THREADS = [1, 2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KPU_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    given = os.environ.get("KPU_FAST_BENCH_IMAGES")
    if given:
        return given
    noise_images(folder)
    return str(folder)


def config(source, **changes):
    values = {"source": source, "batch_size": BATCH, "size": (224, 224), "fit": "crop", "hw_decoder_load": 0.65}
    values |= {"threads": 2, "crop_scale": (0.2, 1.0), "flip": True, "aspect_ratio_grouping": True, "buckets": []}
    return SimpleNamespace(**(values | changes))


def report(benchmark, source):
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.extra_info |= {
        "img_per_s": round(BATCH / benchmark.stats.stats.median, 1),
        "source": os.environ.get("KPU_FAST_BENCH_IMAGES", "made: 64 JPEG of 500 × 375"),
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0)),
    }


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.benchmark(group="crop to 224, batch of 32")
def test_stream(benchmark, source, threads):
    stream = Stream(config(source, threads=threads), load_or_scan(source), rank=0, world_size=1, device="cpu", seed=0)
    benchmark.pedantic(next, (stream,), rounds=15, warmup_rounds=4)
    report(benchmark, source)


@pytest.mark.benchmark(group="crop to 224, batch of 32")
def test_pillow(benchmark, source):
    index = load_or_scan(source)
    sizes = np.stack([index.height, index.width], axis=1)
    options = {"crop_scale": (0.2, 1.0), "flip": True, "step_batches": 1, "rank": 0, "seed": 0}
    sampler = Sampler(sizes, batch_size=BATCH, canvases=[(224, 224)], fit="crop", **options)
    positions = iter(range(0, 10**9, BATCH))

    def batch():
        plan, images = sampler.plan(next(positions)), []
        for number, (y, x), (h, w), flip in zip(plan.image, plan.start, plan.shape, plan.flip, strict=True):
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(index.read(number).tobytes())))
            image = image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR, (x, y, x + w, y + h))
            images.append(torch.from_numpy(np.array(image)[:, ::-1].copy() if flip else np.array(image)))
        return torch.stack(images).permute(0, 3, 1, 2).contiguous().float().div_(255)

    made = benchmark.pedantic(batch, rounds=6, warmup_rounds=1)
    assert made.shape == (BATCH, 3, 224, 224)
    report(benchmark, source)
