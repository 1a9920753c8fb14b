import json
import logging
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kpu_fast.models import FeatureSpec, Student, ViT
from kpu_fast.models.attention import BackendError
from kpu_fast.models.hub import WeightsError
from kpu_fast.models.vit import resize_to_stride_16

VIT = {"patch_size": 4, "dim": 64, "depth": 2, "heads": 2, "registers": 1, "image_size": 16}
ADAPTER = {"cross_attention": "flash", "interactions": 2, "inplanes": 8, "points": 2}
# As CLIP (x and a stride-16 map) and a detector's backbone (no x, three maps).
HEADS = {
    "clip": {"x_dim": 12, "map_dims": (20,), "strides": (16.0,)},
    "detector": {"x_dim": None, "map_dims": (8, 16, 32), "strides": (8.0, 16.0, 32.0)},
}
FILES = ["README.md", "config.json", "model.safetensors", "modeling_kpu_fast.py", "preprocessor_config.json"]


def build(adapter=None, **changes):
    torch.manual_seed(0)
    settings = {"vit": VIT, "adapter": {**ADAPTER, **(adapter or {})}, "heads": HEADS, "head_hidden": 24, **changes}
    return Student(**settings)


def images(height=64, width=96, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def flat(features):
    return [features.x, *features.maps]


# ---- forward ----


@torch.no_grad()
def test_with_an_adapter_the_features_are_the_adapters():
    student = build()
    out = student(images())
    for found, expected in zip(flat(out), flat(student.adapter(images(), student.vit)), strict=True):
        assert torch.equal(found, expected)
    assert student.strides == (4, 8, 16, 32)
    assert student.spec == FeatureSpec(64, (64,) * 4, (4.0, 8.0, 16.0, 32.0))
    for m, stride, dim in zip(out.maps, student.spec.strides, student.spec.map_dims, strict=True):
        assert m.shape == (2, 64 / stride, 96 / stride, dim)


@torch.no_grad()
def test_without_an_adapter_the_map_is_the_normed_patches_at_stride_16():
    student = Student(vit=VIT, adapter=None, heads=HEADS, head_hidden=24, freeze_vit=False)
    pixels = images(48, 80)  # multiples of 16 are enough here
    out = student(pixels)
    tokens = student.vit.embed(resize_to_stride_16(pixels, 4))
    for block in student.vit.blocks:
        tokens = block(tokens)
    tokens = student.vit.norm(tokens)
    assert torch.equal(out.x, tokens[:, 0])
    assert torch.equal(out.maps[0].flatten(1, 2), tokens[:, 2:])
    assert out.maps[0].shape == (2, 3, 5, 64)
    assert student.strides == (16,)
    assert [student.level_for(stride) for stride in (4, 16, 32)] == [0, 0, 0]
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["vit.embed.mask_token"]
    student.drop_unused_levels()
    assert student.strides == (16,)


@pytest.mark.parametrize("cross_attention", ["flash", "deformable"])
@torch.no_grad()
def test_compiles_in_one_graph(cross_attention):
    student = build({"cross_attention": cross_attention})
    compiled = torch.compile(
        lambda pixels: student.project(student(pixels), "clip"), fullgraph=True, backend="aot_eager"
    )
    for found, expected in zip(flat(compiled(images())), flat(student.project(student(images()), "clip")), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "level"), [(1, 0), (4, 0), (5.5, 0), (5.7, 1), (8, 1), (14, 2), (16, 2), (22, 2), (23, 3), (64, 3)]
)
def test_the_closest_level_by_log_distance(stride, level):
    assert build(heads={}).level_for(stride) == level


def test_a_tie_goes_to_the_finer_level():
    student = build(heads={})
    student.strides = (1, 4)  # log 2 is exactly halfway, also in floating point
    assert student.level_for(2) == 0


@torch.no_grad()
def test_project_picks_levels_and_sizes():
    student = build()
    features = student(images())
    out = student.project(features, "detector")
    assert out.x is None
    for i, (head, m) in enumerate(zip(student.heads["detector"].maps, out.maps, strict=True)):
        assert torch.equal(m, head(features.maps[i + 1]))  # strides 8, 16, 32 are the student's own grids
    clip = student.project(features, "clip", sizes=[(3, 5)])
    assert clip.maps[0].shape == (2, 3, 5, 20)
    assert torch.equal(clip.x, student.heads["clip"].x(features.x))
    with pytest.raises(KeyError, match=r"no head for teacher 'dino'; it has heads for \['clip', 'detector'\]"):
        student.project(features, "dino")


