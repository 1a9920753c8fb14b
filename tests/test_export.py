import json
import os
from pathlib import Path

import pytest
import torch

from kpu_fast import export
from kpu_fast.models import Student

VIT = {"patch_size": 4, "dim": 16, "depth": 1, "heads": 2, "registers": 1, "image_size": 16}
ADAPTER = {"interactions": 1, "inplanes": 8, "points": 2}
HEADS = {
    "clip": {"x_dim": 12, "map_dims": (20,), "strides": (14.0,)},  # another grid than the student's
    "detector": {"x_dim": None, "map_dims": (8, 16), "strides": (8.0, 16.0)},
}


def build(cross_attention=None):
    torch.manual_seed(0)
    adapter = None if cross_attention is None else {**ADAPTER, "cross_attention": cross_attention}
    student = Student(vit=VIT, adapter=adapter, heads=HEADS, head_hidden=24)
    for name, parameter in student.named_parameters():
        if name.endswith(("gamma", "cls_token", "register_tokens", "bias")):  # zeros at the start: nothing to compare
            torch.nn.init.normal_(parameter, std=0.3)
    return student.eval()


def images(batch, height=32, width=64):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def flash():
    """A student with the flash adapter, wrapped, and its program for any batch: tracing takes seconds."""
    model = export.NamedOutputs(build("flash"))
    return model, export.trace(model, 32, 64)


@torch.no_grad()
def test_a_pt2_file_computes_what_the_student_computes_for_any_batch(flash, tmp_path):
    model, program = flash
    export.save(program, model, tmp_path / "student.pt2")
    note = {"kpu_fast.json": ""}
    loaded = torch.export.load(tmp_path / "student.pt2", extra_files=note)
    assert json.loads(note["kpu_fast.json"])["student"] == json.loads(json.dumps(model.student.config))
    assert not [node for node in loaded.graph.nodes if "kpu_fast" in str(node.target)]  # loads without this package
    student = build("flash")
    for batch in (1, 5):
        found, features = loaded.module()(images(batch)), student(images(batch))
        assert list(found) == ["x", "map4", "map8", "map16", "map32"]
        for value, expected in zip(found.values(), (features.x, *features.maps), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match=r"size|shape"):
        loaded.module()(images(2, 64, 64))


@torch.no_grad()
def test_an_onnx_file_computes_what_the_student_computes_for_any_batch(flash, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, program = flash
    out = tmp_path / "student.onnx"
    export.save(program, model, out)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]  # the weights are in it
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["kpu_fast"])["head"] is None
    names = [output.name for output in session.get_outputs()]
    assert names == ["x", "map4", "map8", "map16", "map32"]
    student = build("flash")
    for batch in (1, 5):
        features = student(images(batch))
        found = session.run(names, {"images": images(batch).numpy()})
        for value, expected in zip(found, (features.x, *features.maps), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected, rtol=1e-5, atol=1e-5)
    assert export.difference(out, model, images(2)) < 1e-5


@torch.no_grad()
def test_the_deformable_adapter_in_a_teachers_space():
    student = build("deformable")
    model = export.NamedOutputs(build("deformable"), "clip")
    program = export.trace(model, 32, 64, batch=2)
    expected, found = student.project(student(images(2)), "clip"), program.module()(images(2))
    assert list(found) == ["x", "map14"]
    torch.testing.assert_close(found["x"], expected.x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["map14"], expected.maps[0], rtol=1e-5, atol=1e-5)
    assert not [node for node in program.graph.nodes if "kpu_fast" in str(node.target)]
    assert not [name for name in program.state_dict if "detector" in name]
    assert model.student.strides == (16,)  # the other maps are not computed


# ---- the command, on a student without an adapter, which traces fast ----


@pytest.fixture
def bare(tmp_path):
    build().bfloat16().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def run(bare, *arguments, out="student.pt2"):
    return export.main(["--student", str(bare), "--out", str(bare.parent / out), *arguments])


@torch.no_grad()
def test_the_command_replaces_a_file_and_says_what_it_wrote(bare, capsys):
    (bare.parent / "student.pt2").write_text("old")
    assert run(bare, "--head", "detector") == 0
    assert f"{bare.parent / 'student.pt2'}: " in (printed := capsys.readouterr().out)
    assert "images (any, 3, 64, 64) → map8, map16;" in printed
    found = torch.export.load(bare.parent / "student.pt2").module()(images(1, 64, 64))
    student = build().bfloat16().float()  # what was saved in bf16 is computed in float32
    expected = student.project(student(images(1, 64, 64)), "detector").maps
    for value, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in bare.parent.iterdir()) == ["student", "student.pt2"]


