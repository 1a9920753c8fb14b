"""A process in which everything is imported that a run imports; each run that it is asked for is a fork of it.

Reads JSON, one request per line: {"command": [SCRIPT, ...], "environment": {}, "folder": DIR, "printed": DIR} is
answered with the number of the new process, a number with its exit code, or null while it runs. Ends with its input,
and whatever still runs with it.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy
import torch

IMPORTED = [
    "kpu_fast.engine.loop",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "matplotlib.pyplot",
    "nvidia.dali.fn",
    "sklearn.decomposition",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.swin.modeling_swin",
]


def become(command: list[str], environment: dict[str, str], folder: str, printed: str) -> None:
    """Be the process that `python command` is, in a group of its own, printing into files."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    numpy.random.seed()  # as a process of its own would; only hashes of strings stay the server's
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(printed, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    """Serve. A fork leaves through its script's exception or exit, as any script does."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if not torch.cuda.is_available():  # a CUDA context would not outlive a fork
        for name in IMPORTED:
            importlib.import_module(name)
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, dict):
            answer = os.fork()
            if answer == 0:
                become(**request)
                return
            codes[answer] = None
        else:
            if codes[request] is None:
                pid, status = os.waitpid(request, os.WNOHANG)
                codes[request] = os.waitstatus_to_exitcode(status) if pid else None
            answer = codes[request]
        print(json.dumps(answer), file=answers, flush=True)
    for pid, code in codes.items():
        if code is None:
            with contextlib.suppress(ProcessLookupError):  # killed before it had a group of its own
                os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
