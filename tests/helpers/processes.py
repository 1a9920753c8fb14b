"""Runs of the command as child processes, and what they left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "kpu_fast" / "train.py"
HELPERS = Path(__file__).parent
LOSSES = [f"{t}/{k}" for t in ("clip", "gdino") for k in ("s2t", "t2s", "rec")]


class Run:
    """A script in a process of its own for each rank, forked from one in which everything is imported already.

    Has what `finish` and `wait_for` need of a Popen. Ranks meet as under torchrun, but nothing watches over them: one
    that fails leaves the others waiting. What they print lands in files of `folder`, which they run in.
    """

    server: subprocess.Popen | None = None

    def __init__(
        self, script: Path, arguments: list[str], environment: Mapping[str, str], folder: Path, ranks: int = 1
    ):
        places = [{}]
        if ranks > 1:
            meet = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            places = [meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.printed = folder / f"printed-{len(list(folder.glob('printed-*')))}"
        self.printed.mkdir()
        if Run.server is None:  # what it imports reads some of its environment then: threads, the hub
            quiet = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # asking whether there is a GPU must not begin to use it
            Run.server = subprocess.Popen(
                [sys.executable, str(HELPERS / "fork_server.py")], env={**environment, **quiet}, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        request = {"command": [str(script), *arguments], "folder": str(folder), "printed": str(self.printed)}
        self.pids = [self._ask(request | {"environment": {**environment, **place}}) for place in places]
        self.pid = self.pids[0]

    def poll(self) -> int | None:
        """The exit code, the first other than 0, once all ranks have ended."""
        codes = [self._ask(pid) for pid in self.pids]
        return None if None in codes else next(filter(None, codes), 0)

    returncode = property(poll)

    def wait(self, timeout: float = 240) -> int:
        """Until all ranks have ended; kills them and fails, showing what they said, where they take too long."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                said = (self.printed / "stderr").read_text()[-4000:]
                self.kill()
                raise AssertionError(f"not ended after {timeout} s\n{said}")
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait; stdout and stderr of all ranks."""
        self.wait(timeout)
        return (self.printed / "stdout").read_text(), (self.printed / "stderr").read_text()

    def send_signal(self, number: int) -> None:
        """To every rank that is still there."""
        for pid in self.pids:
            if self._ask(pid) is None:
                os.kill(pid, number)

    def kill(self) -> None:
        """All ranks, and what they have started."""
        for pid in self.pids:
            if self._ask(pid) is None:
                os.killpg(pid, signal.SIGKILL)
        self.wait()

    @staticmethod
    def _ask(request: dict | int) -> int | None:
        print(json.dumps(request), file=Run.server.stdin, flush=True)
        answer = Run.server.stdout.readline()
        assert answer, f"the fork server has ended with exit code {Run.server.wait()}"
        return json.loads(answer)


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
