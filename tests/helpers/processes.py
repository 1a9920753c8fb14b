"""Runs of the command as child processes."""

import socket
import subprocess
import sys
from pathlib import Path


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
