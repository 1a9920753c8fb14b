"""A small part of the labelled images as WebDataset shards, for demonstrations without the whole set."""

import io
import tarfile
from pathlib import Path

from kpu_fast.data.labelled import LabelledImages

TRAIN, TEST = 2000, 1000


def write_samples(folder: Path, train: LabelledImages, test: LabelledImages, classes: tuple[str, ...]) -> None:
    """Write train.tar and test.tar (.jpg or .png as found, and .cls) and classes.txt into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images, count in (("train.tar", train, TRAIN), ("test.tar", test, TEST)):
        with tarfile.open(folder / name, "w") as tar:
            for number, i in enumerate(balanced(images.labels, count)):
                data, suffix = images.encoded(i)
                _add(tar, f"{number:06d}{suffix}", data)
                _add(tar, f"{number:06d}.cls", str(images.labels[i]).encode())
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def balanced(labels: list[int], count: int) -> list[int]:
    """The first images in their order, as many of each class as of every other; all of a class that has too few."""
    share = -(-count // len(set(labels)))
    taken: dict[int, int] = {}
    chosen = []
    for i, label in enumerate(labels):
        if taken.get(label, 0) < share and len(chosen) < count:
            taken[label] = taken.get(label, 0) + 1
            chosen.append(i)
    return chosen


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same images give the same file
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
