"""runs/<name>/: what was run, with which code and which libraries."""

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from kpu_fast.config import Config
from kpu_fast.config_tree import with_older_ways
from kpu_fast.machine import circumstances, written_whole

RESOLVED = "config.resolved.json"
NOT_A_RECORD = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what a record that is none raises
_CLAIM = ".claim"
_SHAPING = ("student", "teachers", "objective")  # what the trained weights, and so a checkpoint, depend on
_VISIBLE_AFTER = 20.0  # seconds that a network file system may take to show one node what another has written


class OutputError(RuntimeError):
    """Something a run leaves behind could not be written."""


def claim_run_folder(folder: Path) -> IO:
    """Make the folder and lock it against a second run; the lock lasts as long as what is returned stays open.

    A file beside it says who has it, anew for each run: `see_claim`. Raises OSError, naming the folder, when it cannot
    be written or another run is using it.
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
        holder = read_claim(folder).partition(",")[0]
        another = f"another run{holder and f' ({holder})'}"
        raise OSError(f"output: {another} is using {folder}; wait for it, or set another name") from error
    except OSError as error:  # some network file systems have no locks
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s): see that one run uses it", folder, error.strerror
        )
    try:
        # Not in the lock itself, which on some file systems other nodes cannot read.
        (folder / _CLAIM).write_text(f"{socket.gethostname()} process {os.getpid()}, {uuid.uuid4().hex}")
    except OSError as error:
        lock.close()
        raise OSError(f"output: {folder} cannot be written ({error.strerror})") from error
    return lock


def read_claim(folder: Path) -> str:
    """Who has the folder, and a word that no other run has; "" where nobody has said so."""
    try:
        return (folder / _CLAIM).read_text()
    except OSError:
        return ""


def see_claim(folder: Path, claim: str) -> None:
    """Wait until this process finds the `claim` of rank 0 in the folder; every rank writes its part of a checkpoint.

    Raises OSError where it does not come: the folder is another one here.
    """
    deadline = time.monotonic() + _VISIBLE_AFTER
    while read_claim(folder) != claim:
        if time.monotonic() > deadline:
            raise OSError(
                f"output: {folder.absolute()} on {socket.gethostname()} is not the folder that rank 0 sees under this "
                "name; all ranks write checkpoints there, so set `output` to a folder that all nodes share"
            )
        time.sleep(0.2)


def record_run(folder: Path, cfg: Config, before: Path | None = None, step: int = 0) -> list[str]:
    """Save the config as it is used from `step` on, with commit and versions. Raises OSError, naming the folder.

    before: the folder of the run that went on to `step`. What it had otherwise is returned, as "key old → new", and its
    file is kept as config.until-step-….json.
    """
    now = cfg.model_dump(mode="json")
    old = None if before is None else recorded(before)
    changes = {} if old is None else differences(old, now)
    until = folder / f"config.until-step-{step:08d}.json"
    try:
        with written_whole(folder / RESOLVED) as partial:
            partial.write_text(json.dumps({"config": now, **circumstances()}, indent=2), encoding="utf-8")
            if before is None:
                for stale in folder.glob("config.until-step-*.json"):
                    stale.unlink()
            elif changes and not until.exists():  # else what is there now has made no step
                shutil.copyfile(before / RESOLVED, until)
    except OSError as error:
        raise OSError(
            f"output: {folder} cannot be written ({error.strerror}); set `output` to a folder that can"
        ) from error
    return [f"{key} {json.dumps(a)} → {json.dumps(b)}" for key, (a, b) in sorted(changes.items())]


def changed_settings(folder: Path, cfg: Config) -> list[str]:
    """The keys of student, teachers but for their data, and objective that the run in the folder had otherwise."""
    before, now = recorded(folder), cfg.model_dump(mode="json")
    if before is None:
        return []
    changes = differences(*({part: tree.get(part) for part in _SHAPING} for tree in (before, now)))
    return sorted(key for key in changes if not re.match(r"teachers\.[^.]+\.data\.", key))


def read_recorded(folder: Path) -> dict:
    """The config that the run in the folder was last started with, as its version took it.

    Raises one of NOT_A_RECORD.
    """
    return with_older_ways(json.loads((folder / RESOLVED).read_text(encoding="utf-8"))["config"])


def recorded(folder: Path) -> dict | None:
    """The config that the run in the folder was last started with; None if it tells nothing."""
    try:
        found = read_recorded(folder)
    except NOT_A_RECORD:
        return None
    try:  # other settings that an older version had not have their defaults
        return Config.model_validate_json(json.dumps(found)).model_dump(mode="json")
    except ValueError:
        return found


def differences(before: Mapping, now: Mapping) -> dict[str, tuple[object, object]]:
    """What two trees of settings have otherwise: {"student.vit.heads": (before, now)}."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else key)
