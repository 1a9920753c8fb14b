import numpy as np
import pytest
from PIL import Image

from kpu_fast import reproduce
from kpu_fast.config import load_config

SCORES = {"zero_shot": 0.5, "knn": 0.6, "linear": 0.7, "ap": 0.2}
PAGE = f"# Page\n\nabove\n{reproduce.MARKS[0]}\nold\n{reproduce.MARKS[1]}\nbelow\n"


def test_the_table_is_mean_and_deviation_over_seeds():
    references = {
        "clip": {"zero_shot": 0.75, "knn": 0.8, "linear": 0.9},
        "gdino": {"ap": 0.4},
        "dinov2": {"knn": 0.5, "linear": 0.6},
    }
    results = {
        "kpu": [
            SCORES | {"gap": {"own": 10.0, "common": 2.0}},
            SCORES | {"ap": 0.3, "gap": {"own": 12.0, "common": 4.0}},
        ],
        "clip_only": [{"zero_shot": 0.5, "knn": 0.6, "linear": 0.7}],
    }
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in reproduce.table(references, results).split("\n")
    ]
    assert len({len(row) for row in rows}) == 1
    assert rows[2] == ["teacher: CLIP", "75.0", "80.0", "90.0", "–", "", "", "", ""]
    assert rows[3][4] == "40.0"
    # ap: 20 and 30; the mean of the columns: 50 and 52.5
    kpu = ["50.0 ± 0.0", "60.0 ± 0.0", "70.0 ± 0.0", "25.0 ± 7.1", "51.2 ± 1.8", "11.0×", "3.0×", "2"]
    assert rows[5] == [reproduce.LABELS["kpu"], *kpu]
    assert rows[6] == [reproduce.LABELS["clip_only"], "50.0", "60.0", "70.0", "–", "–", "–", "–", "1"]


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    reproduce.write_report(page, "new")
    assert page.read_text() == PAGE.replace("old", "new")


@pytest.mark.parametrize("run", reproduce.RUNS)
def test_every_run_is_a_config(run):
    cfg = load_config(reproduce.CONFIG, list(reproduce.RUNS[run]))
    paper = {"base_a": (None, False, False), "base_b": (True, False, False), "base_c": (True, True, False)}
    adapter, t2s, rec = paper.get(run, (True, True, True))
    assert (cfg.student.adapter is not None or None, cfg.objective.t2s, cfg.objective.rec) == (adapter, t2s, rec)
    assert cfg.student.freeze_vit == (run != "base_a")
    assert set(cfg.teachers) == ({run.removesuffix("_only")} if run.endswith("_only") else {"clip", "gdino"})
    assert set(reproduce.LABELS) == set(reproduce.RUNS)


def test_mosaics_are_made_once_and_go_on(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "0.png")
    folder = reproduce.make_mosaics(str(tmp_path / "images"), tmp_path / "mosaics", 3)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(first) == 3
    (folder / "000001.png").unlink()
    reproduce.make_mosaics(str(tmp_path / "images"), folder, 3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_results_that_are_there_are_read_and_not_made_again(tmp_path):
    made = []
    for _ in range(2):
        found = reproduce._kept(tmp_path / "results/kpu-0.json", lambda: made.append(1) or SCORES)
        assert found == SCORES
    assert made == [1]
    assert reproduce.read_results(tmp_path / "results") == {"kpu": [SCORES]}


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--seeds", "0"], "--seeds 0"), (["--report", "{tmp}/none.md"], "expected a page with the lines")],
)
def test_what_cannot_be_used_is_named(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "ZOO", tmp_path)
    for name in reproduce.REFERENCES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert reproduce.main([option.format(tmp=tmp_path) for option in options]) == 2
    assert message in capsys.readouterr().err


def test_without_a_zoo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "ZOO", tmp_path)
    assert reproduce.main([]) == 2
    assert "python -m kpu_fast.zoo trains them" in capsys.readouterr().err
