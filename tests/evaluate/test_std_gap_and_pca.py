"""std-gap against numpy on the tokens themselves; pca's shares and pictures."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("nvidia.dali")

from kpu_fast.kernels import moments

from kpu_fast.data.labelled import LabelledImages, to_batch
from kpu_fast.data.pipeline import Stream
from kpu_fast.data.scan import load_or_scan
from kpu_fast.evaluate.__main__ import main
from kpu_fast.evaluate.encoder import Encoder, load_encoder
from kpu_fast.evaluate.pca import _read as read_files
from kpu_fast.evaluate.pca import pca
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.evaluate.std_gap import deviation, std_gap
from kpu_fast.models import Features, Student
from kpu_fast.models.teachers import build_teacher
from kpu_fast.objectives.kpu import KPU

CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 64, "patch_size": 16, "projection_dim": 24,
}  # fmt: skip
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
ARCH = {"dim": 32, "depth": 2, "heads": 2, "patch_size": 14, "image_size": 56}
SEED, BATCHES = 3, 2


# ---- std-gap ----


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_deviation_is_over_all_tokens_and_channels_about_one_mean(offset):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 5, 5, 3, generator=generator) * 4 + offset, torch.randn(30, 7, generator=generator) + offset]
    maps[0][..., 1] += 5.0
    expected = np.concatenate([m.double().numpy().ravel() for m in maps]).std()
    assert deviation([moments(m) for m in maps]) == pytest.approx(expected, rel=1e-6 if offset == 0 else 1e-3)


def test_features_that_are_not_finite_have_no_deviation():
    with pytest.raises(EvaluateError, match="NaN or Inf"):
        deviation([moments(torch.tensor([[1.0], [float("nan")]]))])


def write_run(root, photos, centre: bool):
    """A run's folder as training leaves it, with random heads, and its module and teachers.

    centre: with the means of `objective.centre`, or else from before there was such a key.
    """
    objective = {
        "t2s": True, "rec": True, "rec_weight": 1.0, "x_weight": 1.0, "cos_weight": 0.9, "l1_weight": 0.1, "beta": 1.0,
        "standardize": "none",
    }  # fmt: skip
    data = {"source": str(photos), "threads": 1, "hw_decoder_load": 0.65, "crop_scale": [0.2, 1.0], "flip": True}
    teachers = {
        "clip": {"kind": "clip", "arch": CLIP, "data": {**data, "batch_size": 4, "size": [64, 64], "fit": "crop"}},
        "gdino": {
            "kind": "grounding_dino", "arch": SWIN, "data": {**data, "batch_size": 2, "size": [64, 96], "fit": "pad"}
        },
    }  # fmt: skip
    teachers = {name: {"weights": "random", "levels": None, **teacher} for name, teacher in teachers.items()}
    student = {
        "vit": {"weights": "random", "arch": ARCH},
        "adapter": {"cross_attention": "flash", "interactions": 2, "heads": None, "points": 4, "inplanes": 8},
        "freeze_vit": True, "attention": "auto", "head_hidden": 32,
    }  # fmt: skip
    tree = {"config": {"student": student, "teachers": teachers, "objective": objective}}
    built = {
        name: build_teacher(
            name,
            SimpleNamespace(**teacher),
            device="cpu",
            dtype=torch.float32,
            image_size=tuple(teacher["data"]["size"]),
        )
        for name, teacher in teachers.items()
    }
    specs = {name: teacher.spec for name, teacher in built.items()}
    cfg = SimpleNamespace(**{**student, "vit": SimpleNamespace(**student["vit"])})
    torch.manual_seed(5)  # not the seed that std_gap builds its own module with
    module = KPU(Student.from_config(cfg, specs), specs, SimpleNamespace(**objective, centre=centre))
    if centre:
        objective["centre"] = True
        with torch.no_grad():
            for head in [*module.h_t2s.clip.maps, *module.h_t2s.gdino.maps]:
                head.centre.mean.add_(torch.linspace(-3, 3, len(head.centre.mean)))
    for step in (1, 2):
        folder = root / "checkpoints" / f"step-{step:08d}"
        (folder / "state").mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"step": step, "world_size": 1, "zero_stage": 1}))
        torch.save({"module": module.state_dict()}, folder / "state" / "mp_rank_00_model_states.pt")
        if step == 1:
            with torch.no_grad():
                for head in [*module.h_t2s.clip.maps, *module.h_t2s.gdino.maps]:
                    head.fc2.weight.mul_(3.0)
    (root / "config.resolved.json").write_text(json.dumps(tree))
    return module, built, teachers


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((120 + 8 * i, 96), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KPU_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        root = tmp_path_factory.mktemp("run")
        yield root, *write_run(root, photos, centre=True)


@pytest.fixture
def old_run(tmp_path, photos):
    return tmp_path, *write_run(tmp_path, photos, centre=False)


def tokens_of(maps, valid):
    """The cells whose centre is no padding, one (n, C) array per map."""
    out = []
    for m in maps:
        keep = np.ones(m.shape[:3], bool)
        if valid is not None:
            ys, xs = (
                ((np.arange(n) + 0.5) * side / n).astype(int)
                for n, side in zip(m.shape[1:3], valid.shape[1:], strict=True)
            )
            keep = valid.numpy()[:, ys[:, None], xs]
        out.append(m.double().numpy()[keep])
    return out


@pytest.mark.parametrize("made", ["run", "old_run"])
@torch.no_grad()
def test_the_gap_is_that_of_the_tokens_themselves(made, request):
    root, module, teachers, blocks = request.getfixturevalue(made)
    own, common = {}, {}
    for name, teacher in teachers.items():
        block = blocks[name]["data"]
        data = {
            **block,
            "size": tuple(block["size"]),
            "aspect_ratio_grouping": False,
            "buckets": [],
        }  # as older runs had it
        data = SimpleNamespace(**data)
        stream = Stream(data, load_or_scan(data.source), rank=0, world_size=1, device=torch.device("cpu"), seed=SEED)
        seen, unified = [], []
        for _ in range(BATCHES):
            batch = next(stream)
            features = teacher(batch.images)
            height, width = batch.images.shape[2:]
            grids = [(height // s, width // s) for s in ([16] if name == "clip" else [8, 16, 32])]
            seen += tokens_of(features.maps, batch.valid)
            unified += tokens_of(module.h_t2s[name](features, grids).maps, batch.valid)
        own[name], common[name] = (np.concatenate([t.ravel() for t in part]).std() for part in (seen, unified))
    found = std_gap(root, batches=BATCHES, seed=SEED)
    for space, expected in (("own", own), ("common", common)):
        assert found[space]["std"] == pytest.approx(expected, rel=1e-4)
        assert found[space]["gap"] == pytest.approx(max(expected.values()) / min(expected.values()), rel=1e-4)
    assert found["images"] == {"clip": 8, "gdino": 4}
    assert found["checkpoint"].endswith("step-00000002")
    older = std_gap(root, batches=1, seed=SEED, checkpoint="step-00000001")
    newer = std_gap(root, batches=1, seed=SEED)
    assert older["own"] == newer["own"]
    assert older["common"]["std"]["gdino"] < 0.5 * newer["common"]["std"]["gdino"]


def test_the_command_gives_what_the_function_gives(run, photos, tmp_path):
    root, images = run[0], tmp_path / "images"
    images.mkdir()
    for path in sorted(photos.iterdir())[:2]:
        shutil.copy(path, images)
    default = std_gap(root, batches=1)
    for asked in ({"seed": SEED}, {"images": str(images)}, {"checkpoint": "step-00000001"}):
        words = [word for key, value in asked.items() for word in (f"--{key}", str(value))]
        command = ["std-gap", "--run", str(root), "--batches", "1", "--device", "cpu", *words]
        assert main([*command, "--json", str(tmp_path / "result.json")]) == 0
        found = json.loads((tmp_path / "result.json").read_text())
        expected = std_gap(root, batches=1, **asked)
        assert {key: found[key] for key in expected} == expected
        assert found["common"] != default["common"]


def test_a_run_without_t2s_has_no_common_space(tmp_path, run):
    root = run[0]
    tree = json.loads((root / "config.resolved.json").read_text())
    tree["config"]["objective"] |= {"t2s": False, "rec": False}
    (tmp_path / "config.resolved.json").write_text(json.dumps(tree))
    (tmp_path / "checkpoints").symlink_to(root / "checkpoints")
    found = std_gap(tmp_path, batches=1, seed=SEED)
    assert found["common"] is None
    assert found["own"] == std_gap(root, batches=1, seed=SEED)["own"]


def test_a_folder_that_is_no_run_or_has_no_such_checkpoint_is_an_error(run, tmp_path):
    root = run[0]
    with pytest.raises(EvaluateError, match=r"config\.resolved\.json cannot be used"):
        std_gap(tmp_path)
    with pytest.raises(EvaluateError, match=r"step-00000009: not in .* it has step-00000001, step-00000002"):
        std_gap(root, checkpoint="step-00000009")
    tree = (root / "config.resolved.json").read_text()
    (tmp_path / "config.resolved.json").write_text(tree)
    with pytest.raises(EvaluateError, match="is no folder of a run"):
        std_gap(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(EvaluateError, match="the run has saved none yet"):
        std_gap(tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000003"
    (folder / "state").mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (folder / "state" / "mp_rank_00_model_states.pt").write_bytes(b"cut off")
    with pytest.raises(EvaluateError, match="step-00000003: does not load"):
        std_gap(tmp_path)
    torch.save({"module": {}}, folder / "state" / "mp_rank_00_model_states.pt")
    with pytest.raises(EvaluateError, match=r"step-00000003: lacks h_t2s\.clip"):
        std_gap(tmp_path)
    with pytest.raises(EvaluateError, match=r"teachers\.clip\.data: .*nowhere"):
        std_gap(root, batches=1, images=str(tmp_path / "nowhere"))


def test_a_run_with_another_attention_kernel_is_read_anywhere(tmp_path, run):
    root = run[0]
    tree = json.loads((root / "config.resolved.json").read_text())
    tree["config"]["student"]["attention"] = "fa3" if not torch.cuda.is_available() else "fa2"
    (tmp_path / "config.resolved.json").write_text(json.dumps(tree))
    (tmp_path / "checkpoints").symlink_to(root / "checkpoints")
    found = std_gap(tmp_path, batches=1, seed=SEED)
    assert found["common"] == std_gap(root, batches=1, seed=SEED)["common"]
    assert found["size"] == {"clip": [64, 64], "gdino": [64, 96]}


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_images_that_cannot_be_read_are_an_error(monkeypatch, run, error):
    def fail(self):
        raise error("1.jpg: gone")

    monkeypatch.setattr(Stream, "__next__", fail)
    with pytest.raises(EvaluateError, match=r"^teachers\.clip\.data: 1\.jpg: gone$"):
        std_gap(run[0], batches=1)


# ---- pca ----


class Plane(nn.Module):
    """A map of 8 channels that vary along `directions` directions only, as the image does."""

    def __init__(self, directions):
        super().__init__()
        basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
        self.basis = nn.Parameter(basis[:directions])

    def forward(self, images):
        rows = torch.randn(len(images), 8, 8, len(self.basis), generator=torch.Generator().manual_seed(1))
        return Features(None, (rows @ self.basis,))


@pytest.mark.parametrize("directions", [2, 3, 6])
def test_the_share_shown_is_that_of_three_directions(tmp_path, directions):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = pca(Encoder("plane", "backbone", Plane(directions), 32), images, tmp_path / "a.png")
    (share,) = found["shown"].values()
    assert share == pytest.approx(1.0, abs=1e-5) if directions <= 3 else 0.45 < share < 0.75
    assert found["images"] == 2


def test_the_pictures_show_the_images_and_differ_between_models(zoo, student, coloured, tmp_path):
    data = LabelledImages(coloured)
    images = to_batch([data[i][0] for i in (0, 15, 30)], 64)
    pictures = {}
    for name, folder in {"student": student, "dinov2": zoo["dinov2"]}.items():
        found = pca(load_encoder(folder), images, tmp_path / f"{name}.png")
        assert len(found["shown"]) == (4 if name == "student" else 1)
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
    assert pictures["student"].shape[1] > 2 * pictures["dinov2"].shape[1]
    for picture in pictures.values():  # green, red and blue noise, large enough to be seen
        for channel in range(3):
            others = picture.astype(int).sum(2) - picture[..., channel]
            assert ((picture[..., channel] > 180) & (others < 250)).sum() > 1000
    found = pca(load_encoder(student), images, tmp_path / "both.png", teacher=load_encoder(zoo["clip"]))
    assert set(found["shown"]) == {str(zoo["clip"]), str(student), f"{student} as clip"}
    assert np.asarray(Image.open(tmp_path / "both.png")).std() > 10
    with pytest.raises(EvaluateError, match="--teacher takes a student to compare with"):
        pca(load_encoder(zoo["dinov2"]), images, tmp_path / "x.png", teacher=load_encoder(zoo["clip"]))


@pytest.mark.parametrize(
    ("kind", "name", "asked", "warned"),
    [
        ("dinov2", "zoo/dinov2", None, True),
        ("dinov2", "zoo/dinov2", "clip", False),
        ("clip", "openai/vit-b-16", None, False),
        ("backbone", "weights/CLIP-convnext", None, False),
        ("backbone", "clip/swin", None, True),
    ],
)
def test_a_head_that_nobody_named_and_that_may_be_anothers_is_warned_of(
    zoo, student, tmp_path, capsys, kind, name, asked, warned
):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    teacher = Encoder(name, kind, load_encoder(zoo["clip"]).net, 64)
    pca(load_encoder(student), images, tmp_path / "a.png", teacher=teacher, teacher_name=asked)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == warned
    for line in lines:
        assert "read through its head 'clip', the only one with maps of (32,) channels" in line
        assert f"if {name} was not that teacher" in line


def test_image_files_are_seen_as_in_training(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen = (np.arange(20 * 30, dtype=np.uint16) * 109).reshape(20, 30)
    Image.fromarray(sixteen).save(tmp_path / "a.png", exif=turned)
    (pixels,) = read_files([str(tmp_path / "a.png")], count=1, seed=0)
    assert np.array_equal(pixels, np.stack([np.rot90(sixteen >> 8, -1)] * 3, axis=2))


def test_a_student_alone_can_be_shown_in_a_teachers_space(student, tmp_path):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = pca(load_encoder(student), images, tmp_path / "a.png", teacher_name="gdino")
    assert [name.partition(", ")[2] for name in found["shown"]] == ["map 0, 8×8", "map 1, 4×4", "map 2, 2×2"]
    assert (found["head"], found["size"]) == ("gdino", 64)


def test_maps_of_one_grid_are_all_shown_and_the_model_is_run_once(zoo, student, tmp_path):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plane = Plane(3)
    two = nn.Module()
    two.weight, two.forward = plane.basis, lambda images: Features(None, plane(images).maps * 2)
    found = pca(Encoder("two", "backbone", two, 32), images, tmp_path / "a.png")
    assert list(found["shown"]) == ["two, map 0, 8×8", "two, map 1, 8×8"]
    encoder, runs = load_encoder(student), []
    encoder.net.register_forward_hook(lambda *_: runs.append(1))
    pca(encoder, images, tmp_path / "b.png", teacher=load_encoder(zoo["clip"]))
    assert runs == [1]


def test_maps_that_are_not_finite_are_an_error_and_leave_no_picture(tmp_path):
    net = Plane(3)
    with torch.no_grad():
        net.basis[0, 0] = float("nan")
    with pytest.raises(EvaluateError, match="NaN or Inf in the map"):
        pca(Encoder("plane", "backbone", net, 32), torch.rand(1, 3, 32, 32), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
