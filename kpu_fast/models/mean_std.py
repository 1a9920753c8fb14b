"""How a network wants its images normalised: what its image processor says, else what is usual."""

import logging
import math
from pathlib import Path

from kpu_fast.models.hub import PROCESSORS, WeightsError, read_json

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5,) * 3, (0.5,) * 3
_USUAL = {"clip": ("CLIP", *CLIP_MEAN_STD), "siglip": ("SigLIP", *_HALF), "vit": ("ViT", *_HALF)}


def usual_mean_std(kind: str) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """Whose they are, mean and std for images in [0, 1], for a kind of network."""
    return _USUAL.get(kind, ("ImageNet", *IMAGENET_MEAN_STD))


def read_mean_std(key: str, kind: str, folder: Path) -> tuple:
    """Mean and std for images in [0, 1] from the folder's image processor, else those usual for `kind`.

    A processor makes (factor · byte − mean) / std of bytes up to 255, factor 1/255 unless it says otherwise: of images
    in [0, 1] that is (image − mean/scale) / (std/scale) with scale = 255 · factor.
    key: what error messages begin with. Raises WeightsError for values that cannot be used.
    """
    whose, mean, std = usual_mean_std(kind)
    for file in PROCESSORS:
        if not (folder / file).is_file():
            continue
        processor = read_json(key, folder / file)
        processor = processor.get("image_processor", processor)
        if not isinstance(processor, dict):
            raise WeightsError(f"{key}: image_processor in {folder / file} is {processor!r}, expected an object {{…}}")
        processor = {field: value for field, value in processor.items() if value is not None}  # null: the default
        if not processor.keys() & {"do_normalize", "do_rescale", "rescale_factor", "image_mean", "image_std"}:
            continue
        if not _flag(key, folder / file, "do_normalize", processor):
            mean, std = (0.0,) * 3, (1.0,) * 3
        elif "image_mean" in processor or "image_std" in processor:
            mean, std = (_three_numbers(key, folder / file, field, processor) for field in ("image_mean", "image_std"))
        scale = 255 * _rescale_factor(key, folder / file, processor)
        return tuple(m / scale for m in mean), tuple(s / scale for s in std)
    log.warning(
        "%s: %s has no image processor (%s) that says how; images are normalised with %s's, mean %s and std %s",
        key, folder, PROCESSORS[0], whose, mean, std,
    )  # fmt: skip
    return mean, std


def _flag(key: str, path: Path, field: str, processor: dict) -> bool:
    value = processor.get(field, True)
    if not isinstance(value, bool):
        raise WeightsError(f"{key}: {field} in {path} is {value!r}, expected true or false")
    return value


def _rescale_factor(key: str, path: Path, processor: dict) -> float:
    if not _flag(key, path, "do_rescale", processor):
        return 1.0
    factor = processor.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise WeightsError(f"{key}: rescale_factor in {path} is {factor!r}, expected a number above 0, such as 1/255")
    return factor


def _three_numbers(key: str, path: Path, field: str, processor: dict) -> tuple[float, ...]:
    values = processor.get(field)
    numbers = values if isinstance(values, list) and all(isinstance(v, int | float) for v in values) else []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (field == "image_std" and min(numbers) <= 0):
        raise WeightsError(
            f"{key}: {field} in {path} is {values!r}, expected three numbers"
            + (" above 0" if field == "image_std" else "")
            + ", one for each of red, green and blue, as in [0.5, 0.5, 0.5]"
        )
    return tuple(numbers)
