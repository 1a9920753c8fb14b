"""The command as its users run it: finished, stopped, diverged, misused."""

import itertools
import json
import math
import os
import re
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
from processes import HELPERS, TRAIN, Run, finish, free_port, losses, steps_done, two_ranks, wait_for, weights
from safetensors.torch import load_file

from kpu_fast.config import load_config
from kpu_fast.data.scan import scan
from kpu_fast.engine import loop, result
from kpu_fast.engine.distributed import World
from kpu_fast.export import main as export
from kpu_fast.machine import slow_bf16
from kpu_fast.models import Student
from kpu_fast.models.features import FeatureSpec
from kpu_fast.objectives.kpu import KPU


def test_a_run_leaves_what_its_owner_expects(whole):
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
    assert "- arxiv:2508.14707\n" in card.split("---")[1]
    assert "KPU (arXiv 2508.14707)" in card
    assert 'student.project(features, "clip")' in card
    assert "H and W multiples of 32\n" in card
    assert "| clip/s2t |" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card  # the ViT is random


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
    meet = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        arguments = ["--config", str(tiny), "--set", "output=runs"]
        nodes.append(Run(TRAIN, arguments, environment | meet | {"RANK": rank}, tmp_path / rank))
    _, err = finish(nodes[0], code=2)
    finish(nodes[1], code=2)
    assert "is not the folder that rank 0 sees under this name" in err
    assert "(rank 1)" in err
    assert str(tmp_path / "1" / "runs" / "tiny") in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_a_checkpoint_and_exits_0(number, whole, start, tmp_path):
    run = tmp_path / "tiny"
    first = start("checkpoint.every=1000")
    wait_for(lambda: steps_done(run) >= 3, first)
    first.send_signal(number)
    out, _ = finish(first)
    stopped = steps_done(run)
    assert f"stopped after step {stopped}; go on with --resume auto" in out
    assert 3 <= stopped < 8
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped:08d}"
    finish(start("checkpoint.every=1000", resume="auto"))
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)


def test_signals_that_ask_to_stop():
    """Each is noted, but for those that were ignored before (nohup); afterwards all is as it was."""
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop._stop_signals() as asked:
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
                signal.raise_signal(number)
            assert asked == [signal.SIGUSR1, signal.SIGTERM]
        assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)] == [before[0], signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGHUP, before[1])


def test_a_second_ctrl_c_seconds_later_stops_at_once(tiny, environment, tmp_path):
    """In the middle of a step that does not end: nothing more is written."""
    command = [sys.executable, str(HELPERS / "endless_step_worker.py"), str(tiny), str(tmp_path)]
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
    command = [sys.executable]
    process = start("checkpoint.every=1000", "steps=100000" if stop else "steps=8", launcher=command)
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


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_accumulated_in_fp32_are_every_teachers(stage, start, tmp_path):
    """DeepSpeed's BF16_Optimizer, which stage 1 gets with fp32, by itself keeps those of one forward."""
    rows = {}
    common = ["precision=bf16", "steps=2", "gradient_accumulation_steps=2"]
    common += [f"deepspeed.zero_optimization.stage={stage}"]
    for name, dtype in (("bf16", "bf16"), ("fp32", "fp32")):
        finish(start(*common, f"name={name}", f"deepspeed.data_types.grad_accum_dtype={dtype}"))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    first, second = zip(*rows.values(), strict=True)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=2e-3)
    assert second[0]["loss"] == pytest.approx(second[1]["loss"], rel=2e-3)


def test_a_rank_that_is_gone_is_told_in_one_line(start, tmp_path):
    run = start("steps=100000", ranks=2)
    wait_for(lambda: steps_done(tmp_path / "tiny") >= 2, run)
    os.kill(run.pids[1], signal.SIGKILL)
    _, err = finish(run, code=1)
    assert err.splitlines()[-1] == "error: another rank has ended; what it said is the reason"
    assert "Traceback" not in err


def test_every_switch_at_once_trains(start, tmp_path):
    """bf16, activation checkpointing, a DINOv3 with the deformable adapter and ZeRO 2."""
    switches = ["precision=bf16", "activation_checkpointing=true", "deepspeed.zero_optimization.stage=2", "steps=3"]
    rope = ["student.vit.arch.patch_size=16", "student.vit.arch.image_size=64", "student.vit.arch.rope_theta=100.0"]
    finish(start(*switches, *rope, "student.adapter.cross_attention=deformable"))
    exported = load_file(tmp_path / "tiny" / "student" / "model.safetensors")
    assert {t.dtype for t in exported.values()} == {torch.bfloat16}
    assert all(torch.isfinite(torch.tensor(row)).all() for row in losses(tmp_path / "tiny"))