@torch.no_grad()
@pytest.mark.parametrize(("stride", "cells"), [(14.0, 11), (15.0, 11), (160 / 29, 29), (400.0, 1)])
def test_project_rounds_sizes_as_teachers_do(stride, cells):
    student = build(heads={"t": {"x_dim": None, "map_dims": (8,), "strides": (stride,)}})
    features = student(images(160, 160, batch=1))
    assert student.project(features, "t").maps[0].shape == (1, cells, cells, 8)


@torch.no_grad()
@pytest.mark.parametrize("side", [80, 112, 144])
def test_half_a_cell_is_one_as_for_swin(side):
    """Swin pads to whole cells; sides that are multiples of 16 and not of 32 only fit a student without an adapter."""
    student = Student(vit=VIT, adapter=None, heads=HEADS, head_hidden=24)
    out = student.project(student(images(side, side, batch=1)), "detector")
    assert [m.shape[1] for m in out.maps] == [side // 8, side // 16, (side + 16) // 32]


# ---- what is trained ----


def test_the_frozen_vit_stays_out():
    student = build()
    assert not any(parameter.requires_grad for parameter in student.vit.parameters())
    assert all(parameter.requires_grad for parameter in student.adapter.parameters())
    assert all(parameter.requires_grad for parameter in student.heads.parameters())


def test_without_a_teacher_that_has_an_x_what_makes_x_is_not_trained():
    student = build({"x_injector": True}, heads={"detector": {"x_dim": None, "map_dims": (24,), "strides": (8.0,)}})
    student.drop_unused_levels()
    runs = []
    student.adapter.x_injector.register_forward_hook(lambda *_: runs.append(1))
    out = student.project(student(images()), "detector")
    assert runs == []
    sum(t.square().sum() for t in out.maps).backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert not any(parameter.requires_grad for parameter in student.adapter.x_injector.parameters())


def test_levels_without_a_teacher_are_dropped_and_the_rest_gets_gradient():
    student = build({"cross_attention": "deformable"})
    with torch.no_grad():
        for interaction in student.adapter.interactions:
            interaction.injector.gamma.fill_(0.1)
        whole = student(images())
    student.drop_unused_levels()
    student.drop_unused_levels()  # nothing is left to drop
    assert student.levels == (1, 2, 3)
    assert student.strides == (8, 16, 32)
    assert student.spec.strides == (8.0, 16.0, 32.0)
    frozen = {id(parameter) for parameter in student.adapter.level_parameters(0)}
    assert frozen
    calls = []
    student.adapter.up.register_forward_hook(lambda *_: calls.append("up"))
    features = student(images())
    assert calls == []
    assert all(torch.equal(a, b) for a, b in zip(features.maps, whole.maps[1:], strict=True))
    outputs = [student.project(features, name) for name in HEADS]
    sum(t.square().sum() for out in outputs for t in flat(out) if t is not None).backward()
    for name, parameter in student.named_parameters():
        trained = not name.startswith("vit.") and id(parameter) not in frozen
        assert parameter.requires_grad == trained == (parameter.grad is not None), name


@pytest.mark.parametrize("adapter", [ADAPTER, None])
def test_activation_checkpointing_changes_no_gradient(adapter):
    gradients = []
    for switch in (False, True):
        torch.manual_seed(0)
        student = Student(vit=VIT, adapter=adapter, freeze_vit=False, activation_checkpointing=switch)
        runs = []
        student.vit.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        sum(t.square().sum() for t in flat(student(images()))).backward()
        assert len(runs) == 1 + switch  # once more in backward
        gradients.append([parameter.grad for parameter in student.parameters() if parameter.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {"a.b": HEADS["clip"]}}, "'a.b' cannot be a teacher's name"),
        ({"heads": {"keys": HEADS["clip"]}}, "'keys' cannot be a teacher's name"),
        ({"heads": {"t": {"x_dim": 3}}}, r"heads.t has the keys \['x_dim'\]"),
        ({"heads": {"t": FeatureSpec(3, (4, 5), (8.0,))}}, "heads.t has 2 map_dims and 1 strides"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("adapter", [ADAPTER, None])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_images(adapter, dtype):
    student = Student(vit=VIT, adapter=adapter)
    with pytest.raises(ValueError, match=rf"{dtype}.*expected floating point in \[0, 1\]"):
        student((images() * 255).to(dtype))


@pytest.mark.parametrize("adapter", [ADAPTER, None])
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 64, 64, 3)])
def test_what_is_no_batch_of_rgb_images_is_named(adapter, shape):
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\), found shape"):
        Student(vit=VIT, adapter=adapter)(torch.rand(shape))


