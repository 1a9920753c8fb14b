"""Order, sharding and crops, checked by counting; no image is read."""

import numpy as np
import pytest

from kpu_fast.data.sampler import RATIO, Sampler

SIZES = np.random.default_rng(0).integers(30, 900, (101, 2)).astype(np.int32)


def sampler(sizes=SIZES, **changes):
    values = {"batch_size": 8, "size": (64, 96), "fit": "crop", "crop_scale": (0.2, 1.0), "flip": True}
    values |= {"rank": 0, "seed": 7}
    return Sampler(sizes, **(values | changes))


def sequence(world_size, batch_size, steps, **changes):
    """Per rank: the images in the order it gets them, with the global place of each in the endless sequence."""
    ranks = [sampler(rank=rank, batch_size=batch_size, **changes) for rank in range(world_size)]
    stride = world_size * batch_size
    images = [np.concatenate([one.plan(step * stride).image for step in range(steps)]) for one in ranks]
    places = [
        np.concatenate([np.arange(batch_size) + step * stride + rank * batch_size for step in range(steps)])
        for rank in range(world_size)
    ]
    return images, places


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 8), (3, 5), (8, 1), (2, 150)])
def test_every_epoch_holds_every_image_once_over_all_ranks(world_size, batch_size):
    images, places = sequence(world_size, batch_size, steps=-(-3 * len(SIZES) // (world_size * batch_size)))
    for epoch in range(3):
        mine = [image[place // len(SIZES) == epoch] for image, place in zip(images, places, strict=True)]
        assert sorted(np.concatenate(mine)) == list(range(len(SIZES)))


def test_epochs_and_seeds_differ_and_repeat():
    (first,), _ = sequence(1, 101, steps=2)
    (again,), _ = sequence(1, 101, steps=2)
    (other,), _ = sequence(1, 101, steps=2, seed=8)
    assert np.array_equal(first, again)
    fixed = [np.mean(a == b) for a, b in [(first[:101], first[101:]), (first, other), (first[:101], np.arange(101))]]
    assert max(fixed) < 0.1  # a random permutation of 101 keeps one in place on average


def test_a_split_over_ranks_changes_nothing_but_who_gets_what():
    whole = sampler(batch_size=24).plan(48)
    parts = [sampler(batch_size=8, rank=rank).plan(48) for rank in range(3)]
    for field, joined in zip(whole._fields, zip(*parts, strict=True), strict=True):
        assert np.array_equal(getattr(whole, field), np.concatenate(joined)), field


def test_crops_lie_inside_have_the_asked_area_and_ratio_and_reach_every_corner():
    sizes = np.tile(np.array([[300, 400]], np.int32), (50, 1))
    plan = sampler(sizes, batch_size=20_000, crop_scale=(0.3, 0.6)).plan(0)
    height, width = plan.shape.T
    assert (plan.start >= 0).all()
    assert (plan.start + plan.shape <= sizes[0]).all()
    area, ratio = height * width / 120_000, width / height
    # One pixel of rounding on a side of 164 or more.
    assert 0.295 < area.min() < 0.305
    assert 0.59 < area.max() < 0.605
    assert RATIO[0] * 0.99 < ratio.min() < RATIO[0] * 1.02
    assert RATIO[1] * 0.98 < ratio.max() < RATIO[1] * 1.01
    assert abs(area.mean() - 0.45) < 0.01
    room = sizes[0] - plan.shape
    for axis in range(2):
        place = plan.start[room[:, axis] > 50, axis] / room[room[:, axis] > 50, axis]
        assert (place.min(), place.max()) == (0, 1)
        assert abs(place.mean() - 0.5) < 0.01
    assert abs(plan.flip.mean() - 0.5) < 0.02


@pytest.mark.parametrize(("size", "part"), [((10, 800), (10, 13)), ((800, 10), (13, 10)), ((1, 1), (1, 1))])
def test_a_strip_gives_its_centre(size, part):
    plan = sampler(np.array([size], np.int32), crop_scale=(0.9, 1.0), batch_size=2).plan(0)
    assert plan.shape[0].tolist() == list(part)
    assert (np.abs(2 * plan.start[0] + plan.shape[0] - size) <= 1).all()


@pytest.mark.parametrize(
    ("size", "target"),
    [((100, 100), (64, 64)), ((10, 40), (24, 96)), ((640, 10), (64, 1)), ((1, 5000), (1, 96)), ((64, 96), (64, 96))],
)
def test_pad_keeps_the_aspect_and_fills_the_tighter_side(size, target):
    plan = sampler(np.array([size], np.int32), fit="pad", batch_size=1).plan(0)
    assert plan.target[0].tolist() == list(target)
    assert plan.shape[0].tolist() == list(size)


def test_flip_can_be_switched_off():
    assert sampler(flip=False, batch_size=500).plan(0).flip.sum() == 0