def test_siglip_dinov3_and_sam_teach(start, tmp_path):
    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = {**vit, "intermediate_size": 48, "image_size": 64}
    sam = {**vit, "mlp_dim": 48, "image_size": 96, "window_size": 4, "global_attn_indexes": [0], "output_channels": 16}
    teachers = {
        "clip": None,
        "gdino": None,
        "siglip": {"kind": "siglip", "arch": siglip, "data": {"batch_size": 2, "size": [64, 64]}},
        "dinov3": {"kind": "dinov3", "arch": {**vit, "intermediate_size": 48, "num_register_tokens": 1},
                   "data": {"batch_size": 2, "size": [64, 96], "fit": "pad"}},
        "sam": {"kind": "sam", "arch": sam, "data": {"batch_size": 2, "size": [96, 96], "fit": "pad"}},
    }  # fmt: skip
    for teacher in filter(None, teachers.values()):
        teacher["weights"] = "random"
    finish(start("steps=3", *(f"teachers.{name}={json.dumps(value)}" for name, value in teachers.items())))
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    terms = [f"{name}/{term}" for name in ("siglip", "dinov3", "sam") for term in ("s2t", "t2s", "rec")]
    assert [math.isfinite(row[term]) and row[term] > 0 for row in rows for term in terms] == [True] * 27
    heads = json.loads((tmp_path / "tiny" / "student" / "config.json").read_text())["student"]["heads"]
    assert {name: (head["x_dim"], head["map_dims"]) for name, head in heads.items()} == {
        "siglip": (32, [32]),
        "dinov3": (32, [32]),
        "sam": (None, [16]),
    }


def test_a_teacher_on_anothers_images(start, tmp_path):
    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}
    dino = {"kind": "dinov2", "weights": "random", "arch": vit, "images_of": "clip"}
    out, _ = finish(start("steps=3", "checkpoint.every=3", f"teachers.dino={json.dumps(dino)}"))
    assert "clip: 4 images of 64x64 per rank and step\n  dino on the same images\n" in out
    assert "\ndino: " not in out
    rows = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["dino/s2t"] > 0 and row["dino/t2s"] > 0 and row["dino/rec"] > 0 for row in rows)
    assert all(row["images_per_second"] * row["step_seconds"] == pytest.approx(6) for row in rows)  # not 10
    rank = torch.load(tmp_path / "tiny" / "checkpoints" / "step-00000003" / "rank-0.pt", weights_only=True)
    assert list(rank["streams"]) == ["clip", "gdino"]
    resolved = json.loads((tmp_path / "tiny" / "config.resolved.json").read_text())["config"]
    assert resolved["teachers"]["dino"]["data"] == resolved["teachers"]["clip"]["data"]
    (tmp_path / "again.json").write_text(json.dumps(resolved))
    assert load_config(tmp_path / "again.json").streams() == {"clip": ["clip", "dino"], "gdino": ["gdino"]}


