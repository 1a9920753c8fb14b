"""Every kind of labelled source gives the pixels and classes that were put in; a bad one is named."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, features

from kpu_fast.data.cifar import cifar_part
from kpu_fast.data.labelled import LabelledImages, read_class_names, source_files, to_batch
from kpu_fast.data.sources import SourceError, list_files


def picture(number, size=(32, 32)):
    """Pixels that tell the number."""
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def png(number, size=(32, 32)):
    buffer = io.BytesIO()
    Image.fromarray(picture(number, size)).save(buffer, "PNG")
    return buffer.getvalue()


def check(images, numbers, labels):
    assert images.labels == labels
    assert len(images) == len(labels)
    for i, number in enumerate(numbers):
        pixels, label = images[i]
        assert pixels.dtype == np.uint8
        assert label == labels[i]
        assert np.array_equal(pixels, picture(number, pixels.shape[:2]))


@pytest.fixture
def folders(tmp_path):
    for name, number in (("ship/deep/0", 0), ("ship/1", 1), ("cat/2", 2), ("cat/3", 3)):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, (20 + number, 30)))
    return tmp_path / "images"


def test_class_folders_are_numbered_by_name(folders):
    images = LabelledImages(folders)
    assert images.classes == ("cat", "ship")
    check(images, [2, 3, 1, 0], [0, 0, 1, 1])
    assert images.encoded(0) == (png(2, (22, 30)), ".png")
    with pytest.raises(IndexError):
        images[4]


def test_shards_by_range_glob_and_name(make, tmp_path):
    tmp_path = tmp_path / "a::b"  # what stands between a shard and its member in messages
    tmp_path.mkdir()
    for shard in range(2):
        rows = [(f"{i:03d}.png", png(i)) for i in range(3 * shard, 3 * shard + 3)]
        # .cls may come before its image, and other members are of no concern
        rows = [
            row for name, data in rows for row in ((name[:3] + ".cls", b"%d\n" % (int(name[:3]) % 4)), (name, data))
        ]
        make.tar(tmp_path / f"s-{shard:02d}.tar", [*rows, ("000.json", b"{}")])
    for source in (f"{tmp_path}/s-{{00..01}}.tar", f"{tmp_path}/s-*.tar"):
        images = LabelledImages(source)
        assert images.classes is None
        check(images, range(6), [0, 1, 2, 3, 0, 1])
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    images = LabelledImages(tmp_path / "s-01.tar")
    assert images.classes == ("a", "b", "c", "d")
    check(images, [3, 4, 5], [3, 0, 1])
    assert images.encoded(2) == (png(5), ".png")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_images_are_seen_as_in_training(make, tmp_path):
    """Upright, and the upper byte of 16 bits, whatever the file and wherever it lies."""
    sixteen = (np.arange(20 * 30, dtype=np.uint16) * 109).reshape(20, 30)
    colour = picture(1, (20, 30))
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = {
        "turned.png": (encoded(Image.fromarray(colour), "PNG", exif=turned), np.rot90(colour, -1)),
        "sixteen.png": (encoded(Image.fromarray(sixteen), "PNG"), sixteen >> 8),
        "both.png": (encoded(Image.fromarray(sixteen), "PNG", exif=turned), np.rot90(sixteen >> 8, -1)),
        "sixteen.pgm": (b"P5 30 20 65535 " + sixteen.astype(">u2").tobytes(), sixteen >> 8),
    }  # fmt: skip
    (tmp_path / "folders" / "cat").mkdir(parents=True)
    rows = []
    for name, (data, _) in sorted(upright.items()):
        (tmp_path / "folders" / "cat" / name).write_bytes(data)
        rows += [(name, data), (name.partition(".")[0] + ".cls", b"0")] if name != "sixteen.pgm" else []
    make.tar(tmp_path / "s.tar", rows)
    for source, count in ((tmp_path / "folders", 4), (tmp_path / "s.tar", 3)):
        images = LabelledImages(source)
        assert len(images) == count
        for i in range(count):
            _, expected = upright[os.path.basename(images._files[i][3].split("::")[-1])]
            expected = expected if expected.ndim == 3 else np.stack([expected] * 3, axis=2)
            assert images[i][0].dtype == np.uint8
            assert np.array_equal(images[i][0], expected), images._files[i][3]


def test_what_training_refuses_or_cannot_find_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("F", (8, 8), 0.5).save(tmp_path / "cat" / "a.tif")
    (tmp_path / "cat" / "b.png").symlink_to(tmp_path / "nowhere.png")
    images = LabelledImages(tmp_path)
    with pytest.raises(SourceError, match=r"a\.tif: not an image that can be read \(32-bit pixels, whose range"):
        images[0]
    with pytest.raises(SourceError, match=r"b\.png: not an image that can be read .*No such file"):
        images[1]


def cifar(folder, per_batch=2):
    """CIFAR-10's python version, made small: image n of all is picture(n)."""
    folder.mkdir()
    names = [b"plane", b"car", b"bird"]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    for batch, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        numbers = range(batch * per_batch, (batch + 1) * per_batch)
        rows = np.stack([picture(n).transpose(2, 0, 1).reshape(-1) for n in numbers])
        values = {b"data": rows, b"labels": [n % 3 for n in numbers]}
        (folder / name).write_bytes(pickle.dumps(values, protocol=2))
    return folder


