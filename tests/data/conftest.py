"""Images whose pixels tell which image they are and which part of it one sees, and streams over them."""

import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("KPU_FAST_CACHE", str(folder))
    return folder


def ramp(number, height=96, width=128):
    """Red grows with x and green with y (0 to 250); blue is 8·number everywhere."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.rint(np.linspace(0, 250, width))[None]
    pixels[..., 1] = np.rint(np.linspace(0, 250, height))[:, None]
    pixels[..., 2] = 8 * number
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def config(**changes):
    values = {"source": "the source", "batch_size": 4, "size": (32, 32), "fit": "crop", "hw_decoder_load": 0.65}
    values |= {"threads": 1, "crop_scale": (0.2, 1.0), "flip": True, "aspect_ratio_grouping": True, "buckets": []}
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def make():
    """The helpers above, for tests that cannot import this file by name."""
    return SimpleNamespace(ramp=ramp, encoded=encoded, tar=write_tar, config=config)


@pytest.fixture
def folder(tmp_path):
    """10 images of three sizes."""
    root = tmp_path / "images"
    root.mkdir()
    for number in range(10):
        ramp(number, *[(96, 128), (128, 96), (64, 64)][number % 3]).save(root / f"{number}.png")
    return root


@pytest.fixture
def shards(tmp_path):
    """The same 10 images in two shards, 6 and 4, beside members that are no images."""
    sizes = [(96, 128), (128, 96), (64, 64)]
    members = [(f"{number:03d}", encoded(ramp(number, *sizes[number % 3]))) for number in range(10)]
    for shard, part in enumerate([members[:6], members[6:]]):
        rows = [row for key, data in part for row in ((f"{key}.png", data), (f"{key}.cls", b"3"))]
        write_tar(tmp_path / f"train-{shard:03d}.tar", rows)
    return str(tmp_path / "train-{000..001}.tar")
