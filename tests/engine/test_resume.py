"""Runs that go on: after a kill, with other settings, with another number of ranks; and what none goes on from."""

import json
import math
import os
import shutil
import signal
import subprocess

import pytest
import torch
from processes import finish, losses, steps_done, two_ranks, wait_for, weights
from safetensors.torch import load_file

from kpu_fast.export import main as export


@pytest.mark.parametrize("moment", ["after step 3", "after step 5", "while a checkpoint is written"])
def test_killed_and_resumed_equals_never_killed(moment, whole, start, tmp_path):
    run = tmp_path / "tiny"
    first = start()
    if moment.startswith("after"):
        wait_for(lambda: steps_done(run) >= int(moment[-1]), first)
    else:
        wait_for(lambda: list((run / "checkpoints").glob(".partial-step-00000004/*")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (run / "student").exists()
    (run / "checkpoints" / ".partial-step-00000099").mkdir()
    finish(start(resume="auto"))
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)
    assert not list((run / "checkpoints").glob(".partial-*"))


def test_two_ranks_killed_and_resumed_equal_never_killed(whole, start, tmp_path):
    stage2 = "deepspeed.zero_optimization.stage=2"
    finish(start(stage2, ranks=2, output=tmp_path / "whole"))
    killed = start(stage2, launcher=two_ranks("deepspeed"), output=tmp_path / "cut")
    wait_for(lambda: steps_done(tmp_path / "cut" / "tiny") >= 3, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    subprocess.run(["pkill", "-9", "-f", f"output={tmp_path}/cut"], check=False)  # ranks that left the process group
    finish(start(stage2, launcher=two_ranks("deepspeed"), output=tmp_path / "cut", resume="auto"))
    assert losses(tmp_path / "cut" / "tiny") == losses(tmp_path / "whole" / "tiny")
    assert weights(tmp_path / "cut" / "tiny") == weights(tmp_path / "whole" / "tiny")
    assert losses(tmp_path / "whole" / "tiny")[0] != losses(whole)[0]  # two ranks see more images than one
    out = str(tmp_path / "out")
    assert export(["--run", str(tmp_path / "cut" / "tiny"), "--out", out]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights(tmp_path / "whole" / "tiny")


def test_one_rank_in_two_backwards_sees_what_two_ranks_see(start, tmp_path):
    """And goes on from the step, not from a half of it."""
    finish(start("steps=4", ranks=2, output=tmp_path / "two"))
    twice = ["gradient_accumulation_steps=2", "steps=4"]
    out, _ = finish(start(*twice))
    assert "clip: 8 images of 64x64 per rank and step, 4 at once\n  2.67 epochs in 4 steps" in out
    for one, other in zip(losses(tmp_path / "tiny"), losses(tmp_path / "two" / "tiny"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["images_per_second"] * row["step_seconds"] == pytest.approx(12) for row in rows)
    shutil.copytree(tmp_path / "tiny" / "checkpoints/step-00000002", tmp_path / "cut/tiny/checkpoints/step-00000002")
    finish(start(*twice, output=tmp_path / "cut", resume="auto"))
    assert losses(tmp_path / "cut" / "tiny") == losses(tmp_path / "tiny")[2:]
    assert weights(tmp_path / "cut" / "tiny") == weights(tmp_path / "tiny")


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (3, "bf16")])
def test_a_run_goes_on_with_another_number_of_ranks(stage, precision, start, tmp_path):
    """Two ranks, one in two backwards, two: but for rounding what two do all the way, weights and optimiser."""
    common = [f"deepspeed.zero_optimization.stage={stage}", f"precision={precision}", "checkpoint.keep=9"]
    finish(start(*common, ranks=2, output=tmp_path / "two"))
    from_two = tmp_path / "two" / "tiny" / "checkpoints" / "step-00000002"
    one = [*common, "gradient_accumulation_steps=2"]
    one_there = tmp_path / "one (2) c++"  # DeepSpeed's converter would take it for a pattern
    out, _ = finish(start(*one, output=one_there, resume=str(from_two)))
    assert "from step 2 of " in out
    assert "step-00000002, which 2 ranks wrote\n" in out
    from_one = one_there / "tiny" / "checkpoints" / "step-00000006"
    assert not list(from_one.parent.glob(".*"))
    out, _ = finish(start(*common, ranks=2, output=tmp_path / "back", resume=str(from_one)))
    assert "step-00000006, which 1 rank wrote\n" in out
    whole = losses(tmp_path / "two" / "tiny")
    for name, first in ((one_there.name, 2), ("back", 6)):
        found = losses(tmp_path / name / "tiny")
        assert len(found) == 8 - first
        for row, expected in zip(found, whole[first:], strict=True):
            assert row == pytest.approx(expected, rel=2e-5), name
    ours, theirs = (load_file(tmp_path / name / "tiny/student/model.safetensors") for name in ("back", "two"))
    far = max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in theirs)
    assert far < (1e-5 if precision == "fp32" else 2e-3)


def test_frozen_weights_are_the_checkpoints_at_zero_3_with_other_ranks(start, tmp_path):
    """Not those that the config makes anew."""
    stage3 = ["deepspeed.zero_optimization.stage=3", "steps=3", "checkpoint.every=2"]
    finish(start(*stage3, ranks=2, output=tmp_path / "two"))
    checkpoint = tmp_path / "two" / "tiny" / "checkpoints" / "step-00000002"
    for file in checkpoint.glob("state/*model_states.pt"):
        state = torch.load(file, weights_only=False)
        for fragment in state["frozen_param_fragments"].values():
            fragment.add_(1.0)
        torch.save(state, file)
    finish(start(*stage3, output=tmp_path / "one", resume=str(checkpoint)))
    before, after = (load_file(tmp_path / name / "tiny/student/model.safetensors") for name in ("two", "one"))
    frozen = [name for name in before if name.startswith("vit.blocks.")]
    assert len(frozen) > 20
    for name in frozen:
        torch.testing.assert_close(after[name], before[name] + 1.0)


def test_a_second_run_needs_resume(whole, start, tmp_path):
    shutil.copytree(whole, tmp_path / "tiny")
    _, err = finish(start(), code=2)
    assert "holds step-00000008 of an earlier run; add --resume auto" in err
    rows = (tmp_path / "tiny" / "metrics.jsonl").read_text()
    (tmp_path / "tiny" / "metrics.jsonl").write_text("not json\n" + rows + '{"step": 8, "cut')
    out, _ = finish(start(resume="auto"))  # nothing left to do: the result is written again
    assert losses(tmp_path / "tiny") == losses(whole)  # damaged lines are gone
    assert f"from step 8 of {tmp_path / 'tiny' / 'checkpoints' / 'step-00000008'}" in out
    assert weights(tmp_path / "tiny") == weights(whole)


def test_a_run_begun_from_anothers_checkpoint_may_be_started_by_the_same_command_again(whole, start, tmp_path):
    """As a job that is put back into the queue: from its own newest, with where it began on record."""
    own, base = tmp_path / "next" / "checkpoints", whole / "checkpoints" / "step-00000008"
    command = ["name=next", "steps=12", "checkpoint.keep=1", "checkpoint.keep_every=10"]
    out, _ = finish(start(*command, resume=str(whole)))
    assert f"from step 8 of {base}\n" in out
    expected = losses(tmp_path / "next"), weights(tmp_path / "next")
    shutil.rmtree(own / "step-00000012")  # stopped after step 10
    out, _ = finish(start(*command, resume=str(whole)))
    assert f"from step 10 of {own / 'step-00000010'}, the newest of this run, which began from {base}\n" in out
    assert (losses(tmp_path / "next"), weights(tmp_path / "next")) == expected
    metas = [json.loads((folder / "meta.json").read_text()) for folder in (base, *sorted(own.glob("step-*")))]
    assert [meta.get("origin") for meta in metas] == [None, *[{"checkpoint": str(base), "id": metas[0]["id"]}] * 2]


def test_settings_changed_on_resume_hold(whole, start, tmp_path):
    """More steps and another optimiser: the schedule is that of the new config, not a mixture."""
    shutil.copytree(whole, tmp_path / "tiny")
    changed = ["steps=12", "optimizer.lr=1e-4", "optimizer.weight_decay=0.5", "optimizer.betas=[0.5,0.6]"]
    changed += [
        "optimizer.eps=1e-3",
        "optimizer.clip_grad_norm=0.25",
        "objective.rec_weight=0.5",
        "student.vit.arch.registers=0",
    ]  # 0 is the default
    out, err = finish(start(*changed, resume="auto", skip=3))
    assert "its run had another objective.rec_weight, student.vit.arch.registers; this config's holds" in err
    assert "with other settings than before: objective.rec_weight 1.0 → 0.5, optimizer.betas [0.9, 0.999] → " in out
    assert "step-00000008, passing over 3 batches of each stream\n" in out
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    expected = [0.5e-4 * (1 + math.cos(math.pi * (step - 2) / 10)) for step in range(8, 12)]
    assert [row["lr"] for row in rows[8:]] == pytest.approx(expected)
    state = torch.load(
        next((tmp_path / "tiny" / "checkpoints" / "step-00000012" / "state").glob("*optim_states.pt")),
        weights_only=False,
    )
    assert state["optimizer_state_dict"]["clip_grad"] == 0.25
    groups = state["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [(tuple(group["betas"]), group["eps"]) for group in groups] == [((0.5, 0.6), 1e-3)] * 2
    resolved, before = (
        json.loads((tmp_path / "tiny" / f"config.{which}.json").read_text())["config"]
        for which in ("resolved", "until-step-00000008")
    )
    assert (resolved["steps"], before["steps"]) == (12, 8)
    streams = torch.load(tmp_path / "tiny" / "checkpoints" / "step-00000012" / "rank-0.pt")["streams"]
    seen = {name: json.loads(state)["images_seen"] for name, state in streams.items()}
    assert seen == {"clip": (12 + 3) * 4, "gdino": (12 + 3) * 2}


@pytest.mark.parametrize(
    ("damage", "overrides", "resume", "message"),
    [
        (None, ["steps=4"], "auto", "steps: found 4, but"),
        (None, [], "checkpoints/step-00000006", "holds step-00000008, which a run from there would contradict"),
        ("rank-0.pt", [], "auto", "is damaged (UnpicklingError"),
        ("meta.json", [], "auto", "meta.json cannot be used"),
        (None, ["deepspeed.zero_optimization.stage=2"], "auto", "written with zero_stage = 1, this run has 2"),
        (None, ["precision=bf16"], "auto", "written with precision = fp32, this run has bf16"),
        (None, ["seed=1"], "auto", "written with seed = 0, this run has 1"),
        (None, ["student.head_hidden=16"], "auto", "networks.student.head_hidden = 32, this run has 16"),
        (None, ["student.vit.arch.heads=4"], "auto", "written with networks.student.vit.heads = 2, this run has 4"),
        (None, ["teachers.clip.arch.num_hidden_layers=1"], "auto", "clip.arch.num_hidden_layers = 2, this run has 1"),
        (None, ["teachers.gdino=null"], "auto", "written with teachers = ['clip', 'gdino'], this run has ['clip']"),
        (None, ["objective.centre=false"], "auto", "its run had another objective.centre"),
    ],
    ids=str,
)
def test_resume_refuses_what_it_cannot_go_on_from(damage, overrides, resume, message, whole, start, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(whole, run)
    record = (run / "config.resolved.json").read_bytes()
    if damage:
        (run / "checkpoints" / "step-00000008" / damage).write_text("{}")
    resume = resume if resume == "auto" else str(run / resume)
    _, err = finish(start(*overrides, resume=resume), code=2)
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert (run / "config.resolved.json").read_bytes() == record
