"""Evaluate a student, or one of its teachers, by the same command.

    python -m kpu_fast.evaluate {zero-shot,knn,linear,segment,detect,std-gap,pca} --model DIR ...

The result is JSON, on standard output or in --json FILE; progress goes to standard error.
Exit codes: 0 done; 2 a model, images or an option that cannot be used; 130 interrupted.
"""

import argparse
import importlib
import sys
from pathlib import Path

from kpu_fast.machine import is_out_of_memory, memory_advice, missing, usable_device

NEEDED = "torch transformers pydantic safetensors tqdm PIL sklearn matplotlib torchmetrics pycocotools"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, write the result; returns the exit code."""
    try:
        return _evaluate(argv)
    except KeyboardInterrupt:  # the imports take seconds, and are made in there
        return _fail("interrupted; nothing was written", 130)


def _evaluate(argv: list[str] | None) -> int:
    if problem := missing(NEEDED):
        return _fail(problem)
    tasks = {name: importlib.import_module(f"kpu_fast.evaluate.{name.replace('-', '_')}") for name in TASKS}
    args = _parser(tasks).parse_args(argv)

    import torch

    from kpu_fast.evaluate.result import EvaluateError, settings_of, with_circumstances, write_result

    settings = settings_of(args)
    try:
        _check(args)
        args.device = _device(args.device)
        args.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        scores = tasks[args.task].run(args)
        write_result(with_circumstances(args.task, scores, settings, args.device), args.json)
    except EvaluateError as error:
        return _fail(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(memory_advice(error, "--dtype bf16, smaller batches or images, or --device cpu need less"))
    return 0


TASKS = {
    "zero-shot": "classes by the text tower of CLIP or SigLIP",
    "knn": "classes by nearest neighbours of frozen features",
    "linear": "classes by logistic regression on frozen features",
    "segment": "classes of pixels by a linear layer on frozen maps",
    "detect": "boxes by GroundingDINO, with its own backbone or through the student",
    "std-gap": "spread of the teachers' features, in their own spaces and in the common one",
    "pca": "a picture of the maps' first three principal components",
}


SIZE = "of the images, in pixels, a multiple of 32 (default: the model's own, at most 224; a SAM's own)"
SIZES = {
    "detect": "shorter side of an image, in pixels (default: 800 with --annotations, mosaics as they are)",
    "segment": "that images are resized to, in pixels a side, a multiple of 32 (default: 512)",
}
BATCHES = {"detect": (None, "8 mosaics, 1 with --annotations"), "segment": (16, "16")}


def _parser(tasks: dict) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kpu_fast.evaluate", description=__doc__.splitlines()[0])
    chosen = parser.add_subparsers(dest="task", required=True)
    for name, summary in TASKS.items():
        sub = chosen.add_parser(name, help=summary, description=summary)
        if name != "std-gap":
            sub.add_argument(
                "--model",
                required=True,
                metavar="DIR",
                help="a student, a teacher of any kind or a backbone of transformers: folder or hub id",
            )
            sub.add_argument("--teacher-name", metavar="NAME", help="whose head of the student to use")
            sub.add_argument("--size", type=int, help=SIZES.get(name, SIZE))
        tasks[name].add_arguments(sub)
        add = sub.add_argument
        if name in ("zero-shot", "knn", "linear", "segment", "detect"):
            from kpu_fast.evaluate.images import default_workers

            batch, usual = BATCHES.get(name, (64, "64"))
            add("--batch-size", type=int, default=batch, help=f"images (default: {usual})")
            add("--workers", type=int, default=default_workers(), help="that read images (default %(default)s)")
            add("--limit", type=int, metavar="N", help="use N images of each source, drawn by --seed")
        add("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
        add("--device", default="auto", help='such as "cpu" or "cuda:1" (default: a GPU if there is one)')
        add("--dtype", choices=("fp32", "bf16"), default="fp32", help="to compute in (default %(default)s)")
        add("--json", type=Path, metavar="FILE", help="where the result goes (default: standard output)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises EvaluateError for a number that no evaluation can use, and a file that cannot be written."""
    from kpu_fast.evaluate.result import EvaluateError, check_writable

    for option, least in (("batch_size", 1), ("workers", 0), ("limit", 1), ("size", 32), ("longest", 32)):
        value = getattr(args, option, None)
        if value is not None and value < least:
            raise EvaluateError(f"--{option.replace('_', '-')} {value}: expected at least {least}")
    if args.task != "detect" and getattr(args, "size", None) is not None and args.size % 32:
        raise EvaluateError(f"--size {args.size}: expected a multiple of 32, such as {round(args.size / 32) * 32}")
    for option in ("json", "picture"):
        path = getattr(args, option, None)
        if path is not None:
            check_writable(f"--{option}", path)
    picture = getattr(args, "picture", None)
    if picture is not None and args.json is not None and picture.resolve() == args.json.resolve():
        raise EvaluateError(f"--json {args.json}: is the file of --picture too; give another name")


def _device(name: str):
    from kpu_fast.evaluate.result import EvaluateError

    try:
        return usable_device(name)
    except ValueError as error:
        raise EvaluateError(str(error)) from error


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
