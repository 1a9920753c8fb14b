"""The command as its users run it: finished, killed, stopped, diverged, misused."""

import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import finish, two_ranks
from safetensors.torch import load_file

from kpu_fast.export import main as export

LOSSES = [f"{t}/{k}" for t in ("clip", "gdino") for k in ("s2t", "t2s", "rec")]


def losses(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], *(row[key] for key in [*LOSSES, "loss"])) for row in rows]


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.005)


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def whole(tiny, environment, tmp_path_factory) -> Path:
    """A run of 8 steps that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    train = Path(__file__).parents[2] / "kpu_fast" / "train.py"
    command = [sys.executable, str(train), "--config", str(tiny), "--set", f"output={output}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (output / "stdout").write_text(done.stdout)
    (output / "stderr").write_text(done.stderr)
    return output / "tiny"


def test_a_run_leaves_what_its_owner_expects(whole):
    from kpu_fast.models import Student

    resolved = json.loads((whole / "config.resolved.json").read_text())
    assert resolved["config"]["teachers"]["clip"]["data"]["crop_scale"] == [0.2, 1.0]  # defaults are written out
    assert resolved["versions"]["torch"] == torch.__version__
    assert "commit" in resolved
    assert [row[0] for row in losses(whole)] == list(range(1, 9))
    assert list((whole / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["latest", "step-00000006", "step-00000008"]
    assert (whole / "checkpoints" / "latest").read_text() == "step-00000008"
    for picture in ("features.png", "losses.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")
        assert str(whole / picture) in (whole.parent / "stdout").read_text()
    bar = (whole.parent / "stderr").read_text()
    assert all(part in bar for part in ("clip ", "gdino ", "img/s", "data "))
    student = Student.from_pretrained(whole / "student")
    features = student.project(student(torch.rand(1, 3, 64, 64)), "clip")
    assert features.x.shape == (1, 24)
    card = (whole / "student" / "README.md").read_text()
    assert "| clip/s2t |" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card  # the ViT is random


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


def test_a_checkpoint_becomes_the_student_that_its_run_would_have_left(whole, tmp_path, capsys):
    assert export(["--run", str(whole), "--out", str(tmp_path / "last")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'last'}: the student of step-00000008\n"
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "last" / name).read_bytes() == (whole / "student" / name).read_bytes()
    out = str(tmp_path / "before")
    assert export(["--run", str(whole), "--checkpoint", "step-00000006", "--out", out]) == 0
    assert weights(whole) != (tmp_path / "before" / "model.safetensors").read_bytes()
    assert "- 6 steps, fp32" in (tmp_path / "before" / "README.md").read_text()


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (None, ["--checkpoint", "step-00000007"], "step-00000007: not in"),
        (None, ["--head", "clip"], "--head: belongs to --student"),
        (None, ["--batch", "3"], "--batch: belongs to --student"),
        (None, ["--out", "student.onnx"], "--out student.onnx: expected a folder with --run"),
        (None, ["--run", "nothing"], "nothing: is no folder of a run"),
        ("config.resolved.json", [], "this version of kpu_fast cannot read it"),
        ("checkpoints/step-00000008/meta.json", [], "this version of kpu_fast cannot read it (KeyError: 'networks')"),
        ("checkpoints/step-00000008/state/mp_rank_00_model_states.pt", [], "does not load (RuntimeError"),
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_exported_is_one_line(damage, arguments, message, whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "tiny")
    if damage:
        (run / damage).write_text('{"config": {}}')
    assert export(["--run", str(run), "--out", str(tmp_path / "out"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_nodes_that_share_no_folder_do_not_start(tiny, environment, tmp_path):
    """Each rank in a folder of its own, as on two nodes where `output` is on their own disks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    train = Path(__file__).parents[2] / "kpu_fast" / "train.py"
    nodes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        (tmp_path / rank).mkdir()
        nodes.append(
            subprocess.Popen(
                [sys.executable, str(train), "--config", str(tiny), "--set", "output=runs"], cwd=tmp_path / rank,
                env=environment | place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    _, err = finish(nodes[0], code=2)
    finish(nodes[1], code=2)
    assert "is not the folder that rank 0 sees under this name" in err
    assert "(rank 1)" in err
    assert str(tmp_path / "1" / "runs" / "tiny") in err


def test_two_ranks_killed_and_resumed_equal_never_killed(whole, start, tmp_path):
    stage2 = "deepspeed.zero_optimization.stage=2"
    finish(start(stage2, launcher=two_ranks("deepspeed"), output=tmp_path / "whole"))
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
    finish(start("steps=4", launcher=two_ranks("torchrun"), output=tmp_path / "two"))
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
    finish(start(*common, launcher=two_ranks("torchrun"), output=tmp_path / "two"))
    from_two = tmp_path / "two" / "tiny" / "checkpoints" / "step-00000002"
    one = [*common, "gradient_accumulation_steps=2"]
    one_there = tmp_path / "one (2) c++"  # DeepSpeed's converter would take it for a pattern
    out, _ = finish(start(*one, output=one_there, resume=str(from_two)))
    assert "from step 2 of " in out
    assert "step-00000002, which 2 ranks wrote\n" in out
    from_one = one_there / "tiny" / "checkpoints" / "step-00000006"
    assert not list(from_one.parent.glob(".*"))
    out, _ = finish(start(*common, launcher=two_ranks("torchrun"), output=tmp_path / "back", resume=str(from_one)))
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
    finish(start(*stage3, launcher=two_ranks("torchrun"), output=tmp_path / "two"))
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


def test_sigterm_writes_a_checkpoint_and_exits_0(whole, start, tmp_path):
    run = tmp_path / "tiny"
    first = start("checkpoint.every=1000")
    wait_for(lambda: steps_done(run) >= 3, first)
    first.send_signal(signal.SIGTERM)
    out, _ = finish(first)
    stopped = steps_done(run)
    assert f"stopped after step {stopped}; go on with --resume auto" in out
    assert 3 <= stopped < 8
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped:08d}"
    finish(start("checkpoint.every=1000", resume="auto"))
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)


