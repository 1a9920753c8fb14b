"""What a run says, without depending on anybody who listens."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminal_may_go() -> Iterator[None]:
    """Inside, writing to sys.stdout and sys.stderr never raises OSError or UnicodeError.

    A Ctrl-C in `train.py 2>&1 | tee log` ends tee as well, and whatever is printed from then on has no reader.
    """
    with contextlib.redirect_stdout(_Unfailing(sys.stdout)), contextlib.redirect_stderr(_Unfailing(sys.stderr)):
        yield


def say_from_handler(line: str) -> None:
    """Write a line to stderr from a signal handler, where Python's own streams may be in the middle of a write."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


class _Unfailing:
    """A text stream whose write and flush swallow what they cannot do; all else is the stream's own."""

    def __init__(self, stream):
        # Python's streams are None where the process was started with its terminal closed.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (as long as the process)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, UnicodeError):  # a file's name need not be text
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
