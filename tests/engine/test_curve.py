"""The loss curves, read back from the figure that is saved."""

import pytest

figure = pytest.importorskip("matplotlib.figure")

from kpu_fast.engine.curve import save_curve  # noqa: E402


def lines(monkeypatch, folder, rows):
    """{(panel, teacher): the points of its line} of the figure that save_curve draws."""
    found, save = {}, figure.Figure.savefig

    def look(drawn, *args, **kwargs):
        for axis in drawn.axes:
            for line in axis.lines:
                found[axis.get_title().partition(":")[0], line.get_label()] = line.get_xydata().tolist()
        save(drawn, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", look)
    assert save_curve(folder, rows).read_bytes().startswith(b"\x89PNG")
    return found


def test_a_run_that_resumed_with_another_balance_has_a_line_from_there(monkeypatch, tmp_path):
    rows = [{"step": step, "clip/s2t": 1.0 / step, "loss": 3.0, "lr": 0.1} for step in (1, 2, 3)]
    rows[1]["clip/share"], rows[2]["clip/share"] = 0.25, 0.75  # the first row has none
    assert lines(monkeypatch, tmp_path, rows) == {
        ("s2t", "clip"): [[1, 1], [2, 1 / 2], [3, 1 / 3]],
        ("share", "clip"): [[2, 0.25], [3, 0.75]],
    }
