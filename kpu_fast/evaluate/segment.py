"""Linear probe of the maps: which class lies at each pixel, by a linear layer on frozen features."""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from kpu_fast.evaluate.encoder import Encoder, load_encoder
from kpu_fast.evaluate.images import progress
from kpu_fast.evaluate.masks import LARGEST, MaskedImages, check_apart, find_classes, to_index
from kpu_fast.evaluate.result import EvaluateError, replaced

SIZE, STEPS, LR, WEIGHT_DECAY = 512, 4000, 1e-3, 1e-2
_IGNORED = -1  # what counts in neither loss nor score
_PICTURED = 4
_MOST_CLASSES = 5000  # beyond, masks are rather numbers of objects; the table of counts grows with the square
_AT_ONCE = 16  # classes whose scores are resized together; what bounds the memory that a large mask takes


class Probe(nn.Module):
    """Batch norm without weights, then one linear layer, over all maps resized (bilinear) to the finest and joined.

    forward(maps (B, h, w, C), finest first) → (B, classes, h, w) of the first. A linear layer on joined maps is a sum
    of one for each, and commutes with the resize: so no map is resized but the classes' scores.
    """

    def __init__(self, channels: tuple[int, ...], classes: int):
        super().__init__()
        # momentum None: the mean over all batches, since what comes in does not change.
        self.norms = nn.ModuleList(nn.BatchNorm1d(c, affine=False, momentum=None) for c in channels)
        self.linears = nn.ModuleList(nn.Linear(c, classes, bias=i == 0) for i, c in enumerate(channels))
        for linear in self.linears:
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.linears[0].bias)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        total = None
        for m, norm, linear in zip(maps, self.norms, self.linears, strict=True):
            scores = linear(norm(m.flatten(0, 2))).unflatten(0, m.shape[:3]).permute(0, 3, 1, 2)
            if total is None:
                total = scores
            else:
                total = total + F.interpolate(scores, total.shape[-2:], mode="bilinear", align_corners=False)
        return total


def segment(
    encoder: Encoder,
    train: MaskedImages,
    test: MaskedImages,
    *,
    size: int = SIZE,
    steps: int = STEPS,
    lr: float = LR,
    ignore: tuple[int, ...] = (255,),
    batch_size: int = 16,
    workers: int = 0,
    teacher_name: str | None = None,
    seed: int = 0,
    picture: Path | None = None,
) -> dict:
    """Mean IoU and pixel accuracy on `test` of a `Probe` of the encoder's maps, trained on `train`.

    Images are resized to size × size, whatever their aspect. Training: AdamW, `lr` falling along a cosine,
    cross-entropy at the centre pixel of each cell of the finest map, half of the images mirrored. Test: the scores are
    resized (bilinear) to the mask's own size. Numbers in `ignore` count nowhere; the other numbers in the masks are the
    classes. The mean is over those that a test mask or a prediction has. teacher_name: in whose space and on whose
    grids; None: the encoder's own maps, of a student those that a teacher read. picture: a PNG of the first images.
    """
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    space = None if teacher_name is None else encoder.space(teacher_name)
    classes = _classes(*(find_classes(images, ignore, workers) for images in (train, test)))
    see = partial(_maps, encoder, space)
    probe = fit(see, train, classes, size=size, steps=steps, lr=lr, batch_size=batch_size, workers=workers, seed=seed)

    many = dict(num_classes=len(classes), ignore_index=_IGNORED)
    scores = MetricCollection(
        {
            "miou": MulticlassJaccardIndex(average="macro", **many),
            "iou": MulticlassJaccardIndex(average="none", zero_division=math.nan, **many),
            "pixel_accuracy": MulticlassAccuracy(average="micro", **many),
        }
    ).to(encoder.device)
    table = to_index(classes, _IGNORED)
    shown = []
    read = partial(_to_test, size=size, table=table)
    with torch.no_grad():
        for images, masks in progress(test, batch_size, workers, "segment: test", read):
            for one, mask in zip(probe(see(images)), masks, strict=True):
                found = _best(one, mask.shape)
                scores.update(found[None], mask[None].to(found.device).long())
                if picture is not None and len(shown) < _PICTURED:
                    shown.append((images[len(shown)].clone(), mask.clone(), found.cpu()))
    result = {key: value.cpu() for key, value in scores.compute().items()}
    if picture is not None:
        _save(picture, shown, len(classes))
    return {
        "miou": float(result["miou"]),
        "pixel_accuracy": float(result["pixel_accuracy"]),
        "iou": {
            str(number): None if math.isnan(iou) else iou
            for number, iou in zip(classes, result["iou"].tolist(), strict=True)
        },
        "images": len(test),
        "train_images": len(train),
        "size": size,
        "channels": [norm.num_features for norm in probe.norms],
        "head": space,
    }


