import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kpu_fast.data.labelled import to_batch
from kpu_fast.models import Student
from kpu_fast.models.hf_files import auto_keys, front_matter, usual_size

transformers = pytest.importorskip("transformers")
from transformers import AutoImageProcessor, AutoModel  # noqa: E402

VIT = {"patch_size": 4, "dim": 16, "depth": 1, "heads": 2, "registers": 1, "image_size": 16}
ADAPTER = {"cross_attention": "flash", "interactions": 1, "inplanes": 8}
HEADS = {
    "clip": {"x_dim": 12, "map_dims": (20,), "strides": (14.0,)},
    "detector": {"x_dim": None, "map_dims": (8, 16, 32), "strides": (8.0, 16.0, 32.0)},
}


@pytest.fixture
def student():
    torch.manual_seed(0)
    student = Student(vit=VIT, adapter=ADAPTER, heads=HEADS, head_hidden=24)
    for interaction in student.adapter.interactions:
        torch.nn.init.normal_(interaction.injector.gamma)
    return student.eval()


@pytest.fixture
def folder(student, tmp_path, monkeypatch):
    """An export, with transformers' copies of its code in a place of this test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    student.save_pretrained(tmp_path / "student", card=front_matter("facebook/dinov2-base") + "# A student\n")
    return tmp_path / "student"


def images(height=64, width=96, dtype=torch.float32):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def test_auto_model_gives_the_students_features(student, folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert same_state(model.student.state_dict(), student.state_dict())
    assert not model.training
    assert [p.requires_grad for p in model.student.parameters()] == [p.requires_grad for p in student.parameters()]
    features, out = student(images()), model(images())
    assert torch.equal(out.pooler_output, features.x)
    assert torch.equal(out.last_hidden_state, features.maps[2].flatten(1, 2))  # stride 16
    assert len(out.feature_maps) == 4
    for found, expected in zip(out.feature_maps, features.maps, strict=True):
        assert torch.equal(found, expected.permute(0, 3, 1, 2))


@torch.no_grad()
def test_a_teachers_name_gives_its_space(student, folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    features = student(images())
    clip, detector = student.project(features, "clip"), student.project(features, "detector")
    out = model(images(), teacher="clip")
    assert torch.equal(out.pooler_output, clip.x)
    assert torch.equal(out.last_hidden_state, clip.maps[0].flatten(1, 2))
    out = model(images(), teacher="detector")
    assert out.pooler_output is None
    assert torch.equal(out.last_hidden_state, detector.maps[1].flatten(1, 2))
    with pytest.raises(KeyError, match="no head for teacher 'dino'"):
        model(images(), teacher="dino")


@torch.no_grad()
def test_the_keywords_of_transformers_vision_models(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    out = model(images(), output_attentions=False, output_hidden_states=None, return_dict=None)
    found = model(images(), return_dict=False)
    assert type(found) is tuple
    for left, right in zip(found, out.to_tuple(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert len(model(images(), teacher="detector", return_dict=False)) == 2  # no x
    for key in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"{key}=True: a student has none"):
            model(images(), **{key: True})
    model.config.return_dict, model.config.output_hidden_states = False, True
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        model(images())
    assert type(model(images(), output_hidden_states=False)) is tuple


@torch.no_grad()
@pytest.mark.parametrize("vit", [VIT, dict(VIT, dim=24, patch_size=14, image_size=70)])
def test_the_config_describes_what_the_model_takes_and_gives(vit, tmp_path):
    from kpu_fast.models.hf import KPUStudentConfig, KPUStudentModel

    Student(vit=vit, adapter=None).save_pretrained(tmp_path)
    model = KPUStudentModel.from_pretrained(tmp_path)
    config = model.config
    side = config.image_size
    out = model(torch.rand(1, config.num_channels, side, side))
    assert out.last_hidden_state.shape == (1, (side // config.patch_size) ** 2, config.hidden_size)
    size = AutoImageProcessor.from_pretrained(tmp_path).crop_size
    assert (size["height"], size["width"]) == (side, side)
    names = ("hidden_size", "image_size", "patch_size", "num_channels")
    config.save_pretrained(tmp_path / "again")
    assert not set(names) & json.loads((tmp_path / "again" / "config.json").read_text()).keys()
    again = KPUStudentConfig.from_pretrained(tmp_path / "again")
    assert [getattr(again, name) for name in names] == [vit["dim"], side, 16, 3]


def test_a_config_without_a_student_has_no_sizes():
    from kpu_fast.models.hf import KPUStudentConfig

    assert not hasattr(KPUStudentConfig(), "hidden_size")
    by_hand = {key: value for key, value in VIT.items() if key != "image_size"} | {"patch_size": 14}
    assert KPUStudentConfig(student={"vit": by_hand}).image_size == 224  # of 518, where `ViT` starts from


def test_where_kpu_fast_is_imported_no_code_of_the_folder_is_run(student, folder):
    from kpu_fast.models.hf import KPUStudentModel

    (folder / "modeling_kpu_fast.py").write_text("raise SystemExit")
    model = AutoModel.from_pretrained(folder)
    assert type(model) is KPUStudentModel
    assert same_state(model.student.state_dict(), student.state_dict())


@torch.no_grad()
def test_dtypes(student, folder, tmp_path):
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    expected = student.bfloat16()(images(dtype=torch.bfloat16)).x
    assert torch.equal(half(images(dtype=torch.bfloat16)).pooler_output, expected)
    student.save_pretrained(tmp_path / "half")
    assert AutoModel.from_pretrained(tmp_path / "half", trust_remote_code=True).dtype == torch.bfloat16
    student.adapter.float()  # a frozen part in bf16 beside trained parts in fp32: computed in the wider of the two
    student.save_pretrained(tmp_path / "mixed")
    mixed = AutoModel.from_pretrained(tmp_path / "mixed", trust_remote_code=True)
    assert same_state(mixed.student.state_dict(), student.float().state_dict())
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


def test_the_widest_of_two_halves_is_float32():
    assert auto_keys([torch.bfloat16, torch.int64, torch.float16])["dtype"] == "float32"
    assert auto_keys([torch.int64, torch.bfloat16])["dtype"] == "bfloat16"


def test_what_the_model_saves_is_a_student_again(student, folder, tmp_path):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="50GB")  # as push_to_hub calls it
    assert same_state(Student.from_pretrained(tmp_path / "again").state_dict(), student.state_dict())
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert same_state(again.state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank").exists()


def test_the_model_saves_as_transformers_own_callers_ask(folder, tmp_path):
    """What Trainer, accelerate and push_to_hub hand in; what cannot be had is refused before anything is written."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "trainer", state_dict=doubled, is_main_process=True)
    found = Student.from_pretrained(tmp_path / "trainer").state_dict()
    assert same_state({f"student.{name}": tensor for name, tensor in found.items()}, doubled)
    model.save_pretrained(tmp_path / "accelerate", save_function=torch.save, safe_serialization=True, push_to_hub=False)
    assert same_state(Student.from_pretrained(tmp_path / "accelerate").state_dict(), model.student.state_dict())
    for asked in ({"push_to_hub": True}, {"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_sise": 1}):
        with pytest.raises(ValueError, match=f"save_pretrained: {next(iter(asked))}="):
            model.save_pretrained(tmp_path / "no", **asked)
    doubled.pop("student.vit.norm.weight")
    with pytest.raises(ValueError, match=r"state does not fit .* \(vit.norm.weight is missing\)"):
        model.save_pretrained(tmp_path / "no", state_dict=doubled)
    assert not (tmp_path / "no").exists()


