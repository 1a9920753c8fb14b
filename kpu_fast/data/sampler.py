"""Which image comes when, and how it is cut: functions of seed and position alone, so a position is all a resume needs.

The images of all ranks form one endless sequence: epoch after epoch, each a new permutation of the N images. At
position p (images taken so far by all ranks together) rank r of R takes the `batch_size` entries from
p + r·batch_size on; then p grows by R·batch_size.
"""

from typing import NamedTuple

import numpy as np

RATIO = (3 / 4, 4 / 3)  # width : height of a random crop, as in torchvision's and DALI's random-resized crop
_ATTEMPTS = 10
_DRAWS = 2 * _ATTEMPTS + 4  # uniforms per image: area and ratio of each attempt, place (y, x), flip, one spare
_PHILOX_WORDS = 4  # uniforms per step of Philox's counter; divides _DRAWS


class Plan(NamedTuple):
    """A batch before it is read. All arrays have one row per image; pixel sizes are (height, width)."""

    image: np.ndarray  # (B,) number of the image in the index
    start: np.ndarray  # (B, 2) int32: top left corner of the part that is used
    shape: np.ndarray  # (B, 2) int32: size of that part
    target: np.ndarray  # (B, 2) int32: the size it is resized to
    flip: np.ndarray  # (B,) int32: 1 where it is mirrored left to right


class Sampler:
    """Plans of batches for one rank.

    sizes: (N, 2) heights and widths; size: (H, W) of the batch; fit: "crop" or "pad"; crop_scale: range of the crop's
    share of the area; flip: whether half of the images are mirrored.
    """

    def __init__(self, sizes, *, batch_size, size, fit, crop_scale, flip, rank, seed):
        self._sizes = sizes
        self._batch_size = batch_size
        self._size = np.array(size, np.int32)
        self._fit = fit
        self._crop_scale = crop_scale
        self._flip = flip
        self._rank = rank
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def plan(self, position: int) -> Plan:
        """The batch of this rank at `position` (see the head of the file)."""
        first = position + self._rank * self._batch_size
        image = self._images(np.arange(first, first + self._batch_size))
        uniform = self._uniforms(first)
        sizes = self._sizes[image]
        flip = ((uniform[:, -2] < 0.5) & self._flip).astype(np.int32)
        if self._fit == "pad":
            scale = (self._size / sizes).min(axis=1, keepdims=True)
            target = np.clip(np.rint(sizes * scale), 1, self._size).astype(np.int32)
            return Plan(image, np.zeros_like(sizes), sizes, target, flip)
        start, shape = _random_crop(sizes, uniform, self._crop_scale)
        return Plan(image, start, shape, np.tile(self._size, (len(image), 1)), flip)

    def _images(self, positions: np.ndarray) -> np.ndarray:
        count = len(self._sizes)
        epochs = positions // count
        image = np.empty(len(positions), np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            image[here] = self._order(epoch)[positions[here] % count]
        return image

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            order = np.arange(len(self._sizes), dtype=np.uint32)
            np.random.default_rng([self._seed, epoch]).shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]

    def _uniforms(self, first: int) -> np.ndarray:
        # A counter-based generator started at the position: an image's draws depend on nothing that came before it.
        steps = _DRAWS // _PHILOX_WORDS
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=first * steps))
        return generator.random((self._batch_size, _DRAWS))


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
