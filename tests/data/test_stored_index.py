"""The index that is kept: used while the source stays, brought up to date with what changed, compared between ranks."""

import json
import os

import numpy as np
import pytest

from kpu_fast.data import scan as scan_module
from kpu_fast.data.index import index_path
from kpu_fast.data.scan import load_or_scan, load_same, scan


def test_an_index_from_before_pixels_were_compared_is_made_anew(folder, monkeypatch):
    scan(str(folder))
    stored = json.loads(index_path(str(folder)).read_text())
    index_path(str(folder)).write_text(json.dumps({**stored, "version": 1}))
    scanned = []
    monkeypatch.setattr("kpu_fast.data.scan.scan", lambda *args, **kwargs: scanned.append(args) or scan(*args))
    load_or_scan(str(folder))
    assert len(scanned) == 1


def test_the_stored_index_is_used_while_the_source_stays(folder, monkeypatch):
    first = scan(str(folder))
    monkeypatch.setattr("kpu_fast.data.scan.scan", lambda *args, **kwargs: pytest.fail("scanned again"))
    stored = load_or_scan(str(folder))
    for column in ("file", "offset", "length", "height", "width", "crc"):
        assert np.array_equal(getattr(stored, column), getattr(first, column))
    assert stored.files == first.files
    assert stored.digest() == first.digest()


def test_images_of_the_same_size_are_told_apart(tmp_path, make):
    for number in range(4):
        make.ramp(number).save(tmp_path / f"{number}.ppm")
    before = load_or_scan(str(tmp_path))
    assert before.digest() == scan(str(tmp_path)).digest()
    make.ramp(9).save(tmp_path / "2.ppm")
    after = load_or_scan(str(tmp_path))
    for column in ("length", "height", "width"):
        assert np.array_equal(getattr(before, column), getattr(after, column))
    assert before.digest() != after.digest()


@pytest.mark.parametrize("stored", [b"[]", b"\x80abc", b"3", b""])
def test_a_stored_index_that_is_none_is_made_anew(folder, stored):
    scan(str(folder))
    index_path(str(folder)).write_bytes(stored)
    assert len(load_or_scan(str(folder))) == 10
    assert index_path(str(folder)).read_bytes() != stored


@pytest.mark.parametrize("change", ["added", "removed", "touched", "rewritten", "cache damaged", "converted lost"])
def test_a_change_is_noticed(folder, make, change, monkeypatch):
    (folder / "cmyk.jpg").write_bytes(make.encoded(make.ramp(1).convert("CMYK"), "JPEG"))
    index = load_or_scan(str(folder))
    assert (len(index), index.converted) == (11, 1)
    if change == "added":
        make.ramp(11).save(folder / "new.png")
    elif change == "removed":
        (folder / "0.png").unlink()
    elif change == "touched":
        os.utime(folder / "0.png", (1, 1))
    elif change == "rewritten":
        (folder / "0.png").write_bytes(b"text")
    elif change == "cache damaged":
        index_path(str(folder)).write_text("{")
    else:
        os.unlink(index.files[-1].path)
    scanned = []
    monkeypatch.setattr(
        "kpu_fast.data.scan.scan", lambda *args, **kwargs: scanned.append(scan(*args, **kwargs)) or scanned[0]
    )
    again = load_or_scan(str(folder))
    assert len(scanned) == 1
    assert len(again) == {"added": 12, "removed": 10, "rewritten": 10}.get(change, 11)
    assert os.path.exists(again.files[-1].path)


def test_what_was_decoded_is_not_decoded_again(folder, make, monkeypatch):
    """Of a source that grew, what is new, changed, converted or left out before, and no more."""
    (folder / "cmyk.jpg").write_bytes(make.encoded(make.ramp(1).convert("CMYK"), "JPEG"))
    (folder / "text.jpg").write_bytes(b"text")
    shard = [(f"{number}.png", make.encoded(make.ramp(number))) for number in range(20, 23)]
    make.tar(folder / "shard.tar", shard)
    source = [str(folder), f"{folder}/*.tar"]
    load_or_scan(source)
    make.ramp(11).save(folder / "new.png")
    make.ramp(12).save(folder / "0.png")
    os.utime(folder / "1.png", (1, 1))
    make.tar(folder / "more.tar", [("23.png", make.encoded(make.ramp(23)))])
    decoded, check = [], scan_module._check
    monkeypatch.setattr(scan_module, "_check", lambda file, one, to: decoded.append(one.name) or check(file, one, to))
    again = load_or_scan(source)
    names = {name.rpartition("::")[2].rpartition("/")[2] for name in decoded}
    assert names == {"cmyk.jpg", "text.jpg", "new.png", "0.png", "1.png", "23.png"}
    afresh = scan(source)
    assert again.digest() == afresh.digest()
    assert [again.name(i) for i in range(len(again))] == [afresh.name(i) for i in range(len(afresh))]
    assert (len(again), again.rejected) == (16, afresh.rejected)


def test_another_rank_takes_the_index_of_the_same_images_and_no_other(folder, make, tmp_path):
    (folder / "cmyk.jpg").write_bytes(make.encoded(make.ramp(1).convert("CMYK"), "JPEG"))
    source = str(folder)
    assert load_same(source, "0") is None
    index = load_or_scan(source)
    assert load_same(source, "0") is None
    for look in (False, True):
        assert load_same(source, index.digest(), look=look).files == index.files
    for path in folder.iterdir():  # as of a node's own copy
        os.utime(path, (1, 1))
    assert load_same(source, index.digest(), look=True).digest() == index.digest()
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[:-1] + b"!")  # of the same size
    assert load_same(source, index.digest(), look=True) is None
    (folder / "0.png").write_bytes(b"cut off")
    assert load_same(source, index.digest(), look=True) is None
    assert load_same(source, index.digest()) is not None
    make.ramp(0).save(folder / "0.png")
    os.unlink(index.files[-1].path)
    assert load_same(source, index.digest(), look=True) is None


def test_a_copy_whose_shards_are_packed_otherwise_is_another(tmp_path, make):
    """The same images in the same order in a shard of the same size, at other places."""
    images = [(f"{number}.png", make.encoded(make.ramp(number))) for number in range(3)]
    shard, label = str(tmp_path / "shard.tar"), ("0.json", b"{}")
    make.tar(shard, [label, *images])
    index, size = load_or_scan(shard), os.path.getsize(shard)
    os.utime(shard, (1, 1))
    assert load_same(shard, index.digest(), look=True) is not None
    make.tar(shard, [images[0], label, *images[1:]])
    os.utime(shard, (1, 1))
    assert os.path.getsize(shard) == size
    assert load_same(shard, index.digest(), look=True) is None
    assert load_or_scan(shard).digest() == index.digest()
