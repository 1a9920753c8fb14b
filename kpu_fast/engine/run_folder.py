"""runs/<name>/: what was run, with which code and which libraries."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

from kpu_fast.config import Config

RESOLVED = "config.resolved.json"
LIBRARIES = ("torch", "triton", "deepspeed", "nvidia-dali-cuda130", "transformers", "numpy", "kpu_fast")


class OutputError(RuntimeError):
    """Something a run leaves behind could not be written."""


def prepare_run_folder(folder: Path, cfg: Config) -> None:
    """Make the folder and save the config as it will be used. Raises OSError, naming it, when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{RESOLVED}"
        partial.write_text(
            json.dumps({"config": cfg.model_dump(mode="json"), **circumstances()}, indent=2), encoding="utf-8"
        )
        os.replace(partial, folder / RESOLVED)
    except OSError as error:
        raise OSError(
            f"output: {folder} cannot be written ({error.strerror}); set `output` to a folder that can"
        ) from error


def circumstances() -> dict[str, object]:
    """Commit, versions and machine: what a result has to carry to mean anything."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "commit": _commit(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.platform(),
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return None
    return found.stdout.strip() or None
