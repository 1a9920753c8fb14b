"""Pictures with boxes from labelled images: each is a canvas with one to four images on it, which are its objects."""

import numpy as np
from PIL import Image

MOST_OBJECTS = 4
_SIDES = 0.2, 0.5  # an object's longer side, as a share of the canvas
_GAP = 4  # pixels between objects at least
_TRIES = 20


def make_mosaic(images, seed: int, index: int, canvas: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mosaic number `index` of the images: uint8 (canvas, canvas, 3), boxes (n, 4) float32 xyxy, labels (n,) int64.

    images: whatever has a length and gives (uint8 (H, W, 3), class number) for [i], such as LabelledImages. (seed,
    index, canvas) decide everything. Objects do not touch; the ground is a soft pattern of two colours.
    """
    random = np.random.default_rng((seed, index))
    picture = _ground(random, canvas)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(random.integers(1, MOST_OBJECTS + 1)):
        pixels, label = images[int(random.integers(len(images)))]
        longer = random.uniform(*_SIDES) * canvas
        height, width = (max(1, round(side * longer / max(pixels.shape[:2]))) for side in pixels.shape[:2])
        for _ in range(_TRIES):
            top, left = (int(random.integers(canvas - side + 1)) for side in (height, width))
            box = left, top, left + width, top + height
            if all(_apart(box, other) for other in boxes):
                picture[top : box[3], left : box[2]] = Image.fromarray(pixels).resize((width, height), Image.BICUBIC)
                boxes.append(box)
                labels.append(label)
                break
    return picture, np.array(boxes, np.float32), np.array(labels, np.int64)


def _ground(random: np.random.Generator, canvas: int) -> np.ndarray:
    colours = random.integers(0, 256, (2, 3)).astype(np.float32)
    share = random.random((4, 4, 1), np.float32)
    small = (colours[0] * share + colours[1] * (1 - share)).astype(np.uint8)
    return np.array(Image.fromarray(small).resize((canvas, canvas), Image.BICUBIC))


def _apart(a: tuple, b: tuple) -> bool:
    return (
        a[0] >= b[2] + _GAP or b[0] >= a[2] + _GAP or a[1] >= b[3] + _GAP or b[1] >= a[3] + _GAP
    )  # xyxy: beside or below each other
