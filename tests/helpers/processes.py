"""Runs of the command as child processes, and what they left."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "kpu_fast" / "train.py"
HELPERS = Path(__file__).parent
LOSSES = [f"{t}/{k}" for t in ("clip", "gdino") for k in ("s2t", "t2s", "rec")]


# What a run imports, 5 of the 8 seconds that one of a few tiny steps takes.
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


class Run:
    """A script in a process of its own for each rank, forked from one in which everything is imported already.

    Has what `finish` and `wait_for` need of a Popen. Ranks meet as under torchrun, but nothing watches over them: one
    that fails leaves the others waiting. What they print lands in files of `folder`, which they run in.
    """

    def __init__(
        self, script: Path, arguments: list[str], environment: Mapping[str, str], folder: Path, ranks: int = 1
    ):
        context = multiprocessing.get_context("forkserver")
        if not torch.cuda.is_available():  # a CUDA context would not outlive a fork
            context.set_forkserver_preload(IMPORTED)
        places = [{}]
        if ranks > 1:
            meet = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            places = [meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        number = len(list(folder.glob("printed-*")))
        self.printed = folder / f"printed-{number}"
        self.printed.mkdir()
        command = [str(script), *arguments]
        self.processes = [
            context.Process(target=_run, args=(command, {**environment, **place}, folder, self.printed))
            for place in places
        ]
        # The server keeps what it was started with; what it imports reads some of it then.
        with mock.patch.dict(os.environ, environment):
            for process in self.processes:
                process.start()
        self.pid = self.processes[0].pid

    def poll(self) -> int | None:
        """The exit code, the first other than 0, once all ranks have ended."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    returncode = property(poll)

    def wait(self, timeout: float = 240) -> int:
        """Until all ranks have ended, or subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.printed), timeout)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait; stdout and stderr of all ranks."""
        self.wait(timeout)
        return (self.printed / "stdout").read_text(), (self.printed / "stderr").read_text()

    def send_signal(self, number: int) -> None:
        """To every rank that is still there."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        """All ranks."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def _run(command: list[str], environment: dict[str, str], folder: Path, printed: Path) -> None:
    """Be the process that `python command` is."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def free_port() -> str:
    """One of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def two_ranks(launcher: str) -> list[str]:
    """The command of "deepspeed" or "torchrun" for two ranks on this machine."""
    ranks = {"deepspeed": "--num_accelerators", "torchrun": "--nproc-per-node"}[launcher]
    return [str(Path(sys.executable).parent / launcher), ranks, "2", "--master_port", free_port()]


def finish(process: subprocess.Popen | Run, code: int = 0) -> tuple[str, str]:
    """Wait for a run; its stdout and stderr. Fails showing them when the exit code is not `code`."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def losses(run: Path) -> list[tuple]:
    """Each step's number, terms and total."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], *(row[key] for key in [*LOSSES, "loss"])) for row in rows]


def weights(run: Path) -> bytes:
    """The exported student's."""
    return (run / "student" / "model.safetensors").read_bytes()


def wait_for(condition, process: subprocess.Popen | Run, seconds: float = 120) -> None:
    """Until condition() while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.005)


def steps_done(run: Path) -> int:
    """So far."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0
