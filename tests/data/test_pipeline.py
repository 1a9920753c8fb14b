"""Streams end to end: pixels against Pillow, sharding and flips read off the pixels, exact resume."""

import errno
import gc
import hashlib
import io
import os
import re
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kpu_fast.data.pipeline import IMAGENET_MEAN, Stream, _Reader
from kpu_fast.data.scan import load_or_scan, scan
from kpu_fast.data.sources import SourceError

LEVEL = 1 / 255


def stream(index, cfg, *, rank=0, world_size=1, device="cpu", seed=3, state=None):
    return Stream(cfg, index, rank=rank, world_size=world_size, device=device, seed=seed, state=state)


def take(source, count):
    return [next(source) for _ in range(count)]


def who(images):
    """The numbers of `ramp` images, read off their blue channel (fit "crop": no padding)."""
    return (images[:, 2].mean(dim=(1, 2)) * 255 / 8).round().int().tolist()


def same(left, right):
    return torch.equal(left.images, right.images) and (
        left.valid is right.valid is None or torch.equal(left.valid, right.valid)
    )


def resized(image, height, width):
    """Pillow's antialiased bilinear resize, (3, height, width) in [0, 1], with the edge pixels repeated outwards.

    Pillow itself leaves out what lies outside the image and DALI repeats the edge: they differ in the outermost pixels.
    """
    pad = 40
    wide = Image.fromarray(np.pad(np.asarray(image), [(pad, pad), (pad, pad), (0, 0)], mode="edge"))
    box = (pad, pad, pad + image.width, pad + image.height)
    return (
        torch.from_numpy(np.array(wide.resize((width, height), Image.Resampling.BILINEAR, box))).permute(2, 0, 1) / 255
    )


@pytest.fixture
def photo(tmp_path):
    """A photograph where scikit-image is installed, otherwise a smooth pattern; 201 × 302, so that nothing divides."""
    try:
        from skimage import data

        image = Image.fromarray(data.astronaut()).resize((302, 201))
    except ImportError:
        y, x = np.mgrid[:201, :302]
        waves = [np.sin(x / 9) * np.cos(y / 13), np.sin(x / 31 + 1), np.cos((x + y) / 17)]
        image = Image.fromarray(np.uint8(np.stack(waves, -1) * 120 + 128))
    image.save(tmp_path / "photo.png")
    return image, scan(str(tmp_path / "photo.png"))


@pytest.mark.parametrize("size", [(64, 96), (64, 160), (96, 64), (320, 320)])
@pytest.mark.parametrize("flip", [False, True])
def test_pad_is_pillows_resize_top_left_on_the_mean_colour(photo, make, size, flip):
    image, index = photo
    config = make.config(fit="pad", size=size, flip=flip, batch_size=6, aspect_ratio_grouping=False)
    batch = next(stream(index, config))
    scale = min(size[0] / 201, size[1] / 302)
    height, width = round(201 * scale), round(302 * scale)
    expected = torch.tensor(IMAGENET_MEAN)[:, None, None].repeat(1, *size)
    plain = resized(image, height, width)
    seen = set()
    for got, valid in zip(batch.images, batch.valid, strict=True):
        errors = []
        for content in (plain, plain.flip(-1)):
            expected[:, :height, :width] = content
            errors.append((got - expected).abs())
        best = min(errors, key=torch.max)
        seen.add(best is errors[1])
        assert best.max() < 1.01 * LEVEL
        assert best.mean() < 0.3 * LEVEL
        assert best[:, height:].max() < 1e-6 if height < size[0] else True
        assert best[:, :, width:].max() < 1e-6 if width < size[1] else True
        mask = torch.zeros(size, dtype=torch.bool)
        mask[:height, :width] = True
        assert torch.equal(valid, mask)
    assert seen == ({False, True} if flip else {False})


def test_grouped_batches_lie_as_their_images_do(folder, make):
    """Those of a run of the one orientation alone, and one of the other: 96 × 128, 128 × 96 and 64 × 64 are there."""
    index = load_or_scan(str(folder))
    options = {"source": str(folder), "fit": "pad", "size": (64, 96), "batch_size": 3}
    batches = take(stream(index, make.config(**options)), 20)
    shapes = [tuple(batch.images.shape[2:]) for batch in batches]
    assert shapes.count((96, 64)) == 6  # three of ten images
    for batch, (height, width) in zip(batches, shapes, strict=True):
        assert batch.valid.shape == (3, height, width)
        used = batch.valid.sum(dim=(1, 2)) / (height * width)
        assert ((used > 0.85) | ((used - 2 / 3).abs() < 0.01)).all()  # the squares leave a third empty
        assert batch.images[batch.valid.logical_not()[:, None].expand_as(batch.images)].unique().numel() <= 3
    later = stream(index, make.config(**options))
    for number in range(3):
        assert same(next(later), batches[number])
    resumed = stream(index, make.config(**options), state=later.state())
    assert all(same(next(resumed), batch) for batch in batches[3:8])