# ---- from a config ----


def config(**changes):
    adapter = {**ADAPTER, "heads": None}
    vit = SimpleNamespace(weights="random", arch=VIT)
    return SimpleNamespace(
        **{"vit": vit, "freeze_vit": True, "adapter": adapter, "attention": "auto", "head_hidden": 24, **changes}
    )


def test_from_config_with_random_weights_warns(caplog):
    specs = {name: FeatureSpec(**spec) for name, spec in HEADS.items()}
    with caplog.at_level(logging.WARNING):
        student = Student.from_config(config(), specs)
    assert "random weights, and they are frozen" in caplog.text
    assert {name: p.shape for name, p in student.state_dict().items()} == {
        name: p.shape for name, p in build().state_dict().items()
    }
    assert student.head_specs == specs


def test_from_config_without_adapter_and_heads():
    student = Student.from_config(config(adapter=None, freeze_vit=False))
    assert student.adapter is None
    assert len(student.heads) == 0
    assert [name for name, p in student.vit.named_parameters() if not p.requires_grad] == ["embed.mask_token"]


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ({"heads": 0}, "student: ViT: heads must be 1 or more, got 0"),
        ({"patch_size": 0}, "student: ViT: patch_size must be 1 or more, got 0"),
        ({"registers": -1}, "student: ViT: registers must be 0 or more, got -1"),
        ({"mlp_ratio": -1}, r"student: ViT: mlp_ratio · dim must be 1 or more, got -"),
        ({"mlp_ratio": float("inf")}, "student.vit.arch: .*infinity.*; ViT takes"),
        ({"heads": "two"}, "student.vit.arch: .*; ViT takes"),
    ],
)
def test_from_config_names_sizes_that_make_no_vit(arch, message):
    with pytest.raises(ValueError, match=message):
        Student.from_config(config(vit=SimpleNamespace(weights="random", arch=VIT | arch)))


def test_from_config_takes_the_adapters_settings():
    for heads, expected in ((4, 4), (None, VIT["heads"])):
        deformable = {"cross_attention": "deformable", "interactions": 1, "points": 3, "heads": heads}
        adapter = Student.from_config(config(adapter={**deformable, "x_injector": heads == 4})).adapter
        cross = adapter.interactions[0].injector.cross
        assert (cross.heads, cross.points, cross.levels) == (expected, 3, 3)
        assert (adapter.x_injector is not None) == (heads == 4)


def test_from_config_loads_a_vit(tmp_path):
    transformers = pytest.importorskip("transformers", reason="DINOv2 weights are read by transformers")
    arch = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    transformers.Dinov2Model(transformers.Dinov2Config(**arch)).save_pretrained(tmp_path)
    student = Student.from_config(config(vit=SimpleNamespace(weights=str(tmp_path), arch={})))
    expected = ViT.from_hf(str(tmp_path)).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in student.vit.state_dict().items())
    assert not any(parameter.requires_grad for parameter in student.vit.parameters())


def test_from_config_starts_from_a_student_without_an_adapter(tmp_path, monkeypatch):
    first = Student(vit=VIT, adapter=None, freeze_vit=False).bfloat16()
    torch.nn.init.normal_(first.vit.embed.mask_token)
    first.save_pretrained(tmp_path / "first")
    monkeypatch.setenv("HOME", str(tmp_path))
    for weights in (str(tmp_path / "first"), "~/first"):
        again = Student.from_config(config(vit=SimpleNamespace(weights=weights, arch={})))
        assert all(torch.equal(first.vit.state_dict()[name].float(), w) for name, w in again.vit.state_dict().items())


