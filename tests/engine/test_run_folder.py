"""What a run leaves about itself."""

import json
import os

import pytest

from kpu_fast.config import load_config
from kpu_fast.engine import run_folder


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
    def begin(folder, step, *changes, before=None):
        (tmp_path / folder).mkdir(exist_ok=True)
        return run_folder.record_run(
            tmp_path / folder, load_config(tiny, list(changes)), before and tmp_path / before, step
        )

    def kept():
        found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "run").glob("config.*")}
        return {name.split(".")[1]: tree["config"]["optimizer"]["lr"] for name, tree in found.items()}

    assert begin("run", 0) == []
    assert begin("run", 0, "optimizer.lr=1e-2") == []  # nothing was made with the first
    assert begin("run", 4, "optimizer.lr=1e-2", before="run") == []
    assert begin("run", 4, "optimizer.lr=2e-3", "teachers.clip.data.batch_size=2", before="run") == [
        "optimizer.lr 0.01 → 0.002", "teachers.clip.data.batch_size 4 → 2",
    ]  # fmt: skip
    assert begin("run", 4, "optimizer.lr=3e-3", before="run")[0] == "optimizer.lr 0.002 → 0.003"
    assert kept() == {"resolved": 3e-3, "until-step-00000004": 1e-2}  # no step was made with 2e-3
    assert begin("other", 4, "optimizer.lr=5e-3", before="run") == ["optimizer.lr 0.003 → 0.005"]
    assert (tmp_path / "other" / "config.until-step-00000004.json").exists()
    changed = load_config(tiny, ["objective.rec_weight=2.0", "steps=9", "teachers.clip.data.batch_size=2"])
    assert run_folder.changed_settings(tmp_path / "run", changed) == ["objective.rec_weight"]
    begin("run", 0, "optimizer.lr=7e-3")  # begun anew
    assert kept() == {"resolved": 7e-3}


def test_what_an_older_version_had_no_setting_for_has_not_changed(tiny, tmp_path):
    cfg = load_config(tiny)
    run_folder.record_run(tmp_path, cfg)
    record = tmp_path / run_folder.RESOLVED
    tree = json.loads(record.read_text())
    for teacher in tree["config"]["teachers"].values():
        del teacher["weight"]
    record.write_text(json.dumps(tree))
    assert run_folder.changed_settings(tmp_path, cfg) == []
    assert run_folder.record_run(tmp_path, cfg, tmp_path, 4) == []
    assert not list(tmp_path.glob("config.until-*"))


def test_what_an_older_version_did_otherwise_is_a_change(tiny, tmp_path):
    cfg = load_config(tiny)
    run_folder.record_run(tmp_path, cfg)
    record = tmp_path / run_folder.RESOLVED
    tree = json.loads(record.read_text())
    del tree["config"]["objective"]["centre"]
    for teacher in tree["config"]["teachers"].values():
        del teacher["data"]["aspect_ratio_grouping"], teacher["data"]["buckets"]
    record.write_text(json.dumps(tree))
    assert run_folder.changed_settings(tmp_path, cfg) == ["objective.centre"]
    assert run_folder.record_run(tmp_path, cfg, tmp_path, 4) == [
        "objective.centre false → true", "teachers.gdino.data.aspect_ratio_grouping false → true",
    ]  # fmt: skip


def test_what_cannot_be_recorded_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    run_folder.record_run(tmp_path, load_config(tiny))
    before = (tmp_path / run_folder.RESOLVED).read_bytes()
    (tmp_path / f".{run_folder.RESOLVED}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written"):
        run_folder.record_run(tmp_path, load_config(tiny, ["steps=9"]), tmp_path, 4)
    assert (tmp_path / run_folder.RESOLVED).read_bytes() == before
