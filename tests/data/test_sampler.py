"""Order, sharding and crops, checked by counting; no image is read."""

from types import SimpleNamespace

import numpy as np
import pytest

from kpu_fast.data.sampler import RATIO, Sampler, canvases_of, choose_canvas

SIZES = np.random.default_rng(0).integers(30, 900, (101, 2)).astype(np.int32)


def sampler(sizes=SIZES, **changes):
    data = {"size": (64, 96), "fit": "crop", "aspect_ratio_grouping": True, "buckets": []}
    data |= {key: changes.pop(key) for key in data if key in changes}
    values = {"batch_size": 8, "crop_scale": (0.2, 1.0), "flip": True, "step_batches": 1, "rank": 0, "seed": 7}
    return Sampler(sizes, canvases=canvases_of(SimpleNamespace(**data)), fit=data["fit"], **(values | changes))


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
    for field in ("image", "start", "shape", "target", "flip"):
        assert np.array_equal(getattr(whole, field), np.concatenate([getattr(part, field) for part in parts])), field


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
    plan = sampler(np.array([size], np.int32), fit="pad", batch_size=1, aspect_ratio_grouping=False).plan(0)
    assert plan.target[0].tolist() == list(target)
    assert plan.shape[0].tolist() == list(size)
    assert plan.canvas == (64, 96)


@pytest.mark.parametrize(("size", "target"), [((640, 10), (96, 2)), ((40, 10), (96, 24)), ((96, 64), (96, 64))])
def test_grouping_turns_the_canvas(size, target):
    plan = sampler(np.array([size], np.int32), fit="pad", batch_size=2).plan(0)
    assert plan.target[0].tolist() == list(target)
    assert plan.canvas == (96, 64)
    upright = sampler(np.array([size], np.int32), fit="pad", batch_size=2, size=(96, 64)).plan(0)
    assert all(np.array_equal(*pair) for pair in zip(upright, plan, strict=True))
    for options in ({"size": (64, 64)}, {"fit": "crop"}):  # nothing to turn
        same = sampler(np.array([size], np.int32), **({"fit": "pad"} | options)).plan(0)
        assert same.canvas == options.get("size", (64, 96))


@pytest.mark.parametrize("portraits", [1, 9, 30, 92, 100])
def test_grouped_batches_are_of_one_orientation_and_hold_every_image_equally_often(portraits):
    lying = np.array([(96, 128), (64, 96), (80, 80)], np.int32)[np.arange(101) % 3]
    sizes = np.where(np.arange(101)[:, None] < portraits, lying[:, ::-1] + [1, 0], lying).astype(np.int32)
    one = sampler(sizes, fit="pad", batch_size=4)
    plans = [one.plan(4 * number) for number in range(3 * 101)]
    turned = np.array([plan.canvas == (96, 64) for plan in plans])
    for plan, is_turned in zip(plans, turned, strict=True):
        assert ((plan.image < portraits) == is_turned).all()
        assert (plan.target <= plan.canvas).all()
        assert (plan.target == plan.canvas).any(axis=1).all()
    assert np.bincount(np.concatenate([plan.image for plan in plans]), minlength=101).tolist() == [12] * 101
    # Evenly: no stretch of batches has one more or less than its share.
    share = np.arange(1, len(plans) + 1) * portraits / 101
    assert np.abs(turned.cumsum() - share).max() <= 0.5