def test_buckets_leave_less_empty_and_every_image_as_large(folder, make):
    """Of 96 × 128, 128 × 96 and 64 × 64 none fills 96 × 160."""
    index = load_or_scan(str(folder))
    options = {"source": str(folder), "fit": "pad", "size": (96, 160), "batch_size": 2, "flip": False}
    found = {}
    for buckets in ([], [(96, 128), (96, 96)]):
        batches = take(stream(index, make.config(**options, buckets=buckets)), 40)
        for images, valid in batches:
            for image, real in zip(images, valid, strict=True):
                part = image[:, real.any(dim=1)][:, :, real.any(dim=0)]
                found.setdefault(part.numpy().tobytes(), {})[bool(buckets)] = (part.shape, real.shape)
    assert len(found) == 10
    used = {(96, 128): (96, 128), (128, 96): (128, 96), (96, 96): (96, 96)}
    for shapes in found.values():  # the same pixels
        (part, wide), (same_part, fitting) = shapes[False], shapes[True]
        assert part == same_part
        assert tuple(wide) in {(96, 160), (160, 96)}
        assert tuple(fitting) == used[part[1:]]
    with_step = Stream(make.config(**options, buckets=buckets), index, rank=0, world_size=1, device="cpu", seed=0,
                       skip=3, step_batches=4)  # fmt: skip
    assert with_step.images_seen == 8
    with pytest.raises(ValueError, match="step_batches is 3: expected a multiple of the 2 ranks"):
        Stream(make.config(**options), index, rank=0, world_size=2, device="cpu", seed=0, step_batches=3)


def test_padding_is_zero_after_normalisation(photo, make):
    _, index = photo
    batch = next(stream(index, make.config(fit="pad", size=(64, 256))))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, (0.229, 0.224, 0.225)))
    outside = ((batch.images - mean) / std).masked_select(~batch.valid[:, None])
    assert outside.numel() > 1000
    assert outside.abs().max() < 1e-6


def test_a_crop_of_everything_is_pillows_resize(tmp_path, make, photo):
    photo[0].crop((0, 0, 200, 200)).save(tmp_path / "square.png")
    index = scan(str(tmp_path / "square.png"))
    batch = next(stream(index, make.config(size=(64, 64), crop_scale=(1.0, 1.0), flip=False)))
    assert batch.valid is None
    assert (batch.images - resized(Image.open(tmp_path / "square.png"), 64, 64)).abs().max() < 1.01 * LEVEL


def test_crops_and_flips_read_off_the_pixels(tmp_path, make):
    make.ramp(5, 240, 320).save(tmp_path / "ramp.png")
    index = scan(str(tmp_path / "ramp.png"))
    images = next(stream(index, make.config(size=(64, 64), crop_scale=(0.25, 0.5), batch_size=400))).images * 255 / 250
    # 64 pixels see the ramp at their centres: the range they span is 63/64 of the crop's.
    left, right = images[:, 0, 32, 0], images[:, 0, 32, -1]
    top, bottom = images[:, 1, 0, 32], images[:, 1, -1, 32]
    width, height = (right - left).abs() * 64 / 63 * 320, (bottom - top) * 64 / 63 * 240
    area, ratio = width * height / (240 * 320), width / height
    assert 0.23 < area.min() < 0.28
    assert 0.46 < area.max() < 0.53
    assert 0.71 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4
    assert (bottom > top).all()
    assert 0.4 < (right < left).float().mean() < 0.6
    corner = torch.minimum(left, right)
    assert corner.min() < 0.05
    assert corner.max() > 0.4


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_an_epoch_over_two_ranks_is_disjoint_complete_and_shuffled(kind, make, request):
    source = request.getfixturevalue(kind)
    index = scan(str(source))
    ranks = [stream(index, make.config(batch_size=1), rank=rank, world_size=2) for rank in range(2)]
    epochs = [[[who(next(one).images)[0] for _ in range(5)] for one in ranks] for _ in range(2)]
    for first, second in epochs:
        assert sorted(first + second) == list(range(10))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_resume_is_exact_at_any_point(kind, fit, make, request):
    # 10 images, 8 per step: epochs end inside steps 2, 3 and 4 and with step 5, so a cut at 5 lies on the boundary.
    index = scan(str(request.getfixturevalue(kind)))
    cfg = make.config(fit=fit)
    for rank in range(2):
        straight = take(stream(index, cfg, rank=rank, world_size=2), 10)
        for cut in (0, 1, 2, 4, 5, 6):
            first = stream(index, cfg, rank=rank, world_size=2)
            take(first, cut)
            second = stream(index, cfg, rank=rank, world_size=2, state=first.state())
            assert second.images_seen == first.images_seen == cut * 8
            assert all(same(*pair) for pair in zip(straight[cut : cut + 4], take(second, 4), strict=True)), (rank, cut)
        assert not same(straight[0], straight[1])