def test_cifar_as_published_folder_and_archive(tmp_path):
    folder = cifar(tmp_path / "cifar-10-batches-py")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    for source in (folder, archive):
        for part in ("", ":train"):
            images = LabelledImages(f"{source}{part}")
            assert images.classes == ("plane", "car", "bird")
            check(images, range(10), [n % 3 for n in range(10)])
        images = LabelledImages(f"{source}:test")
        check(images, [10, 11], [1, 2])
        data, suffix = images.encoded(0)
        assert suffix == ".png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture(10))


def test_the_files_of_a_source(folders, tmp_path):
    """CIFAR-10 as published is its archive and a part of it, or that part's files, none with an image's suffix."""
    folder = cifar(tmp_path / "cifar-10-batches-py")
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"12345")
    batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    for ending, part in (("", "train"), (":train", "train"), (":test", "test")):
        (file,) = source_files(f"{archive}{ending}")
        assert (file.path, file.size, file.mtime_ns) == (str(archive), 5, archive.stat().st_mtime_ns)
        assert cifar_part(f"{archive}{ending}") == part
        files = source_files(f"{folder}{ending}")
        assert [file.path for file in files] == [str(folder / name) for name in ("batches.meta", *batches[part])]
        assert cifar_part(f"{folder}{ending}") == part
    before = source_files(f"{folder}:test")
    with open(folder / "test_batch", "ab") as batch:
        batch.write(b"more")
    assert source_files(f"{folder}:test") != before
    assert source_files(str(folders)) == list_files(str(folders))
    assert cifar_part(str(folders)) is None
    with pytest.raises(OSError, match="cifar-10-none"):
        source_files(f"{tmp_path}/cifar-10-none.tar.gz:test")


def test_package_source_and_glob_of_class_folders(folders, tmp_path, monkeypatch):
    (tmp_path / "images" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for source in ("package:images", f"{folders}/*/*.png", f"{folders}/[cs]*"):
        images = LabelledImages(source)
        assert images.classes == ("cat", "ship")
        assert sorted(images.labels) == ([0, 0, 1] if source.endswith("png") else [0, 0, 1, 1])
        assert np.array_equal(images[0][0], picture(2, (22, 30)))


class _Runs:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def test_a_cifar_pickle_cannot_run_code(tmp_path, capsys):
    folder = cifar(tmp_path / "c")
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": _Runs()}))
    with pytest.raises(ValueError, match=r"data_batch_3.*no array"):
        LabelledImages(folder)
    assert capsys.readouterr().out == ""


def test_bad_folders_name_the_file(folders):
    (folders / "loose.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"loose\.png.*in no class folder"):
        LabelledImages(folders)
    (folders / "loose.png").unlink()
    (folders / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty.*without an image"):
        LabelledImages(folders)
    (folders / "empty").rmdir()
    (folders / "cat" / "2.png").write_bytes(png(2, (22, 30))[:100])
    images = LabelledImages(folders)
    with pytest.raises(ValueError, match=r"cat/2\.png.*not an image"):
        images[0]
    with pytest.raises(ValueError, match="only CIFAR-10's own"):
        LabelledImages(f"{folders}:test")
    with pytest.raises(ValueError, match="no such file"):
        LabelledImages(folders / "none")


def test_class_folders_are_those_that_images_are_found_in(folders, tmp_path):
    (folders / "lost+found").mkdir()
    (folders / ".cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.png").write_bytes(png(4))
    (folders / "dog").mkdir()
    (folders / "dog" / "linked").symlink_to(tmp_path / "elsewhere")
    images = LabelledImages(folders)
    assert images.classes == ("cat", "dog", "ship")
    assert images.labels == [0, 0, 1, 2, 2]
    (folders / "again").symlink_to(folders / "cat")  # listed first, so that cat gives nothing
    with pytest.raises(ValueError, match=r"images/cat: a class folder without an image"):
        LabelledImages(folders)
    (folders / "again").unlink()
    (folders / "mac").mkdir()
    (folders / "mac" / "._a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"images/mac: a class folder without an image"):
        LabelledImages(folders)


def test_the_last_member_of_a_name_gives_image_and_class(make, tmp_path):
    rows = [("0.png", png(0)), ("0.cls", b"0"), ("1.png", png(1)), ("1.cls", b"1")]
    make.tar(tmp_path / "s.tar", [*rows, ("0.png", png(5)), ("0.cls", b"5")])
    check(LabelledImages(tmp_path / "s.tar"), [5, 1], [5, 1])


def test_links_in_a_shard_give_image_and_class(make, tmp_path):
    make.tar(tmp_path / "s.tar", [("0.png", png(0)), ("0.cls", b"3")])
    links = [("1.png", "0.png"), ("1.cls", "0.cls"), ("2.png", "0.png"), ("2.cls", "nowhere.cls")]
    for count in (2, 4):
        with tarfile.open(tmp_path / "s.tar", "a") as tar:
            for name, target in links[count - 2 : count]:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.LNKTYPE, target
                tar.addfile(info)
        if count == 2:
            check(LabelledImages(tmp_path / "s.tar"), [0, 0], [3, 3])
    with pytest.raises(ValueError, match=r"s\.tar::2\.cls: a link to nothing in its tar"):
        LabelledImages(tmp_path / "s.tar")
    make.tar(tmp_path / "s.tar", [("0.png", png(0)), ("0.cls", b"3")])
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = tarfile.SYMTYPE, "../1.png"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"s\.tar::1\.png: a link to nothing in its tar"):
        LabelledImages(tmp_path / "s.tar")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named(tmp_path):
    whole, rng = encoded(Image.fromarray(picture(1, (40, 56))), "AVIF"), np.random.default_rng(0)
    path = tmp_path / "cat" / "a.avif"
    path.parent.mkdir()
    path.write_bytes(whole)
    images = LabelledImages(tmp_path)
    for _ in range(600):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            Image.open(path).load()
        except RuntimeError:  # what this is about
            with pytest.raises(SourceError, match=r"a\.avif: not an image that can be read"):
                images[0]
            return
        except (OSError, ValueError, SyntaxError):
            continue
    pytest.fail("none of the damaged files made Pillow raise RuntimeError")


def test_a_pipe_is_named_and_never_opened(folders):
    os.mkfifo(folders / "cat" / "0.png")
    with pytest.raises(SourceError, match=r"0\.png: not an image that can be read .*no regular file"):
        LabelledImages(folders)[0]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("0.png", b"x")], r"s\.tar::0\.png.*no \.cls"),
        ([("0.png", b"x"), ("0.cls", b"cat")], r"0\.cls.*b'cat'.*class number"),
        ([("0.png", b"x"), ("0.cls", b"-1")], r"0\.cls.*class number"),
        ([("0.cls", b"1")], r"s\.tar: holds no image"),
        ([("0.png", b"x"), ("0.cls", b"2")], r"0\.png.*class 2.*names 2"),
    ],
)
def test_bad_shards_name_the_member(make, tmp_path, members, said):
    make.tar(tmp_path / "s.tar", members)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=said):
        LabelledImages(tmp_path / "s.tar")


