"""CIFAR-10 as it was published: an archive of pickles."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np

from kpu_fast.data.sources import SourceError

_CIFAR_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_CIFAR_META = "batches.meta"
_CIFAR_BYTES = 3 * 32 * 32


def split_of(source: str) -> tuple[str, str | None]:
    """A source of `LabelledImages` as the path and the part that it names after a colon, if it does."""
    for split in _CIFAR_FILES:
        if source.endswith(f":{split}"):
            return source.removesuffix(f":{split}"), split
    return source, None


def cifar_part(source: str) -> str | None:
    """Which part of CIFAR-10 as published a source of `LabelledImages` is, "train" or "test"; None of any other."""
    path, split = split_of(source)
    return (split or "train") if is_cifar(path) else None


def cifar_files(source: str) -> list[str]:
    """The paths of the files that a source with a `cifar_part` is read from."""
    path, split = split_of(source)
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(path):
        return [path]
    return [os.path.join(path, name) for name in (_CIFAR_META, *_CIFAR_FILES[split or "train"])]


def is_cifar(path: str) -> bool:
    """Whether `path` is CIFAR-10 as published: its archive, or the folder that it unpacks to."""
    path = os.path.expanduser(path)
    name = os.path.basename(path)
    if os.path.isdir(path):
        return os.path.exists(os.path.join(path, _CIFAR_META))
    return name.startswith("cifar-10-") and name.endswith(".tar.gz")


def read_cifar(path: str, split: str) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
    """Pixels (N, 32, 32, 3) uint8, class numbers and class names of a part, "train" or "test".

    path: what `is_cifar` says yes to. Raises SourceError where it is not whole.
    """
    path = os.path.expanduser(path)
    wanted = [_CIFAR_META, *_CIFAR_FILES[split]]
    found = _cifar_folder(path, wanted) if os.path.isdir(path) else _cifar_archive(path, wanted)
    for name in wanted:
        if name not in found:
            raise SourceError(f"{path}: has no {name}; expected CIFAR-10's python version, whole")
    pixels, labels = [], []
    names = found[_CIFAR_META].get(b"label_names")
    if not names:
        raise SourceError(f"{path}: {_CIFAR_META} names no classes")
    for name in wanted[1:]:
        data, numbers = found[name].get(b"data"), found[name].get(b"labels")
        if data is None or numbers is None or data.shape != (len(numbers), _CIFAR_BYTES) or data.dtype != np.uint8:
            raise SourceError(f"{path}: {name} is not a batch of CIFAR-10 (uint8 rows of {_CIFAR_BYTES}, and labels)")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += [int(number) for number in numbers]
    return np.ascontiguousarray(np.concatenate(pixels)), labels, tuple(name.decode() for name in names)


def _cifar_folder(path: str, wanted: list[str]) -> dict[str, dict]:
    found = {}
    for name in wanted:
        file = os.path.join(path, name)
        if os.path.exists(file):
            found[name] = _unpickle(Path(file).read_bytes(), file)
    return found


def _cifar_archive(path: str, wanted: list[str]) -> dict[str, dict]:
    found = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if member.isreg() and name in wanted:
                    found[name] = _unpickle(tar.extractfile(member).read(), f"{path}::{member.name}")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise SourceError(f"{path}: not a readable archive ({error}); fetch it again") from error
    return found


class _OnlyArrays(pickle.Unpickler):
    """A pickle may run any code; CIFAR's hold dicts, lists, bytes and arrays, so nothing else is let in."""

    def find_class(self, module, name):
        if name == "_reconstruct" and module.startswith("numpy"):
            return np._core.multiarray._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is no array")


def _unpickle(data: bytes, name: str) -> dict:
    try:
        values = _OnlyArrays(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:
        raise SourceError(f"{name}: not a batch of CIFAR-10 ({error})") from error
    if not isinstance(values, dict):
        raise SourceError(f"{name}: holds a {type(values).__name__}, expected CIFAR-10's dict")
    return values