def _classes(train: set[int], test: set[int]) -> list[int]:
    """Those of either, ascending. Raises EvaluateError where there is nothing to learn or to test."""
    if len(train) < 2:
        raise EvaluateError(
            f"--train-masks: hold the classes {sorted(train)} beside --ignore; two or more are to be learnt"
        )
    if not train & test:
        raise EvaluateError(
            f"--test-masks: hold the classes {sorted(test)[:5]} beside --ignore, none of --train-masks' "
            f"{sorted(train)[:5]}"
        )
    if len(both := train | test) > _MOST_CLASSES:
        raise EvaluateError(f"--train-masks, --test-masks: hold {len(both)} classes; are they numbers of objects?")
    if unknown := sorted(test - train):
        some = ", ".join(map(str, unknown[:5])) + ", …" * (len(unknown) > 5)
        told = f"{len(unknown)} of the classes are in no training mask, so their IoU is 0: {some}"
        print(f"warning: --test-masks: {told}", file=sys.stderr)
    return sorted(both)


def fit(
    see,
    train: MaskedImages,
    classes: list[int],
    *,
    size: int,
    steps: int,
    lr: float,
    batch_size: int,
    workers: int,
    seed: int,
) -> Probe:
    """A `Probe` trained on `train` and what `see`, images (B, 3, H, W) → maps, makes of it."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])[: steps * batch_size]
    maps = see(torch.zeros(1, 3, size, size))
    if batch_size * min(m.shape[1] * m.shape[2] for m in maps) < 2:
        raise EvaluateError(f"--size {size} --batch-size 1: leaves one cell to the coarsest map; batch norm needs more")
    probe = Probe(tuple(m.shape[3] for m in maps), len(classes)).to(maps[0].device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    grid = tuple(maps[0].shape[1:3])
    read = partial(_to_train, size=size, table=to_index(classes, _IGNORED), grid=grid)
    for images, truth in progress(Subset(train, order.tolist()), batch_size, workers, "segment: train", read):
        flip = torch.rand(len(images), generator=generator) < 0.5
        logits = probe(see(torch.where(flip[:, None, None, None], images.flip(3), images)))
        truth = torch.where(flip[:, None, None], truth.flip(2), truth).to(logits.device)
        optimizer.zero_grad()
        _loss(logits, truth).backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of (B, classes, h, w) and (B, h, w), a mean over the cells that count; 0 where none does."""
    counted = (truth != _IGNORED).sum().clamp(1)
    return F.cross_entropy(logits, truth, ignore_index=_IGNORED, reduction="sum") / counted


def _maps(encoder: Encoder, space: str | None, images: Tensor) -> tuple[Tensor, ...]:
    """The maps that are probed, float32, finest first; copies, since a gradient may not pass what inference mode made.

    Raises EvaluateError for NaN or Inf.
    """
    maps = encoder(images, space).maps
    if space is None and encoder.kind == "student" and encoder.net.head_specs:
        maps = tuple(maps[level] for level in encoder.net.levels_read())
    if not all(torch.isfinite(m).all() for m in maps):
        raise EvaluateError(f"{encoder.name}: NaN or Inf in the maps")
    return tuple(m.float().clone() for m in maps)