@torch.no_grad()
def test_maps_that_share_a_stride_are_all_there(tmp_path):
    heads = {"vit": {"x_dim": 12, "map_dims": (8, 6, 4), "strides": (14.0, 16.0, 14.0)}}
    torch.manual_seed(0)
    student = Student(vit=VIT, adapter=None, heads=heads, head_hidden=24).eval()
    student.save_pretrained(tmp_path / "student")
    assert run(tmp_path / "student", "--head", "vit", "--batch", "1") == 0
    found = torch.export.load(tmp_path / "student.pt2").module()(images(1, 64, 64))
    assert list(found) == ["x", "map14_0", "map16", "map14_1"]
    expected = student.project(student(images(1, 64, 64)), "vit")
    for value, wanted in zip(found.values(), (expected.x, *expected.maps), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "out", "message"),
    [
        (["--height", "48", "--width", "56"], "a.pt2", "--width 56: expected a multiple of 16, such as 64"),
        (["--height", "-16"], "a.pt2", "--height -16: expected a multiple of 16, such as 16"),
        (["--height", "0"], "a.pt2", "--height 0: expected a multiple of 16, such as 16"),
        (["--batch", "0"], "a.pt2", "--batch 0: expected a number of images, at least 1, or dynamic"),
        (["--batch", "many"], "a.pt2", "--batch many: expected a number"),
        (["--head", "dino"], "a.pt2", "--head dino: .* has heads for clip, detector"),
        ([], "a.pth", r"expected a name that ends in \.pt2 or \.onnx"),
        ([], "nowhere/a.pt2", "expected a file in a folder that exists"),
        ([], "student", r"expected a name that ends in \.pt2 or \.onnx"),
    ],
)
def test_what_cannot_be_exported_is_named_before_any_work(arguments, out, message, bare, capsys, monkeypatch):
    monkeypatch.setattr(export, "trace", None)
    assert run(bare, *arguments, out=out) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(printed)


def test_with_an_adapter_sides_are_multiples_of_32(tmp_path, capsys):
    build("flash").save_pretrained(tmp_path / "student")
    assert run(tmp_path / "student", "--height", "48") == 2
    assert "--height 48: expected a multiple of 32, such as 64" in capsys.readouterr().err


def test_a_folder_that_is_no_student(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert f"error: --student: {tmp_path / 'config.json'} is missing" in capsys.readouterr().err


def test_missing_packages_and_large_students_are_named(bare, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export, "FORMATS", {".pt2": (), ".onnx": ("torch", "no_such_package")})
        assert run(bare, out="a.onnx") == 2
    assert "needs no_such_package; pip install no_such_package" in capsys.readouterr().err
    monkeypatch.setattr(export, "FORMATS", {".pt2": (), ".onnx": ()})
    monkeypatch.setattr(export, "_ONNX_BYTES", 10_000)
    assert run(bare, out="a.onnx") == 2
    assert "GiB of weights, and an .onnx file holds 2; use .pt2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "batch", "message"),
    [
        (lambda values: {**values, "x": values["x"] * 1.0001}, "3", "differs from the student by 1.0e-04"),
        (lambda values: {**values, "x": values["x"] * torch.nan}, "3", "differs from the student by nan"),
        (lambda values: {"y": values["x"]}, "3", r"the file gives \{'y': \(3, 16\)\}, the student"),
        # Right for the two images that it was traced with alone.
        (lambda values: {**values, "x": values["x"] * (values["x"].shape[0] / 2)}, "dynamic", "the student by 5.0e-01"),
    ],
)
def test_a_program_that_computes_something_else_is_not_kept(damage, batch, message, bare, capsys, monkeypatch):
    (bare.parent / "student.pt2").write_text("old")
    trace = export.trace

    class Damaged(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return damage(self.model(images))

    monkeypatch.setattr(export, "trace", lambda model, *where: trace(Damaged(model), *where))
    assert run(bare, "--batch", batch) == 3
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)
    assert (bare.parent / "student.pt2").read_text() == "old"
    assert sorted(path.name for path in bare.parent.iterdir()) == ["student", "student.pt2"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["student.pt2", "student.onnx"])
def test_a_full_disk_leaves_the_old_file(name, bare, capsys):
    for package in export.FORMATS[Path(name).suffix]:
        pytest.importorskip(package)
    (bare.parent / name).write_text("old")
    stem, suffix = name.split(".")
    (bare.parent / f".{stem}.{os.getpid()}.tmp.{suffix}").symlink_to("/dev/full")
    assert run(bare, "--batch", "1", out=name) == 4
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {bare.parent / name} cannot be written (")
    assert "No space left on device" in told
    assert (bare.parent / name).read_text() == "old"
    assert sorted(path.name for path in bare.parent.iterdir()) == ["student", name]