def test_a_students_file_goes_into_the_model_as_trainer_loads_it(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.nn.init.zeros_(model.student.vit.norm.weight)
    model.load_state_dict(load_file(folder / "model.safetensors"), False)
    assert same_state(model.state_dict(), expected)
    model.load_state_dict(expected)


def classifier():
    from kpu_fast.models.hf import KPUStudentModel

    class Classifier(KPUStudentModel):
        def __init__(self, config):
            super().__init__(config)
            self.classifier = torch.nn.Linear(16, 300)
            self.post_init()

    return Classifier


def test_a_subclass_starts_from_a_student_and_is_saved_whole(student, folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    model = classifier().from_pretrained(folder)
    assert "classifier.weight" in caplog.text  # transformers' own report of what is new
    assert same_state(model.student.state_dict(), student.state_dict())
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.classifier.bias.count_nonzero() == 0
    assert not any(p.requires_grad for p in model.student.vit.parameters())
    model.save_pretrained(tmp_path / "classifier", state_dict=model.state_dict())
    again = classifier().from_pretrained(tmp_path / "classifier")
    assert same_state(again.state_dict(), model.state_dict())
    fresh = classifier()(model.config)
    assert torch.equal(fresh.student.vit.blocks[0].ls1, torch.ones(16))  # a student's own start, not transformers'
    state = load_file(tmp_path / "classifier" / "model.safetensors")
    state.pop("student.vit.norm.weight")
    save_file(state, tmp_path / "classifier" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors \(student.vit.norm.weight is missing\)"):
        classifier().from_pretrained(tmp_path / "classifier")


def test_a_new_model_keeps_the_students_own_start(folder):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    cross = model.student.adapter.interactions[0].injector
    assert cross.gamma.count_nonzero() == 0
    assert cross.cross.q.weight.std() > 0.2  # Xavier; transformers' own is 0.02
    assert torch.equal(model.student.vit.blocks[0].ls1, torch.ones(16))
    assert 0.5 < model.student.adapter.level_embed.std() < 1.5


def test_weights_of_another_shape_are_errors_even_where_a_new_head_may_have_one(folder):
    from kpu_fast.models.hf import KPUStudentModel

    config = json.loads((folder / "config.json").read_text())
    config["student"]["head_hidden"] = 25
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"student.heads.clip.maps.0.fc1.bias is \(24,\), expected \(25,\)"):
        KPUStudentModel.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("vit.norm.weight"), r"1 tensors \(student.vit.norm.weight is missing\)"),
        (lambda s: s.update(extra=torch.ones(2)), r"1 tensors \(extra is not expected\)"),
    ],
)
def test_weights_that_do_not_fit_are_errors(change, message, folder):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    from kpu_fast.models.hf import KPUStudentModel

    with pytest.raises(ValueError, match=re.escape(f"{folder}: model.safetensors does not fit")):
        KPUStudentModel.from_pretrained(pretrained_model_name_or_path=folder)


