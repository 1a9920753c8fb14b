"""Images with a class number for each pixel, as ADE20K, Pascal VOC and others keep them: a mask beside each image."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kpu_fast.data.decode import UNREADABLE, stored_size, to_rgb
from kpu_fast.data.sources import SourceError, list_files, open_regular
from kpu_fast.evaluate.images import draw, progress, refuse_shared
from kpu_fast.evaluate.result import EvaluateError

LARGEST = 2**16 - 1  # the highest number that a mask of 16 bits holds


class MaskedImages(Dataset):
    """Images with masks: [i] → (uint8 (H, W, 3), int64 (H, W) class numbers), both as stored, whatever EXIF says.

    images, masks: folders. A mask is a PNG of 1, 8 or 16 gray bits, or a palette, whose indices count, not its colours;
    it has its image's path below its folder, but for the suffix. Images without a mask are left out. limit: only so
    many, drawn.

    files: of the images, in order. Raises EvaluateError, naming `keys`, where the two do not fit; SourceError from [i].
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        limit: int | None = None,
        seed: int = 0,
        keys: tuple[str, str] = ("--images", "--masks"),
    ):
        of_images, of_masks = (_by_stem(key, folder) for key, folder in zip(keys, (images, masks), strict=True))
        both = sorted(of_images.keys() & of_masks.keys())
        if not both:
            raise EvaluateError(
                f"{keys[1]}: {masks} has no mask of an image in {images}: such as {_first(of_masks)}, while images are "
                f"such as {_first(of_images)}; a mask is to be called as its image is, but for the suffix"
            )
        if alone := sorted(of_masks.keys() - of_images.keys()):
            raise EvaluateError(
                f"{keys[1]}: {len(alone)} of the masks in {masks} have no image in {images}, such as "
                f"{of_masks[alone[0]]}; remove them or add their images"
            )
        chosen = [both[i] for i in draw(len(both), limit, seed)]
        self.files = [of_images[stem] for stem in chosen]
        self._masks = [of_masks[stem] for stem in chosen]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        file, mask = self.files[i], self._mask(i)
        try:
            with open_regular(file) as opened:
                image = to_rgb(Image.open(opened), upright=False)
        except UNREADABLE as error:
            raise SourceError(f"{file}: not an image that can be read ({error})") from error
        self._check_size(i, mask, image.shape[:2])
        return image, mask

    def numbers(self, i: int) -> set[int]:
        """The class numbers in mask i. Raises SourceError as [i] does, but reads of the image its size alone."""
        file, mask = self.files[i], self._mask(i)
        try:
            with open_regular(file) as opened, Image.open(opened) as image:
                size = stored_size(image)
        except UNREADABLE as error:
            raise SourceError(f"{file}: not an image that can be read ({error})") from error
        self._check_size(i, mask, size)
        return set(np.unique(mask).tolist())

    def _check_size(self, i: int, mask: np.ndarray, size: tuple[int, int]):
        if size != mask.shape:
            sizes = " and ".join(f"{height}×{width}" for height, width in (mask.shape, size))
            raise SourceError(f"{self._masks[i]}: is not as large as its image ({sizes})")

    def _mask(self, i: int) -> np.ndarray:
        file = self._masks[i]
        try:
            with open_regular(file) as opened, Image.open(opened) as image:
                if image.format != "PNG":  # others lose numbers, spread them over 8 bits, turn or invert the picture
                    raise ValueError(f"{image.format} may not keep numbers; save masks as PNG")
                if any(str(tile[3]) in ("L;2", "L;4") for tile in image.tile):  # Pillow spreads them over 8 bits
                    raise ValueError("gray of 2 or 4 bits; save masks with 8 or 16, or with a palette")
                numbers = np.asarray(image)
        except UNREADABLE as error:
            raise SourceError(f"{file}: not a mask that can be read ({error})") from error
        if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
            raise SourceError(f"{file}: {image.mode} pixels are no class numbers; a mask has one channel of integers")
        return numbers.astype(np.int64)


def check_apart(train: MaskedImages, test: MaskedImages) -> None:
    """Raises EvaluateError where both have a file; links are followed, copies are not noticed."""
    refuse_shared(*({os.path.realpath(file) for file in images.files} for images in (train, test)))


def find_classes(images: MaskedImages, ignore: Sequence[int], workers: int) -> set[int]:
    """The class numbers in the masks, without those of `ignore`. Reads every mask once.

    Raises EvaluateError, naming the file, for a mask that is none or not as large as its image.
    """
    found: set[int] = set()
    for numbers, _ in progress(_Numbers(images), 64, workers, "segment: masks", _join):
        found |= numbers
    return found - set(ignore)


def to_index(classes: Sequence[int], missing: int) -> Tensor:
    """(65536,) int32: the place of each number in `classes`, or `missing`."""
    table = torch.full((LARGEST + 1,), missing, dtype=torch.int32)
    table[torch.tensor(classes)] = torch.arange(len(classes), dtype=torch.int32)
    return table


class _Numbers(Dataset):
    def __init__(self, images: MaskedImages):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> set[int]:
        return self._images.numbers(i)


def _join(samples: list[set[int]]) -> tuple[set[int], list]:
    return set().union(*samples), samples


def _by_stem(key: str, folder: str | Path) -> dict[str, str]:
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    if not root.is_dir():
        raise EvaluateError(f"{key}: {folder} is not a folder")
    try:
        files = [file.path for file in list_files(str(root))]
    except (OSError, ValueError) as error:
        raise EvaluateError(f"{key}: {error}") from error
    found: dict[str, str] = {}
    for file in files:
        stem = str(Path(file).relative_to(root).with_suffix(""))
        if stem in found:
            raise EvaluateError(f"{key}: {found[stem]} and {file} have one name; keep one of them")
        found[stem] = file
    return found


def _first(files: dict[str, str]) -> str:
    return min(files.values())
