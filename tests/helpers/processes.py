"""Runs of the command as child processes, and what they left."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

LOSSES = [f"{t}/{k}" for t in ("clip", "gdino") for k in ("s2t", "t2s", "rec")]


def two_ranks(launcher: str) -> list[str]:
    """The command of "deepspeed" or "torchrun" for two ranks on this machine, on a port nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {"deepspeed": "--num_accelerators", "torchrun": "--nproc-per-node"}[launcher]
    return [str(Path(sys.executable).parent / launcher), ranks, "2", "--master_port", port]


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
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


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
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
