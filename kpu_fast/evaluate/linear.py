"""Linear probe: logistic regression on frozen features."""

import argparse
import math
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kpu_fast.evaluate.encoder import Encoder, load_encoder
from kpu_fast.evaluate.knn import add_image_arguments, collect_both, count_classes, read_pair, settings
from kpu_fast.evaluate.result import EvaluateError

C, MAX_ITER = 1.0, 1000


def linear(
    encoder: Encoder,
    train: Dataset,
    test: Dataset,
    *,
    size: int,
    c: float = C,
    max_iter: int = MAX_ITER,
    features: str = "x",
    batch_size: int = 64,
    workers: int = 0,
    teacher_name: str | None = None,
) -> dict:
    """Top-1 accuracy on `test` of a logistic regression (scikit-learn, L-BFGS) fitted on the features of `train`.

    Features are standardised channel by channel on `train` first. c: inverse strength of the L2 penalty. features,
    teacher_name: as `knn`'s. The result tells whether the fit converged within `max_iter` iterations.
    """
    classes = count_classes(train, test)
    _check_several(train.labels)  # before the hours that encoding may take
    space = None if teacher_name is None else encoder.space(teacher_name)
    reading = dict(size=size, batch_size=batch_size, workers=workers)
    known, asked = collect_both(encoder, train, test, task="linear", features=features, space=space, **reading)
    channels = known[0].shape[1]
    print(f"linear: fitting {len(train)} images, {channels} channels, {classes} classes", file=sys.stderr, flush=True)
    top1, iterations = regress(known, asked, classes, c=c, max_iter=max_iter)
    return {
        "top1": top1,
        "iterations": iterations,
        "converged": iterations < max_iter,
        "images": len(test),
        "train_images": len(train),
        "size": size,
        "head": space,
    }


def regress(
    known: tuple[Tensor, Tensor],
    asked: tuple[Tensor, Tensor],
    classes: int,
    *,
    c: float = C,
    max_iter: int = MAX_ITER,
) -> tuple[float, int]:
    """Top-1 accuracy on `asked` of a regression fitted on `known`, as `knn.collect_both` gives them; its iterations.

    Raises EvaluateError where `known` is of one class only.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torchmetrics.classification import MulticlassAccuracy

    (x, y), (x_test, y_test) = known, asked
    _check_several(y.tolist())
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says so
        probe.fit(x.numpy(), y.numpy())
    top1 = MulticlassAccuracy(classes, average="micro")
    top1.update(torch.from_numpy(probe.predict(x_test.numpy())), y_test)
    return float(top1.compute()), int(probe[-1].n_iter_.max())


def _check_several(labels: Sequence[int]) -> None:
    if len(set(labels)) < 2:
        raise EvaluateError("--train-images: images of one class only; there is nothing to fit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `linear` beside those of every evaluation."""
    add_image_arguments(parser)
    parser.add_argument("--c", type=float, default=C, help="inverse strength of the L2 penalty (default %(default)s)")
    parser.add_argument("--max-iter", type=int, default=MAX_ITER, help="of L-BFGS (default %(default)s)")


def run(args: argparse.Namespace) -> dict:
    """`linear` as the command line asks for it."""
    if args.max_iter < 1 or not 0 < args.c < math.inf:
        raise EvaluateError(f"--c {args.c} --max-iter {args.max_iter}: expected both above 0, and finite")
    encoder = load_encoder(args.model, device=args.device, dtype=args.dtype)
    return linear(encoder, *read_pair(args), c=args.c, max_iter=args.max_iter, **settings(args, encoder))
