"""What a source may be, and what is said when it is missing or empty."""

import importlib.util
import os

import pytest

from kpu_fast.data.sources import SourceError, list_files


def names(source):
    return [os.path.basename(file.path) for file in list_files(source)]


def test_folder_is_searched_recursively_in_a_fixed_order(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.jpeg", "notes.txt", ".hidden.jpg", ".git/x.jpg", "c/d/3.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert names(str(tmp_path)) == ["a.jpeg", "1.jpg", "2.PNG", "3.webp"]


def test_glob_range_and_list_give_each_file_once(tmp_path):
    for number in range(12):
        (tmp_path / f"t-{number:03d}.tar").write_bytes(b"x")
    assert names(f"{tmp_path}/t-{{009..011}}.tar") == ["t-009.tar", "t-010.tar", "t-011.tar"]
    both = [f"{tmp_path}/t-01*.tar", f"{tmp_path}/t-{{008..010}}.tar"]
    assert names(both) == ["t-010.tar", "t-011.tar", "t-008.tar", "t-009.tar"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].jpg").write_bytes(b"x")
    assert names(str(tmp_path / "a[1].jpg")) == ["a[1].jpg"]


def test_package_path():
    folder = os.path.dirname(importlib.util.find_spec("matplotlib").origin)
    path = "mpl-data/images/home.png"
    if not os.path.exists(os.path.join(folder, path)):
        pytest.skip("this matplotlib ships no home.png")
    assert [file.path for file in list_files(f"package:matplotlib/{path}")] == [os.path.join(folder, path)]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{tmp}/none/of/it", ["none/of/it", "exists up to '{tmp}'"]),
        ("{tmp}/x-*.tar", ["x-*.tar", "no file matches"]),
        ("{tmp}/x-{{000..003}}.tar", ["{{000..003}}", "no file matches"]),
        ("{tmp}/tars/{{000..009}}.tar", ["{{000..009}}", "6 of 10", "tars/004.tar", "tars/007.tar, …"]),
        ("{tmp}/tars/x.tar.gz", ["x.tar.gz", "compressed: unpack it first"]),
        ("{tmp}/tars/*.tgz", ["*.tgz", "compressed: unpack it first"]),
        ("{tmp}/tars/none.tar.gz", ["none.tar.gz", "no such file"]),
        ("package:kpu_no_such_package/a", ["kpu_no_such_package", "install"]),
        ("{tmp}/empty", ["empty", "no image", "no files"]),
        ("{tmp}/texts", ["texts", "no image", "2 × .txt"]),
        ("{tmp}/tars", ["tars", "4 × .tar", "tars/*.tar"]),
        ([], ["[]", "expected a path"]),
        (["a", 3], ["3", "expected a path"]),
    ],
)
def test_missing_and_empty_sources_say_what_was_found_and_what_would_do(tmp_path, source, said):
    for name in ("empty", "texts", "tars"):
        (tmp_path / name).mkdir()
    tars = [f"tars/{name}" for name in ("000.tar", "001.tar", "002.tar", "003.tar", "x.tar.gz", "x.tgz")]
    for name in ("texts/a.txt", "texts/b.txt", *tars):
        (tmp_path / name).write_bytes(b"x")
    if isinstance(source, str):
        source = source.format(tmp=tmp_path)
    with pytest.raises(SourceError) as caught:
        list_files(source)
    for words in said:
        assert words.format(tmp=tmp_path) in str(caught.value)


def test_a_disks_lost_and_found_is_passed_over(tmp_path, monkeypatch):
    for name in ("a", "lost+found"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    listed, asked = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: asked.append(os.path.basename(path)) or listed(path))
    assert names(str(tmp_path)) == ["1.jpg"]
    assert "a" in asked
    assert "lost+found" not in asked


def test_a_file_that_is_not_there_is_listed_with_no_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert [file[1:] != (0, 0) for file in list_files(str(tmp_path))] == [True, False]