def test_grouped_ranks_share_one_sequence_of_batches():
    """Two ranks, one in two backwards, and one that starts late see the same batches; epochs are shuffled anew."""
    whole = sampler(fit="pad")
    ranks = [sampler(fit="pad", rank=rank) for rank in range(2)]
    for number in range(40):
        found, expected = ranks[number % 2].plan(16 * (number // 2)), whole.plan(8 * number)
        late = sampler(fit="pad").plan(8 * number)
        for field in expected._fields:
            assert np.array_equal(getattr(found, field), getattr(expected, field)), field
            assert np.array_equal(getattr(late, field), getattr(expected, field)), field
    turned = [whole.plan(8 * number) for number in range(200)]
    turned = np.concatenate([plan.image for plan in turned if plan.canvas == (96, 64)])
    count = len(set(turned.tolist()))
    assert count == (SIZES[:, 0] > SIZES[:, 1]).sum()
    epochs = turned[: len(turned) // count * count].reshape(-1, count)
    assert all(len(set(epoch)) == count for epoch in epochs.tolist())
    assert np.mean(epochs[0] == epochs[1]) < 0.2


BUCKETS = ((64, 64), (64, 80), (64, 96))
# (number of images, height, width, canvas): as large as on 64 × 96 or 96 × 64, and no larger a canvas than that takes
PLACED = [
    (40, 480, 640, (64, 96)), (30, 480, 600, (64, 80)), (7, 600, 480, (80, 64)), (11, 500, 500, (64, 64)),
    (9, 96, 64, (96, 64)), (3, 10, 900, (64, 96)),
]  # fmt: skip


def placed():
    return np.array([(height, width) for count, height, width, _ in PLACED for _ in range(count)], np.int32)


def bucketed(**changes):
    return sampler(placed(), **({"fit": "pad", "buckets": BUCKETS[:2], "batch_size": 4} | changes))


def test_an_image_goes_on_the_smallest_canvas_that_shows_it_as_large():
    data = SimpleNamespace(size=(64, 96), fit="pad", aspect_ratio_grouping=True, buckets=list(BUCKETS[:2]))
    shapes = canvases_of(data)
    assert shapes == [(64, 96), (96, 64), (64, 64), (64, 80), (80, 64)]
    assert [shapes[which] for which in choose_canvas(placed(), shapes)] == [
        canvas for count, *_, canvas in PLACED for _ in range(count)
    ]
    every = np.random.default_rng(1).integers(1, 2000, (5000, 2)).astype(np.int32)
    chosen = choose_canvas(every, shapes)
    scale = np.array([[min(h / height, w / width) for h, w in shapes] for height, width in every])
    area = np.array([h * w for h, w in shapes])
    for row, which in zip(scale, chosen, strict=True):
        assert row[which] == row.max()
        assert area[which] == area[row == row.max()].min()
    without = canvases_of(SimpleNamespace(**(vars(data) | {"buckets": []})))
    assert np.array_equal(scale.max(axis=1), scale[:, : len(without)].max(axis=1))  # no image larger or smaller


@pytest.mark.parametrize("step_batches", [1, 3, 8])
def test_the_batches_of_a_step_have_one_area_and_hold_every_image_equally_often(step_batches):
    ranks = [bucketed(rank=rank, step_batches=step_batches) for rank in range(step_batches)]
    steps = 3 * 100  # three times the images: whole turns of every canvas
    plans = [[one.plan(4 * step_batches * step) for one in ranks] for step in range(steps)]
    areas = [{plan.canvas[0] * plan.canvas[1] for plan in step} for step in plans]
    assert all(len(found) == 1 for found in areas)
    expected = np.repeat([canvas for *_, canvas in PLACED], [count for count, *_ in PLACED], axis=0)
    for plan in (plan for step in plans for plan in step):
        assert (expected[plan.image] == plan.canvas).all()
        assert (plan.target <= plan.canvas).all()
    seen = np.bincount(np.concatenate([plan.image for step in plans for plan in step]), minlength=100)
    assert seen.tolist() == [12 * step_batches] * 100
    # The largest first. Evenly: no stretch of steps has two more or less of an area than its share.
    assert areas[0] == {64 * 96}
    for area, images in ((64 * 96, 52), (64 * 64, 11), (64 * 80, 37)):
        share = np.arange(1, steps + 1) * images / 100
        assert np.abs(np.cumsum([area in found for found in areas]) - share).max() < 2
    assert {canvas for step in plans for canvas in {plan.canvas for plan in step}} == set(map(tuple, expected.tolist()))


def test_one_rank_that_accumulates_sees_what_many_ranks_see():
    one = bucketed(step_batches=6)
    ranks = [bucketed(rank=rank, step_batches=6) for rank in range(3)]
    for number in range(60):
        found, expected = ranks[number % 3].plan(12 * (number // 3)), one.plan(4 * number)
        for field in expected._fields:
            assert np.array_equal(getattr(found, field), getattr(expected, field)), field


def test_the_order_of_an_areas_images_is_its_own():
    """Buckets in another order change nothing, and images of the same canvas come in the same order beside others."""
    one, other = bucketed(step_batches=2), bucketed(step_batches=2, buckets=BUCKETS[1::-1])
    assert all(np.array_equal(one.plan(4 * n).image, other.plan(4 * n).image) for n in range(200))
    small = [
        plan.image for plan in (bucketed(step_batches=2).plan(4 * n) for n in range(200)) if plan.canvas == (64, 64)
    ]
    alone = bucketed(step_batches=2, buckets=BUCKETS[:1])
    again = [plan.image for plan in (alone.plan(4 * n) for n in range(200)) if plan.canvas == (64, 64)]
    assert np.array_equal(np.concatenate(small), np.concatenate(again))


def test_a_position_inside_a_step_is_moved_to_its_end_where_areas_differ():
    assert [bucketed(step_batches=3).align(position) for position in (0, 4, 12, 13)] == [0, 12, 12, 24]
    assert [bucketed(step_batches=3, buckets=[]).align(position) for position in (0, 4, 13)] == [0, 4, 13]


def test_flip_can_be_switched_off():
    assert sampler(flip=False, batch_size=500).plan(0).flip.sum() == 0
