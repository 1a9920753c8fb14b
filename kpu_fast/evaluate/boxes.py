"""Images with boxes, from COCO's annotations or as mosaics of labelled images, and the average precision on them."""

import contextlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kpu_fast.data.decode import UNREADABLE, to_rgb
from kpu_fast.data.mosaic import make_mosaic
from kpu_fast.data.sources import SourceError
from kpu_fast.evaluate.images import draw
from kpu_fast.evaluate.result import EvaluateError

_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")


class Truth(NamedTuple):
    """What is in an image: boxes (n, 4) xyxy float, labels (n,) int, area (n,) float, crowd (n,) bool."""

    boxes: Tensor
    labels: Tensor
    area: Tensor
    crowd: Tensor


class CocoImages(Dataset):
    """Images with boxes as COCO describes them: [i] → (uint8 (H, W, 3), Truth).

    The pixels are as stored: EXIF orientation is not applied, since COCO's boxes refer to the stored pixels and its
    other readers (torchvision's CocoDetection) do not apply it either.

    annotations: a file such as instances_val2017.json. folder: where its images are. limit: only so many, drawn.
    classes: names of the categories, in the order of their ids. Raises EvaluateError where a file does not fit.
    """

    def __init__(self, annotations: Path, folder: Path, limit: int | None = None, seed: int = 0):
        try:
            tree = json.loads(Path(annotations).read_text(encoding="utf-8"))
            categories = sorted(tree["categories"], key=lambda category: category["id"])
            self.classes = tuple(_text(category, "name") for category in categories)
            numbers = {category["id"]: i for i, category in enumerate(categories)}
            chosen = draw(len(tree["images"]), limit, seed)
            names = {tree["images"][i]["id"]: _text(tree["images"][i], "file_name") for i in chosen}
            rows: dict[int, list] = {i: [] for i in names}
            for box in tree["annotations"]:
                if box["image_id"] in rows:
                    x, y, w, h = map(float, box["bbox"])
                    if not math.isfinite(x + y + w + h):
                        raise ValueError(f"bbox {box['bbox']} of image {box['image_id']}")
                    found = ([x, y, x + w, y + h], numbers[box["category_id"]], float(box.get("area", w * h)))
                    rows[box["image_id"]].append((*found, bool(box.get("iscrowd", 0))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluateError(
                f"--annotations: {annotations} is not COCO's JSON ({type(error).__name__}: {error}); expected images, "
                "annotations with bbox [x, y, w, h], and categories"
            ) from error
        if not names or not self.classes:
            raise EvaluateError(
                f"--annotations: {annotations} lists {len(names)} images, {len(self.classes)} categories"
            )
        self._images = [(Path(folder) / name, rows[i]) for i, name in names.items()]
        missing = [path for path, _ in self._images if not path.is_file()]
        if missing:
            raise EvaluateError(f"--images: {missing[0]} is not there, and {len(missing) - 1} more of {annotations}")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Truth]:
        path, rows = self._images[i]
        try:
            pixels = to_rgb(Image.open(path), upright=False)
        except UNREADABLE as error:
            raise SourceError(f"{path}: not an image that can be read ({error})") from error
        boxes, labels, area, crowd = zip(*rows, strict=True) if rows else ((), (), (), ())
        shaped = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return pixels, Truth(shaped, torch.tensor(labels).long(), torch.tensor(area), torch.tensor(crowd).bool())


def _text(entry: dict, key: str) -> str:
    if not isinstance(entry[key], str):
        raise ValueError(f"{key} {entry[key]!r}")
    return entry[key]


class Mosaics(Dataset):
    """`count` canvases with labelled images as objects on them: [i] → (uint8 (canvas, canvas, 3), Truth)."""

    def __init__(self, images: Dataset, count: int, canvas: int, seed: int):
        self.images, self.count, self.canvas, self.seed = images, count, canvas, seed
        self.classes = images.classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[np.ndarray, Truth]:
        pixels, boxes, labels = make_mosaic(self.images, self.seed, i, self.canvas)
        boxes, labels = torch.as_tensor(boxes, dtype=torch.float32), torch.as_tensor(labels).long()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return np.asarray(pixels), Truth(boxes, labels, area, torch.zeros(len(labels), dtype=torch.bool))


def average_precision(
    truths: Sequence[Truth], found: Iterable[dict[str, Tensor]], classes: Sequence[str]
) -> dict[str, float | None]:
    """COCO's twelve figures less three, by pycocotools: AP over IoU 0.50 to 0.95, AP at 0.50 and 0.75, by size, recall.

    found: per image {"boxes" (n, 4) xyxy, "scores" (n,), "labels" (n,)}. None where nothing of that kind is there.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = {
        "info": {},
        "images": [{"id": i} for i in range(len(truths))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
        "annotations": [
            {"image_id": i, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for i, t in enumerate(truths)
            for box, label, area, crowd in zip(
                _xywh(t.boxes), t.labels.tolist(), t.area.tolist(), t.crowd.tolist(), strict=True
            )
        ],
    }
    for number, annotation in enumerate(truth["annotations"], start=1):  # 0 means "no match" to pycocotools
        annotation["id"] = number
    results = [
        {"image_id": i, "category_id": label, "bbox": box, "score": score}
        for i, f in enumerate(found)
        for box, label, score in zip(_xywh(f["boxes"]), f["labels"].tolist(), f["scores"].tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its table
        coco, nothing = COCO(), COCO()
        coco.dataset, nothing.dataset = truth, {**truth, "annotations": []}
        coco.createIndex()
        nothing.createIndex()
        # loadRes takes no empty list.
        evaluation = COCOeval(coco, coco.loadRes(results) if results else nothing, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # −1 is its word for "no such object".
    return {name: float(v) if v >= 0 else None for name, v in zip(_STATS, evaluation.stats[: len(_STATS)], strict=True)}


def _xywh(boxes: Tensor) -> list[list[float]]:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
