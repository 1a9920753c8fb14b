"""The feature picture of a run: what each teacher sees on a few images, and what the student has made of it."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kpu_fast.machine import written_whole

_COLUMN_INCHES = 2.3
_TALLEST = 1.6  # height over width beyond which a row stops growing
_NO_FEATURE = 0.5  # grey: a direction without variance, or a cell with NaN or Inf


class Panel(NamedTuple):
    """One teacher's part of the picture: n images of one size, and three feature maps of each.

    name: title. images: (n, 3, H, W) in [0, 1]. valid: (n, H, W) bool, False on padding, or None.
    teacher: (n, h, w, C). projected: the student's map in the teacher's space, (n, h', w', C), None where no head leads
    there. student: its own map, (n, h'', w'', D). Each may have its own grid over the whole image, padding included.
    """

    name: str
    images: Tensor
    valid: Tensor | None
    teacher: Tensor
    projected: Tensor | None
    student: Tensor


def save_feature_picture(path: str | os.PathLike, panels: list[Panel], title: str = "Features") -> None:
    """Write a PNG: a block per panel, a row per image: image | teacher | (student in the teacher's space) | student.

    Colours are the first three principal components. Teacher and projected student share one basis and one scale,
    fitted on the teacher's valid cells, so that their colours compare; the student's own map has its own. A constant
    map and cells with NaN or Inf are grey. Padding is cut off. The file is replaced in one step. Raises ValueError when
    a panel's shapes do not belong together.
    """
    from matplotlib.figure import Figure

    for panel in panels:
        _check(panel)
    boxes = [[_box(panel, i) for i in range(len(panel.images))] for panel in panels]
    ratios = [[min((y1 - y0) / (x1 - x0), _TALLEST) for y0, y1, x0, x1 in rows] for rows in boxes]
    heights = [_COLUMN_INCHES * sum(rows) + 0.6 + 0.08 * len(rows) for rows in ratios]
    columns = 3 + any(panel.projected is not None for panel in panels)
    figure = Figure(figsize=(columns * _COLUMN_INCHES + 0.3, sum(heights) + 0.85), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    caption = "Colours: the first three principal components of the features"
    if columns == 4:
        caption += (
            ". “Teacher” and “student as teacher” share\n"
            "one basis: the same colour is the same feature, and the closer the two look, the more has been inherited."
        )
    else:
        caption += ",\neach map's its own: what belongs together has one colour."
    figure.supxlabel(caption, fontsize=9, color="0.35")
    blocks = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for block, panel, panel_boxes, panel_ratios in zip(blocks, panels, boxes, ratios, strict=True):
        _draw(block, panel, panel_boxes, panel_ratios)

    with written_whole(Path(path)) as partial:
        figure.savefig(partial, format="png")


def _check(panel: Panel) -> None:
    n, _, height, width = panel.images.shape
    for part in ("teacher", "projected", "student"):
        if getattr(panel, part) is None:
            continue
        if getattr(panel, part).ndim != 4 or len(getattr(panel, part)) != n:
            raise ValueError(
                f"panel {panel.name!r}: {part} is {tuple(getattr(panel, part).shape)}, expected ({n}, h, w, channels)"
            )
    if panel.projected is not None and panel.projected.shape[3] != panel.teacher.shape[3]:
        raise ValueError(
            f"panel {panel.name!r}: projected has {panel.projected.shape[3]} channels, "
            f"the teacher {panel.teacher.shape[3]}; project the student into the teacher's space first"
        )
    if panel.valid is not None and panel.valid.shape != (n, height, width):
        raise ValueError(f"panel {panel.name!r}: valid is {tuple(panel.valid.shape)}, expected {(n, height, width)}")


def _draw(block, panel: Panel, boxes: list, ratios: list[float]) -> None:
    teacher, student = _array(panel.teacher), _array(panel.student)
    in_space = fit_colours(teacher[_cells(panel, teacher)])
    own = fit_colours(student[_cells(panel, student)])
    columns = {
        "image": _array(panel.images).clip(0, 1).transpose(0, 2, 3, 1),
        f"teacher, {_size(teacher)}": in_space(teacher),
    }
    if panel.projected is not None:
        projected = _array(panel.projected)
        columns[f"student as teacher, {_size(projected)}"] = in_space(projected)
    columns[f"student’s own map, {_size(student)}"] = own(student)
    block.suptitle(panel.name, fontsize=12, fontweight="bold", x=0.01, ha="left")
    height, width = panel.images.shape[-2:]
    axes = block.subplots(len(boxes), len(columns), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for i, (row, (y0, y1, x0, x1)) in enumerate(zip(axes, boxes, strict=True)):
        for axis, (heading, pictures) in zip(row, columns.items(), strict=True):
            # Every map spans the whole image, so that the crop cuts through cells where padding does.
            axis.imshow(pictures[i], extent=(0, width, height, 0), interpolation="nearest", aspect="equal")
            axis.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(heading, fontsize=9)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _size(maps: np.ndarray) -> str:
    return f"{maps.shape[1]}×{maps.shape[2]}"


def _box(panel: Panel, i: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in pixels of the part of image i that is no padding."""
    height, width = panel.images.shape[-2:]
    if panel.valid is None or not panel.valid[i].any():
        return 0, height, 0, width
    ys, xs = np.nonzero(panel.valid[i].cpu().numpy())
    return int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1


def _cells(panel: Panel, maps: np.ndarray) -> np.ndarray:
    """(n, h, w) bool: cells of `maps` whose centre is a valid pixel and whose features are all finite."""
    usable = np.isfinite(maps).all(-1)
    if panel.valid is not None:
        (height, width), (h, w) = panel.valid.shape[1:], maps.shape[1:3]
        ys, xs = ((np.arange(n) + 0.5) * side / n for n, side in ((h, height), (w, width)))
        usable &= panel.valid.cpu().numpy()[:, ys.astype(int)[:, None], xs.astype(int)]
    return usable


def fit_colours(tokens: np.ndarray):
    """A function (…, C) → RGB (…, 3): the principal components of tokens (N, C), 1st to 99th percentile → [0, 1]."""
    from sklearn.decomposition import PCA

    count = min(3, *tokens.shape)
    spread = tokens.std(0).max() if count else 0.0
    if not count or spread <= 1e-6 * np.abs(tokens).max():  # constant up to rounding: there is no direction to show
        return lambda maps: np.full((*maps.shape[:-1], 3), _NO_FEATURE)
    # A fixed seed: above some size scikit-learn's solver is a randomised one.
    pca = PCA(count, random_state=0).fit(tokens)
    low, high = np.percentile(pca.transform(tokens), (1, 99), axis=0)

    def colour(maps: np.ndarray) -> np.ndarray:
        flat = maps.reshape(-1, maps.shape[-1])
        finite = np.isfinite(flat).all(-1)
        rgb = np.full((len(flat), 3), _NO_FEATURE)
        if finite.any():
            scaled = (pca.transform(flat[finite]) - low) / np.maximum(high - low, 1e-12)
            rgb[finite, :count] = np.where(high - low > 1e-6 * (high - low).max(), scaled.clip(0, 1), _NO_FEATURE)
        return rgb.reshape(*maps.shape[:-1], 3)

    return colour
