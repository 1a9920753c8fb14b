"""Train, evaluate, write.

    python -m kpu_fast.reproduce --images SOURCE --test-images SOURCE [--runs kpu base_a ...] [--seeds 3]

Every run and every evaluation leaves its own file below --out; what is there is not done again, so an interrupted
command goes on where it was. The test images are read by the evaluation only.
Exit codes: 0 done; 2 an option, images or a folder that cannot be used; 1 a training failed (its own message says why);
130 or 143 interrupted.
"""

import argparse
import signal
import sys
from pathlib import Path

from kpu_fast.evaluate.__main__ import NEEDED as EVALUATION
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.machine import is_out_of_memory, memory_advice, missing
from kpu_fast.reproduce import ablation, report, scores
from kpu_fast.reproduce.settings import check, settle
from kpu_fast.reproduce.train import TrainingFailed, config_of, make_mosaics, train
from kpu_fast.train import NEEDED as TRAINING

NEEDED = f"{TRAINING} {EVALUATION} scipy"
ROOT = Path(__file__).resolve().parents[2]


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that a training in progress is stopped on the way out."""


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, write; returns the exit code."""
    args = _parser().parse_args(argv)
    if problem := missing(NEEDED):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        check(args)
        settle(args)
        make_mosaics(args.images, args.out / "mosaics", args.mosaics)
        references = {name: scores.score_reference(name, args) for name in ablation.REFERENCES}
        for seed in range(args.seeds):
            for run in args.runs:
                scores.score_run(run, train(run, seed, args), args)
        results = report.read_results(args.out / "results")
        every = [*references.values(), *(result for seeds in results.values() for result in seeds)]
        told = report.conditions([config_of(run, 0, args) for run in results], every)
        text = f"{report.table(references, results)}\n\n{told}"
        print(text)
        if args.report:
            report.write_report(args.report, text)
            report.save_curves(args.report.parent / "img/reproduction.png", args.out)
    except (EvaluateError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {memory_advice(error, 'With a device that is free the same command goes on')}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Terminated) as stop:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(*_) -> None:
    raise _Terminated


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kpu_fast.reproduce", description="The paper's ablation, small.")
    add = parser.add_argument
    zoo = ROOT / "zoo"
    add("--images", default=str(zoo / "images/train.tar"), help="labelled images to train on (labels: kNN and linear)")
    add("--test-images", default=str(zoo / "images/test.tar"), help="labelled images that nothing is trained on")
    add("--runs", nargs="+", choices=ablation.RUNS, default=list(ablation.RUNS), help="default: all")
    add("--seeds", type=int, default=3, help="trainings of each run (default %(default)s)")
    add("--steps", type=int, help="of each training (default: the configuration's)")
    add("--mosaics", type=int, default=8000, help="images for GroundingDINO to teach on (default %(default)s)")
    add("--train-limit", type=int, default=5000, help="images that kNN and linear learn from (default %(default)s)")
    add("--test-limit", type=int, default=2000, help="images to test on (default %(default)s)")
    add("--zoo", type=Path, default=zoo, metavar="DIR", help="the teachers (default: the repository's)")
    add("--config", type=Path, default=ROOT / "configs/zoo.json", help="of the trainings (default: configs/zoo.json)")
    add("--out", type=Path, default=Path("runs/reproduce"), help="default %(default)s")
    add("--report", type=Path, metavar="PAGE", help="also write the table between the marker lines of this page")
    add("--device", default="auto", help="of the evaluations (default: a GPU if there is one, as the trainings)")
    parser.set_defaults(precision=None)  # the configuration's, unless `check` finds that this CPU is slow in it
    return parser


if __name__ == "__main__":
    sys.exit(main())
