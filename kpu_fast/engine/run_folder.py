"""runs/<name>/: what was run, with which code and which libraries."""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from kpu_fast.config import Config

RESOLVED = "config.resolved.json"
_SHAPING = ("student", "teachers", "objective")  # what the trained weights, and so a checkpoint, depend on
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
LIBRARIES = ("torch", "triton", "deepspeed", *_DALI, "transformers", "numpy", "kpu_fast")


class OutputError(RuntimeError):
    """Something a run leaves behind could not be written."""


def claim_run_folder(folder: Path) -> IO:
    """Make the folder and lock it against a second run; the lock lasts as long as what is returned stays open.

    Raises OSError, naming the folder, when it cannot be written or another run is using it.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (the caller keeps it)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"output: {folder} cannot be written ({reason}); set `output` to a folder that can") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise OSError(f"output: another run is using {folder}; wait for it, or set another name") from error
    except OSError as error:  # some network file systems have no locks
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s): see that one run uses it", folder, error.strerror
        )
    return lock


def record_run(folder: Path, cfg: Config) -> None:
    """Save the config as it is used, with commit and versions. Raises OSError, naming the folder."""
    try:
        partial = folder / f".{RESOLVED}"
        partial.write_text(
            json.dumps({"config": cfg.model_dump(mode="json"), **circumstances()}, indent=2), encoding="utf-8"
        )
        os.replace(partial, folder / RESOLVED)
    except OSError as error:
        raise OSError(
            f"output: {folder} cannot be written ({error.strerror}); set `output` to a folder that can"
        ) from error


def changed_settings(folder: Path, cfg: Config) -> list[str]:
    """The keys of student, teachers and objective that the run in the folder had otherwise; [] if it tells nothing."""
    try:
        before = json.loads((folder / RESOLVED).read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    now = cfg.model_dump(mode="json")
    return sorted(differences(*({part: tree.get(part) for part in _SHAPING} for tree in (before, now))))


def differences(before: Mapping, now: Mapping) -> dict[str, tuple[object, object]]:
    """What two trees of settings have otherwise: {"student.vit.heads": (before, now)}."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        a_batch = path.startswith("teachers.") and path.count(".") == 1 and key == "data"  # no part of a model
        if not a_batch:
            yield from _leaves(value, f"{path}.{key}" if path else key)


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
    """None where git does not track this file: an installed copy may lie in the folder of another repository."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40")


def _git(folder: Path, *command: str) -> str | None:
    """What git says in the folder; None where it fails or is not here."""
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
