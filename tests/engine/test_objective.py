"""Balancing and standardisation in a run of two ranks: resumed exactly, reported, exported in teachers' own spaces."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from processes import HELPERS, Run, finish
from safetensors.torch import load_file

COMMON = "steps=4,checkpoint.keep=9,optimizer.lr=1e-2,optimizer.warmup_steps=1"
RUNS = {  # balance, standardize, ZeRO stage, precision, backwards per step
    "famo, phi_s, ZeRO 3, fp32": ("famo", "phi_s", 3, "fp32", 1),
    "teacher_drop, meanstd, ZeRO 2, bf16": ("teacher_drop", "meanstd", 2, "bf16", 1),
    "teacher_drop, meanstd, ZeRO 3, bf16, two backwards": ("teacher_drop", "meanstd", 3, "bf16", 2),
    "famo, meanstd, ZeRO 2, fp32, on the same images": ("famo", "meanstd", 2, "fp32", 1),
}
# The first teacher on the images of the second: shares and losses keep the order of the teachers.
SHARED = ",teachers.clip.data=null,teachers.clip.images_of=gdino"


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    clock = {"time", "step_seconds", "data_wait_percent", "data_wait_rank", "images_per_second"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def statistics(run: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step-{step:08d}" / "state").glob("*model_states.pt"))
    module = torch.load(files[0], weights_only=False)["module"]
    return {key: value for key, value in module.items() if key.startswith("standardize.")}


@pytest.fixture(scope="module")
def runs(tiny, environment, tmp_path_factory) -> Path:
    """Each run whole and resumed, by two ranks that start once."""
    folder = tmp_path_factory.mktemp("runs")
    switches = [
        f"{COMMON},objective.balance={balance},objective.standardize={standardize},objective.standardize_batches=3,"
        f"deepspeed.zero_optimization.stage={stage},precision={precision},gradient_accumulation_steps={turns},"
        "deepspeed.zero_optimization.enable_sanity_checks=true"  # an export that wrote to gathered weights would end it
        + (SHARED if "same images" in name else "")
        for name, (balance, standardize, stage, precision, turns) in RUNS.items()
    ]
    finish(Run(HELPERS / "resume_worker.py", [str(tiny), str(folder), *switches], environment, folder, ranks=2))
    return folder


@pytest.mark.parametrize("number", range(len(RUNS)), ids=list(RUNS))
def test_resumed_equals_never_stopped(number, runs):
    whole, cut = (runs / str(number) / part / "tiny" for part in ("whole", "cut"))
    assert len(rows(whole)) == 4
    assert rows(cut) == rows(whole)
    assert (cut / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()
    ours, theirs = (torch.load(run / "checkpoints/step-00000004/rank-1.pt", weights_only=True) for run in (whole, cut))
    assert str(ours) == str(theirs)
    assert list(ours["streams"]) == (["gdino"] if "same images" in list(RUNS)[number] else ["clip", "gdino"])
    if "famo" in ours:
        first = torch.load(whole / "checkpoints/step-00000004/rank-0.pt", weights_only=True)
        assert torch.equal(first["famo"]["w"], ours["famo"]["w"])  # ranks agree
        assert ours["famo"]["w"].abs().max() > 0.01
        assert ours["famo"]["adam"]["state"][0]["step"] == 4


@pytest.mark.parametrize("number", range(len(RUNS)), ids=list(RUNS))
def test_shares_are_reported(number, runs):
    whole = runs / str(number) / "whole" / "tiny"
    for row in rows(whole):
        shares = row["clip/share"], row["gdino/share"]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
        clip, gdino = (sum(row[f"{name}/{term}"] for term in ("s2t", "t2s", "rec")) for name in ("clip", "gdino"))
        if "famo" in list(RUNS)[number]:
            assert row["loss"] == pytest.approx(shares[0] * clip + shares[1] * gdino, rel=1e-4)
        else:
            # clip is the furthest of both ranks and is kept, gdino by none, one or both of them
            turns = list(RUNS.values())[number][-1]
            possible = itertools.combinations_with_replacement([2 / (2 + kept) for kept in (0, 1, 2)], turns)
            assert any(shares[0] == pytest.approx(sum(several) / turns) for several in possible)
    assert "share |" not in (whole / "student" / "README.md").read_text()


@pytest.mark.parametrize("number", range(len(RUNS)), ids=list(RUNS))
def test_statistics_are_in_the_checkpoint_and_folded_into_the_export(number, runs):
    whole, cut = (runs / str(number) / part / "tiny" for part in ("whole", "cut"))
    found = statistics(whole, 4)
    assert {key.rpartition(".")[0] for key in found} == {
        "standardize.clip.x", "standardize.clip.maps.0", *(f"standardize.gdino.maps.{i}" for i in range(3))
    }  # fmt: skip
    assert {value.dtype for value in found.values()} == {torch.float32}  # also where the weights are bf16
    again = statistics(cut, 4)
    assert all(torch.equal(value, again[key]) for key, value in found.items())
    exported = load_file(whole / "student" / "model.safetensors")
    assert not any("standardize" in key for key in exported)
    # The student has hardly learnt yet: its guess in the standard space is near 0, so in the teacher's near the mean.
    mean, bias = found["standardize.clip.maps.0.mean"], exported["heads.clip.maps.0.fc2.bias"]
    assert torch.corrcoef(torch.stack([mean, bias]))[0, 1] > 0.5