def test_shards_cut_short_compressed_and_mixed(make, tmp_path, folders):
    make.tar(tmp_path / "s.tar", [("0.png", png(0)), ("0.cls", b"0")])
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"s\.tar: cut short"):
        LabelledImages(tmp_path / "s.tar")
    (tmp_path / "s.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"s\.tar\.gz.*unpack"):
        LabelledImages(tmp_path / "s.tar.gz")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8bno archive")
    with pytest.raises(ValueError, match="not a readable archive"):
        LabelledImages(tmp_path / "cifar-10-python.tar.gz")
    (folders / "cat" / "s.png").write_bytes(png(1))
    (tmp_path / "s.tar").write_bytes(whole)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.tar").write_bytes(whole)
    (tmp_path / "x" / "b.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"b\.png: neither shards alone"):
        LabelledImages(f"{tmp_path}/x/*")


@pytest.mark.parametrize("text", ["", "a\n\nb\n"])
def test_class_names(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"classes\.txt.*none empty"):
        read_class_names(path)


def test_two_classes_may_have_one_name(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sunglasses\ncrane\nsunglasses\n")
    assert read_class_names(path) == ("sunglasses", "crane", "sunglasses")


def test_incomplete_cifar(tmp_path):
    folder = cifar(tmp_path / "c")
    (folder / "data_batch_2").unlink()
    with pytest.raises(ValueError, match="has no data_batch_2"):
        LabelledImages(folder)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 0]}))
    with pytest.raises(ValueError, match="data_batch_2 is not a batch"):
        LabelledImages(folder)


def test_to_batch_is_torchs_resize_of_the_centred_square():
    shapes = [(32, 32), (41, 60), (200, 128)]  # enlarged; cropped in width; cropped in height
    images = [picture(i, shape) for i, shape in enumerate(shapes)]
    batch = to_batch(images, 128)
    assert batch.shape == (3, 3, 128, 128)
    assert batch.dtype == torch.float32
    squares = [images[0], images[1][:, 9:50], images[2][36:164]]
    for got, square in zip(batch, squares, strict=True):
        exact = torch.from_numpy(square.copy()).double().permute(2, 0, 1)[None] / 255
        exact = F.interpolate(exact, (128, 128), mode="bicubic", antialias=True).clamp(0, 1)[0]
        assert (got - exact).abs().max() < 1e-5
    same = [picture(i) for i in range(4)]
    assert torch.equal(to_batch(same, 64), torch.cat([to_batch([image], 64) for image in same]))
    assert torch.equal(to_batch(torch.from_numpy(np.stack(same)), 64), to_batch(same, 64))
    # As they are: exact, and the caller's array stays its own.
    kept = to_batch(same[:1], 32)
    kept.zero_()
    assert np.array_equal(same[0], picture(0))
    with pytest.raises(ValueError, match="no images"):
        to_batch([], 32)