def test_ranks_share_one_state_and_a_run_may_go_on_with_another_number_of_them(folder, make):
    index = scan(str(folder))
    two = [stream(index, make.config(), rank=rank, world_size=2) for rank in range(2)]
    for one in two:
        take(one, 3)
    assert two[0].state() == two[1].state()
    alone = stream(index, make.config(batch_size=8), state=two[0].state())
    assert torch.equal(next(alone).images, torch.cat([next(one).images for one in two]))


def digest(batches):
    return hashlib.sha256(b"".join(batch.images.numpy().tobytes() for batch in batches)).hexdigest()


FRESH = """
import hashlib, sys
from types import SimpleNamespace
from kpu_fast.data import Stream, load_or_scan
cfg = SimpleNamespace(source=sys.argv[1], batch_size=4, size=(32, 32), fit="crop", hw_decoder_load=0.65, threads=3,
                      crop_scale=(0.2, 1.0), flip=True, aspect_ratio_grouping=True, buckets=[])
stream = Stream(cfg, load_or_scan(sys.argv[1]), rank=0, world_size=1, device="cpu", seed=3)
print(hashlib.sha256(b"".join(next(stream).images.numpy().tobytes() for _ in range(6))).hexdigest())
"""


def test_a_fresh_process_with_more_threads_gives_the_same_batches(folder, make):
    index = load_or_scan(str(folder))
    here = digest(take(stream(index, make.config()), 6))
    other = digest(take(stream(index, make.config(), seed=4), 6))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split()[-1] == here != other


def test_batches_stay_what_they_were_while_the_stream_goes_on(folder, make):
    one = stream(scan(str(folder)), make.config())
    kept = take(one, 4)
    copies = [batch.images.clone() for batch in kept]
    take(one, 8)
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))


def test_on_a_gpu_a_batch_lives_until_the_gpu_has_read_it(folder, make, monkeypatch):
    """Seen without a GPU: a batch that its user dropped is still held while an event after its use has not come."""

    class Event:
        def __init__(self):
            recorded.append(self)
            self.done = False

        def record(self, stream):
            assert stream == "the stream of cuda:0"

        def query(self):
            return self.done

    recorded, held = [], []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    source = stream(scan(str(folder)), make.config(fit="pad", size=(32, 48), batch_size=2))
    source._device = torch.device("cuda:0")  # all else stays on the CPU
    for _ in range(4):
        batch = next(source)
        held.append([weakref.ref(tensor) for tensor in source._handed_out])
        assert any(ref() is batch.images for ref in held[-1])
    del batch
    assert all(ref() is not None for refs in held for ref in refs)
    recorded[0].done = recorded[1].done = True  # before the first batch and after it; the second is still being read
    next(source)
    assert [all(ref() is None for ref in refs) for refs in held] == [True, False, False, False]
    for event in recorded:
        event.done = True
    next(source)
    assert [all(ref() is None for ref in refs) for refs in held] == [True] * 4


def test_a_dropped_stream_goes_at_once(make, folder):
    before = set(threading.enumerate())
    source = stream(scan(str(folder)), make.config())
    next(source)
    readers = [t for t in threading.enumerate() if t not in before and t.name.startswith("kpu_fast-read")]
    assert readers
    gone = [weakref.ref(part) for part in (source, source._pipe, source._reader)]
    gc.disable()  # nothing may be left to the search for cycles, which a training loop hardly ever sets off
    try:
        del source
        assert [part() for part in gone] == [None] * 3
        for reader in readers:
            reader.join(5)
            assert not reader.is_alive()
    finally:
        gc.enable()


