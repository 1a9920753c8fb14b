"""Train a student.

    deepspeed kpu_fast/train.py --config configs/random.json [--set path.to.key=value ...] [--resume auto|DIR]

The same file runs under `deepspeed`, `torchrun` and plain `python`, on GPUs and on a CPU.
Exit codes: 0 finished, or stopped by SIGTERM/SIGINT after writing a checkpoint; 1 another rank has ended, or a mistake
in the program; 2 a config, data, model or output that cannot be used, or too little memory; 3 a loss or weight is no
longer finite; 4 a checkpoint or another file could not be written; 130 second Ctrl-C.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

# A script's own folder comes first on sys.path, where data/ and models/ would shadow other packages of those names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

# On a CPU the threads of libgomp spin for milliseconds after every operation, and wait for one another while other work
# has their cores: beside one busy process on 2 cores a step of configs/zoo.json took 15 s; spinning less, 5 s, and no
# longer than before where there is no other work (0.56 and 0.64 s). Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

NEEDED = "torch deepspeed transformers pydantic safetensors tqdm tensorboard PIL sklearn matplotlib nvidia.dali"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, check the config, train; returns the exit code."""
    codes = __doc__[__doc__.index("Exit codes:") :]
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train one vision student from several frozen teachers.", epilog=codes
    )
    parser.add_argument("--config", required=True, help="a JSON file such as configs/random.json")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="over the config: steps=100 optimizer.lr=1e-4 teachers.*.data.batch_size=8; the value is JSON or a string",
    )
    parser.add_argument("--resume", metavar="auto|DIR", help="go on from the run's newest checkpoint, or from DIR")
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="with --resume: pass over the next N batches, one of which may have made a loss NaN",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_args(argv)
    if not 0 <= args.skip <= 10**9 or (args.skip and args.resume is None):
        return _fail(f"--skip {args.skip}: expected a number of batches, with --resume", 2)
    if importlib.util.find_spec("kpu_fast") is None:
        return _fail("not installed: kpu_fast; pip install -c constraints.txt -e '.[train]'", 2)
    import kpu_fast

    here, used = (Path(file).resolve().parent for file in (__file__, kpu_fast.__file__))
    if here != used and os.environ.get("RANK", "0") == "0":
        print(f"warning: this is {here}'s train.py, but the installed kpu_fast, which runs, is {used}", file=sys.stderr)
    from kpu_fast.machine import is_out_of_memory, memory_advice, missing

    if problem := missing(NEEDED):
        return _fail(problem, 2)
    from kpu_fast.config import ConfigError, load_config

    try:
        cfg = load_config(args.config, args.set)
    except ConfigError as error:
        return _fail(error, 2)

    from kpu_fast.engine.build import RunError
    from kpu_fast.engine.checkpoint import CheckpointError
    from kpu_fast.engine.loop import train
    from kpu_fast.engine.monitor import Diverged
    from kpu_fast.engine.run_folder import OutputError

    try:
        train(cfg, resume=args.resume, skip=args.skip)
    except (RunError, Diverged, CheckpointError, OutputError) as error:
        code = 2 if isinstance(error, RunError) else 3 if isinstance(error, Diverged) else 4
        return _fail(error, code, alone=not hasattr(error, "shared"))
    except (MemoryError, RuntimeError) as error:
        # gloo's words, wherever this rank waits for the others.
        if any(text in str(error) for text in ("Connection closed by peer", "Connection reset by peer")):
            return _fail("another rank has ended; what it said is the reason", 1, alone=True)
        if not is_out_of_memory(error):
            raise
        hint = "smaller batch_size, activation_checkpointing=true or ZeRO 2 need less; what is saved is whole"
        return _fail(memory_advice(error, hint), 2, alone=True)
    except KeyboardInterrupt:
        return _fail("interrupted; what is saved is whole: go on with --resume auto", 130)
    return 0


def _fail(error: Exception | str, code: int, alone: bool = False) -> int:
    """Print an error: on rank 0, or wherever it came up if it came up on this rank alone."""
    if alone or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a reader that has gone
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
    else:
        time.sleep(1)  # a launcher ends all ranks when one has gone, and rank 0 is to print first
    return code


def leave(code: int) -> NoReturn:
    """End this process with `code`, at once: gloo's threads now and then abort one that Python takes down in order."""
    with contextlib.suppress(OSError):  # a reader that has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        code = 1
    leave(code)
