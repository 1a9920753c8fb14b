"""Nothing that the scan lets through may stop a stream, and nothing good may be lost without a word."""

import errno
import io
import os
import struct
import subprocess
import sys
import tarfile
from concurrent.futures import BrokenExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from kpu_fast.data import scan as scan_module
from kpu_fast.data.decode import to_rgb
from kpu_fast.data.index import index_path
from kpu_fast.data.pipeline import Stream
from kpu_fast.data.scan import MAX_PIXELS, load_or_scan, main, scan
from kpu_fast.data.sources import SourceError


def reasons(index):
    return {os.path.basename(name).partition("::")[2] or os.path.basename(name): why for name, why in index.rejected}


def run_an_epoch(index, make, **changes):
    stream = Stream(make.config(**changes), index, rank=0, world_size=1, device="cpu", seed=0)
    while stream.images_seen < len(index):
        images = next(stream).images
        assert images.isfinite().all()
        assert images.min() >= 0
        assert images.max() <= 1


def test_bad_files_are_set_aside_with_a_reason_and_the_stream_lives(tmp_path, make, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    jpeg, png = make.encoded(noise, "JPEG"), make.encoded(noise)
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0x55
    bad = {
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated or corrupt"),
        "no_end.jpg": (jpeg[:-2], "truncated or corrupt"),
        "header.jpg": (jpeg[:200], "truncated or corrupt"),
        "half.png": (png[: len(png) // 2], "truncated or corrupt"),
        "flipped.png": (bytes(flipped), "truncated or corrupt"),
        "text.jpg": (b"I am a poem. " * 50, "not an image"),
        "zero.jpg": (b"", "empty file"),
        "huge.png": (make.encoded(Image.new("1", (40_000, MAX_PIXELS // 40_000 + 1))), "more than 80 megapixels"),
        "float.tif": (make.encoded(Image.new("F", (8, 8)), "TIFF"), "32-bit pixels, whose range is unknown"),
    }
    good = {
        "good.jpg": jpeg,
        "tail.jpg": jpeg + b"more bytes after the end",
        "png_inside.jpg": png,
        "pixel.png": make.encoded(Image.new("RGB", (1, 1))),
        "line.png": make.encoded(Image.new("RGB", (700, 1))),
    }
    for name, data in [*good.items(), *((name, data) for name, (data, _) in bad.items()), ("readme.txt", b"x")]:
        (tmp_path / name).write_bytes(data)
    index = scan(str(tmp_path))
    assert reasons(index) == {name: why for name, (_, why) in bad.items()}
    assert sorted(os.path.basename(index.name(i)) for i in range(len(index))) == sorted(good)
    assert index.summary().splitlines()[0] == "5 images usable, 9 left out"
    for fit in ("crop", "pad"):
        run_an_epoch(index, make, fit=fit, batch_size=3)


def variants(make):
    """Name → (bytes, what Pillow's upright RGB of it is, whether the scan converts it)."""
    base = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 56, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen = (np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29).astype(np.uint16)
    upper = Image.fromarray((sixteen >> 8).astype(np.uint8))
    profiles = [ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")]
    lab = ImageCms.profileToProfile(base, *profiles, outputMode="LAB")
    made = {
        "rgb.jpg": (make.encoded(base, "JPEG"), None, False),
        "progressive.jpg": (make.encoded(base, "JPEG", progressive=True), None, False),
        "gray.jpg": (make.encoded(base.convert("L"), "JPEG"), None, False),
        "cmyk.jpg": (make.encoded(base.convert("CMYK"), "JPEG"), None, True),
        "turned.jpg": (make.encoded(base, "JPEG", exif=turned), None, False),
        "turned.png": (make.encoded(base, exif=turned), None, False),
        "palette.png": (make.encoded(base.convert("P")), None, False),
        "alpha.png": (make.encoded(base.convert("RGBA")), None, False),
        "sixteen.png": (make.encoded(Image.fromarray(sixteen)), upper, False),
        "one_bit.png": (make.encoded(base.convert("1")), None, False),
        "rgb.bmp": (make.encoded(base, "BMP"), None, False),
        "rgb.tif": (make.encoded(base, "TIFF"), None, False),
        "lab.tif": (make.encoded(lab, "TIFF"), None, True),
        "gray_alpha.tif": (make.encoded(base.convert("LA"), "TIFF"), None, True),
        "sixteen_turned.png": (
            make.encoded(Image.fromarray(sixteen), exif=turned),
            upper.transpose(Image.Transpose.ROTATE_270),
            False,
        ),
        "rgb.ppm": (make.encoded(base, "PPM"), None, False),
        "gray.pgm": (make.encoded(base.convert("L"), "PPM"), None, False),
        "one_bit.pbm": (make.encoded(base.convert("1"), "PPM"), None, False),
        "animated.gif": (make.encoded(base, "GIF", save_all=True, append_images=[base.rotate(90)]), None, True),
        "lossless.webp": (make.encoded(base, "WEBP", lossless=True), None, False),
        "animated.webp": (make.encoded(base, "WEBP", save_all=True, append_images=[base.rotate(90)]), None, False),
    }
    if features.check("avif"):
        made["rgb.avif"] = (make.encoded(base, "AVIF"), None, True)
    return made


def test_every_kind_of_image_comes_out_of_the_stream_as_pillow_shows_it(tmp_path, make):
    made = variants(make)
    for name, (data, _, _) in made.items():
        (tmp_path / name).write_bytes(data)
        index = scan(str(tmp_path / name))
        data, expected, converted = made[name]
        if expected is None:
            expected = ImageOps.exif_transpose(Image.open(tmp_path / name))
        expected = np.asarray(expected.convert("RGB"))
        assert (index.height[0], index.width[0]) == expected.shape[:2], name
        assert index.converted == converted, name
        cfg = make.config(fit="pad", flip=False, size=expected.shape[:2], batch_size=1)
        batch = next(Stream(cfg, index, rank=0, world_size=1, device="cpu", seed=0))
        assert batch.valid.all()
        got = batch.images[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(got - expected).max() < 1.01, name  # one level: two JPEG decoders may round differently


def tiff(planes, bits, photometric=1):
    """An uncompressed TIFF of (planes, H, W) samples, each plane a strip of its own."""
    planes = np.asarray(planes, np.uint16)
    count, height, width = planes.shape
    if bits == 12:
        first, second = planes[..., ::2], planes[..., 1::2]
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=3).astype(np.uint8)
    else:
        packed = planes.astype("<u2")
    strips = [plane.tobytes() for plane in packed]
    rest, end = bytearray(), 8 + 2 + 12 * 10 + 4
    directory = struct.pack("<H", 10)
    offsets = [end + 3 * 10 * count + i * len(strips[0]) for i in range(count)]
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * count), (259, 3, [1]), (262, 3, [photometric]),
            (273, 4, offsets), (277, 3, [count]), (278, 4, [height]), (279, 4, [len(strips[0])] * count),
            (284, 3, [2 if count > 1 else 1])]  # fmt: skip
    for tag, kind, values in tags:
        data = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        field = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", end + len(rest))
        rest += data if len(data) > 4 else b""
        directory += struct.pack("<HHI", tag, kind, len(values)) + field
    rest = bytes(rest).ljust(3 * 10 * count, b"\0")
    return b"II*\0\x08\0\0\0" + directory + bytes(4) + rest + b"".join(strips)


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_a_tiff_is_as_bright_as_its_bits_and_its_white_say(tmp_path, make, bits, photometric):
    samples = np.random.default_rng(bits).integers(0, 1 << bits, (1, 40, 56))
    (tmp_path / "a.tif").write_bytes(tiff(samples, bits, photometric))
    index = scan(str(tmp_path))
    assert index.converted == (not photometric)
    stream = Stream(make.config(fit="pad", flip=False, size=(40, 56), batch_size=1), index,
                    rank=0, world_size=1, device="cpu", seed=0)  # fmt: skip
    got = next(stream).images[0].permute(1, 2, 0).numpy()
    true = samples[0] / ((1 << bits) - 1)
    assert np.abs(got - (true if photometric else 1 - true)[..., None]).max() < 1.51 / 255


def test_a_planar_tiff_of_16_bits_is_left_out(tmp_path, make):
    samples = np.random.default_rng(0).integers(0, 1 << 16, (3, 40, 56))
    (tmp_path / "a.tif").write_bytes(tiff(samples, 16, photometric=2))
    make.ramp(1).save(tmp_path / "b.png")
    assert reasons(scan(str(tmp_path))) == {"a.tif": "planar TIFF with 16 bits per sample, which Pillow misreads"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_pixels_as_stored_are_not_turned(make, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = make.encoded(make.ramp(1), kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(to_rgb(Image.open(io.BytesIO(data)), upright=False), np.asarray(make.ramp(1)))
    assert np.array_equal(to_rgb(Image.open(io.BytesIO(data))), upright)


@pytest.mark.parametrize("magic", ["P5", "P6"])
@pytest.mark.parametrize("maxval", [1, 15, 100, 200, 254, 255, 256, 1023, 4095, 65535])
def test_a_ppm_is_as_bright_as_its_maxval_says(tmp_path, make, magic, maxval):
    shape = (40, 56, 1 if magic == "P5" else 3)
    samples = np.random.default_rng(maxval).integers(0, maxval + 1, shape)
    path = tmp_path / "a.ppm"
    stored = samples.astype(np.uint8 if maxval < 256 else ">u2").tobytes()
    path.write_bytes(b"%s\n# a comment\n56 40\n%d\n" % (magic.encode(), maxval) + stored)
    index = scan(str(path))
    assert index.converted == (maxval not in (254, 255, 65535))  # of 254, one level is no reason to copy a file
    stream = Stream(make.config(fit="pad", flip=False, size=(40, 56), batch_size=1), index,
                    rank=0, world_size=1, device="cpu", seed=0)  # fmt: skip
    got = next(stream).images[0].permute(1, 2, 0).numpy()
    assert np.abs(got - samples / maxval).max() < 1.51 / 255


def test_a_dark_picture_of_low_maxval_is_converted_too(tmp_path, make):
    # Stored values 0 to 2 of 100: DALI's black differs from the true 0 to 5 by few levels, yet by a factor.
    samples = np.random.default_rng(0).integers(0, 3, (40, 56)).astype(np.uint8)
    (tmp_path / "a.pgm").write_bytes(b"P5\n56 40\n100\n" + samples.tobytes())
    index = scan(str(tmp_path))
    assert index.converted == 1
    assert np.asarray(Image.open(io.BytesIO(index.read(0).tobytes()))).max() == 5


def test_a_jpeg_that_only_pillow_reads_is_converted(tmp_path, make):
    # Damage to the header, the same each time: Pillow and DALI disagree on some of these files.
    rng = np.random.default_rng(5)
    turned = Image.Exif()
    turned[0x0112] = 6
    clean = np.frombuffer(make.encoded(make.ramp(3, 48, 64), "JPEG", exif=turned), np.uint8)
    for number in range(300):
        damaged = clean.copy()
        damaged[rng.integers(0, 300, 2)] = rng.integers(0, 256, 2)
        (tmp_path / f"{number:03d}.jpg").write_bytes(damaged.tobytes())
    for number in range(40):
        (tmp_path / f"whole-{number:02d}.jpg").write_bytes(clean.tobytes())
    index = scan(str(tmp_path))
    assert index.converted > 0
    assert len(index.rejected) > 0
    assert len(index) + len(index.rejected) == 340
    # What DALI refused before must not touch what comes after: whole files are read where they lie.
    assert sum("whole" in index.name(i) for i in range(len(index))) == 40
    run_an_epoch(index, make, batch_size=50)


def test_processes_find_what_threads_find(folder, shards, make, monkeypatch):
    (folder / "bad.jpg").write_bytes(b"text")
    (folder / "cmyk.jpg").write_bytes(make.encoded(make.ramp(1).convert("CMYK"), "JPEG"))
    source = [str(folder), shards]
    threads = scan(source)
    monkeypatch.setattr("kpu_fast.data.scan.PROCESS_BYTES", 0)
    processes = scan(source, workers=2)
    assert len(processes) == 21
    assert processes.digest() == threads.digest()
    assert processes.rejected == threads.rejected
    assert [file.path for file in processes.files] == [file.path for file in threads.files]


def test_half_a_shard_keeps_its_whole_samples_and_says_so(tmp_path, make):
    images = [make.encoded(make.ramp(number)) for number in range(8)]
    path = tmp_path / "a.tar"
    make.tar(path, [(f"{number}.png", data) for number, data in enumerate(images)])
    whole = path.read_bytes()
    ends = np.cumsum([512 + -(-len(data) // 512) * 512 for data in images])  # header block, then data in blocks of 512
    for cut, expected in [(ends[3] + 700, 4), (ends[3] + 100, 4), (ends[3], 4), (ends[-1], 8)]:
        path.write_bytes(whole[:cut])
        index = scan(str(path))
        assert len(index) == expected
        assert "cut short" in index.summary()
        run_an_epoch(index, make)
    path.write_bytes(whole)
    assert "cut short" not in scan(str(path)).summary()


def test_damage_inside_a_shard_is_reported(tmp_path, make):
    path = tmp_path / "a.tar"
    make.tar(path, [(f"{number}.png", make.encoded(make.ramp(number))) for number in range(4)])
    data = bytearray(path.read_bytes())
    second = 512 + -(-len(make.encoded(make.ramp(0))) // 512) * 512
    data[second : second + 512] = b"\x07" * 512
    path.write_bytes(data)
    index = scan(str(path))
    assert len(index) == 1
    assert f"unreadable from byte {second:,} on" in index.summary()


def test_bad_members_and_bad_shards_beside_good_ones(tmp_path, make):
    good = make.encoded(make.ramp(1))
    make.tar(
        tmp_path / "a.tar", [("0.png", good), ("1.png", good[:90]), ("2.jpg", b"text"), ("3.jpg", b""), ("3.cls", b"1")]
    )
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b" + b"zipped" * 100)
    (tmp_path / "d.tar").write_bytes(b"")
    index = scan(str(tmp_path / "*.tar"))
    assert len(index) == 1
    assert reasons(index) == {"1.png": "truncated or corrupt", "2.jpg": "not an image", "3.jpg": "empty file"}
    assert [os.path.basename(problem).partition(":")[0] for problem in index.problems] == ["b.tar", "c.tar", "d.tar"]
    assert "gunzip" in index.summary()
    run_an_epoch(index, make)


def test_a_sample_of_several_images_gives_the_plain_one(tmp_path, make):
    first, second = make.encoded(make.ramp(1)), make.encoded(make.ramp(2))
    make.tar(tmp_path / "a.tar", [("0.depth.png", second), ("0.png", first), ("1.png", first), ("1.seg.png", second)])
    index = scan(str(tmp_path / "a.tar"))
    assert [index.read(i).tobytes() for i in range(len(index))] == [first, first]
    assert index.ignored == 0
    assert "a.tar::0.depth.png and 1 more: not read, since the sample has another image" in index.summary()


def test_names_with_a_dot_are_one_sample_and_that_is_said(tmp_path, make):
    make.tar(tmp_path / "a.tar", [(f"2024.01.{day:02d}.png", make.encoded(make.ramp(day))) for day in range(9)])
    index = scan(str(tmp_path / "a.tar"))
    assert (len(index), index.ignored) == (1, 0)
    assert "2024.01.01.png and 7 more: not read" in index.summary()
    assert "ends at the first dot" in index.summary()


def test_of_members_with_one_name_the_last_counts(tmp_path, make):
    old, new = make.encoded(make.ramp(1)), make.encoded(make.ramp(20))
    make.tar(tmp_path / "a.tar", [("0.png", old), ("0.txt", b"1"), ("1.png", old), ("./0.png", new), ("0.txt", b"2")])
    index = scan(str(tmp_path / "a.tar"))
    assert [index.read(i).tobytes() for i in range(len(index))] == [new, old]
    assert "a.tar::0.png: not read" in index.summary()
    assert index.ignored == 2


def test_joined_tars_are_reported(tmp_path, make):
    for shard in range(2):
        make.tar(tmp_path / f"{shard}.tar", [(f"{shard}.png", make.encoded(make.ramp(shard)))])
    first, second = ((tmp_path / f"{shard}.tar").read_bytes() for shard in range(2))
    (tmp_path / "both.tar").write_bytes(first + second)
    index = scan(str(tmp_path / "both.tar"))
    assert len(index) == 1
    assert f"both.tar: {len(second):,} bytes after the end-of-archive mark are not read" in index.summary()
    (tmp_path / "padded.tar").write_bytes(first + bytes(200_000))
    assert scan(str(tmp_path / "padded.tar")).problems == []


def test_links_inside_a_shard_lead_to_its_images(tmp_path, make):
    image = make.encoded(make.ramp(1))
    links = {
        "in/hard.png": (tarfile.LNKTYPE, "in/0.png"),
        "in/soft.png": (tarfile.SYMTYPE, "0.png"),
        "chain.png": (tarfile.SYMTYPE, "in/soft.png"),
        "early.png": (tarfile.SYMTYPE, "late.png"),
        "in/0.png": (tarfile.LNKTYPE, "in/0.png"),  # what tar writes for a file that it is given twice
        "out.png": (tarfile.SYMTYPE, "/etc/0.png"),
        "loop.png": (tarfile.SYMTYPE, "loop.png"),
        "text.txt": (tarfile.SYMTYPE, "in/0.png"),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("in/0.png", "late.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
            for link, (kind, target) in links.items() if name == "in/0.png" else ():
                info = tarfile.TarInfo(link)
                info.type, info.linkname = kind, target
                tar.addfile(info)
    index = scan(str(tmp_path / "a.tar"))
    assert len(index) == 6
    assert all(index.read(i).tobytes() == image for i in range(6))
    assert reasons(index) == dict.fromkeys(["out.png", "loop.png"], "a link to nothing in its tar")
    assert index.ignored == 1
    run_an_epoch(index, make)


def test_a_member_stored_sparse_is_left_out_alone(tmp_path, make):
    image = make.encoded(make.ramp(1))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("0.png", {"GNU.sparse.map": "0,100,9000,100"}), ("1.png", {})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(image), headers | ({"GNU.sparse.size": "9100"} if headers else {})
            tar.addfile(info, io.BytesIO(image))
    index = scan(str(tmp_path / "a.tar"))
    assert reasons(index) == {"0.png": "stored sparse: pack it without --sparse"}
    assert (len(index), index.problems) == (1, [])


def test_what_a_folder_holds_beside_images_is_counted_and_shards_are_named(folder, make):
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.jpg").write_bytes(b"x")
    for shard in range(3):
        make.tar(folder / f"t-{shard}.tar", [(f"{shard}.png", make.encoded(make.ramp(shard)))])
    index = scan(str(folder))
    assert (len(index), index.ignored) == (10, 2)
    assert f"t-0.tar and 2 more: not read, being in a folder of images; add '{folder}/*.tar'" in index.summary()
    both = scan([str(folder), f"{folder}/*.tar"])
    assert (len(both), both.ignored, both.problems) == (13, 2, [])


def test_nothing_usable_is_an_error_that_says_what_was_there(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"text")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no usable image .*1 × not an image, 1 × empty file"):
        scan(str(tmp_path))


def test_damaged_exif_costs_neither_the_image_nor_the_scan(tmp_path, make):
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, kind, options in (("a.webp", "WEBP", {"lossless": True}), ("a.jpg", "JPEG", {})):
        data = make.encoded(make.ramp(1), kind, exif=turned, **options)
        start = data.index(b"MM\x00*")
        (tmp_path / name).write_bytes(data[:start] + b"XX" + data[start + 2 :])
    with pytest.raises(SyntaxError):  # what this is about
        ImageOps.exif_transpose(Image.open(tmp_path / "a.webp"))
    index = scan(str(tmp_path))
    assert list(zip(index.height, index.width, strict=True)) == [(96, 128)] * 2
    run_an_epoch(index, make, batch_size=2)


def test_a_link_to_nothing_is_left_out_with_a_reason(folder, make, tmp_path):
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    make.tar(tmp_path / "a.tar", [("0.png", make.encoded(make.ramp(1)))])
    (tmp_path / "b.tar").symlink_to(tmp_path / "nowhere.tar")
    index = scan([str(folder), f"{tmp_path}/*.tar"])
    assert len(index) == 11
    why = reasons(index)
    assert sorted(why) == ["gone.png", "loop.png"]
    assert why["gone.png"] == "cannot be read (No such file or directory)"
    assert why["loop.png"].startswith("cannot be read")
    assert len(index.problems) == 1
    assert "b.tar" in index.problems[0]
    make.ramp(3).save(folder / "nowhere.png")  # what the link pointed to is back: the stored index no longer holds
    assert len(load_or_scan([str(folder), f"{tmp_path}/*.tar"])) == 13


def failing_open(monkeypatch, *names):
    """From here on reading what is called so fails, until the returned function is called."""
    opened = open

    def fail(path, *args, **options):
        if os.path.basename(path) in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *args, **options)

    monkeypatch.setattr("kpu_fast.data.sources.open", fail, raising=False)
    return lambda: monkeypatch.setattr("kpu_fast.data.sources.open", opened)


@pytest.mark.parametrize("name", ["2.png", "a.tar"])
def test_what_could_not_be_read_once_is_read_again_when_it_can(folder, make, monkeypatch, name):
    make.tar(folder / "a.tar", [("0.png", make.encoded(make.ramp(1)))])
    source = [str(folder), f"{folder}/*.tar"]
    scans = []
    monkeypatch.setattr("kpu_fast.data.scan.scan", lambda *args, **kwargs: scans.append(args) or scan(*args))
    mend = failing_open(monkeypatch, name)
    for _ in range(2):  # while it stays unreadable there is nothing to gain from another scan
        index = load_or_scan(source)
        assert len(index) == 10
        assert f"{name}: cannot be read (Permission denied)" in index.summary() or name == "2.png"
        assert len(scans) == 1
    mend()
    assert len(load_or_scan(source)) == 11
    assert len(load_or_scan(source)) == 11
    assert len(scans) == 2


def test_a_shard_that_cannot_be_read_costs_only_itself(tmp_path, make, monkeypatch):
    for name in ("a", "b"):
        make.tar(tmp_path / f"{name}.tar", [("0.png", make.encoded(make.ramp(1)))])
    failing_open(monkeypatch, "b.tar")
    index = scan(f"{tmp_path}/*.tar")
    assert len(index) == 1
    assert index.problems == [f"{tmp_path}/b.tar: cannot be read (Permission denied)"]


def test_a_pipe_is_left_out_and_never_opened(folder):
    for name in ("pipe.jpg", "pipe.tar"):
        os.mkfifo(folder / name)
    command = [sys.executable, "-m", "kpu_fast.data.scan", str(folder), f"{folder}/pipe.tar"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "10 images usable, 1 left out" in done.stdout
    assert "cannot be read (no regular file): 1" in done.stdout
    assert "pipe.tar: cannot be read (no regular file)" in done.stdout


def test_a_shard_cut_inside_a_long_name_says_where(tmp_path, make):
    image = make.encoded(make.ramp(1))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{'x' * 150}{number}.png")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[: third + 600])
    index = scan(str(path))
    assert len(index) == 2
    assert f"a.tar: unreadable from byte {third:,} on" in index.summary()


def test_a_damaged_long_header_costs_only_its_shard(tmp_path, make):
    make.tar(tmp_path / "a.tar", [("0.png", make.encoded(make.ramp(1)))])
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.png")
        info.pax_headers = {"GNU.sparse.map": "no number", "GNU.sparse.size": "9"}
        tar.addfile(info)
    index = scan(f"{tmp_path}/*.tar")
    assert len(index) == 1
    assert "b.tar: not a readable tar" in index.summary()


def test_a_folder_that_cannot_be_listed_leaves_the_stored_index_as_it_is(folder, make, monkeypatch):
    (folder / "more").mkdir()
    make.ramp(1).save(folder / "more" / "a.png")
    assert len(load_or_scan(str(folder))) == 11
    before = index_path(str(folder)).read_bytes()
    listed = os.scandir

    def scandir(path):
        if os.path.basename(path) == "more":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match=r"more cannot be listed \(Input/output error\)"):
        load_or_scan(str(folder))
    assert index_path(str(folder)).read_bytes() == before


def test_a_name_in_another_encoding_can_be_printed(folder, make):
    for name in (b"bad-\xff.png", b"shard-\xff.tar"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"text")
    command = [sys.executable, "-m", "kpu_fast.data.scan", str(folder), f"{folder}/*.tar", "--workers", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr.count("Error")) == (0, 0)
    assert r"bad-\udcff.png" in done.stdout
    assert r"shard-\udcff.tar: not a readable tar" in done.stdout


def test_a_killed_process_is_one_line(folder, monkeypatch, capsys):
    def killed(*_):
        raise BrokenExecutor("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(scan_module, "_check_chunk", killed)
    assert main([str(folder)]) == 2
    assert "was killed, as happens where memory runs out" in capsys.readouterr().err


def test_an_interrupted_scan_is_one_line(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan_module, "_check_chunk", interrupted)
    assert main([str(folder)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; nothing was stored"


def test_a_cache_that_takes_no_files_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    monkeypatch.setenv("KPU_FAST_CACHE", str(tmp_path / "blocked"))
    with pytest.raises(OSError, match="KPU_FAST_CACHE"):
        scan(str(folder))


def test_command_line(folder, capsys):
    (folder / "bad.jpg").write_bytes(b"text")
    assert main([str(folder), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "10 images usable, 1 left out" in out
    assert "not an image: 1" in out
    assert str(index_path([str(folder)])) in out


def test_command_line_on_a_missing_source_is_one_line_and_exit_2(tmp_path):
    command = [sys.executable, "-m", "kpu_fast.data.scan", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("workers", ["-1", "0", "two"])
def test_a_wrong_number_of_workers_is_refused(folder, capsys, workers):
    with pytest.raises(SystemExit) as caught:
        main([str(folder), "--workers", workers])
    assert caught.value.code == 2
    assert f"found '{workers}', expected a number of at least 1" in capsys.readouterr().err


def test_without_dali_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(ImportError, match="pip install nvidia-dali-cuda130"):
        scan(str(folder))
