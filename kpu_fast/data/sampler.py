"""Which image comes when, and how it is cut: functions of seed and position alone, so a position is all a resume needs.

The images of all ranks form one endless sequence: epoch after epoch, each a new permutation of the N images. At
position p (images taken so far by all ranks together) rank r of R takes the `batch_size` entries from
p + r·batch_size on; then p grows by R·batch_size.

With several canvases an image goes on the one that suits it, a batch is of one canvas, and the images of each canvas
have a sequence of their own. The batches of an optimiser step, of all ranks together, are of canvases of one area: a
rank with a smaller one would wait for the others. Which it is follows from the step's number; the steps of each area
come at even distances, as many as are its images, and so do the two orientations within them. The first step has the
largest: what does not fit into memory is seen at once.
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

    sizes: (N, 2) heights and widths; canvases: of the batches, from `canvases_of`; fit: "crop" or "pad"; crop_scale:
    range of the crop's share of the area; flip: whether half of the images are mirrored; step_batches: of an optimiser
    step, those of all ranks together.
    """

    def __init__(self, sizes, *, batch_size, canvases, fit, crop_scale, flip, step_batches, rank, seed):
        self._sizes = sizes
        self._batch_size = batch_size
        self._canvases = canvases
        self._step_batches = step_batches
        self._fit = fit
        self._crop_scale = crop_scale
        self._flip = flip
        self._rank = rank
        self._seed = seed
        suits = choose_canvas(sizes, canvases)
        self._groups = [np.flatnonzero(suits == canvas).astype(np.uint32) for canvas in range(len(canvases))]
        areas: dict[int, list[int]] = {}  # area: its canvases that hold images
        for canvas, (height, width) in enumerate(canvases):
            if len(self._groups[canvas]):
                areas.setdefault(height * width, []).append(canvas)
        self._areas = [areas[area] for area in sorted(areas)]
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def align(self, position: int) -> int:
        """The first position from `position` on at which a step's batches begin, where that is of account.

        A run may go on with other batches to a step, whose ranks would then have canvases of two areas in every step.
        """
        step = self._step_batches * self._batch_size
        return position if len(self._areas) == 1 else -(-position // step) * step

    def plan(self, position: int) -> Plan:
        """The batch of this rank at `position` (see the head of the file)."""
        first = position + self._rank * self._batch_size
        group, start = self._group_at(first)
        image = self._images(group, np.arange(start, start + self._batch_size))
        canvas = self._canvases[group]
        size = np.array(canvas, np.int32)
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
        """(number of the canvas; place in the sequence of its images) of the batch at place `first`."""
        if len(self._areas) == 1 and len(self._areas[0]) == 1:
            return self._areas[0][0], first
        step, batch = divmod(first // self._batch_size, self._step_batches)
        images = [sum(len(self._groups[group]) for group in groups) for groups in self._areas]
        area, steps_before = _share_out(step, images, early=True)
        groups = self._areas[area]
        number = steps_before * self._step_batches + batch
        turn, before = _share_out(number, [len(self._groups[group]) for group in groups])
        return groups[turn], before * self._batch_size

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
            canvas, size = self._canvases[group], self._canvases[0]
            # By the shape, not by the place among the buckets; size and size turned as before there were any.
            key = [] if canvas == size else [1] if canvas == size[::-1] else list(canvas)
            np.random.default_rng([self._seed, epoch, *key]).shuffle(order)
            self._orders[group, epoch] = order
        return self._orders[group, epoch]

    def _uniforms(self, first: int) -> np.ndarray:
        # A counter-based generator started at the position: an image's draws depend on nothing that came before it.
        steps = _DRAWS // _PHILOX_WORDS
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=first * steps))
        return generator.random((self._batch_size, _DRAWS))


def canvases_of(data_cfg) -> list[tuple[int, int]]:
    """Heights and widths that a teacher's batches may have, its `size` first, the other orientation after each."""
    if data_cfg.fit == "crop" or not data_cfg.aspect_ratio_grouping:
        return [tuple(data_cfg.size)]
    every = [pair for h, w in (data_cfg.size, *data_cfg.buckets) for pair in ((h, w), (w, h))]
    return list(dict.fromkeys(every))  # a square has one orientation


def choose_canvas(sizes: np.ndarray, canvases: list[tuple[int, int]]) -> np.ndarray:
    """(N,) numbers of canvases: for each of the (N, 2) heights and widths the smallest on which it is largest."""
    chosen = np.zeros(len(sizes), np.intp)
    if len(canvases) == 1:
        return chosen
    largest = np.zeros(len(sizes))  # scale so far; by rising area, so that only a larger image is worth a larger canvas
    for number in sorted(range(len(canvases)), key=lambda number: canvases[number][0] * canvases[number][1]):
        scale = np.minimum(canvases[number][0] / sizes[:, 0], canvases[number][1] / sizes[:, 1])
        chosen[scale > largest] = number
        np.maximum(largest, scale, out=largest)
    return chosen


def _share_out(number: int, counts: list[int], early: bool = False) -> tuple[int, int]:
    """Whose turn the turn `number` is, when each has turns in proportion to its count, evenly spread, and how many
    turns it had before. early: the first turn is the last one's; else each waits for half a distance.
    """
    rest = sum(counts)
    for which in range(len(counts) - 1, 0, -1):
        start = rest - 1 if early else rest // 2
        before, after = ((n * counts[which] + start) // rest for n in (number, number + 1))
        if after > before:
            return which, before
        number -= before
        rest -= counts[which]
    return 0, number


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
