import argparse
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kpu_fast.config import load_config
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.machine import slow_bf16
from kpu_fast.reproduce import __main__ as command
from kpu_fast.reproduce import ablation, report, scores, settings
from kpu_fast.reproduce.train import TrainingFailed, config_of, make_mosaics, train

SCORES = {"zero_shot": 0.5, "knn": 0.6, "linear": 0.7, "ap": 0.2}
ROOT = Path(__file__).resolve().parents[1]
CONFIG, ZOO = ROOT / "configs/zoo.json", ROOT / "zoo"
PAGE = f"# Page\n\nabove\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nbelow\n"


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
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table(references, results).split("\n")]
    assert len({len(row) for row in rows}) == 1
    assert rows[2] == ["teacher: CLIP", "75.0", "80.0", "90.0", "–", "", "", "", ""]
    assert rows[3][4] == "40.0"
    # ap: 20 and 30; the mean of the columns: 50 and 52.5
    kpu = ["50.0 ± 0.0", "60.0 ± 0.0", "70.0 ± 0.0", "25.0 ± 7.1", "51.2 ± 1.8", "11.0× ± 1.4", "3.0× ± 1.4", "2"]
    assert rows[5] == [ablation.LABELS["kpu"], *kpu]
    assert rows[6] == [ablation.LABELS["clip_only"], "50.0", "60.0", "70.0", "–", "–", "–", "–", "1"]


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    report.write_report(page, "new")
    assert page.read_text() == PAGE.replace("old", "new")


@pytest.mark.parametrize("run", ablation.RUNS)
def test_every_run_is_a_config(run):
    cfg = load_config(CONFIG, list(ablation.RUNS[run]))
    paper = {"base_a": (False, False), "base_b": (False, False), "base_c": (True, False)}
    assert (cfg.objective.t2s, cfg.objective.rec) == paper.get(run, (True, True))
    assert (cfg.student.adapter is None) == (run == "base_a")
    assert cfg.student.freeze_vit == (run != "base_a")
    assert cfg.objective.balance == {"kpu_famo": "famo", "kpu_teacher_drop": "teacher_drop"}.get(run, "equal")
    assert cfg.objective.standardize == {"kpu_phi_s": "phi_s"}.get(run, "none")
    assert set(cfg.teachers) == ({run.removesuffix("_only")} if run.endswith("_only") else {"clip", "gdino"})
    assert set(ablation.LABELS) == set(ablation.RUNS)


