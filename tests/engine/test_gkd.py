"""Runs of the GKD recipe: resumed exactly, exported without heads, the start of a second one, kept apart from KPU."""

import json
from pathlib import Path

import pytest
import torch
from processes import HELPERS, Run, finish
from safetensors.torch import load_file

from kpu_fast.engine.trained import load_student
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.evaluate.std_gap import std_gap
from kpu_fast.models import Student

RECIPE = [
    'objective={"recipe":"gkd"}', "student.adapter=null", "student.freeze_vit=false", "student.head_hidden=1280",
    "teachers.gdino.data.fit=crop",
]  # fmt: skip
RUNS = {  # balance, ZeRO stage, precision
    "teacher_drop, ZeRO 2, fp32": ("teacher_drop", 2, "fp32"),
    "equal, ZeRO 3, bf16": ("equal", 3, "bf16"),
}


def losses(run: Path) -> list[dict]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if "/" in key or key in ("step", "loss")} for row in rows]


@pytest.fixture(scope="module")
def runs(tiny, environment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    common = ["steps=4", "checkpoint.keep=9", "optimizer.warmup_steps=1", *RECIPE]
    switches = [
        ",".join([*common, f"objective.balance={balance}", f"deepspeed.zero_optimization.stage={stage}"])
        + f",precision={precision}"
        for balance, stage, precision in RUNS.values()
    ]
    finish(Run(HELPERS / "resume_worker.py", [str(tiny), str(folder), *switches], environment, folder, ranks=2))
    return folder


@pytest.mark.parametrize("number", range(len(RUNS)), ids=list(RUNS))
def test_resumed_equals_never_stopped(number, runs):
    """The masks go on where they were: they are drawn from the generator that a checkpoint keeps."""
    whole, cut = (runs / str(number) / part / "tiny" for part in ("whole", "cut"))
    terms = {"clip/token", "clip/feature", "clip/patch", "gdino/feature", "gdino/patch"}
    assert len(losses(whole)) == 4
    assert {key for key in losses(whole)[0] if "/" in key and not key.endswith("share")} == terms
    assert losses(cut) == losses(whole)
    assert (cut / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()


@pytest.mark.parametrize("number", range(len(RUNS)), ids=list(RUNS))
def test_a_checkpoint_gives_the_student_of_the_run(number, runs):
    run = runs / str(number) / "whole" / "tiny"
    student, card, _ = load_student(run)
    exported = load_file(run / "student" / "model.safetensors")
    assert student.state_dict().keys() == exported.keys()
    assert not any(key.startswith("heads") for key in exported)
    assert all(torch.equal(value, exported[key]) for key, value in student.state_dict().items())
    assert "GKD (arXiv 2603.02554)" in card
    assert "- arxiv:2603.02554\n" in card.split("---")[1]
    assert "2508.14707" not in card
    assert "project(" not in card
    assert "H and W multiples of 16\n" in card
    assert (run / "student" / "README.md").read_text() == card
    assert exported["vit.embed.mask_token"].abs().max() > 0  # it starts at 0


def test_a_second_stage_starts_from_the_student_of_the_first(runs, start, tmp_path):
    first = runs / "0" / "whole" / "tiny" / "student"
    again = start(*RECIPE, f"student.vit.weights={first}", "student.vit.arch={}", "steps=1", "optimizer.warmup_steps=0",
                  "optimizer.lr=1e-30", "name=second")  # fmt: skip
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "features.png" in out
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "second" / "student"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_student_with_an_adapter_is_no_start(start, tmp_path):
    vit = {"dim": 32, "depth": 2, "heads": 2, "patch_size": 16, "image_size": 64}
    adapter = {"cross_attention": "flash", "interactions": 1, "inner_ratio": 1.0}
    Student(vit=vit, adapter=adapter).save_pretrained(tmp_path / "with")
    refused = start(*RECIPE, f"student.vit.weights={tmp_path / 'with'}", "student.vit.arch={}")
    _, err = refused.communicate()
    assert refused.returncode == 2
    assert "student.vit.weights" in err
    assert "with an adapter" in err


@pytest.mark.parametrize("student", [RECIPE, []], ids=["the same networks", "others"])
def test_kpu_does_not_go_on_with_a_run_of_gkd(student, runs, start):
    checkpoint = runs / "0" / "whole" / "tiny" / "checkpoints" / "step-00000002"
    kpu = 'objective={"t2s": false, "rec": false}'
    refused = start(*student, kpu, "deepspeed.zero_optimization.stage=2", resume=str(checkpoint))
    _, err = refused.communicate()
    assert refused.returncode == 2
    assert "written with objective.recipe = gkd, this run has kpu; set it back" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("override", ["objective.mask_patches=0.25", "objective.query=false"])
def test_other_settings_of_the_recipe(override, runs, start):
    """What shapes no weight may change, and is said; what does is refused."""
    checkpoint = runs / "0" / "whole" / "tiny" / "checkpoints" / "step-00000002"
    again = start(*RECIPE, override, "deepspeed.zero_optimization.stage=2", "steps=3", resume=str(checkpoint))
    _, err = again.communicate()
    assert again.returncode == (2 if "query" in override else 0), err
    assert f"its run had another {override.partition('=')[0]}" in err.replace("objective.balance, ", "")


def test_std_gap_is_kpus(runs):
    with pytest.raises(EvaluateError, match='recipe "gkd"; only KPU has a common space'):
        std_gap(runs / "0" / "whole" / "tiny")
