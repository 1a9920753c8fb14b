"""Images with a class each: for training the zoo and for evaluation. (Training a student needs no classes.)"""

import io
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kpu_fast.data.cifar import cifar_files, cifar_part, is_cifar, read_cifar, split_of
from kpu_fast.data.decode import UNREADABLE, to_rgb
from kpu_fast.data.sources import (
    IMAGE_SUFFIXES,
    SourceError,
    SourceFile,
    is_shard,
    list_files,
    open_regular,
    read_shard,
    split_member,
    tar_members,
)


class LabelledImages(Dataset):
    """The images of `source` as (uint8 array (H, W, 3), class number) pairs, in a fixed order.

    The pixels are those that training sees: upright as EXIF says, of 16 bits the upper 8.

    source is one of
      - a folder of class folders, `source/CLASS/**/image.jpg`: classes are numbered in the order of their names;
      - WebDataset shards (one .tar, a glob, or a range such as `train-{000..009}.tar`) of images and .cls files with a
        number each; a `classes.txt` beside the first shard, one name per line, names the classes;
      - CIFAR-10 as published: `cifar-10-python.tar.gz`, or the folder it unpacks to. That is its training images; with
        `:test` after the path, its test images.
    `package:NAME/path` finds a folder or shards in an installed package.

    classes: the names by number, or None where a source has none. labels: every class number, in order.
    Raises SourceError, a ValueError that names the file, where there is nothing to read or an image has no class; and
    from [i] where an image does not decode.
    """

    def __init__(self, source: str | Path):
        self.source = os.fspath(source)
        self.classes: tuple[str, ...] | None = None
        self.labels: list[int] = []
        self._pixels: np.ndarray | None = None  # CIFAR's own archive is not a file per image
        self._files: list[tuple[str, int, int, str]] = []  # path, first byte, length (-1: to the end), name for people
        path, split = split_of(self.source)
        if is_cifar(path):
            self._pixels, self.labels, self.classes = read_cifar(path, split or "train")
        elif split:
            raise SourceError(f"source {self.source!r}: only CIFAR-10's own archive or folder has a {split!r} part")
        else:
            self._index(path)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        label = self.labels[i]
        if self._pixels is not None:
            return self._pixels[i], label
        path, first, length, name = self._files[i]
        try:
            with open_regular(path) as file:
                file.seek(first)
                return to_rgb(Image.open(io.BytesIO(file.read(length)))), label
        except UNREADABLE as error:
            raise SourceError(f"{name}: not an image that can be read ({error})") from error

    def encoded(self, i: int) -> tuple[bytes, str]:
        """Image i as it lies in its file and the file's suffix (".jpg"); a PNG where it has no file of its own."""
        if self._pixels is not None:
            buffer = io.BytesIO()
            Image.fromarray(self._pixels[i]).save(buffer, "PNG")
            return buffer.getvalue(), ".png"
        path, first, length, name = self._files[i]
        with open(path, "rb") as file:
            file.seek(first)
            return file.read(length), os.path.splitext(name)[1].lower()

    def _index(self, source: str) -> None:
        files = list_files(source)
        shards = [file for file in files if is_shard(file.path)]
        if not shards:
            folder = os.path.abspath(os.path.expanduser(source))
            # Of a glob or a `package:` entry, the class folders are what lies below all that it finds.
            root = folder if os.path.isdir(folder) else os.path.commonpath([_above_class(file.path) for file in files])
            found = []
            for file in files:
                name, *rest = Path(file.path).relative_to(root).parts
                if not rest:
                    raise SourceError(f"{file.path}: is in no class folder; expected {root}/CLASS/{name}")
                found.append(name)
                self._files.append((file.path, 0, -1, file.path))
            self.classes = tuple(sorted(set(found)))
            if root == folder:
                _check_class_folders(root, self.classes)
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = [numbers[name] for name in found]
            return
        if len(shards) < len(files):
            other = next(file.path for file in files if not is_shard(file.path))
            raise SourceError(f"{other}: neither shards alone nor class folders alone; give one kind")
        names = Path(shards[0].path).with_name("classes.txt")
        if names.is_file():
            self.classes = read_class_names(names)
        for number, file in enumerate(shards):
            shard = read_shard(number, file)
            if shard.problem:
                raise SourceError(f"{file.path}: {shard.problem}")
            if shard.rejected:
                raise SourceError(": ".join(shard.rejected[0]))
            if not shard.images:
                raise SourceError(f"{file.path}: holds no image; expected {' '.join(sorted(IMAGE_SUFFIXES)[:4])} …")
            labels = _shard_labels(file)
            for image in shard.images:
                member = image.name.removeprefix(f"{file.path}::")
                label = labels.get(split_member(member)[0])
                if label is None:
                    raise SourceError(f"{image.name}: has no .cls beside it, so no class")
                if self.classes and label >= len(self.classes):
                    raise SourceError(f"{image.name}: is of class {label}, but {names} names {len(self.classes)}")
                self._files.append((file.path, image.offset, image.length, image.name))
                self.labels.append(label)


def to_batch(images: list[np.ndarray] | Tensor, size: int) -> Tensor:
    """uint8 images (H, W, 3) of any sizes, or a tensor (B, H, W, 3) → float32 (B, 3, size, size) in [0, 1].

    Of an image that is not square the largest centred square is taken. The resize is bicubic and antialiased; what it
    overshoots is clipped.
    """
    if not len(images):
        raise ValueError("to_batch: no images")
    if isinstance(images, Tensor):
        return _resize(images, size)
    if len({image.shape for image in images}) == 1:
        return _resize(torch.from_numpy(np.stack(images)), size)
    return torch.cat([_resize(torch.from_numpy(image[None].copy()), size) for image in images])


def _resize(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = images[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float() / 255
    if side != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return pixels.clamp_(0, 1).contiguous()


def _above_class(path: str) -> str:
    return os.path.dirname(os.path.dirname(path))


def _check_class_folders(root: str, classes: tuple[str, ...]) -> None:
    folders = {p.name for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith(".")}
    for name in sorted(folders - {"lost+found", *classes}):
        raise SourceError(
            f"{root}/{name}: a class folder without an image (hidden files are none; a folder that has links to it is "
            "read once); remove it or fill it"
        )


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """The lines of a text file as names of the classes 0, 1, 2 … Raises SourceError.

    Two may be equal, as in CLIP's list of ImageNet's classes: whoever needs them distinct checks that.
    """
    try:
        names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a text file that can be read ({error})") from error
    if not names or not all(names):
        raise SourceError(f"{path}: expected one class name per line, none empty")
    return names


def _shard_labels(file: SourceFile) -> dict[str, int]:
    labels = {}
    with open(file.path, "rb") as shard:
        for name, member in tar_members(file)[0].items():
            if not name.endswith(".cls"):
                continue
            if member is None:
                raise SourceError(f"{file.path}::{name}: a link to nothing in its tar")
            shard.seek(member.offset_data)
            text = shard.read(min(member.size, 32))
            if not text.strip().isdigit():
                raise SourceError(f"{file.path}::{name}: is {text!r}, expected a class number (0, 1, 2 …)")
            labels[split_member(name)[0]] = int(text)
    return labels


def source_files(source: str) -> list[SourceFile]:
    """The files that a source of `LabelledImages` is read from.

    Raises OSError where one of CIFAR-10's is missing, SourceError as `list_files` does.
    """
    if cifar_part(source) is None:
        return list_files(source)
    stats = {file: os.stat(file) for file in cifar_files(source)}
    return [SourceFile(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]
