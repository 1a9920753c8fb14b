"""What a run leaves about itself."""

import importlib.util
import json
import shutil
import subprocess

import pytest

from kpu_fast.config import load_config
from kpu_fast.engine import run_folder


def test_the_commit_is_of_the_repository_that_tracks_this_code(tmp_path):
    def git(*command):
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        done = subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    copy = shutil.copy(run_folder.__file__, tmp_path / "installed.py")
    spec = importlib.util.spec_from_file_location("installed", copy)
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    assert installed.circumstances()["commit"] is None
    git("init")
    git("commit", "--allow-empty", "--message", "someone else's")
    assert installed.circumstances()["commit"] is None
    git("add", "installed.py")
    git("commit", "--message", "ours")
    assert installed.circumstances()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "installed.py").write_text("changed")
    assert installed.circumstances()["commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_a_claim_is_seen_where_it_was_made_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_VISIBLE_AFTER", 0.3)
    claims = []
    for _ in range(2):
        with run_folder.claim_run_folder(tmp_path / "run"):
            claims.append(run_folder.read_claim(tmp_path / "run"))
            run_folder.see_claim(tmp_path / "run", claims[-1])
            with pytest.raises(OSError, match=r"another run \(.* process \d+\) is using"):
                run_folder.claim_run_folder(tmp_path / "run")
    assert claims[0] != claims[1]
    for folder in (tmp_path / "run", tmp_path / "another"):
        with pytest.raises(OSError, match=f"{folder} on .* is not the folder that rank 0 sees"):
            run_folder.see_claim(folder, claims[0])


def test_the_settings_of_every_part_of_a_run_are_kept(tiny, tmp_path):
    def begin(step, *changes):
        return run_folder.record_run(tmp_path, load_config(tiny, list(changes)), step)

    def kept(name):
        return json.loads((tmp_path / name).read_text())["config"]["optimizer"]["lr"]

    assert begin(0) == {}
    assert begin(0, "optimizer.lr=1e-2") == {}  # nothing was made with the first
    assert begin(4, "optimizer.lr=1e-2") == {}
    assert begin(4, "optimizer.lr=2e-3", "teachers.clip.data.batch_size=2") == {
        "optimizer.lr": (1e-2, 2e-3), "teachers.clip.data.batch_size": (4, 2),
    }  # fmt: skip
    assert begin(4, "optimizer.lr=3e-3")["optimizer.lr"] == (2e-3, 3e-3)  # no step was made with 2e-3
    assert sorted(path.name for path in tmp_path.glob("config.*")) == [
        "config.resolved.json", "config.until-step-00000004.json",
    ]  # fmt: skip
    assert (kept("config.until-step-00000004.json"), kept("config.resolved.json")) == (1e-2, 3e-3)
    assert run_folder.changed_settings(tmp_path, load_config(tiny, ["objective.rec_weight=2.0", "steps=9"])) == [
        "objective.rec_weight"
    ]
