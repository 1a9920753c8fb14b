"""Mosaics: every object lies whole on the ground, under its own class, and the numbers given decide everything."""

import numpy as np
from PIL import Image

from kpu_fast.data.mosaic import make_mosaic


def images_of(count):
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, (32 - i % 3, 32, 3), dtype=np.uint8), i % 4) for i in range(count)]


def test_mosaics_are_their_objects_on_a_ground():
    images = images_of(12)
    counts = set()
    for index in range(60):
        picture, boxes, labels = make_mosaic(images, 3, index, 96)
        assert picture.shape == (96, 96, 3)
        assert (picture.dtype, boxes.dtype, labels.dtype) == (np.uint8, np.float32, np.int64)
        assert len(boxes) == len(labels) >= 1
        assert boxes.min() >= 0
        assert boxes.max() <= 96
        counts.add(len(boxes))
        for (left, top, right, bottom), label in zip(boxes.astype(int), labels, strict=True):
            assert 19 <= max(right - left, bottom - top) <= 48
            inside = picture[top:bottom, left:right]
            same = [
                np.array_equal(Image.fromarray(pixels).resize((right - left, bottom - top), Image.BICUBIC), inside)
                for pixels, of in images
                if of == label
            ]
            assert any(same)  # also: no other object lies over it
        again = make_mosaic(images, 3, index, 96)
        assert all(np.array_equal(a, b) for a, b in zip((picture, boxes, labels), again, strict=True))
    assert counts == {1, 2, 3, 4}
    assert not np.array_equal(make_mosaic(images, 3, 0, 96)[0], make_mosaic(images, 4, 0, 96)[0])