def _best(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(classes, h, w) → (H, W): the class with the highest score, resized."""
    best = None
    for first in range(0, len(scores), _AT_ONCE):
        part = F.interpolate(scores[None, first : first + _AT_ONCE], size, mode="bilinear", align_corners=False)[0]
        value, index = part.max(0)
        if best is None:
            best, found = value, index
        else:
            found = torch.where(value > best, index + first, found)
            best = torch.maximum(best, value)
    return found


def _at_cells(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W) → (h, w): what the mask has at the centre of each cell."""
    rows, columns = (
        ((torch.arange(cells) + 0.5) * side / cells).long() for cells, side in zip(grid, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def _to_train(samples: list, *, size: int, table: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """float32 (B, 3, size, size) in [0, 1]; what `table` has for the masks at the cells of a grid, int64 (B, h, w)."""
    images, masks = _to_test(samples, size=size, table=table)
    return images, torch.stack([_at_cells(mask, grid) for mask in masks]).long()


def _to_test(samples: list, *, size: int, table: Tensor) -> tuple[Tensor, list[Tensor]]:
    """float32 (B, 3, size, size) in [0, 1] and what `table` has for the masks, int32 (H, W) each."""
    images, masks = zip(*samples, strict=True)
    resized = [
        F.interpolate(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255, (size, size), mode="bicubic",
                      align_corners=False, antialias=True)
        for image in images
    ]  # fmt: skip
    return torch.cat(resized).clamp_(0, 1), [table[torch.from_numpy(mask)] for mask in masks]


def _save(path: Path, shown: list[tuple[Tensor, Tensor, Tensor]], classes: int) -> None:
    """A PNG, a row for each (image (3, H, W), true mask, found mask); what does not count is left grey."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps["tab20" if classes <= 20 else "nipy_spectral"]
    figure = Figure(figsize=(7.5, 2.5 * len(shown) + 0.3), layout="constrained", dpi=110)
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, (image, truth, found) in zip(axes, shown, strict=True):
        pictures = [np.ma.masked_less(part.numpy(), 0) for part in (truth, found)]
        aspect = truth.shape[0] / truth.shape[1]
        row[0].imshow(image.permute(1, 2, 0).numpy(), extent=(0, 1, 0, aspect))
        for axis, picture in zip(row[1:], pictures, strict=True):
            axis.set_facecolor("0.8")
            axis.imshow(
                picture,
                cmap=colours,
                vmin=0,
                vmax=max(19, classes - 1),
                interpolation="nearest",
                extent=(0, 1, 0, aspect),
            )
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ("image", "mask", "found"), strict=True):
        axis.set_title(title, fontsize=9)
    with replaced("--picture", path) as partial_file:
        figure.savefig(partial_file, format="png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segment` beside those of every evaluation."""
    for part, what in (("train", "to learn from"), ("test", "to be tested on")):
        parser.add_argument(f"--{part}-images", required=True, metavar="DIR", help=f"images {what}")
        parser.add_argument(f"--{part}-masks", required=True, metavar="DIR", help="their masks, of the same names")
    parser.add_argument(
        "--ignore", type=int, nargs="*", default=[255], metavar="N", help="numbers that count nowhere, in place of 255"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default %(default)s)")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate (default %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("segmentation.png"), help="default %(default)s")


def run(args: argparse.Namespace) -> dict:
    """`segment` as the command line asks for it."""
    if args.steps < 1 or not 0 < args.lr < math.inf:
        raise EvaluateError(f"--steps {args.steps} --lr {args.lr}: expected both above 0, and finite")
    if wrong := [number for number in args.ignore if not 0 <= number <= LARGEST]:
        raise EvaluateError(f"--ignore {wrong[0]}: no mask holds that; expected 0 to {LARGEST}")
    train, test = (
        MaskedImages(
            getattr(args, f"{part}_images"),
            getattr(args, f"{part}_masks"),
            args.limit,
            args.seed,
            keys=(f"--{part}-images", f"--{part}-masks"),
        )
        for part in ("train", "test")
    )
    check_apart(train, test)
    encoder = load_encoder(args.model, device=args.device, dtype=args.dtype)
    return segment(
        encoder,
        train,
        test,
        size=args.size or SIZE,
        steps=args.steps,
        lr=args.lr,
        ignore=tuple(args.ignore),
        batch_size=args.batch_size,
        workers=args.workers,
        teacher_name=args.teacher_name,
        seed=args.seed,
        picture=args.picture,
    )
