"""What a run leaves about itself."""

import importlib.util
import shutil
import subprocess

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