def test_an_offloaded_optimizer_takes_the_same_steps(whole, start, tmp_path):
    """torch's, without a compiler."""
    finish(start('deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}'))
    for found, expected in zip(losses(tmp_path / "tiny"), losses(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_photographs_of_any_shape_are_learned_from(start, photos, tmp_path):
    """GroundingDINO's batches lie one way or the other or are square: all go through teacher, student and losses."""
    for number, path in enumerate(sorted(photos.iterdir())):
        image = Image.open(path)
        (tmp_path / "both").mkdir(exist_ok=True)
        shaped = (image, image.transpose(Image.Transpose.ROTATE_90), image.resize((60, 60)))[number % 3]
        shaped.save(tmp_path / "both" / path.name)
    run = ["steps=4", f"source={tmp_path / 'both'}", "student.adapter.cross_attention=deformable"]
    out, _ = finish(start(*run, "teachers.gdino.data.buckets=[[64,64]]"))
    assert "".join(f"  4 of them come in batches of {canvas}\n" for canvas in ("64x96", "96x64", "64x64")) in out
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
    assert re.search(r"the checkpoint of step 6 was not written: .+ \([\d,]+ MiB free there\)", err)
    assert f"the last good checkpoint is {kept}" in err
    assert {p: p.read_bytes() for p in kept.rglob("*.pt")} == before
    assert len(before) == 3
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000004"]
    finish(start("steps=6", resume="auto"))


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


def test_a_deepspeed_key_that_nobody_knows_is_named_and_its_monitors_hear_of_losses(start, tmp_path):
    csv = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "run"}
    _, err = finish(start(f"deepspeed={json.dumps({'zero': {'stage': 2}, 'csv_monitor': csv})}", "steps=2"))
    assert "deepspeed.zero: no key that kpu_fast knows" in err
    told = [line.split(",") for line in (tmp_path / "csv/run/loss_loss.csv").read_text().splitlines()[1:]]
    rows = [json.loads(line) for line in (tmp_path / "tiny/metrics.jsonl").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in told] == [(r["step"], pytest.approx(r["loss"])) for r in rows]
    assert {path.name.partition("_")[0] for path in (tmp_path / "csv/run").iterdir()} == {"loss", "run"}  # as ours


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
        _, err = finish(start(*switches, output=tmp_path / str(stage)))
        assert ("this CPU multiplies in bf16" in err) == (slow_bf16() is not None)
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


def test_an_image_that_cannot_be_decoded_is_named_in_one_line(start, photos, environment, monkeypatch, tmp_path):
    """Its bytes changed after the scan, its size and time did not: no start would scan it again."""
    source = Path(shutil.copytree(photos, tmp_path / "source"))
    monkeypatch.setenv("KPU_FAST_CACHE", environment["KPU_FAST_CACHE"])
    scan(str(source))
    damaged, seen = source / "3.jpg", (source / "3.jpg").stat()
    damaged.write_bytes(bytes(seen.st_size))
    os.utime(damaged, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    _, err = finish(start(f"source={source}"), code=2)
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: teachers.")
    assert f"DALI cannot use {damaged}, changed since the scan" in said
    assert said.endswith("if a batch is to blame, --resume auto --skip N passes over the next N")
    assert "Traceback" not in err


def test_a_rank_that_cannot_write_stops_all_ranks(start_helper, tmp_path):
    """Disk full on rank 1 only, in DeepSpeed's file and in ours: every rank raises, none waits for another."""
    out, _ = finish(start_helper("full_disk_worker.py", str(tmp_path), ranks=2))
    said = sorted(line for line in out.splitlines() if line.startswith("rank"))
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
def test_a_gradient_that_is_not_finite_stops_the_run(switches, waits, message, start_helper, tmp_path):
    """Whether the step is taken or left out, and with a checkpoint due at every step: none is written of it."""
    out, _ = finish(start_helper("nan_gradient_worker.py", str(tmp_path), "checkpoint.every=1", *switches))
    assert f"stopped: step 3: {message}" in out
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert f"last good checkpoint is {checkpoints / 'step-00000002'}" in out
    assert not (checkpoints / "step-00000003").exists()
    assert ("read: 0" not in out) == waits, out


def test_a_picture_without_memory_is_a_warning(monkeypatch, tiny, tmp_path, caplog, capsys):
    """The student is written, and the run that has made it does not fail."""

    def full(*_):
        raise MemoryError("CUDA allocation failed")

    monkeypatch.setattr(result, "_panel", full)
    (tmp_path / "metrics.jsonl").touch()
    cfg = load_config(tiny)
    specs = {"clip": FeatureSpec(24, (32,), (16.0,))}
    student = Student.from_config(cfg.student, specs)
    alone = World(0, 1, torch.device("cpu"), 0, None)
    objective = KPU(student, specs, cfg.objective)
    result.write_result(cfg, tmp_path, alone, objective, {"clip": None}, {"clip": None})
    assert "features.png could not be made: CUDA allocation failed" in caplog.text
    assert f"student  {tmp_path / 'student'}" in capsys.readouterr().out
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_a_picture_that_cannot_be_made_is_a_warning(start_helper, photos, tmp_path):
    """The photographs are damaged after the last step: the student is there, and so is the reason."""
    shutil.copytree(photos, tmp_path / "photos")
    out, err = finish(start_helper("damaged_images_worker.py", str(tmp_path), str(tmp_path / "photos")))
    assert [line for line in err.splitlines() if line.startswith("features.png could not be made: source ")]
    assert f"student  {tmp_path / 'tiny' / 'student'}" in out
    assert f"curve    {tmp_path / 'tiny' / 'losses.png'}" in out
    assert "features.png" not in out
    assert not (tmp_path / "tiny" / "features.png").exists()
