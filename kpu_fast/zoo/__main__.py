"""Train the zoo: a CLIP, a GroundingDINO and a DINOv2-shaped ViT, small, from labelled images.

    python -m kpu_fast.zoo --images 'cifar10/train-*.tar' --test-images 'cifar10/test-*.tar' --out zoo

Exit codes: 0 all are there; 2 something given cannot be used, or a file not read or written; 130 interrupted (the same
command goes on).
"""

import argparse
import math
import sys
from pathlib import Path

from kpu_fast.machine import is_out_of_memory, memory_advice, missing, usable_device

NEEDED = "torch transformers tokenizers safetensors PIL tqdm torchmetrics"
NEEDED_BY_GDINO = "scipy pycocotools"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kpu_fast.zoo", description=__doc__.splitlines()[0])
    source = "a folder of class folders, .tar shards (a glob or range) with .cls, or CIFAR-10's python archive"
    parser.add_argument("--images", required=True, metavar="SOURCE", help=source)
    parser.add_argument("--test-images", required=True, metavar="SOURCE", help="others, never trained on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="gets clip/, gdino/, dinov2/, images/")
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line, where the images name none")
    parser.add_argument("--only", choices=("clip", "gdino", "dinov2"), help="this one alone")
    parser.add_argument("--minutes", type=float, help="training time of each, in place of the recipe's steps")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    args = parser.parse_args(argv)

    if problem := missing(f"{NEEDED} {NEEDED_BY_GDINO}" if args.only in (None, "gdino") else NEEDED):
        return _fail(problem)
    if args.minutes is not None and not (args.minutes > 0 and math.isfinite(args.minutes)):
        return _fail(f"--minutes {args.minutes}: expected a number above 0")
    if args.seed < 0 or (args.threads is not None and args.threads < 1):
        return _fail("--seed must be at least 0, --threads at least 1")

    import torch

    from kpu_fast.data.labelled import LabelledImages, read_class_names
    from kpu_fast.data.sources import SourceError
    from kpu_fast.zoo.build import NAMES, build_zoo
    from kpu_fast.zoo.fit import ZooError

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = usable_device(args.device)
    except ValueError as error:
        return _fail(error)
    try:
        build_zoo(
            LabelledImages(args.images),
            LabelledImages(args.test_images),
            args.out,
            classes=read_class_names(args.classes) if args.classes else None,
            only=(args.only,) if args.only else NAMES,
            minutes=args.minutes,
            device=device,
            seed=args.seed,
        )
    except (SourceError, ZooError) as error:
        return _fail(error)
    except OSError as error:  # a full disk, an image that is gone
        return _fail(f"{args.out} is not finished ({error}); when that is put right, the same command goes on")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(memory_advice(error, "With a device that is free, or --device cpu, the same command goes on"))
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _fail(error) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