def test_a_second_ctrl_c_seconds_later_stops_at_once(tiny, environment, tmp_path):
    """In the middle of a step that does not end: nothing more is written."""
    worker = Path(__file__).parents[1] / "helpers" / "endless_step_worker.py"
    command = [sys.executable, str(worker), str(tiny), str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line == "in step 3\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    time.sleep(3.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert err.splitlines()[-1] == "error: interrupted; what is saved is whole: go on with --resume auto"
    assert (tmp_path / "tiny" / "checkpoints" / "latest").read_text() == "step-00000002"


@pytest.mark.parametrize("stop", [signal.SIGINT, None], ids=["Ctrl-C", "no signal"])
def test_a_terminal_that_is_gone_ends_no_run(stop, start, tmp_path):
    """`2>&1 | tee log`: Ctrl-C ends tee too, and whatever the run says from then on has no reader."""
    run = tmp_path / "tiny"
    process = start("checkpoint.every=1000", "steps=100000" if stop else "steps=8")
    wait_for(lambda: steps_done(run) >= 3, process)
    process.stdout.close()
    process.stderr.close()
    if stop:
        process.send_signal(stop)
    assert process.wait(timeout=120) == 0
    assert (run / "checkpoints" / "latest").read_text() == f"step-{steps_done(run):08d}"
    if not stop:
        assert steps_done(run) == 8
        assert (run / "losses.png").exists()


def test_a_tilde_in_output_is_the_home_folder(start, tmp_path):
    at_home = ["env", f"HOME={tmp_path}", sys.executable]
    out, _ = finish(start("steps=1", "optimizer.warmup_steps=0", launcher=at_home, output=Path("~/runs")))
    assert f"student  {tmp_path / 'runs' / 'tiny' / 'student'}" in out
    assert not (tmp_path / "~").exists()


def test_zero_3_under_torchrun_trains_and_exports(start, tmp_path):
    launcher = two_ranks("torchrun")
    out, _ = finish(start("deepspeed.zero_optimization.stage=3", "precision=bf16", "steps=3", launcher=launcher))
    assert "student  " in out
    assert "clip: 4 images of 64x64 per rank and step (8 on all)" in out
    assert "  2.00 epochs in 3 steps, from " in out
    exported = load_file(tmp_path / "tiny" / "student" / "model.safetensors")
    assert all(t.numel() > 0 and t.isfinite().all() for t in exported.values())
    assert export(["--run", str(tmp_path / "tiny"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights(tmp_path / "tiny")
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["data_wait_rank"] in (0, 1) for row in rows)


@pytest.mark.parametrize(("stage", "turns"), [(1, 1), (1, 2), (2, 2)])
def test_gradients_accumulated_in_fp32_are_every_teachers(stage, turns, start, tmp_path):
    """DeepSpeed's BF16_Optimizer, which stage 1 gets with fp32, by itself keeps those of one forward."""
    rows = {}
    common = ["precision=bf16", "steps=2", f"gradient_accumulation_steps={turns}"]
    common += [f"deepspeed.zero_optimization.stage={stage}"]
    for name, dtype in (("bf16", "bf16"), ("fp32", "fp32")):
        finish(start(*common, f"name={name}", f"deepspeed.data_types.grad_accum_dtype={dtype}"))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    first, second = zip(*rows.values(), strict=True)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=2e-3)
    assert second[0]["loss"] == pytest.approx(second[1]["loss"], rel=2e-3)


def test_every_switch_at_once_trains(start, tmp_path):
    """bf16, activation checkpointing, the deformable adapter and ZeRO 2."""
    switches = ["precision=bf16", "activation_checkpointing=true", "deepspeed.zero_optimization.stage=2", "steps=3"]
    finish(start(*switches, "student.adapter.cross_attention=deformable"))
    exported = load_file(tmp_path / "tiny" / "student" / "model.safetensors")
    assert {t.dtype for t in exported.values()} == {torch.bfloat16}
    assert all(torch.isfinite(torch.tensor(row)).all() for row in losses(tmp_path / "tiny"))


@pytest.mark.parametrize("adapter", ["flash", "deformable"])
def test_photographs_of_both_orientations_are_learned_from(adapter, start, photos, tmp_path):
    """GroundingDINO's batches lie one way or the other: both shapes go through teacher, student and losses."""
    for number, path in enumerate(sorted(photos.iterdir())):
        image = Image.open(path)
        (tmp_path / "both").mkdir(exist_ok=True)
        (image.transpose(Image.Transpose.ROTATE_90) if number % 2 else image).save(tmp_path / "both" / path.name)
    run = ["steps=4", f"source={tmp_path / 'both'}", f"student.adapter.cross_attention={adapter}"]
    finish(start(*run))
    finish(start(*run, "name=one", "teachers.gdino.data.aspect_ratio_grouping=false"))
    grouped, one = (losses(tmp_path / name) for name in ("tiny", "one"))
    assert all(map(math.isfinite, itertools.chain(*grouped)))
    clip, gdino = slice(1, 4), slice(4, 7)
    assert grouped[0][clip] == one[0][clip]
    assert grouped[0][gdino] != one[0][gdino]


def test_a_loss_that_is_not_finite_stops_the_run(start, tmp_path):
    _, err = finish(start("optimizer.lr=1e30", "optimizer.clip_grad_norm=null", "optimizer.warmup_steps=0"), code=3)
    assert err.splitlines()[-1].startswith("error: step ")
    assert "clip/s2t = nan" in err or "clip/t2s = nan" in err or "= inf" in err
    assert "The last good checkpoint is none: no step was saved; if a batch is to blame, --resume auto --skip N" in err
    assert not list((tmp_path / "tiny" / "checkpoints").glob("step-*"))


def test_a_full_disk_keeps_the_last_good_checkpoint(start, tmp_path, environment):
    """RLIMIT_FSIZE stands for the full disk: writing beyond it fails as ENOSPC does."""
    run = tmp_path / "tiny"
    finish(start("steps=4"))
    kept = run / "checkpoints" / "step-00000004"
    before = {p: p.read_bytes() for p in kept.rglob("*.pt")}
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$0" "$@"', sys.executable]
    _, err = finish(start("steps=6", launcher=limited, resume="auto"), code=4)
    assert "the checkpoint of step 6 was not written" in err
    assert f"the last good checkpoint is {kept}" in err
    assert {p: p.read_bytes() for p in kept.rglob("*.pt")} == before
    assert len(before) == 3
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000004"]
    finish(start("steps=6", resume="auto"))


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


@pytest.mark.parametrize(
    ("overrides", "resume", "message"),
    [
        (["source=EMPTY"], None, "EMPTY"),
        (["source=/no/such/folder"], None, "/no/such/folder"),
        (["output=/proc/nowhere"], None, "output: /proc/nowhere/tiny cannot be written"),
        (["teachers.clip.weights=openai/no-such-model", "teachers.clip.arch={}"], None, "teachers.clip.weights"),
        (["student.vit.weights=facebook/no-such-model", "student.vit.arch={}"], None, "facebook/no-such-model"),
        (["teachers.clip.arch.hiden_size=32"], None, "hiden_size"),
        (["student.vit.arch.dimm=32"], None, "dimm"),
        (["student.vit.arch.heads=0"], None, "student: ViT: heads must be 1 or more, got 0"),
        (["teachers.clip.arch.num_channels=1"], None, "teachers.clip: does not take images of 64×64"),
        (["student.attention=fa3"], None, "fa3"),
        (["optimizer.impl=apex"], None, "optimizer.impl"),
        (["student.adapter.interactions=3"], None, "student: Adapter: interactions 3"),
        (["deepspeed.zero_optimization.stagee=2"], None, "deepspeed: DeepSpeed cannot use this block"),
        (["student.head_hidden=1000000000000"], None, "out of memory: "),
        (["teachers.clip.data.batch_size=1000000000000"], None, "out of memory: "),
        ([], "/no/such/run", "--resume /no/such/run: no checkpoint there"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_run_says_so_and_exits_2(overrides, resume, message, start, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    overrides = [o.replace("EMPTY", str(tmp_path / "EMPTY")) for o in overrides]
    _, err = finish(start(*overrides, resume=resume), code=2)
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_a_deepspeed_key_that_nobody_knows_is_named(start):
    _, err = finish(start('deepspeed={"zero": {"stage": 2}}', "steps=2"))
    assert "deepspeed.zero: no key that kpu_fast knows" in err


def test_bf16_without_zero_takes_the_steps_that_bf16_with_zero_takes(start, tmp_path):
    """At stage 0 DeepSpeed takes a step of its own before the first, which must leave nothing behind."""
    found = []
    for stage in (0, 1):
        switches = [
            "precision=bf16",
            "steps=4",
            "optimizer.weight_decay=100",
            f"deepspeed.zero_optimization.stage={stage}",
        ]
        finish(start(*switches, output=tmp_path / str(stage)))
        found.append([row[-1] for row in losses(tmp_path / str(stage) / "tiny")])
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_fewer_images_than_ranks(start, photos, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "0.jpg", tmp_path / "one")
    launcher = two_ranks("deepspeed")
    process = start(f"source={tmp_path / 'one'}", launcher=launcher)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "1 usable image" in errors[0]
    assert "2 ranks" in errors[0]


def test_bad_images_are_left_out_and_counted(start, photos, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(photos, source)
    jpeg = (photos / "0.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (source / "text.jpg").write_text("not an image")
    out, _ = finish(start(f"source={source}", "steps=2"))
    assert "2 left out" in out
    assert "cut.jpg" in out
    assert "text.jpg" in out


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
    assert "step-00000008, passing over 3 batches of each teacher\n" in out
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


def test_a_second_run_at_once_is_refused_and_a_lost_image_is_named(start, photos, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(photos, source)
    first = start(f"source={source}", "steps=100000", "checkpoint.every=20")
    wait_for(lambda: steps_done(tmp_path / "tiny") >= 21, first)
    _, err = finish(start(f"source={source}", resume="auto"), code=2)
    assert f"another run ({socket.gethostname()} process {first.pid}) is using {tmp_path / 'tiny'}" in err
    (source / "3.jpg").unlink()
    _, err = finish(first, code=2)
    last = err.splitlines()[-1]
    assert last.startswith("error: teachers.")
    assert "3.jpg" in last
    assert "The last good checkpoint is" in last


def test_a_rank_that_cannot_write_stops_all_ranks(tiny, environment, tmp_path):
    """Disk full on rank 1 only, in DeepSpeed's file and in ours: every rank raises, none waits for another."""
    worker = Path(__file__).parents[1] / "helpers" / "full_disk_worker.py"
    launcher = two_ranks("torchrun")
    done = subprocess.run(
        [*launcher, str(worker), str(tiny), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert len(said) == 4
    assert all("No space left on device (rank 1)" in line for line in said)
    assert not list((tmp_path / "checkpoints").iterdir())


ZERO_1 = 'deepspeed={"zero_optimization": {"stage": 1}}'
GRADIENT = "the gradient is not finite, though every loss is"
WEIGHT = "a trained weight is NaN or Inf"
NO_NORM = ['deepspeed={"zero_optimization": {"stage": 1, "compute_grad_norm": false}}', "optimizer.clip_grad_norm=null"]


@pytest.mark.parametrize(
    ("switches", "waits", "message"),
    [
        (["deepspeed={}"], False, GRADIENT),  # stage 0: the step is taken, and the weights are NaN
        (["deepspeed={}", "optimizer.clip_grad_norm=null"], False, WEIGHT),  # there is no norm to look at
        ([ZERO_1], True, GRADIENT),  # DeepSpeed reads the norm, and leaves the step out
        (["precision=bf16", ZERO_1], False, GRADIENT),  # taken as well
        (["precision=bf16", *NO_NORM], True, GRADIENT),  # DeepSpeed looks at every gradient, and leaves the step out
    ],
    ids=["fp32", "fp32, no norm", "fp32, ZeRO 1", "bf16, ZeRO 1", "bf16, ZeRO 1, no norm"],
)
def test_a_gradient_that_is_not_finite_stops_the_run(switches, waits, message, tiny, environment, tmp_path):
    """Whether the step is taken or left out, and with a checkpoint due at every step: none is written of it."""
    worker = Path(__file__).parents[1] / "helpers" / "nan_gradient_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), str(tiny), str(tmp_path), "checkpoint.every=1", *switches],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert f"stopped: step 3: {message}" in done.stdout, done.stderr
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert f"last good checkpoint is {checkpoints / 'step-00000002'}" in done.stdout
    assert not (checkpoints / "step-00000003").exists()
    assert ("read: 0" not in done.stdout) == waits, done.stdout


def test_a_picture_that_cannot_be_made_is_a_warning(tiny, environment, photos, tmp_path):
    """The photographs are damaged after the last step: the student is there, and so is the reason."""
    shutil.copytree(photos, tmp_path / "photos")
    worker = Path(__file__).parents[1] / "helpers" / "damaged_images_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), str(tiny), str(tmp_path), str(tmp_path / "photos")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("features.png could not be made: source ")]
    assert f"student  {tmp_path / 'tiny' / 'student'}" in done.stdout
    assert f"curve    {tmp_path / 'tiny' / 'losses.png'}" in done.stdout
    assert "features.png" not in done.stdout
    assert not (tmp_path / "tiny" / "features.png").exists()
