"""bench/noise.py: images that cost what photographs of their size do, the same ones for every benchmark."""

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from noise import noise_images
from PIL import Image


def test_noise_images(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        noise_images(tmp_path / folder, count=3)
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / f).iterdir()} for f in ("first", "second"))
    assert first == second
    assert len(set(first.values())) == 3
    assert all(60_000 < len(jpeg) < 75_000 for jpeg in first.values())  # 25,000 without the grain
    assert all(Image.open(tmp_path / "first" / name).size == (500, 375) for name in first)