def test_fewer_images_than_a_batch_repeat(tmp_path, make):
    for number in range(3):
        make.ramp(number).save(tmp_path / f"{number}.png")
    batch = next(stream(scan(str(tmp_path)), make.config(batch_size=9)))
    assert sorted(who(batch.images)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_file_that_changed_after_the_scan_is_named(folder, make):
    index = scan(str(folder))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(OSError, match=r"images/\d.png: 50 bytes left"):
        take(stream(index, make.config()), 1)


@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_read_that_fails_for_a_moment_is_tried_again(folder, make, failures, monkeypatch, caplog):
    index = load_or_scan(str(folder))
    left, read = [None] * failures, type(index)._read

    def stale(self, i):
        if left:
            left.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, i)

    monkeypatch.setattr("kpu_fast.data.index.RETRY_AFTER", (0.0, 0.0, 0.0))
    monkeypatch.setattr(type(index), "_read", stale)
    if failures > 3:
        with pytest.raises(OSError, match=r"Stale file handle: '.*/0\.png'"):
            index.read(0)
    else:
        assert bytes(index.read(0)) == (folder / "0.png").read_bytes()
    assert caplog.text.count("trying again") == min(failures, 3)


def test_what_is_gone_or_cut_off_is_not_tried_again(folder, make, monkeypatch):
    index = load_or_scan(str(folder))
    monkeypatch.setattr("threading.Event.wait", lambda *_: pytest.fail("waited"))
    (folder / "0.png").write_bytes(b"cut")
    (folder / "1.png").unlink()
    with pytest.raises(OSError, match="3 bytes left"):
        index.read(0)
    with pytest.raises(FileNotFoundError):
        index.read(1)


def test_reads_that_wait_do_not_outlive_a_stream_that_failed(folder, make, monkeypatch):
    """The first batch's file is gone, those read ahead are to be tried again in ten minutes."""
    index = scan(str(folder))

    def read(self, i):
        raise FileNotFoundError(self.name(i)) if i == 0 else OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("kpu_fast.data.index.RETRY_AFTER", (600.0,))
    monkeypatch.setattr(type(index), "_read", read)
    plan = {"target": None, "flip": None, "canvas": (1, 1)}
    sampler = SimpleNamespace(plan=lambda at: SimpleNamespace(image=np.array([at]), **plan))
    reader = _Reader(index, sampler, 0, 1, crop=False)
    with pytest.raises(FileNotFoundError, match=r"/0\.png"):
        reader()
    for thread in reader._pool._threads:
        thread.join(60)
        assert not thread.is_alive()


def test_batches_can_be_passed_over(folder, make):
    index = load_or_scan(str(folder))
    place = {"rank": 1, "world_size": 2, "device": "cpu", "seed": 0}
    whole, begun = (Stream(make.config(batch_size=2), index, **place) for _ in range(2))
    fifth, _ = take(whole, 5)[-1], take(begun, 1)
    skipping = Stream(make.config(batch_size=2), index, **place, state=begun.state(), skip=3)
    assert torch.equal(next(skipping).images, fifth.images)
    assert skipping.images_seen == whole.images_seen


def failure(one):
    """What `one` says when it fails, which is to be one line for a person."""
    with pytest.raises(RuntimeError) as caught:
        take(one, 20)
    assert "\n" not in str(caught.value)
    assert "pipeline.py" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_the_image_that_dali_cannot_decode_is_named(tmp_path, make, device, photo):
    """Alone among good ones, some batches into the stream, in a shard too."""
    for number in range(10):
        photo[0].rotate(number).save(tmp_path / f"{number}.jpg", quality=90)
    make.tar(tmp_path / "a.tar", [(f"{n}.png", make.encoded(make.ramp(n))) for n in range(10)])
    index = scan([str(tmp_path / "?.jpg"), str(tmp_path / "a.tar")])
    for number in (7, 13):
        path, at = index.files[index.file[number]].path, index.offset[number]
        with open(path, "r+b") as file:
            file.seek(at)
            kept = file.read(index.length[number])
            file.seek(at)
            file.write(bytes(len(kept)))
        said = failure(stream(index, make.config(), device=device))
        assert said.startswith(f"source 'the source': DALI cannot use {index.name(number)}, changed since the scan; ")
        assert "python -m kpu_fast.data.scan" in said
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(kept)


