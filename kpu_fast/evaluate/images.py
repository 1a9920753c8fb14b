"""Labelled images in batches, decoded by workers, with a bar."""

import os
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from kpu_fast.data.cifar import cifar_part, is_cifar
from kpu_fast.data.labelled import LabelledImages, source_files, to_batch
from kpu_fast.data.sources import SourceError
from kpu_fast.evaluate.result import EvaluateError


def read_images(key: str, source: str, limit: int | None = None, seed: int = 0) -> Dataset:
    """`LabelledImages` of `source`, or `limit` of them drawn at random (the same ones for the same seed).

    The set has `classes` (names, or None) and `labels`. Raises EvaluateError, naming `key`, for what cannot be read,
    and for CIFAR-10's own archive or folder without `:train` or `:test` behind it.
    """
    if is_cifar(source):
        raise EvaluateError(f"{key}: {source} holds training and test images; give {source}:train or {source}:test")
    try:
        images = LabelledImages(source)
    except (OSError, ValueError) as error:
        raise EvaluateError(f"{key}: {error}") from error
    if limit is None or limit >= len(images):
        return images
    drawn = draw(len(images), limit, seed)
    part = Subset(images, drawn)
    part.classes, part.labels = images.classes, [images.labels[i] for i in drawn]
    return part


def check_apart(train: str, test: str, keys: tuple[str, str] = ("--train-images", "--test-images")) -> None:
    """Raises EvaluateError where a file of the source `train` is one of `test`. Copies of a file are not noticed.

    keys: what the user calls the two.
    """
    try:
        files = _files(train), _files(test)
    except (OSError, ValueError) as error:
        raise EvaluateError(f"{', '.join(keys)}: {error}") from error
    refuse_shared(*files, keys)


def refuse_shared(train: set[str], test: set[str], keys: tuple[str, str] = ("--train-images", "--test-images")) -> None:
    """Raises EvaluateError where a file is in both sets. keys: what the user calls the two."""
    if both := train & test:
        files = f"{len(both)} file{'s' if len(both) > 1 else ''}"
        raise EvaluateError(
            f"{keys[1]}: shares {files} with {keys[0]}, such as {min(both)}; test on images that nothing was "
            "learnt from"
        )


def _files(source: str) -> set[str]:
    part = cifar_part(source)
    return {os.path.realpath(file.path) + (f":{part}" if part else "") for file in source_files(source)}


def draw(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the numbers below `count`, ascending, the same for the same seed; all of them where limit is None."""
    # Sources are often sorted by class: the first images of all would be of one class.
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].sort().values.tolist()


def batches(
    images: Dataset, size: int, *, batch_size: int, workers: int, description: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(float32 (B, 3, size, size) in [0, 1], labels (B,)) with a progress bar on stderr; the last batch may be smaller.

    Raises EvaluateError for an image that does not decode.
    """
    yield from progress(images, batch_size, workers, description, partial(_collate, size=size))


def progress(dataset: Dataset, batch_size: int, workers: int, description: str, collate) -> Iterator:
    """Batches of `dataset` as `collate` makes them, in order, with a bar that counts images."""
    loader = DataLoader(dataset, batch_size, num_workers=min(workers, len(dataset)), collate_fn=collate)
    try:
        with tqdm(total=len(dataset), desc=description, unit="img", dynamic_ncols=True, delay=0.5) as bar:
            for batch in loader:
                yield batch
                bar.update(len(batch[1]))
    except SourceError as error:
        # A worker's error arrives with its traceback in front; the last line is the error itself.
        last = str(error).strip().splitlines()[-1]
        raise EvaluateError(last.rpartition("SourceError: ")[2]) from error


def default_workers() -> int:
    """As many as this process may use cores beside its own, at most 8."""
    return max(0, min(8, len(os.sched_getaffinity(0)) - 1))


def _collate(samples: list, size: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return to_batch(list(images), size), torch.tensor(labels)
