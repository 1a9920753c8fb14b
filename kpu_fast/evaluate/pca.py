"""A picture of what a model sees: the first three principal components of its maps as red, green and blue."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kpu_fast.data.decode import UNREADABLE, to_rgb
from kpu_fast.data.labelled import to_batch
from kpu_fast.data.sources import IMAGE_SUFFIXES, SourceError
from kpu_fast.engine.picture import Panel, fit_colours, save_feature_picture
from kpu_fast.evaluate.encoder import Encoder, load_encoder
from kpu_fast.evaluate.images import read_images
from kpu_fast.evaluate.result import EvaluateError, replaced

_COLUMN_INCHES = 2.3
_COUNT = 4
# What the head for a teacher of a kind is usually called, in part.
_USUAL = {
    "clip": "clip",
    "siglip": "siglip",
    "sam": "sam",
    "grounding_dino": "dino",
    "dinov2": "dino",
    "dinov3": "dino",
    "sentinel": "dino",
}


def pca(
    encoder: Encoder,
    images: Tensor,
    picture: Path,
    *,
    teacher: Encoder | None = None,
    teacher_name: str | None = None,
) -> dict:
    """Write a PNG, a row per image of images (B, 3, H, W) in [0, 1]; returns each map's share of variance shown.

    Maps are numbered from 0, finest first.

    Without `teacher`: the image, then each map of the encoder (in the space of `teacher_name`, if that is given). With
    `teacher`: its first map, the student's map in its space, both in the same colours, and the student's own map. Warns
    on stderr of a head that only its channels speak for, neither `teacher_name` nor what it is called.
    Raises EvaluateError for NaN or Inf, and where the picture cannot be written.
    """
    if teacher is None:
        space = None if teacher_name is None else encoder.space(teacher_name)
        maps = encoder(images, space).maps
        parts = {f"{encoder.name}, map {i}, {m.shape[1]}×{m.shape[2]}": m for i, m in enumerate(maps)}
        _check(parts)
        _save(picture, images, parts)
    else:
        target = teacher(images).maps
        channels = tuple(m.shape[3] for m in target)
        space = encoder.space(teacher_name, map_dims=channels)
        if space is None:
            raise EvaluateError(f"{encoder.name}: is a {encoder.kind}; --teacher takes a student to compare with")
        if teacher_name is None and not _is_called_after(space, teacher):
            print(
                f"warning: {encoder.name}: read through its head {space!r}, the only one with maps of {channels} "
                f"channels; if {teacher.name} was not that teacher, the picture means nothing. --teacher-name says "
                "which head is right",
                file=sys.stderr,
            )
        features = encoder(images)
        own = features.maps[encoder.net.level_for(encoder.net.head_specs[space].strides[0])]
        projected = encoder.net.project(features, space, [m.shape[1:3] for m in target]).maps[0]
        parts = {teacher.name: target[0], f"{encoder.name} as {space}": projected, encoder.name: own}
        _check(parts)
        panel = Panel(space, images, None, target[0], projected, own)
        with replaced("--picture", picture) as partial:
            save_feature_picture(partial, [panel], title=f"{_short(encoder)} beside {_short(teacher)}")
    seen = {"images": len(images), "size": images.shape[-1], "head": space, "picture": str(picture)}
    return {"shown": {name: _share(m) for name, m in parts.items()}, **seen}


def _is_called_after(space: str, teacher: Encoder) -> bool:
    space = space.lower()
    usual = _USUAL.get(teacher.kind)
    return space in Path(teacher.name).name.lower() or (usual is not None and usual in space)


def _check(maps: dict[str, Tensor]) -> None:
    for name, m in maps.items():
        if not torch.isfinite(m).all():
            raise EvaluateError(f"{name}: NaN or Inf in the map")


def _short(encoder: Encoder) -> str:
    return "/".join(Path(encoder.name).parts[-2:])


def _share(m: Tensor) -> float:
    """The part of the variance of the cells of (B, h, w, C) that three components carry."""
    from sklearn.decomposition import PCA

    tokens = m.float().cpu().flatten(0, 2).numpy()
    if not tokens.std(0).any():
        return 0.0
    return float(PCA(min(3, *tokens.shape), random_state=0).fit(tokens).explained_variance_ratio_.sum())


def _save(path: Path, images: Tensor, parts: dict[str, Tensor]) -> None:
    from matplotlib.figure import Figure

    columns = {"image": images.cpu().permute(0, 2, 3, 1).numpy()}
    for name, m in parts.items():
        tokens = m.float().cpu().numpy()
        columns[name] = fit_colours(tokens.reshape(-1, tokens.shape[-1]))(tokens)
    rows = len(images)
    size = (_COLUMN_INCHES * len(columns), _COLUMN_INCHES * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    figure.supxlabel("Colours: the first three principal components, of each column by itself.", fontsize=9)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for i, row in enumerate(axes):
        for axis, (name, pictures) in zip(row, columns.items(), strict=True):
            axis.imshow(pictures[i], interpolation="nearest")
            axis.set_axis_off()
            if i == 0:
                axis.set_title(name.rpartition("/")[2], fontsize=9)
    with replaced("--picture", path) as partial:
        figure.savefig(partial, format="png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pca` beside those of every evaluation."""
    parser.add_argument("--images", required=True, nargs="+", metavar="SOURCE", help="image files, or labelled images")
    parser.add_argument("--count", type=int, help=f"images drawn from labelled ones (default {_COUNT})")
    parser.add_argument("--teacher", metavar="DIR", help="show a student beside this teacher, in the same colours")
    parser.add_argument("--picture", type=Path, default=Path("features.png"), help="default %(default)s")


def run(args: argparse.Namespace) -> dict:
    """`pca` as the command line asks for it."""
    place = {"device": args.device, "dtype": args.dtype}
    if args.count is not None and args.count < 1:
        raise EvaluateError(f"--count {args.count}: expected at least 1")
    if args.count is not None and all(map(_is_file, args.images)):
        raise EvaluateError("--count: image files are all shown; leave it out")
    encoder = load_encoder(args.model, **place)
    teacher = None if args.teacher is None else load_encoder(args.teacher, **place, key="--teacher", sentinel=False)
    images = to_batch(_read(args.images, args.count or _COUNT, args.seed), args.size or encoder.image_size)
    return pca(encoder, images, args.picture, teacher=teacher, teacher_name=args.teacher_name)


def _is_file(source: str) -> bool:
    return Path(source).suffix.lower() in IMAGE_SUFFIXES


def _read(sources: Sequence[str], count: int, seed: int) -> list[np.ndarray]:
    images = []
    for source in sources:
        if not _is_file(source):
            drawn = read_images("--images", source, count, seed)
            try:
                images += [drawn[i][0] for i in range(len(drawn))]
            except SourceError as error:
                raise EvaluateError(f"--images: {error}") from error
            continue
        try:
            images.append(to_rgb(Image.open(source)))
        except UNREADABLE as error:
            raise EvaluateError(f"--images: {source} is not an image that can be read ({error})") from error
    return images