def test_what_is_no_start_is_named(tmp_path):
    build().save_pretrained(tmp_path)
    settings = config(vit=SimpleNamespace(weights=str(tmp_path), arch={}))
    with pytest.raises(WeightsError, match=r"student\.vit\.weights: .* is a student with an adapter"):
        Student.from_config(settings)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"student\.vit\.weights: .*model\.safetensors is damaged"):
        Student.from_config(settings)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"student\.vit\.weights: .*config\.json"):
        Student.from_config(settings)


# ---- save and load ----


def mixed():
    student = build({"cross_attention": "deformable", "x_injector": True})
    student.vit.bfloat16()  # a frozen part in bf16 beside trained parts in fp32
    return student


@torch.no_grad()
@pytest.mark.parametrize("make", [build, lambda: build().bfloat16(), mixed])
def test_a_saved_student_comes_back_bit_for_bit(make, tmp_path):
    student = make()
    student.save_pretrained(tmp_path, card="# A student\n")
    loaded = Student.from_pretrained(tmp_path, attention="sdpa")
    assert not loaded.training
    assert {module.backend for module in loaded.modules() if hasattr(module, "backend")} == {"sdpa"}
    before, after = student.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in student.parameters()]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# A student\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # the weights are as readable as the rest
    if make is build:
        for a, b in zip(flat(student(images())), flat(loaded(images())), strict=True):
            assert torch.equal(a, b)


def test_saving_again_replaces_and_a_failure_leaves_the_old_files(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    other = build()
    with torch.no_grad():
        other.adapter.level_embed.add_(1)

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            other.save_pretrained(tmp_path)
    assert torch.equal(Student.from_pretrained(tmp_path).adapter.level_embed, build().adapter.level_embed)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    other.save_pretrained(tmp_path)
    assert torch.equal(Student.from_pretrained(tmp_path).adapter.level_embed, other.adapter.level_embed)


def test_loading_needs_torch_and_safetensors_only(tmp_path):
    student = build({"cross_attention": "deformable"}).eval()
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = student.project(student(images()), "clip").x.sum().item()
    script = """
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("transformers", "pydantic", "deepspeed", "nvidia", "huggingface_hub"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Block())
        import torch
        from kpu_fast.models import Student

        student = Student.from_pretrained(sys.argv[1])
        pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            print(student.project(student(pixels), "clip").x.sum().item())
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(expected, rel=1e-5)


def test_what_loading_needs_comes_without_an_extra(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))
    names = {re.match(r"[\w-]+", line)[0] for line in given["install_requires"]}
    assert {"torch", "safetensors"} <= names


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_backend_that_is_not_there_is_no_damaged_export(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(BackendError, match="'fa3' needs"):
        Student.from_pretrained(tmp_path, attention="fa3")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, r"model\.safetensors is missing"),
        (lambda d: (d / "config.json").write_text("{"), ValueError, r"config\.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("{}"), ValueError, r"config\.json is not a student"),
        (
            lambda d: edit(d / "config.json", lambda c: c.update(version=99)),
            ValueError,
            "format version 99, this kpu_fast reads 1",
        ),
        (
            lambda d: edit(d / "config.json", lambda c: c["student"].update(colour="blue")),
            ValueError,
            r"config\.json describes no student .*colour",
        ),
        (
            lambda d: edit(d / "config.json", lambda c: c["student"]["adapter"].update(cross_attention="deformable")),
            ValueError,
            r"model\.safetensors does not fit .*config\.json",
        ),
        (
            lambda d: edit(d / "config.json", lambda c: c["student"].update(head_hidden=25)),
            ValueError,
            r"heads\.clip\.maps\.0\.fc1\.bias is \(24,\), expected \(25,\)",
        ),
        (
            lambda d: edit(d / "config.json", lambda c: c["student"].update(head_hidden=-1)),
            ValueError,
            r"config\.json describes no student",
        ),
        (
            lambda d: edit(d / "config.json", lambda c: c["student"]["vit"].update(mlp_ratio=float("inf"))),
            ValueError,
            r"config\.json describes no student .*infinity",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
            ValueError,
            r"model\.safetensors is damaged",
        ),
    ],
)
def test_broken_exports_are_named(damage, error, message, tmp_path):
    build().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        Student.from_pretrained(tmp_path)
