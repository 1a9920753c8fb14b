"""k-nearest-neighbour classification of frozen features, votes weighed by similarity as in DINO (arXiv 2104.14294)."""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from kpu_fast.evaluate.encoder import Encoder, load_encoder, walk
from kpu_fast.evaluate.images import batches, check_apart, read_images
from kpu_fast.evaluate.result import EvaluateError

K, TEMPERATURE = 20, 0.07
# Training and test images compared at once: what bounds the memory beside the features themselves.
_CHUNK, _QUERIES = 1 << 16, 256


def knn(
    encoder: Encoder,
    train: Dataset,
    test: Dataset,
    *,
    size: int,
    k: int = K,
    temperature: float = TEMPERATURE,
    features: str = "x",
    batch_size: int = 64,
    workers: int = 0,
    teacher_name: str | None = None,
) -> dict:
    """Top-1 accuracy on `test` by the k images of `train` with the largest cosine; each votes exp(cosine/temperature).

    features: "x", or "map" for the mean over the cells of each map. teacher_name: in whose space (None: the encoder's).
    """
    classes = count_classes(train, test)
    space = None if teacher_name is None else encoder.space(teacher_name)
    reading = dict(size=size, batch_size=batch_size, workers=workers)
    known, asked = collect_both(encoder, train, test, task="knn", features=features, space=space, **reading)
    top1 = nearest(known, asked, classes, k=k, temperature=temperature, device=encoder.device)
    seen = {"images": len(test), "train_images": len(train), "size": size, "head": space}
    return {"top1": top1, "k": min(k, len(train)), **seen}


def nearest(
    known: tuple[Tensor, Tensor],
    asked: tuple[Tensor, Tensor],
    classes: int,
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
    device="cpu",
) -> float:
    """Top-1 accuracy on `asked` by the votes of `known`; both as `collect_both` gives them."""
    from torchmetrics.classification import MulticlassAccuracy

    vectors, labels = F.normalize(known[0], dim=1).to(device), known[1].to(device)
    top1 = MulticlassAccuracy(classes, average="micro")
    for some, truth in zip(asked[0].split(_QUERIES), asked[1].split(_QUERIES), strict=True):
        queries = F.normalize(some, dim=1).to(device)
        top1.update(vote(queries, vectors, labels, classes, k, temperature).cpu(), truth)
    return float(top1.compute())


def vote(queries: Tensor, known: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """(B, classes) votes of the k nearest of known (N, C), with labels (N,), for queries (B, C); all of length 1."""
    similarity, label = queries.new_empty(len(queries), 0), labels.new_empty(len(queries), 0)
    for part, of_part in zip(known.split(_CHUNK), labels.split(_CHUNK), strict=True):
        found = (queries @ part.T).topk(min(k, len(part)), dim=1)
        similarity = torch.cat([similarity, found.values], dim=1)
        label = torch.cat([label, of_part[found.indices]], dim=1)
    best = similarity.topk(min(k, similarity.shape[1]), dim=1)
    weights = ((best.values - 1) / temperature).exp()  # −1 scales all votes alike and keeps exp from overflowing
    return weights.new_zeros(len(queries), classes).scatter_add_(1, label.gather(1, best.indices), weights)


def collect_both(
    encoder: Encoder,
    train: Dataset,
    test: Dataset,
    *,
    size: int,
    task: str,
    features: str = "x",
    batch_size: int = 64,
    workers: int = 0,
    space: str | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Features (N, C) float32 and labels (N,) of all images of `train`, and of `test`, on the CPU; bars say `task`."""

    def collect(images: Dataset, name: str) -> tuple[Tensor, Tensor]:
        read = batches(images, size, batch_size=batch_size, workers=workers, description=f"{task}: {name}")
        parts = [
            (vectors.cpu(), labels.clone())  # a copy: what a worker sent is an open file, until it is gone
            for vectors, labels in walk(encoder, read, features, space)
        ]
        return torch.cat([vectors for vectors, _ in parts]), torch.cat([labels for _, labels in parts])

    return collect(train, "train"), collect(test, "test")


def count_classes(train: Dataset, test: Dataset) -> int:
    """How many classes the sets number. Raises EvaluateError where they name them differently, or there is only one."""
    if train.classes and test.classes and train.classes != test.classes:
        raise EvaluateError(
            f"the classes of the test images {list(test.classes)[:5]} are not those of the images to learn from, "
            f"{list(train.classes)[:5]}; numbers would mean different things"
        )
    classes = int(max(max(train.labels), max(test.labels))) + 1
    if classes < 2:
        raise EvaluateError("the images to learn from and to test on are of one class only; nothing can be told apart")
    return classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `knn` beside those of every evaluation."""
    add_image_arguments(parser)
    parser.add_argument("--k", type=int, default=K, help="neighbours that vote (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of a vote (default %(default)s)")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Images to learn from, images to be tested on, and which features of theirs."""
    parser.add_argument(
        "--train-images", required=True, metavar="SOURCE", help="labelled images whose classes are known"
    )
    parser.add_argument("--test-images", required=True, metavar="SOURCE", help="labelled images, never trained on")
    parser.add_argument("--features", choices=("x", "map"), default="x", help='"map": the mean of each map, joined')


def run(args: argparse.Namespace) -> dict:
    """`knn` as the command line asks for it."""
    if args.k < 1 or not 0 < args.temperature < math.inf:
        raise EvaluateError(
            f"--k {args.k} --temperature {args.temperature}: expected k of at least 1, a finite temperature above 0"
        )
    encoder = load_encoder(args.model, device=args.device, dtype=args.dtype)
    return knn(encoder, *read_pair(args), k=args.k, temperature=args.temperature, **settings(args, encoder))


def read_pair(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The images of --train-images and --test-images. Raises EvaluateError where they share a file."""
    check_apart(args.train_images, args.test_images)
    sources = {"--train-images": args.train_images, "--test-images": args.test_images}
    return tuple(read_images(key, source, args.limit, args.seed) for key, source in sources.items())


def settings(args: argparse.Namespace, encoder: Encoder) -> dict:
    """What `knn` and `linear` both take from the command line."""
    return dict(
        size=args.size or encoder.image_size,
        features=args.features,
        batch_size=args.batch_size,
        workers=args.workers,
        teacher_name=args.teacher_name,
    )
