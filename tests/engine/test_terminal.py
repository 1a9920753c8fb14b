import io
import sys

import pytest

from kpu_fast.engine.terminal import terminal_may_go


class Gone(io.StringIO):
    """A stream without a reader."""

    def write(self, *_):
        raise BrokenPipeError

    flush = write


@pytest.mark.parametrize("stream", [Gone(), None, io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_no_stream_makes_a_print_fail(stream, monkeypatch):
    """No reader; a terminal closed before the start; a name that is not ASCII."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal_may_go():
        for file in (sys.stdout, sys.stderr):
            print("ä.jpg", file=file, flush=True)
            assert file.isatty() is False
    assert sys.stdout is stream


def test_what_can_be_written_is_and_other_errors_come_through(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with terminal_may_go():
        print("step 3", flush=True)
    assert stream.getvalue() == "step 3\n"
    stream.close()
    with terminal_may_go(), pytest.raises(ValueError, match="closed file"):
        print("step 4")
