"""Which checkpoints stay, and which a start goes on from, as folders that no run has written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from kpu_fast.engine.checkpoint import CheckpointError, Checkpoints, resolve_resume
from kpu_fast.engine.distributed import World


def _write(folder: Path, step: int, **meta) -> Path:
    checkpoint = folder / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps({"step": step, **meta}))
    return checkpoint


def _origin(checkpoint: Path, **other) -> dict:
    """What a run that began from `checkpoint` records."""
    written = json.loads((checkpoint / "meta.json").read_text()).get("id")
    return {"checkpoint": str(checkpoint.resolve()), "id": written} | other


@pytest.fixture
def base(tmp_path) -> Path:
    """The newest checkpoint of another run."""
    _write(tmp_path / "base" / "checkpoints", 6, id="six")
    return _write(tmp_path / "base" / "checkpoints", 8, id="eight")


@pytest.fixture
def own(tmp_path) -> Path:
    """The folder of the run's own checkpoints."""
    return tmp_path / "new" / "checkpoints"


@pytest.mark.parametrize("named", ["base", "base/checkpoints", "base/checkpoints/step-00000008", "link"])
def test_the_command_that_began_a_run_goes_on_with_it(named, base, own, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "base")
    resume = str(tmp_path / named)
    assert resolve_resume(resume, own) == base.resolve()
    _write(own, 9, origin=_origin(base))
    newest = _write(own, 10, origin=_origin(base))
    assert resolve_resume(resume, own) == newest


def test_a_beginning_of_an_older_version_is_known_by_its_path(own, tmp_path):
    old = _write(tmp_path / "old", 8)
    newest = _write(own, 9, origin=_origin(old))
    assert resolve_resume(str(old), own) == newest
    shutil.move(old, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds step-00000009, which a run from there would contradict"):
        resolve_resume(str(tmp_path / "elsewhere"), own)


def test_a_beginning_may_have_moved_or_been_pruned(base, own, tmp_path):
    newest = _write(own, 9, origin=_origin(base))
    shutil.move(base, tmp_path / "kept")
    assert resolve_resume(str(tmp_path / "kept"), own) == newest
    assert resolve_resume(str(base), own) == newest
    with pytest.raises(CheckpointError, match="/step-00000007: no checkpoint there"):
        resolve_resume(str(base.with_name("step-00000007")), own)


@pytest.mark.parametrize(
    "case", ["older", "newer", "begun anew", "from the beginning", "not all", "unreadable", "its origin's origin"]
)
def test_what_does_not_descend_from_the_named_one_is_refused(case, base, own):
    named, origin = base, _origin(base)
    first = last = {"origin": origin}
    if case == "older":
        named = base.with_name("step-00000006")
    elif case == "newer":  # the folder's newest is another one by now
        named = _write(base.parent, 10, id="ten").parent
    elif case == "begun anew":  # another run at the same place
        first = last = {"origin": _origin(base, id="eight of a run that was deleted")}
    elif case == "from the beginning":
        first = last = {}
    elif case == "not all":
        first = {"origin": _origin(base.with_name("step-00000006"))}
    elif case == "its origin's origin":
        between = _write(base.parents[2] / "between", 9, id="nine", origin=origin)
        first = last = {"origin": _origin(between)}
    _write(own, 9, **first)
    newest = _write(own, 10, **last)
    if case == "unreadable":
        (newest / "meta.json").write_text("[1")
    with pytest.raises(CheckpointError, match="holds step-00000010, which a run from there would contradict"):
        resolve_resume(str(named), own)


def test_no_run_descends_from_its_own_checkpoints(base, own):
    """Going back in a run's own course stays refused; its newest is no going back."""
    first = _write(own, 9, id="nine", origin=_origin(base))
    newest = _write(own, 10, id="ten", origin=_origin(base))
    assert resolve_resume(str(own.parent), own) == newest.resolve()
    with pytest.raises(CheckpointError, match="holds step-00000010, which a run from there would contradict"):
        resolve_resume(str(first), own)


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (2, None, [9, 10]),
        (2, 4, [4, 8, 9, 10]),  # 9: a signal came
        (1, 10, [10]),  # the newest is a milestone as well
        (3, 2, [2, 4, 6, 8, 9, 10]),
    ],
)
def test_the_newest_stay_and_those_at_multiples_of_keep_every(keep, keep_every, left, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep, World(0, 1, torch.device("cpu"), 0, None), keep_every=keep_every)
    _write(tmp_path, 3).rename(tmp_path / "step-00000004 copy")  # of a person, with no number: as before
    for step in (2, 4, 6, 8, 9, 10):
        partial = tmp_path / f".partial-step-{step:08d}"
        partial.mkdir()
        (partial / "rank-0.pt").write_bytes(b"")
        checkpoints._publish(partial, tmp_path / f"step-{step:08d}", {"step": step})
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == [f"step-{step:08d}" for step in left]
    assert (tmp_path / "latest").read_text() == "step-00000010"
