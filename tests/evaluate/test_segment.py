"""The linear probe of maps: against plain formulas, on images whose answer is known, and what it refuses."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

pytest.importorskip("transformers")

from kpu_fast.data.sources import SourceError
from kpu_fast.evaluate import segment as file
from kpu_fast.evaluate.encoder import Encoder, load_encoder
from kpu_fast.evaluate.masks import MaskedImages, check_apart, find_classes
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.evaluate.segment import Probe, segment
from kpu_fast.models import Features

COLOURS = {3: (220, 40, 40), 7: (40, 200, 60), 40: (50, 60, 220)}  # class number: colour
COMMON = ["--device", "cpu", "--workers", "0", "--size", "64", "--batch-size", "4", "--steps", "3"]


def save(root, name, image, mask):
    for part, picture in (("images", image), ("masks", mask)):
        path = root / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def stripes(root, count, seed):
    """Images of upright stripes in the colours, of several sizes, one below a folder; the edges of stripes are 255."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = rng.integers(60, 120, 2)
        order = rng.permutation(list(COLOURS))
        mask = np.repeat(order, -(-width // 3))[:width][None].repeat(height, 0).astype(np.uint8)
        pixels = np.array([COLOURS[n] for n in order])[np.arange(width) * 3 // width]
        pixels = np.array([[COLOURS[n] for n in row] for row in mask]) + rng.integers(-30, 30, (height, width, 3))
        edge = np.abs(np.diff(mask.astype(int), axis=1, prepend=mask[:, :1])) > 0
        mask[edge] = 255
        name = f"sub/{number}.png" if number == 0 else f"{number}.png"
        save(root, name, Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(train, test) of stripes."""
    root = tmp_path_factory.mktemp("stripes")
    return tuple(stripes(root / name, count, seed) for name, count, seed in (("train", 12, 0), ("test", 6, 1)))


def read(root, **options):
    return MaskedImages(root / "images", root / "masks", **options)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def four_bits(side=64):
    """A gray PNG of 4 bits, which Pillow does not write itself."""
    rows = b"".join(b"\0" + bytes(side // 2) for _ in range(side))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 4, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


FOUR_BITS, JPEG = four_bits(), encoded(Image.new("L", (64, 64)), "JPEG")


class Colours(nn.Module):
    """Maps of the mean colours at strides 8 and 16, the latter with channels that say nothing."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        fine, coarse = (F.avg_pool2d(images, stride).permute(0, 2, 3, 1) for stride in (8, 16))
        return Features(None, (fine + self.nothing, torch.cat([coarse, coarse * 0 + 1], dim=3)))


@pytest.fixture
def colours():
    return Encoder("colours", "backbone", Colours(), 64)


def colours_of(images):
    with torch.no_grad():
        return Colours()(images).maps


def test_a_probe_is_a_linear_layer_on_normalised_maps_joined():
    generator = torch.Generator().manual_seed(0)
    maps = tuple(torch.randn(2, side, side + 1, c, generator=generator) * 3 + 1 for side, c in ((8, 5), (4, 7), (2, 3)))
    probe = Probe((5, 7, 3), 4)
    for parameter in probe.parameters():
        nn.init.normal_(parameter, generator=generator)
    found = probe(maps)
    joined = []
    for m in maps:
        m = m.double()
        normed = (m - m.mean((0, 1, 2))) / (m.var((0, 1, 2), unbiased=False) + 1e-5).sqrt()
        joined.append(F.interpolate(normed.permute(0, 3, 1, 2), (8, 9), mode="bilinear"))
    weight = torch.cat([linear.weight for linear in probe.linears], dim=1).double()
    expected = torch.einsum("kc,bchw->bkhw", weight, torch.cat(joined, dim=1))
    torch.testing.assert_close(
        found.double(), expected + probe.linears[0].bias.double()[:, None, None], atol=2e-4, rtol=0
    )


def test_stripes_are_told_apart(colours, data, tmp_path):
    found = segment(colours, *map(read, data), size=96, steps=150, lr=0.05, picture=tmp_path / "p.png", batch_size=4)
    assert found["miou"] > 0.85
    assert found["pixel_accuracy"] > 0.93
    assert list(found["iou"]) == ["3", "7", "40"]
    assert found["miou"] == pytest.approx(np.mean(list(found["iou"].values())))
    assert (found["images"], found["train_images"], found["channels"], found["head"]) == (6, 12, [3, 6], None)
    assert np.asarray(Image.open(tmp_path / "p.png")).std() > 20
    again = segment(colours, *map(read, data), size=96, steps=150, lr=0.05, batch_size=4)
    assert again == found
    options = dict(size=64, steps=5, lr=0.05, batch_size=4, workers=0)
    weights = [file.fit(colours_of, read(data[0]), [3, 7, 40], seed=seed, **options) for seed in (0, 0, 1)]
    weights = [probe.linears[0].weight for probe in weights]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_probe_without_training_knows_nothing(colours, data, monkeypatch):
    monkeypatch.setattr(file, "fit", lambda *_, **__: Probe((3, 6), 3).eval())
    assert segment(colours, *map(read, data), size=96)["miou"] < 0.2


def test_scores_are_those_of_the_definition(colours, data, monkeypatch):
    """A probe that always finds the colour nearest to red or green; class 7 is never found, 255 does not count."""
    probe = Probe((3, 6), 3)
    with torch.no_grad():
        probe.linears[0].weight[0] = torch.tensor([1.0, -1.0, 0.0])
        probe.linears[0].weight[2] = torch.tensor([-1.0, 0.0, 1.0])
        probe.linears[0].bias[1] = -1e6
    for norm in probe.norms:
        norm.running_mean.fill_(0.5)
    monkeypatch.setattr(file, "fit", lambda *_, **__: probe.eval())
    test = read(data[1])
    found = segment(colours, read(data[0]), test, size=96)
    counts = np.zeros((3, 3), np.int64)
    for image, mask in test:
        pixels = F.interpolate(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255, (96, 96), mode="bicubic",
                               antialias=True).clamp(0, 1)  # fmt: skip
        with torch.no_grad():
            scores = probe(tuple(colours(pixels).maps))
        answer = F.interpolate(scores, mask.shape, mode="bilinear").argmax(1)[0].numpy()
        for number, (true, answered) in enumerate((t, a) for t in range(3) for a in range(3)):
            counts.flat[number] += ((mask == (3, 7, 40)[true]) & (answer == answered)).sum()
    assert counts[:, 1].sum() == 0
    iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert list(found["iou"].values()) == pytest.approx(iou.tolist())
    assert found["miou"] == pytest.approx(iou.mean())
    assert found["pixel_accuracy"] == pytest.approx(counts.trace() / counts.sum())


def test_the_best_of_many_classes_is_found_in_parts():
    scores = torch.randn(37, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores[None], (31, 40), mode="bilinear").argmax(1)[0]
    assert torch.equal(file._best(scores, (31, 40)), expected)
    assert len(expected.unique()) > 20


def test_classes_are_the_numbers_in_the_masks(colours, data):
    train, test = map(read, data)
    assert find_classes(train, [255], workers=0) == {3, 7, 40}
    assert find_classes(test, [], workers=0) == {3, 7, 40, 255}
    found = segment(colours, train, test, size=64, steps=2, ignore=(255, 40))
    assert list(found["iou"]) == ["3", "7"]
    with pytest.raises(EvaluateError, match=r"--train-masks: hold the classes \[3\] beside --ignore; two or more are"):
        segment(colours, train, test, size=64, steps=2, ignore=(255, 40, 7))


def test_classes_that_cannot_be_compared_end_it_before_the_work(colours, data, tmp_path, monkeypatch, capsys):
    fit = file.fit
    monkeypatch.setattr(file, "fit", None)
    for number, name in ((255, "ignored"), (9, "other")):
        save(tmp_path / name, "0.png", Image.new("RGB", (64, 64)), Image.new("L", (64, 64), number))
        with pytest.raises(
            EvaluateError, match=r"--test-masks: hold the classes \[9?\].*none of --train-masks' \[3, 7, 40"
        ):
            segment(colours, read(data[0]), read(tmp_path / name), size=64)
    save(tmp_path / "size", "0.png", Image.new("RGB", (64, 32)), Image.new("L", (64, 64), 3))
    with pytest.raises(EvaluateError, match=r"0.png: is not as large as its image \(64×64 and 32×64\)"):
        segment(colours, read(data[0]), read(tmp_path / "size"), size=64)
    many = Image.fromarray(np.arange(5004, dtype=np.uint16).reshape(4, -1))
    save(tmp_path / "objects", "0.png", Image.new("RGB", many.size), many)
    with pytest.raises(EvaluateError, match="hold 5003 classes; are they numbers of objects"):
        segment(colours, read(data[0]), read(tmp_path / "objects"), size=64)
    monkeypatch.setattr(file, "fit", fit)
    save(tmp_path / "other", "1.png", Image.new("RGB", (64, 64), COLOURS[3]), Image.new("L", (64, 64), 3))
    capsys.readouterr()
    found = segment(colours, read(data[0]), read(tmp_path / "other"), size=64, steps=2)
    assert found["iou"]["9"] == 0
    assert "--test-masks: 1 of the classes are in no training mask, so their IoU is 0: 9\n" in capsys.readouterr().err


RATES = []


class Recorder(torch.optim.AdamW):
    """Notes what each step was asked to do."""

    def step(self, *_, **__):
        RATES.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return super().step(*_, **__)


def test_training_follows_the_protocol(tmp_path, monkeypatch):
    """Pixels and masks both tell their column: whatever is mirrored, a cell's truth is what lies at its centre."""
    columns = np.arange(64, dtype=np.uint8)[None].repeat(64, 0)
    for number in range(6):
        pixels = np.stack([columns * 3, np.full_like(columns, number * 40), columns], axis=2)
        save(tmp_path, f"{number}.png", Image.fromarray(pixels), Image.fromarray(columns))
    images, truths, maps = [], [], []

    def see(batch):
        images.append(batch.clone())
        made = colours_of(batch)
        maps.append(made)
        return made

    loss = file._loss
    monkeypatch.setattr(file, "_loss", lambda logits, truth: (truths.append(truth), loss(logits, truth))[1])
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    RATES.clear()
    steps = 9
    options = dict(size=64, steps=steps, lr=0.02, batch_size=2, workers=0, seed=0)
    probe = file.fit(see, read(tmp_path), list(range(64)), **options)
    assert not probe.training
    mirrored = set()
    for batch, truth in zip(images[1:], truths, strict=True):
        for image, found in zip(batch, truth, strict=True):
            column = (image[0] * 255 / 3).round()
            mirrored.add(bool(column[0, 0] > column[0, -1]))
            assert (found - column[4::8, 4::8]).abs().max() <= 1  # the centre lies between two pixels
    assert mirrored == {False, True}
    numbers = [round(float(image[1, 0, 0]) * 255 / 40) for batch in images[1:] for image in batch]
    assert all(sorted(numbers[i : i + 6]) == list(range(6)) for i in (0, 6, 12))  # each once an epoch
    assert len({tuple(numbers[i : i + 6]) for i in (0, 6, 12)}) == 3
    for level, norm in enumerate(probe.norms):
        mean = torch.stack([made[level].mean((0, 1, 2)) for made in maps[1:]]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
    assert [rate for rate, _ in RATES] == pytest.approx([0.01 * (1 + np.cos(np.pi * n / steps)) for n in range(steps)])
    assert {decay for _, decay in RATES} == {file.WEIGHT_DECAY}


def test_the_loss_is_a_mean_over_what_counts():
    logits, truth = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    truth[0, 1], truth[1, :, 0] = -1, -1
    chosen = truth >= 0
    expected = -logits.log_softmax(1).permute(0, 2, 3, 1)[chosen].gather(1, truth[chosen][:, None]).mean()
    torch.testing.assert_close(file._loss(logits, truth), expected)
    assert file._loss(logits, torch.full_like(truth, -1)) == 0


def test_one_cell_is_too_few_for_batch_norm(colours, data):
    see = file.partial(file._maps, Encoder("coarse", "backbone", Coarse(), 64), None)
    with pytest.raises(EvaluateError, match="--size 64 --batch-size 1: leaves one cell to the coarsest map"):
        file.fit(see, read(data[0]), [3, 7, 40], size=64, steps=1, lr=0.1, batch_size=1, workers=0, seed=0)


class Coarse(Colours):
    def forward(self, images):
        return Features(None, (images.mean((2, 3))[:, None, None] + self.nothing,))


def test_the_picture_shows_what_is_there_and_what_was_found(colours, data, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(file, "_save", lambda _path, rows, _classes: shown.extend(rows))
    segment(colours, *map(read, data), size=96, steps=150, lr=0.05, batch_size=4, picture=tmp_path / "p.png")
    table = {3: 0, 7: 1, 40: 2, 255: -1}
    assert len(shown) == 4
    for (_, mask), (image, truth, found) in zip(read(data[1]), shown, strict=False):
        assert np.array_equal(truth, np.vectorize(table.get)(mask))
        assert image.shape == (3, 96, 96)
        assert (found[truth >= 0] == truth[truth >= 0]).float().mean() > 0.9
        assert (found >= 0).all()


def test_a_class_that_nothing_has_is_no_part_of_the_mean(colours, data, tmp_path):
    save(tmp_path, "0.png", Image.new("RGB", (64, 64), COLOURS[3]), Image.new("L", (64, 64), 3))
    save(tmp_path, "1.png", Image.new("RGB", (64, 64), COLOURS[7]), Image.new("L", (64, 64), 7))
    found = segment(colours, read(data[0]), read(tmp_path), size=96, steps=150, lr=0.05, batch_size=4)
    assert found["iou"] == {"3": 1.0, "7": 1.0, "40": None}
    assert found["miou"] == 1.0


def test_features_that_are_not_finite_end_it(colours, data):
    with torch.no_grad():
        colours.net.nothing.fill_(float("nan"))
    with pytest.raises(EvaluateError, match="colours: NaN or Inf in the maps"):
        segment(colours, *map(read, data), size=64, steps=2)


def test_what_a_mask_may_be(tmp_path):
    numbers = np.array([[0, 1], [2, 200]])
    palette = Image.fromarray(numbers.astype(np.uint8), "P")
    palette.putpalette(bytes(range(256)) * 3)
    kinds = {
        "gray": Image.fromarray(numbers.astype(np.uint8)),
        "palette": palette,
        "sixteen": Image.fromarray((numbers + 1000).astype(np.uint16)),
        "one_bit": Image.fromarray(numbers == 1),
    }
    expected = {"gray": numbers, "palette": numbers, "sixteen": numbers + 1000, "one_bit": numbers == 1}
    for name, mask in kinds.items():
        save(tmp_path, f"{name}.png", Image.new("RGB", (2, 2)), mask)
    images = read(tmp_path)
    assert [file.rpartition("/")[2] for file in images.files] == [
        "gray.png",
        "one_bit.png",
        "palette.png",
        "sixteen.png",
    ]
    for path, (_, mask) in zip(images.files, images, strict=True):
        assert mask.dtype == np.int64
        assert np.array_equal(mask, expected[path.rpartition("/")[2].removesuffix(".png")])


def test_images_stay_as_stored_like_their_masks(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png", exif=exif)
    (tmp_path / "masks").mkdir()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "masks" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "images" / "b.tif", tiffinfo={274: 6})
    Image.fromarray(pixels[..., 0]).save(tmp_path / "masks" / "b.png", exif=exif)
    for number, (image, mask) in enumerate(read(tmp_path)):
        assert np.array_equal(image, pixels)
        assert np.array_equal(mask, pixels[..., 0])
        assert read(tmp_path).numbers(number) == set(pixels[..., 0].ravel().tolist())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("RGB", (64, 64)), "RGB pixels are no class numbers"),
        (encoded(Image.new("L", (64, 64)), "TIFF"), "TIFF may not keep numbers; save masks as PNG"),
        (encoded(Image.new("L", (64, 64)), "PPM"), "PPM may not keep numbers"),
        (FOUR_BITS, "gray of 2 or 4 bits"),
        (JPEG, "JPEG may not keep numbers"),
        (Image.new("L", (64, 32)), r"is not as large as its image \(32×64 and 64×64\)"),
        (b"no picture", "not a mask that can be read"),
    ],
)
def test_masks_that_are_none_are_named(tmp_path, mask, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.jpg")
    path = tmp_path / "masks" / "a.png"
    path.write_bytes(mask) if isinstance(mask, bytes) else mask.save(path)
    with pytest.raises(SourceError, match=f"{path}: .*{message}|{path}: {message}"):
        read(tmp_path)[0]


def test_folders_that_do_not_fit_are_named(data, tmp_path):
    with pytest.raises(EvaluateError, match="--images: /nowhere is not a folder"):
        MaskedImages("/nowhere", data[0] / "masks")
    save(tmp_path, "gray.png", Image.new("RGB", (4, 4)), Image.new("L", (4, 4)))
    with pytest.raises(EvaluateError, match=r"has no mask of an image.*such as .*gray.png, while images are"):
        MaskedImages(data[0] / "images", tmp_path / "masks")
    save(tmp_path, "1.png", Image.new("RGB", (4, 4)), Image.new("L", (4, 4)))
    with pytest.raises(EvaluateError, match=r"--masks: 1 of the masks in .* have no image in .*, such as .*gray.png"):
        MaskedImages(data[0] / "images", tmp_path / "masks")
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "1.jpg")
    with pytest.raises(EvaluateError, match=r"1.jpg and .*1.png have one name"):
        read(tmp_path)


def test_images_without_a_mask_are_left_out_and_a_limit_draws(data, tmp_path):
    (tmp_path / "masks").mkdir()
    for name in ("1.png", "4.png"):
        (tmp_path / "masks" / name).symlink_to(data[0] / "masks" / name)
    some = MaskedImages(data[0] / "images", tmp_path / "masks")
    assert [file.rpartition("/")[2] for file in some.files] == ["1.png", "4.png"]
    drawn = [read(data[0], limit=5, seed=seed).files for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5
    rest = tmp_path / "rest"
    (rest / "masks").mkdir(parents=True)
    (rest / "masks" / "4.png").symlink_to(data[0] / "masks" / "4.png")
    with pytest.raises(EvaluateError, match=r"--test-images: shares 1 file with --train-images, such as .*4.png"):
        check_apart(some, MaskedImages(data[0] / "images", rest / "masks"))
    check_apart(*map(read, data))


def sides(data):
    return [
        word
        for name, root in zip(("train", "test"), data, strict=True)
        for word in (f"--{name}-images", root / "images", f"--{name}-masks", root / "masks")
    ]


def test_the_command(zoo, student, data, tmp_path, evaluate):
    picture = tmp_path / "p.png"
    words = ["segment", *sides(data), *COMMON, "--picture", picture]
    channels = {}
    for name, folder, more in (
        ("student", student, []),
        ("head", student, ["--teacher-name", "gdino"]),
        *((name, folder, ["--size", "288"] if name == "sam" else []) for name, folder in zoo.items()),
    ):
        found = evaluate(*words, "--model", folder, *more)
        channels[name] = found["channels"]
        assert 0 <= found["miou"] <= 1
        assert found["settings"]["ignore"] == [255]
        assert (found["size"], found["task"]) == (288 if name == "sam" else 64, "segment")
        assert found["head"] == ("gdino" if name == "head" else None)
        assert picture.is_file()
        picture.unlink()
    # Of the student's maps those that a teacher read: strides 8, 16 and 32, not 4.
    assert channels == {
        "student": [32] * 3, "head": [16, 32, 64], "clip": [32], "siglip": [32], "gdino": [16, 32, 64],
        "dinov2": [32], "sam": [24],
    }  # fmt: skip
    seen = []
    encoder = load_encoder(student)
    encoder.register_forward_hook(lambda _module, _args, out: seen.append(out.maps))
    maps = file._maps(encoder, None, torch.rand(1, 3, 64, 64))
    assert [tuple(m.shape[1:3]) for m in maps] == [(8, 8), (4, 4), (2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(maps, seen[0][1:], strict=True))


def test_workers_and_bf16(student, data, evaluate):
    common = ["segment", *sides(data), "--model", student, "--device", "cpu", "--size", 64, "--steps", 2, "--limit", 4]
    alone, beside = (evaluate(*common, "--workers", n) for n in (0, 1))
    assert alone["iou"] == beside["iou"]
    assert (alone["images"], alone["train_images"]) == (4, 4)
    rough = evaluate(*common, "--workers", 0, "--dtype", "bf16")
    assert abs(rough["pixel_accuracy"] - alone["pixel_accuracy"]) < 0.15


def test_what_the_command_refuses(student, data, refused, tmp_path):
    words = ["segment", "--model", student, *sides(data), *COMMON]
    same = [*words, "--test-images", data[0] / "images", "--test-masks", data[0] / "masks"]
    for asked, beginning in (
        ([*words, "--steps", 0], "--steps 0 --lr 0.001: expected both above 0"),
        ([*words, "--lr", "nan"], "--steps 3 --lr nan: expected both above 0"),
        ([*words, "--ignore", 255, -1], "--ignore -1: no mask holds that; expected 0 to 65535"),
        ([*words, "--ignore", 70000], "--ignore 70000: no mask holds that"),
        ([*words, "--size", 50], "--size 50: expected a multiple of 32"),
        ([*words, "--teacher-name", "x"], "--teacher-name x:"),
        ([*words, "--train-masks", tmp_path / "no"], f"--train-masks: {tmp_path / 'no'} is not a folder"),
        (same, "--test-images: shares 12 files with --train-images"),
        ([*words, "--picture", tmp_path], f"--picture: {tmp_path} cannot be written"),
    ):
        assert refused(*asked).startswith(beginning)
    broken = tmp_path / "broken"
    save(broken, "1.png", Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)))
    found = refused(*words, "--test-images", broken / "images", "--test-masks", broken / "masks")
    assert found.startswith(f"{broken / 'masks' / '1.png'}: RGB pixels are no class numbers")
