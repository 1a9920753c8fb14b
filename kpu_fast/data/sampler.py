"""Which image comes when, and how it is cut: functions of seed and position alone, so a position is all a resume needs.

The images of all ranks form one endless sequence: epoch after epoch, each a new permutation of the N images. At
position p (images taken so far by all ranks together) rank r of R takes the `batch_size` entries from
p + r·batch_size on; then p grows by R·batch_size.

Where images of both orientations go on a canvas that is not square, each orientation has a sequence of its own and a
batch is of one of them, on the canvas that lies as they do. The batches of the rarer one come at even distances.
"""

from typing import NamedTuple

import numpy as np

RATIO = (3 / 4, 4 / 3)  # width : height of a random crop, as in torchvision's and DALI's random-resized crop
_ATTEMPTS = 10
_DRAWS = 2 * _ATTEMPTS + 4  # uniforms per image: area and ratio of each attempt, place (y, x), flip, one spare
_PHILOX_WORDS = 4  # uniforms per step of Philox's counter; divides _DRAWS


class Plan(NamedTuple):
    """A batch before it is read. Arrays have one row per image; pixel sizes are (height, width)."""

    image: np.ndarray  # (B,) number of the image in the index
    start: np.ndarray  # (B, 2) int32: top left corner of the part that is used
    shape: np.ndarray  # (B, 2) int32: size of that part
    target: np.ndarray  # (B, 2) int32: the size it is resized to
    flip: np.ndarray  # (B,) int32: 1 where it is mirrored left to right
    canvas: tuple[int, int]  # height and width of the batch


class Sampler:
    """Plans of batches for one rank.

    sizes: (N, 2) heights and widths; size: (H, W) of the batch; fit: "crop" or "pad"; crop_scale: range of the crop's
    share of the area; flip: whether half of the images are mirrored; group: with "pad", whether images that lie
    otherwise than size are given batches of (W, H).
    """

    def __init__(self, sizes, *, batch_size, size, fit, crop_scale, flip, group, rank, seed):
        self._sizes = sizes
        self._batch_size = batch_size
        self._size = np.array(size, np.int32)
        self._fit = fit
        self._crop_scale = crop_scale
        self._flip = flip
        self._rank = rank
        self._seed = seed
        turned = lie_otherwise(sizes, size) & (group and fit == "pad")
        self._groups = [np.flatnonzero(~turned).astype(np.uint32), np.flatnonzero(turned).astype(np.uint32)]
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def plan(self, position: int) -> Plan:
        """The batch of this rank at `position` (see the head of the file)."""
        first = position + self._rank * self._batch_size
        turned, start = self._group_at(first)
        image = self._images(turned, np.arange(start, start + self._batch_size))
        size = self._size[::-1] if turned else self._size
        canvas = tuple(size.tolist())
        uniform = self._uniforms(first)
        sizes = self._sizes[image]
        flip = ((uniform[:, -2] < 0.5) & self._flip).astype(np.int32)
        if self._fit == "pad":
            scale = (size / sizes).min(axis=1, keepdims=True)
            target = np.clip(np.rint(sizes * scale), 1, size).astype(np.int32)
            return Plan(image, np.zeros_like(sizes), sizes, target, flip, canvas)
        start, shape = _random_crop(sizes, uniform, self._crop_scale)
        return Plan(image, start, shape, np.tile(size, (len(image), 1)), flip, canvas)

    def _group_at(self, first: int) -> tuple[int, int]:
        """(0 or, for the turned canvas, 1; place in that group's own sequence) of the batch at place `first`."""
        count, turned = len(self._sizes), len(self._groups[1])
        if turned in (0, count):
            return int(turned > 0), first
        number = first // self._batch_size
        before, after = ((n * turned + count // 2) // count for n in (number, number + 1))
        group = after - before
        return group, (before if group else number - before) * self._batch_size

    def _images(self, group: int, positions: np.ndarray) -> np.ndarray:
        count = len(self._groups[group])
        epochs = positions // count
        image = np.empty(len(positions), np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            image[here] = self._order(group, epoch)[positions[here] % count]
        return image

    def _order(self, group: int, epoch: int) -> np.ndarray:
        if (group, epoch) not in self._orders:
            kept = [key for key in self._orders if key[0] == group]
            if len(kept) > 1:
                del self._orders[min(kept)]
            order = self._groups[group].copy()
            np.random.default_rng([self._seed, epoch] + [1] * group).shuffle(order)
            self._orders[group, epoch] = order
        return self._orders[group, epoch]

    def _uniforms(self, first: int) -> np.ndarray:
        # A counter-based generator started at the position: an image's draws depend on nothing that came before it.
        steps = _DRAWS // _PHILOX_WORDS
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=first * steps))
        return generator.random((self._batch_size, _DRAWS))


def lie_otherwise(sizes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: which of the (N, 2) heights and widths are upright where `size` (H, W) is wide, or the other way."""
    lies = np.sign(size[1] - size[0])  # 1: wider than high; 0: square, which no image lies otherwise than
    return lies * (sizes[:, 0].astype(np.int64) - sizes[:, 1]) > 0


def _random_crop(sizes, uniform, scale):
    """Random area and ratio until they fit, as in torchvision; after ten misses the largest centred part."""
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[:, :_ATTEMPTS])
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * uniform[:, _ATTEMPTS : 2 * _ATTEMPTS])
    tried = np.rint(np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1)).astype(np.int64)  # (B, 10, 2)
    fits = ((tried >= 1) & (tried <= sizes[:, None])).all(axis=-1)
    rows = np.arange(len(sizes))
    shape = tried[rows, fits.argmax(axis=1)]

    missed = ~fits.any(axis=1)
    whole = np.concatenate(
        [np.minimum(height, np.rint(width / RATIO[0])), np.minimum(width, np.rint(height * RATIO[1]))], axis=1
    )
    shape[missed] = np.maximum(whole[missed], 1)
    place = np.where(missed[:, None], 0.5, uniform[:, 2 * _ATTEMPTS : 2 * _ATTEMPTS + 2])
    start = np.floor(place * (sizes - shape + 1))
    return start.astype(np.int32), shape.astype(np.int32)