def test_mosaics_are_made_once_and_go_on(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "0.png")
    folder = make_mosaics(str(tmp_path / "images"), tmp_path / "mosaics", 3)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(first) == 3
    (folder / "000001.png").unlink()
    make_mosaics(str(tmp_path / "images"), folder, 3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


@pytest.fixture
def weights(tmp_path):
    """The weights' file of a student that kpu-0 may have left."""
    (tmp_path / "kpu-0/student").mkdir(parents=True)
    (tmp_path / "kpu-0/student/config.json").write_text("{}")
    file = tmp_path / "kpu-0/student/model.safetensors"
    file.write_bytes(b"weights")
    return file


def test_results_that_are_there_are_read_and_not_made_again(tmp_path, weights):
    made, path = [], tmp_path / "results/kpu-0.json"
    args = argparse.Namespace(device=torch.device("cpu"), out=tmp_path)
    for _ in range(2):
        found = scores.kept(path, weights.parent, lambda: made.append(1) or SCORES, args)
        assert found.items() >= SCORES.items()
        assert {"date", "device", "versions", "commit"} <= set(found)
    assert made == [1]
    assert report.read_results(tmp_path / "results") == {"kpu": [found]}
    path.write_text("")
    with pytest.raises(EvaluateError, match=r"kpu-0\.json: damaged"):
        scores.kept(path, weights.parent, lambda: SCORES, args)


def test_another_student_in_the_same_place_is_measured_again(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(scores, "_scores", lambda model, *_: {"knn": len((model / weights.name).read_bytes())})
    args = argparse.Namespace(device=torch.device("cpu"), out=tmp_path)

    def knn():
        return scores.score_run("base_a", tmp_path / "kpu-0", args)["knn"]

    monkeypatch.setattr(scores, "config_of", lambda *_: load_config(CONFIG, list(ablation.RUNS["base_a"])))
    assert knn() == len(b"weights")
    weights.write_bytes(b"of another training")
    assert knn() == len(b"of another training")
    path = tmp_path / "results/kpu-0.json"
    before = json.loads(path.read_text())
    del before["model_sha256"]  # as results were before it was kept
    path.write_text(json.dumps(before | {"knn": 0}))
    assert knn() == len(b"of another training")


@pytest.mark.parametrize("t2s", [True, False])
def test_a_configuration_without_a_common_space_has_no_gap(t2s, tmp_path, weights, monkeypatch):
    own = tmp_path / "own.json"
    tree = json.loads(CONFIG.read_text())
    tree["objective"] = {"t2s": t2s, "rec": t2s}
    own.write_text(json.dumps(tree))
    args = command._parser().parse_args(["--out", str(tmp_path), "--config", str(own), "--device", "cpu"])
    args.device = torch.device("cpu")
    monkeypatch.setattr(scores, "_scores", lambda *_: dict(SCORES))
    gaps = {"own": {"gap": 3.0}, "common": {"gap": 1.0} if t2s else None}
    monkeypatch.setattr("kpu_fast.evaluate.std_gap.std_gap", lambda *_, **__: gaps)
    found = scores.score_run("kpu", weights.parents[1], args)
    assert found.get("gap") == ({"own": 3.0, "common": 1.0} if t2s else None)


def test_the_conditions_name_every_commit_once():
    seen = {"train_images": 1, "test_images": 1, "date": "2026-11-28", "device": "cpu", "versions": {"torch": "2"}}
    commits = ["b" * 40 + "-dirty", "a" * 40, None, "a" * 40]
    told = report.conditions([load_config(CONFIG, [])], [seen | {"commit": commit} for commit in commits])
    assert told.endswith(", torch 2, 2026-11-28, commit aaaaaaaaaa, bbbbbbbbbb with changes, unknown.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--report", "{tmp}/none.md"], "expected a page with the lines"),
        (["--zoo", "{tmp}"], "no clip/model.safetensors; python -m kpu_fast.zoo trains one"),
        (["--device", "abacus"], "--device abacus: "),
        (["--test-images", str(ZOO / "images/tr*.tar")], "--test-images: shares 1 file with --images"),
        (["--report", "{tmp}/twice.md"], "expected a page with the lines"),
        (["--images", "{tmp}/nothing"], "nothing"),
        (["--images", "{tmp}/cifar-10-python.tar.gz:train"], "training reads image files"),
        (["--images", "{tmp}/cifar-10-python.tar.gz:test"], "training reads image files"),
        (["--images", "{tmp}/unicorns"], "--images: the zoo's teachers were never told of dragon, unicorn"),
        (["--config", "{tmp}/none.json"], "none.json"),
        (["--config", "{tmp}/gkd.json", "--runs", "kpu"], 'its objective.recipe is "gkd"; the ablation is KPU\'s'),
        (["--out", "{tmp}"], "holds files but no settings.json"),
    ],
)
def test_what_cannot_be_used_is_named_before_the_work(options, message, tmp_path, capsys):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    (tmp_path / "twice.md").write_text(PAGE + PAGE)
    for name in ("dragon", "unicorn"):
        (tmp_path / "unicorns" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "unicorns" / name / "0.png")
    gkd = {"student": {"adapter": None, "freeze_vit": False, "head_hidden": 1280}, "objective": {"recipe": "gkd"}}
    (tmp_path / "gkd.json").write_text(json.dumps({"extends": str(CONFIG), **gkd}))
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    assert command.main([*out, *(option.format(tmp=tmp_path) for option in options)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_of_an_installed_package(tmp_path, monkeypatch):
    for part, count in (("seen", 3), ("unseen", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "mypics" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / "mypics" / part / name / f"{i}.png")
    (tmp_path / "mypics/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--images", "package:mypics/seen", "--test-images", "package:mypics/unseen", "--runs", "kpu"]
    args = command._parser().parse_args([*options, "--out", str(tmp_path / "out")])
    settings.check(args)
    settings.settle(args)
    assert (args.images, args.test_images) == ("package:mypics/seen", "package:mypics/unseen")


@pytest.mark.parametrize(
    ("times", "gpu", "precision"), [(30.0, False, "fp32"), (None, False, "bf16"), (30.0, True, "bf16")]
)
def test_a_cpu_that_is_slow_in_bf16_trains_in_fp32(times, gpu, precision, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "slow_bf16", lambda: times)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = command._parser().parse_args(["--out", str(tmp_path / "out"), "--device", "cpu"])
    settings.check(args)
    assert config_of("kpu", 0, args).precision == precision
    assert ("30 times as slowly" in capsys.readouterr().out) == (precision == "fp32")
    settings.settle(args)
    for times in (None, 30.0):  # the same command on another machine goes on as it began
        monkeypatch.setattr(settings, "slow_bf16", lambda times=times: times)
        again = command._parser().parse_args(["--out", str(tmp_path / "out"), "--device", "cpu"])
        settings.check(again)
        settings.settle(again)
        assert config_of("kpu", 0, again).precision == precision


def test_figures_of_other_settings_are_not_mixed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "make_mosaics", lambda *_: tmp_path)
    monkeypatch.setattr(command, "train", lambda *_: tmp_path)
    seen = SCORES | {"train_images": 1, "test_images": 1, "date": "2026", "device": "cpu", "versions": {"torch": "2"}}
    seen["commit"] = None
    monkeypatch.setattr(scores, "score_reference", lambda *_: seen)
    monkeypatch.setattr(scores, "score_run", lambda *_: seen)
    monkeypatch.setattr(report, "read_results", lambda *_: {"kpu": [seen]})
    images = shutil.copyfile(ZOO / "images/train.tar", tmp_path / "train.tar")
    same = ["--out", str(tmp_path / "out"), "--runs", "kpu", "--images", str(images)]

    def refused(*options):
        assert command.main([*same, *options]) == 2
        return capsys.readouterr().err

    assert command.main([*same, "--seeds", "1"]) == 0
    assert command.main([*same, "--seeds", "2"]) == 0  # more seeds of the same
    assert "was made with different --steps; choose another folder" in refused("--steps", "7")
    config = json.loads(CONFIG.read_text()) | {"steps": 70}
    (tmp_path / "other.json").write_text(json.dumps(config))
    assert "made with different --config; choose" in refused("--config", str(tmp_path / "other.json"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = ["--images", str(shutil.copyfile(images, elsewhere / images.name))]
    assert command.main([*same, *moved]) == 0  # the same files in another place
    with tarfile.open(images) as before, tarfile.open(elsewhere / images.name, "w") as after:
        for member in before.getmembers()[::-1]:
            after.addfile(member, before.extractfile(member))
    assert (elsewhere / images.name).stat().st_size == images.stat().st_size
    assert "made with different --images; choose" in refused(*moved)
    (tmp_path / "out/settings.json").write_text("{")
    assert "settings.json: damaged" in refused()


def test_classes_without_names_are_the_zoos(tmp_path):
    class Images:
        classes, labels = None, [0, 9]

    assert settings.zoo_classes(Images, ZOO)[9] == "truck"
    Images.labels = [10]
    with pytest.raises(EvaluateError, match="an image is of class 10, the zoo has 10 classes"):
        settings.zoo_classes(Images, ZOO)
    Images.classes = ("fire_truck",) * 11
    assert settings.zoo_classes(Images, ZOO)[0] == "fire truck"


def test_a_training_that_leaves_no_student_is_told(tmp_path, monkeypatch):
    args = command._parser().parse_args(["--out", str(tmp_path), "--zoo", str(ZOO)])
    args.images = str(ZOO / "images/train.tar")
    for code, message in ((3, "kpu-0: the training ended with exit code 3"), (0, "kpu-0: the training was stopped")):
        script = tmp_path / "train.py"
        script.write_text(f"raise SystemExit({code})")
        monkeypatch.setattr("kpu_fast.reproduce.train.TRAIN", script)
        with pytest.raises(TrainingFailed, match=message):
            train("kpu", 0, args)


def test_a_run_of_another_configuration_is_not_gone_on_with(tmp_path):
    args = command._parser().parse_args(["--out", str(tmp_path)])
    folder = tmp_path / "kpu-0"
    (folder / "student").mkdir(parents=True)
    (folder / "student/config.json").write_text("{}")
    config = config_of("kpu", 0, args).model_dump(mode="json")
    config["source"] = "where the images were on another day"
    (folder / "config.resolved.json").write_text(json.dumps({"config": config}))
    assert train("kpu", 0, args) == folder
    config["optimizer"]["lr"] = 1.0
    (folder / "config.resolved.json").write_text(json.dumps({"config": config}))
    with pytest.raises(EvaluateError, match=r"kpu-0: was trained with different optimizer\.lr; choose another --out"):
        train("kpu", 0, args)
    config["optimizer"]["lr"] = config_of("kpu", 0, args).optimizer.lr
    for teacher in config["teachers"].values():  # as a version recorded it that did not have the key yet
        del teacher["data"]["buckets"]
    (folder / "config.resolved.json").write_text(json.dumps({"config": config}))
    assert train("kpu", 0, args) == folder
    (folder / "config.resolved.json").write_text("{")
    with pytest.raises(EvaluateError, match=r"config\.resolved\.json: damaged; remove"):
        train("kpu", 0, args)


def test_every_teacher_learns_from_the_images_that_were_checked(tmp_path):
    """Also with a configuration whose teachers have sources of their own, and a longer warm-up than there are steps."""
    tree = json.loads(CONFIG.read_text())
    for teacher in tree["teachers"].values():
        teacher["data"]["source"] = "/test/images"
    tree["optimizer"]["warmup_steps"] = 7
    (tmp_path / "own.json").write_text(json.dumps(tree))
    args = command._parser().parse_args(
        ["--out", str(tmp_path), "--config", str(tmp_path / "own.json"), "--steps", "5"]
    )
    cfg = config_of("kpu", 0, args)
    assert cfg.teachers["clip"].data.source == args.images
    assert cfg.teachers["gdino"].data.source == str(tmp_path / "mosaics")
    assert (cfg.steps, cfg.optimizer.warmup_steps) == (5, 5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_ends_the_command_ends_the_training(number, code, tmp_path):
    """The child stands for a training: it takes its time to write a checkpoint when it is told to stop."""
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(1); pathlib.Path('saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path('began').touch()\ntime.sleep(60)\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import pathlib, signal, sys\n"
        "from kpu_fast.reproduce import __main__ as command, scores, train\n"
        # A shell lets what it starts in the background ignore Ctrl-C, and the tests may run there.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"train.TRAIN = pathlib.Path({str(script)!r})\n"
        "command.make_mosaics = scores.score_reference = lambda *_: {}\n"
        "sys.exit(command.main(['--out', 'out']))\n"
    )
    process = subprocess.Popen([sys.executable, str(parent)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == code
    assert "interrupted; the same command goes on" in process.stderr.read()
    assert (tmp_path / "saved").exists()


def test_memory_that_does_not_suffice_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "make_mosaics", full)
    assert command.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory: CUDA out of memory. With a")


@pytest.mark.timeout(600)
def test_from_images_to_the_table(tmp_path, monkeypatch):
    """In another folder than the repository's, with relative paths; then again, which does nothing anew."""
    pytest.importorskip("pycocotools")
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "MOSAICS_TEST", 3)
    monkeypatch.setattr(ablation, "GAP_BATCHES", 1)
    (tmp_path / "train.tar").symlink_to(ZOO / "images/train.tar")
    with tarfile.open(ZOO / "images/test.tar") as whole, tarfile.open(tmp_path / "test.tar", "w") as part:
        for member in whole.getmembers()[:40]:  # an image and its class each: fewer than --test-limit
            part.addfile(member, whole.extractfile(member))
    (tmp_path / "page.md").write_text(PAGE)
    columns = {
        "base_a": {"zero_shot", "knn", "linear", "ap"},
        "kpu": {"zero_shot", "knn", "linear", "ap", "gap"},
        "clip_only": {"zero_shot", "knn", "linear"},
        "gdino_only": {"knn", "linear", "ap"},
    }
    asked = ["--images", "train.tar", "--test-images", "test.tar", "--seeds", "1", "--runs", *columns]
    asked += ["--out", "my runs", "--steps", "1", "--mosaics", "4", "--train-limit", "60", "--test-limit", "2000"]
    asked += ["--report", "page.md"]
    assert command.main(asked) == 0
    page = (tmp_path / "page.md").read_text()
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in page.splitlines() if row.startswith("| ")}
    for run, expected in columns.items():
        found = report.read_results(tmp_path / "my runs/results")[run][0]
        assert set(found) & {*ablation.COLUMNS, "gap"} == expected
        assert rows[ablation.LABELS[run]][1].strip() == f"{100 * found['knn']:.1f}"
    precision = "bf16" if slow_bf16() is None or torch.cuda.is_available() else "fp32"
    assert f"1 steps of 32 images of clip and 4 images of gdino in {precision}; kNN and linear learn from 60 " in page
    assert "images; 20 test images, " in page
    assert (tmp_path / "img/reproduction.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "my runs").rglob("*")}
    assert command.main(asked) == 0
    assert (tmp_path / "page.md").read_text() == page
    assert {path: path.stat().st_mtime_ns for path in before} == before
