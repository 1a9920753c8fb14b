"""Open-vocabulary detection: GroundingDINO's AP with its own backbone or with the student in its place."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from kpu_fast.evaluate.boxes import CocoImages, Mosaics, Truth, average_precision
from kpu_fast.evaluate.detector import STRIDE, Prompt, cast_backbone, detect_boxes, make_prompt, with_student_backbone
from kpu_fast.evaluate.encoder import Encoder, load_encoder
from kpu_fast.evaluate.images import progress, read_images
from kpu_fast.evaluate.result import EvaluateError, replaced
from kpu_fast.evaluate.zero_shot import class_names, load_tokenizer, repeated
from kpu_fast.models.hub import WeightsError, find_folder, import_transformers, load_net, read_json
from kpu_fast.models.mean_std import read_mean_std

_CLASSES = {  # of transformers, by what config.json calls itself
    "grounding-dino": "GroundingDinoForObjectDetection",
    "mm-grounding-dino": "MMGroundingDinoForObjectDetection",
}
SHORTEST, LONGEST, CANVAS, COUNT, SHOWN_ABOVE = 800, 1333, 192, 500, 0.3


class Detector:
    """A GroundingDINO with its tokenizer and normalisation.

    net: one of `_CLASSES`, in fp32 but for its image backbone (`cast_backbone`). mean, std: three numbers each, for
    images in [0, 1]. head: the teacher whose head of a student it sees through, or None.
    """

    def __init__(self, net: nn.Module, tokenizer, mean: Sequence[float], std: Sequence[float]):
        self.net, self.tokenizer, self.mean, self.std = net, tokenizer, tuple(mean), tuple(std)
        self.head: str | None = None

    def prompt(self, classes: Sequence[str], key: str = "--classes") -> Prompt:
        """`make_prompt` for this text tower. Raises EvaluateError, naming `key`, for names that make none."""
        try:
            return make_prompt(classes, self.tokenizer, self.net.config.max_text_len)
        except ValueError as error:
            raise EvaluateError(f"{key}: {error}") from error


def load_detector(
    weights: str | Path, *, device="cpu", dtype: torch.dtype = torch.float32, key="--detector"
) -> Detector:
    """GroundingDINO or MM Grounding DINO from a folder or hub id, whole.

    dtype: of its image backbone. The rest stays in fp32: boxes are refined in coordinates from 0 to 1, of which bf16
    has one every 1/256 between 0.5 and 1.
    Raises EvaluateError, naming `key`, where it is none.
    """
    try:
        hf = import_transformers(key)
        folder = find_folder(key, weights, processor=True)
        found = read_json(key, folder / "config.json").get("model_type")
        if found not in _CLASSES:
            expected = " or ".join(map(repr, _CLASSES))
            raise EvaluateError(f"{key}: {folder} holds a model of type {found!r}, expected {expected}")
        net = load_net(key, getattr(hf, _CLASSES[found]), folder, dtype=torch.float32).to(device).eval()
        if dtype != torch.float32:
            cast_backbone(net, dtype)
        mean, std = read_mean_std(key, "grounding_dino", folder)
    except WeightsError as error:
        raise EvaluateError(str(error)) from error
    return Detector(net.requires_grad_(False), load_tokenizer(key, weights), mean, std)


def see_through(detector: Detector, encoder: Encoder, teacher_name: str | None = None) -> Detector:
    """`detector` with the student of `encoder` as its backbone; teacher_name None: the only head with its maps."""
    channels = tuple(detector.net.model.backbone.conv_encoder.intermediate_channel_sizes)
    space = encoder.space(teacher_name, map_dims=channels)
    if space is None:
        raise EvaluateError(f"{encoder.name}: is a {encoder.kind}; --detector takes a student as its backbone")
    with_student_backbone(detector.net, encoder.net, space, mean=detector.mean, std=detector.std)
    detector.head = space
    return detector


def detect(
    detector: Detector,
    images: Dataset,
    classes: Sequence[str],
    *,
    size: int | None = None,
    longest: int = LONGEST,
    batch_size: int = 8,
    workers: int = 0,
    picture: Path | None = None,
    pictured: int = 6,
) -> dict:
    """COCO's AP of the boxes found for `classes` in `images`, whose items are (uint8 (H, W, 3), `Truth`).

    size: shorter side in pixels the images are resized to, the longer one at most `longest`; None: as they are.
    Images of several sizes in one batch are padded to the largest height and width, which a Swin backbone sees: AP
    then depends on `batch_size`. With 1, nothing is padded but what a student's backbone needs (multiples of 32).
    picture: a PNG of the first `pictured` images with boxes found (score above 0.3) and true ones (dashed).
    """
    prompt = detector.prompt(classes)
    device = next(detector.net.parameters()).device
    truths, results, shown = [], [], []
    collate = partial(_collate, size=size, longest=longest, mean=detector.mean, std=detector.std)
    with torch.inference_mode():
        for pixels, originals, mask, sizes, found in progress(images, batch_size, workers, "detect", collate):
            new = detect_boxes(detector.net, pixels.to(device), mask.to(device), prompt, sizes)
            for i, boxes in enumerate(new):
                if not (torch.isfinite(boxes["boxes"]).all() and torch.isfinite(boxes["scores"]).all()):
                    raise EvaluateError(f"NaN or Inf in the boxes of image {len(truths) + i}")
            # Copies: what a worker sent is an open file each, until it is gone.
            found = [Truth(*(part.clone() for part in one)) for one in found]
            shown += list(zip(originals, found, new, strict=True))[: pictured - len(shown)] if picture else []
            truths += found
            results += new
    scores = average_precision(truths, results, classes)
    if picture:
        save_picture(picture, shown, classes)
    seen = {"images": len(truths), "boxes": sum(len(t.labels) for t in truths)}
    sides = {"shortest": size, "longest": None if size is None else longest}
    return {**scores, **seen, **sides, "head": detector.head}


def _collate(samples: list, *, size: int | None, longest: int, mean, std) -> tuple:
    """Normalised images (B, 3, H, W), the images, masks (B, H, W), their sizes (B, 2) and truths.

    H and W are the largest of the batch: one image alone is not padded, as in GroundingDINO's own evaluation.
    """
    originals, truths = zip(*samples, strict=True)
    resized = [_normalise(_resize(image, size, longest), mean, std) for image in originals]
    height, width = (max(r.shape[axis] for r in resized) for axis in (1, 2))
    pixels = torch.zeros(len(resized), 3, height, width)
    mask = torch.zeros(len(resized), height, width, dtype=torch.long)
    for i, image in enumerate(resized):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = 1
    sizes = torch.tensor([image.shape[:2] for image in originals])
    return pixels, originals, mask, sizes, truths


def _resize(image, size: int | None, longest: int) -> Tensor:
    """uint8 (H, W, 3) → float32 (3, h, w) in [0, 1], keeping its proportions; bilinear, antialiased."""
    pixels = torch.tensor(image).permute(2, 0, 1).float() / 255
    if size is None:
        return pixels
    sides = pixels.shape[1:]
    scale = min(size / min(sides), longest / max(sides))
    new = [max(1, round(side * scale)) for side in sides]
    return F.interpolate(pixels[None], new, mode="bilinear", align_corners=False, antialias=True)[0]


def _normalise(pixels: Tensor, mean, std) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def save_picture(path: Path, shown: list[tuple], classes: Sequence[str]) -> None:
    """Write a PNG of (image uint8 (H, W, 3), Truth, found): found boxes coloured by class, true ones white and dashed.

    Raises EvaluateError where it cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 4.2 * rows), layout="constrained", dpi=110)
    figure.supxlabel(f"Coloured: found, score above {SHOWN_ABOVE}. White, dashed: where the objects are.", fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (image, truth, found) in zip(axes, shown, strict=False):
        axis.imshow(image)
        for box in truth.boxes.tolist():
            axis.add_patch(Rectangle(*_corner(box), fill=False, edgecolor="white", linewidth=1.2, linestyle="--"))
        keep = found["scores"] > SHOWN_ABOVE
        parts = (found[part][keep].tolist() for part in ("boxes", "scores", "labels"))
        for box, score, label in zip(*parts, strict=True):
            colour = colormaps["tab10"](label % 10)
            axis.add_patch(Rectangle(*_corner(box), fill=False, edgecolor=colour, linewidth=1.8))
            axis.text(
                *box[:2], f"{classes[label]} {score:.2f}", fontsize=8, va="bottom", backgroundcolor=(*colour[:3], 0.6)
            )
    with replaced("--picture", path) as partial:
        figure.savefig(partial, format="png")


def _corner(box: list[float]) -> tuple[tuple[float, float], float, float]:
    x0, y0, x1, y1 = box
    return (x0, y0), x1 - x0, y1 - y0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `detect` beside those of every evaluation."""
    parser.add_argument(
        "--images", required=True, metavar="SOURCE", help="labelled images to make mosaics of, or a folder"
    )
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO's JSON for the images of the folder")
    parser.add_argument("--detector", metavar="DIR", help="GroundingDINO; default: --model, with its own backbone")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line (default: the images')")
    # None: not given. An option that would do nothing is refused.
    parser.add_argument("--canvas", type=int, help=f"side of a mosaic in pixels (default {CANVAS})")
    parser.add_argument("--mosaics", type=int, help=f"how many (default {COUNT})")
    parser.add_argument(
        "--longest", type=int, help=f"most pixels of the longer side, where images are resized (default {LONGEST})"
    )
    parser.add_argument("--picture", type=Path, default=Path("detections.png"), help="default %(default)s")


def run(args: argparse.Namespace) -> dict:
    """`detect` as the command line asks for it."""
    _check(args)
    place = {"device": args.device, "dtype": args.dtype}
    if args.detector is None:
        detector = load_detector(args.model, **place, key="--model (a student needs --detector beside it)")
    else:
        encoder = load_encoder(args.model, **place)
        detector = see_through(load_detector(args.detector, device=args.device), encoder, args.teacher_name)
    if args.annotations is not None:
        images, canvas = CocoImages(args.annotations, Path(args.images), args.limit, args.seed), None
    else:
        labelled = read_images("--images", args.images, args.limit, args.seed)
        canvas = _or(args.canvas, CANVAS)
        images = Mosaics(labelled, _or(args.mosaics, COUNT), canvas, args.seed)
    size = args.size or (SHORTEST if args.annotations is not None else None)
    # Images of several sizes pad each other in a batch, which costs AP; mosaics are all of one.
    batch_size = _or(args.batch_size, 8 if args.annotations is None else 1)
    common = dict(size=size, longest=_or(args.longest, LONGEST), batch_size=batch_size, workers=args.workers)
    classes = _classes(args, images, detector)
    found = detect(detector, images, classes, picture=args.picture, **common)
    return {**found, "canvas": canvas, "batch_size": batch_size}


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _check(args: argparse.Namespace) -> None:
    """Raises EvaluateError for options that would do nothing here, and for mosaics that cannot be made."""
    if args.teacher_name is not None and args.detector is None:
        raise EvaluateError(f"--teacher-name {args.teacher_name}: there is no --detector to see through a student")
    if args.annotations is not None:
        if args.classes is not None:
            raise EvaluateError("--classes: --annotations brings its own names; leave it out")
        for option in ("canvas", "mosaics"):
            if getattr(args, option) is not None:
                raise EvaluateError(f"--{option}: --annotations brings its own images, no mosaics; leave it out")
    elif args.longest is not None and args.size is None:
        raise EvaluateError("--longest: mosaics are not resized; leave it out, or give --size")
    canvas, count = _or(args.canvas, CANVAS), _or(args.mosaics, COUNT)
    if canvas < STRIDE or canvas % STRIDE or count < 1:
        raise EvaluateError(f"--canvas {canvas} --mosaics {count}: expected a multiple of 32, and some mosaics")


def _classes(args: argparse.Namespace, images: CocoImages | Mosaics, detector: Detector) -> tuple[str, ...]:
    """Names that make a prompt. Raises EvaluateError, naming the option that brought them, where they make none."""
    if args.annotations is not None:
        key, names, alike = "--annotations", images.classes, "capitals count for nothing"
    else:
        key, names = "--images" if args.classes is None else "--classes", class_names(images.images, args.classes)
        alike = "'_' counts as a space, capitals count for nothing"
    if twice := repeated([name.strip().lower() for name in names]):  # as `make_prompt` writes them
        raise EvaluateError(
            f"{key}: the prompt names each class once, found {', '.join(map(repr, twice))} twice ({alike})"
        )
    detector.prompt(names, key)
    return names
