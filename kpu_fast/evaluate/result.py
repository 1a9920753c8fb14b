"""What an evaluation hands over: numbers with the circumstances they were measured in, as JSON."""

import argparse
import contextlib
import errno
import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from kpu_fast.machine import beside, circumstances, device_name, written_whole

_LIBRARIES = ("torchmetrics", "scikit-learn", "pycocotools")


class EvaluateError(ValueError):
    """Something cannot be evaluated as asked; the message is one line: what was found, what to do."""


def with_circumstances(task: str, scores: dict, settings: dict, device: torch.device) -> dict:
    """`scores`, followed by the settings, the date, the device, the commit and the versions they belong to."""
    facts = circumstances(_LIBRARIES)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"task": task, **scores, "settings": settings, "device": device_name(device), "date": when, **facts}


def settings_of(args: argparse.Namespace) -> dict:
    """What was asked for, as JSON can hold it."""
    plain = (bool, int, float, str, list, type(None))
    asked = {key: value for key, value in vars(args).items() if key not in ("task", "json")}
    return {key: value if isinstance(value, plain) else str(value) for key, value in asked.items()}


def write_result(result: dict, path: Path | None) -> None:
    """To `path`, replaced in one step, or to standard output. Raises EvaluateError where it cannot be written."""
    text = json.dumps(result, indent=2, allow_nan=False)
    if path is None:
        print(text, flush=True)
        return
    with replaced("--json", path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced(key: str, path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` in one step, and only if nothing went wrong.

    Raises EvaluateError, naming `key`, where it cannot be written.
    """
    try:
        with written_whole(path) as partial:
            yield partial
    except OSError as error:
        raise _unwritable(key, path, error) from error


def check_writable(key: str, path: Path) -> None:
    """Raises EvaluateError, naming `key`, where `path` cannot be written: before the work, not after it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with beside(path) as partial:
            partial.touch()
    except OSError as error:
        raise _unwritable(key, path, error) from error


def _unwritable(key: str, path: Path, error: OSError) -> EvaluateError:
    return EvaluateError(f"{key}: {path} cannot be written ({error.strerror or error})")
