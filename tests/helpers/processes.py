"""Runs of the command as child processes."""

import subprocess


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Wait for a run; its stdout and stderr. Fails showing them when the exit code is not `code`."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err