@torch.no_grad()
def test_an_image_goes_through_the_processor_as_the_student_wants_it(student, folder):
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(folder)
    found = processor(image_module.fromarray(pixels), return_tensors="pt").pixel_values
    # 64 pixels a side is this student's own size, so nothing is resized: [0, 1], and not normalised.
    torch.testing.assert_close(found, torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    grey = processor(image_module.fromarray(pixels[..., 0], mode="L"), return_tensors="pt").pixel_values
    torch.testing.assert_close(grey, torch.from_numpy(pixels[None, None, ..., 0]).expand(-1, 3, -1, -1) / 255)
    extract = transformers.pipeline("image-feature-extraction", model=str(folder), trust_remote_code=True)
    vector = torch.tensor(extract(image_module.fromarray(pixels[:40]), pool=True))  # resized to 64 × 64
    assert vector.shape == (1, 16)
    torch.testing.assert_close(torch.tensor(extract(image_module.fromarray(pixels), pool=True)), student(found).x)


@pytest.mark.parametrize(
    ("height", "width"),
    [(128, 192), (192, 128), (64, 96), (40, 60), (97, 150)],  # made smaller, kept, made larger; no whole factor
)
def test_the_processor_keeps_proportions_as_evaluate_does(height, width, folder):
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)
    pixels = (smooth[0].permute(1, 2, 0) * 255).round().byte().numpy()
    found = AutoImageProcessor.from_pretrained(folder)(pixels, return_tensors="pt").pixel_values
    expected = to_batch([pixels], 64)
    assert found.shape == expected.shape == (1, 3, 64, 64)
    # Bytes are rounded once more; with a factor that is not whole the squares lie up to half a pixel apart. Squashed,
    # the picture would be 0.1 away.
    assert (found - expected).abs().mean() < (0.01 if height == 97 else 0.003)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "size"), [(518, 14, 224), (128, 16, 128), (16, 4, 64), (112, 16, 96), (8, 8, 32)]
)
def test_the_usual_size_is_a_multiple_of_32(image_size, patch_size, size):
    assert usual_size({"image_size": image_size, "patch_size": patch_size}) == size


def test_the_hub_can_read_the_card(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.base_model == "facebook/dinov2-base"
    assert "kpu_fast" in card.data.tags
    assert card.text.strip() == "# A student"
    assert ModelCard(front_matter()).data.base_model is None