def test_images_that_dali_refuses_unchanged_are_told_from_a_device_that_fails(folder):
    """A GPU's decoder may refuse what the scan's took, and after a fault on the GPU it refuses everything."""
    index = scan(str(folder))
    sampler = SimpleNamespace(
        plan=lambda at: SimpleNamespace(image=np.array([3, 1, 4]) + at, flip=0, target=0, canvas=())
    )
    reader = _Reader(index, sampler, 0, 1, crop=False)
    reader(), reader()
    error = RuntimeError("Error in operator\n  File pipeline.py\nencountered:\n\n no\nCurrent pipeline object is …")

    def refusing(*numbers):
        files = [(folder / f"{number}.png").read_bytes() for number in numbers]

        def decode(data):
            if bytes(data) in files:
                raise ValueError("refused")
            return np.asarray(Image.open(io.BytesIO(data)))

        return decode

    some = reader.what_failed(refusing(2, 5), error)
    assert some.startswith(
        f"DALI cannot decode {folder / '2.png'}, {folder / '5.png'}, which the scan could; replace or"
    )
    candidates = f"DALI could not make a batch (no); it was decoding {folder / '1.png'}, {folder / '2.png'}, "
    candidates += f"{folder / '3.png'} and 2 more"
    assert reader.what_failed(refusing(), error) == candidates
    assert reader.what_failed(refusing(*range(10)), error) == candidates
    assert reader.what_failed(refusing(0, 6), error) == candidates  # of other batches


def test_a_converted_image_that_was_damaged_is_named(folder, make, cache):
    """Its checksum is of the image that it stands in for."""
    for number in range(4):
        make.ramp(number).convert("CMYK").save(folder / f"cmyk-{number}.jpg")
    index = scan(str(folder))
    damaged = sorted(cache.glob("*/converted/*.png"))[0]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert f"DALI cannot decode {damaged}, which the scan could" in failure(stream(index, make.config()))


def test_many_images_that_no_longer_decode_are_counted(folder, make):
    index = scan(str(folder))
    for path in folder.iterdir():
        path.write_bytes(bytes(len(path.read_bytes())))
    said = failure(stream(index, make.config()))
    assert f"DALI cannot use {folder}/" in said
    assert re.search(r"\d\.png and \d more, changed since the scan", said)


def test_an_image_that_shrank_after_the_scan_is_named(tmp_path, make):
    path = tmp_path / "a.bmp"
    make.ramp(1, 200, 10).save(path)
    index = scan(str(path))
    make.ramp(1, 10, 200).save(path)  # another shape in at least as many bytes
    path.write_bytes(path.read_bytes().ljust(index.length[0], b"0"))
    assert f"DALI cannot use {path}, changed since the scan" in failure(stream(index, make.config()))


def test_bad_arguments_are_named(folder, make):
    index = scan(str(folder))
    with pytest.raises(SourceError, match="10 usable images for 11 ranks"):
        stream(index, make.config(), world_size=11)
    with pytest.raises(ValueError, match=r"data.fit is 'stretch'.*'crop' or 'pad'"):
        stream(index, make.config(fit="stretch"))
    with pytest.raises(ValueError, match="rank is 2 of 2"):
        stream(index, make.config(), rank=2, world_size=2)
    with pytest.raises(ValueError, match="device is 'meta'"):
        stream(index, make.config(), device="meta")


def test_a_state_of_another_seed_is_refused_and_of_other_images_warned_about(folder, make):
    index = scan(str(folder))
    state = stream(index, make.config()).state()
    with pytest.raises(ValueError, match="saved with seed 3, the run has seed 4"):
        stream(index, make.config(), seed=4, state=state)
    make.ramp(10).save(folder / "10.png")
    with pytest.warns(UserWarning, match="images changed since the checkpoint"):
        stream(scan(str(folder)), make.config(), state=state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_cuda_agrees_with_the_cpu_and_resumes_exactly(tmp_path, make, fit, photo):
    for number in range(10):
        photo[0].rotate(number).save(tmp_path / f"{number}.jpg", quality=90)
    index = scan(str(tmp_path / "?.jpg"))
    cfg = make.config(fit=fit, size=(64, 96))
    cpu, cuda = stream(index, cfg), stream(index, cfg, device="cuda")
    for _ in range(3):
        reference, batch = next(cpu), next(cuda)
        assert batch.images.device.type == "cuda"
        assert (batch.images.cpu() - reference.images).abs().mean() < 2 * LEVEL
        if fit == "pad":
            assert torch.equal(batch.valid.cpu(), reference.valid)
    again = stream(index, cfg, device="cuda", state=cuda.state())
    assert all(same(*pair) for pair in zip(take(cuda, 3), take(again, 3), strict=True))


def test_an_epoch_of_a_users_own_images(make):
    source = os.environ.get("KPU_FAST_TEST_IMAGES")
    if not source:
        pytest.skip("set KPU_FAST_TEST_IMAGES to a source of images to run this on")
    index = load_or_scan(source)
    one = stream(index, make.config(size=(224, 224), batch_size=32, threads=2))
    while one.images_seen < len(index):
        images = next(one).images
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0.05
