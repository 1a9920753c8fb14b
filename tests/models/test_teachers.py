"""Teachers against transformers' own forward on images normalised by hand, and every way a teacher can be wrong."""

import json
import logging
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from kpu_fast.models import teachers  # noqa: E402
from kpu_fast.models.features import FeatureSpec  # noqa: E402
from kpu_fast.models.hub import WeightsError  # noqa: E402
from kpu_fast.models.teachers import MODEL_TYPES, build_teacher  # noqa: E402

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SWIN = dict(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=4)
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
CLIP = dict(VIT, intermediate_size=48, patch_size=16, image_size=64, projection_dim=24)
SIGLIP = dict(VIT, intermediate_size=48, patch_size=16, image_size=64)
DINOV3 = dict(VIT, intermediate_size=48, num_register_tokens=3)
SAM = dict(VIT, mlp_dim=48, image_size=64, window_size=2, global_attn_indexes=[1], output_channels=24, num_pos_feats=12)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic")
HIERA = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
SQUARE, WIDE = (64, 64), (64, 96)


def config(kind, weights="random", arch=None, levels=None):
    return SimpleNamespace(kind=kind, weights=str(weights), arch=arch or {}, levels=levels)


def build(kind, weights="random", arch=None, levels=None, *, dtype=torch.float32, image_size=SQUARE, seed=0, name="t"):
    cfg = config(kind, weights, arch, levels)
    return build_teacher(name, cfg, device="cpu", dtype=dtype, image_size=image_size, seed=seed)


def pictures(size, n=2, seed=0):
    """Smooth pictures (n, 3, H, W) in [0, 1]."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


def normalise(images, mean, std):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def wake(model, seed=0):
    """Weights large enough that a wrong key, norm or mean moves the output well beyond the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (model, folder)} of tiny checkpoints as save_pretrained writes them."""
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    dino = dict(
        backbone_config=dict(SWIN, model_type="swin", out_indices=[2, 3, 4]),
        text_config=dict(text, model_type="bert", max_position_embeddings=16),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
    )
    hf = transformers
    clip_text = dict(text, projection_dim=24, bos_token_id=1, eos_token_id=2)
    dinov2 = dict(VIT, image_size=56, patch_size=14)
    sam_decoder = dict(
        prompt_encoder_config=dict(hidden_size=24, image_size=64),
        mask_decoder_config=dict(hidden_size=24, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=8),
    )
    torch.manual_seed(0)
    models = {
        "clip": hf.CLIPModel(hf.CLIPConfig(text_config=clip_text, vision_config=CLIP, projection_dim=24)),
        "clip_vision": hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**CLIP)),
        "grounding_dino": hf.GroundingDinoForObjectDetection(hf.GroundingDinoConfig(**dino)),
        "siglip": hf.SiglipModel(hf.SiglipConfig(text_config=dict(text, projection_size=32), vision_config=SIGLIP)),
        "siglip_vision": hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP)),
        "sam": hf.SamModel(hf.SamConfig(vision_config=SAM, **sam_decoder)),
        "sam_vision": hf.SamVisionModel(hf.SamVisionConfig(**SAM)),
        "dinov3": hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3)),
        "dinov2": hf.Dinov2Model(hf.Dinov2Config(**dinov2)),
        "dinov2_reg": hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**dinov2)),
        "swin": hf.SwinForImageClassification(hf.SwinConfig(**SWIN)),
        "resnet": hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
    }
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        wake(model).save_pretrained(root / name)
    return {name: (model, root / name) for name, model in models.items()}


def edited(saved, name, tmp_path, edit_weights=None, edit_config=None):
    """A copy of a checkpoint with changed weights or config."""
    folder = tmp_path / "edited"
    shutil.copytree(saved[name][1], folder)
    if edit_weights:
        weights = load_file(folder / "model.safetensors")
        save_file(edit_weights(weights), folder / "model.safetensors", metadata={"format": "pt"})
    if edit_config:
        values = json.loads((folder / "config.json").read_text())
        edit_config(values)
        (folder / "config.json").write_text(json.dumps(values))
    return folder


# --------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("size", [SQUARE, WIDE, (96, 32)])  # native positions; interpolated to two aspect ratios
@pytest.mark.parametrize("checkpoint", ["clip", "clip_vision"])
def test_clip_is_the_projected_embedding_and_the_last_patch_tokens(saved, checkpoint, size):
    model, folder = saved[checkpoint]
    images = pictures(size)
    x, maps = build("clip", folder, image_size=size)(images)
    vision = model.vision_model(normalise(images, CLIP_MEAN, CLIP_STD), interpolate_pos_encoding=True)
    tokens = vision.last_hidden_state[:, 1:].reshape(2, size[0] // 16, size[1] // 16, 32)
    torch.testing.assert_close(x, model.visual_projection(vision.pooler_output))
    torch.testing.assert_close(maps, (tokens,))


@pytest.mark.parametrize("size", [SQUARE, WIDE, (96, 32)])
@pytest.mark.parametrize("checkpoint", ["siglip", "siglip_vision"])
def test_siglip_is_the_pooled_vector_and_every_token_after_the_last_norm(saved, checkpoint, size):
    model, folder = saved[checkpoint]
    images = pictures(size)
    teacher = build("siglip", folder, image_size=size)
    x, maps = teacher(images)
    vision = getattr(model, "vision_model", model)
    out = vision(normalise(images, (0.5,) * 3, (0.5,) * 3), interpolate_pos_encoding=True)
    torch.testing.assert_close(x, out.pooler_output)
    torch.testing.assert_close(maps, (out.last_hidden_state.reshape(2, size[0] // 16, size[1] // 16, 32),))
    assert teacher.spec == FeatureSpec(32, (32,), (16.0,))
    # The text tower is not kept.
    assert sum(p.numel() for p in teacher.parameters()) == sum(p.numel() for p in vision.parameters())


@pytest.mark.parametrize("size", [SQUARE, WIDE, (32, 96)])
def test_dinov3_is_the_class_token_and_the_patches_without_registers(saved, size):
    model, folder = saved["dinov3"]
    images = pictures(size)
    x, maps = build("dinov3", folder, image_size=size)(images)
    out = model(normalise(images, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
    torch.testing.assert_close(x, out[:, 0])
    torch.testing.assert_close(maps, (out[:, 4:].reshape(2, size[0] // 16, size[1] // 16, 32),))


@pytest.mark.parametrize("checkpoint", ["sam", "sam_vision"])
def test_sam_is_what_its_mask_decoder_reads_and_takes_one_size(saved, checkpoint):
    model, folder = saved[checkpoint]
    images = pictures(SQUARE)
    teacher = build("sam", folder)
    pixels = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
    wanted = model.get_image_embeddings(pixels) if checkpoint == "sam" else model(pixels).last_hidden_state
    x, maps = teacher(images)
    assert x is None
    torch.testing.assert_close(maps, (wanted.permute(0, 2, 3, 1),))
    assert teacher.spec == FeatureSpec(None, (24,), (16.0,))
    text = message("sam", folder, image_size=WIDE)
    one = "teachers.t: does not take images of 64×96: a SAM takes one size, and this one was made for 64×64"
    assert text == one
    with pytest.raises(WeightsError, match=re.escape(f"{one}; set teachers.t.data.aspect_ratio_grouping to false")):
        teacher.check_sizes([SQUARE, WIDE])


@pytest.mark.parametrize("size", [SQUARE, WIDE])
def test_grounding_dino_maps_are_what_its_own_forward_gives_to_the_neck(saved, size):
    model, folder = saved["grounding_dino"]
    teacher = build("grounding_dino", folder, image_size=size)
    images = pictures(size)
    features = model.model.backbone.conv_encoder(
        normalise(images, IMAGENET_MEAN, IMAGENET_STD), torch.ones(2, *size, dtype=torch.long)
    )
    x, maps = teacher(images)
    assert x is None
    torch.testing.assert_close(maps, tuple(m.permute(0, 2, 3, 1) for m, _ in features))
    assert teacher.spec == FeatureSpec(None, (16, 32, 64), (8.0, 16.0, 32.0))
    # Only the image backbone is kept.
    kept = sum(p.numel() for p in teacher.parameters())
    assert kept == sum(p.numel() for p in model.model.backbone.conv_encoder.parameters())


@pytest.mark.parametrize("checkpoint", ["dinov2", "dinov2_reg"])
@pytest.mark.parametrize("size", [(56, 84), SQUARE, (224, 96)])  # fits the patches; 64 → 70; 96 → 98
def test_dinov2_sees_the_nearest_multiple_of_its_patch(saved, checkpoint, size):
    model, folder = saved[checkpoint]
    images = pictures(size)
    teacher = build("dinov2", folder, image_size=size)
    x, maps = teacher(images)
    fitted = {56: 56, 84: 84, 64: 70, 224: 224, 96: 98}
    grid = [fitted[side] // 14 for side in size]
    pixels = F.interpolate(images, [fitted[side] for side in size], mode="bicubic", antialias=True)
    body = getattr(model, "dinov2_with_registers", model)
    out = body(normalise(pixels, IMAGENET_MEAN, IMAGENET_STD))
    skip = 5 if checkpoint == "dinov2_reg" else 1
    torch.testing.assert_close(x, out.last_hidden_state[:, 0])
    torch.testing.assert_close(maps, (out.last_hidden_state[:, skip:].reshape(2, *grid, 32),), rtol=1e-4, atol=1e-5)
    assert maps[0].shape[1:3] == tuple(grid)


def test_a_network_that_mixes_the_cells_of_other_sizes_is_refused():
    """Hiera reads its maps by the image size in its config."""
    hiera = dict(HIERA, model_type="hiera", image_size=[64, 96])
    teacher = build("backbone", arch=hiera, levels=[1, 2], image_size=WIDE)
    with pytest.raises(
        WeightsError, match=r"those of 96×64 give maps of 16×24, 8×12 cells, not 24×16, 12×8;.*buckets to \[\]"
    ):
        teacher.check_sizes([WIDE, WIDE[::-1]])
    for kind, arch in (("grounding_dino", {"embed_dim": 8, "num_heads": [1, 1, 1, 1]}), ("clip", CLIP)):
        build(kind, arch=arch, image_size=WIDE).check_sizes([WIDE, WIDE[::-1], (64, 64), (32, 96)])


def test_backbone_gives_the_stages_asked_for(saved):
    model, folder = saved["swin"]
    images = pictures(WIDE)
    teacher = build("backbone", folder, levels=[1, 3], image_size=WIDE)
    x, maps = teacher(images)
    backbone = transformers.SwinBackbone(transformers.SwinConfig(**SWIN, out_indices=[1, 3])).eval()
    backbone.swin.load_state_dict(model.swin.state_dict())  # the stages' norms keep scale 1 and shift 0
    expected = backbone(normalise(images, IMAGENET_MEAN, IMAGENET_STD)).feature_maps
    assert x is None
    torch.testing.assert_close(maps, tuple(m.permute(0, 2, 3, 1) for m in expected))
    assert teacher.spec == FeatureSpec(None, (8, 32), (4.0, 16.0))
    assert build("backbone", folder).spec == FeatureSpec(None, (64,), (32.0,))  # no levels: the last stage


def test_a_saved_backbone_gives_some_of_its_stages(tmp_path):
    torch.manual_seed(0)
    backbone = wake(transformers.SwinBackbone(transformers.SwinConfig(**SWIN, out_indices=[1, 2, 3])))
    backbone.save_pretrained(tmp_path)
    images = pictures(SQUARE)
    expected = backbone(normalise(images, IMAGENET_MEAN, IMAGENET_STD)).feature_maps[1]
    (found,) = build("backbone", tmp_path, levels=[2])(images).maps  # with the norm trained for that stage
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1))


def test_resnet_backbone_matches_hidden_states(saved):
    model, folder = saved["resnet"]
    images = pictures(SQUARE)
    _, maps = build("backbone", folder, levels=[2, 4])(images)
    hidden = model.resnet(normalise(images, IMAGENET_MEAN, IMAGENET_STD), output_hidden_states=True).hidden_states
    torch.testing.assert_close(maps, (hidden[2].permute(0, 2, 3, 1), hidden[4].permute(0, 2, 3, 1)))


# Patches of 7 pixels, one every 4. 128 is no multiple of 7, and of 256 the nearest (259) has a cell too many.
@pytest.mark.parametrize("side", [64, 128, 256])
def test_overlapping_patches_are_as_far_apart_as_their_stride(side):
    arch = dict(HIERA, model_type="hiera", image_size=[side, side])
    images = pictures((side, side))
    teacher = build("backbone", arch=arch, levels=[1, 2, 4], image_size=(side, side))
    assert teacher.spec == FeatureSpec(None, (8, 16, 64), (4.0, 8.0, 32.0))
    expected = teacher.net(normalise(images, IMAGENET_MEAN, IMAGENET_STD)).feature_maps  # not resized
    torch.testing.assert_close(teacher(images).maps, tuple(m.permute(0, 2, 3, 1) for m in expected))


def test_a_patch_stride_may_be_one_number():
    net = transformers.SwinBackbone(transformers.SwinConfig(**SWIN))
    net.config.patch_size, net.config.patch_stride = 7, 4
    teacher = teachers.Teacher("t", "backbone", net, IMAGENET_MEAN, IMAGENET_STD, SQUARE)
    assert teacher.patch_size == 4


@pytest.mark.parametrize(
    ("kind", "whose"),
    [("clip", "CLIP's, mean (0.48"), ("siglip", "SigLIP's, mean (0.5, 0.5"), ("dinov2", "ImageNet's, mean (0.48")],
)
def test_without_an_image_processor_mean_and_std_are_named(saved, kind, whose, caplog):
    build(kind, saved[kind][1])
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("teachers.")
    assert f"normalised with {whose}" in said


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_mean_and_std_come_from_the_image_processor(saved, tmp_path, file):
    folder = edited(saved, "clip", tmp_path)
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    values = {"image_mean": mean, "image_std": std, "do_normalize": True}
    (folder / file).write_text(json.dumps(values if file.startswith("pre") else {"image_processor": values}))
    model, images = saved["clip"][0], pictures(SQUARE)
    x = build("clip", folder)(images).x
    torch.testing.assert_close(
        x, model.visual_projection(model.vision_model(normalise(images, mean, std)).pooler_output)
    )


@pytest.mark.parametrize(
    "processor",
    [
        {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.1, 0.9], "image_std": [0.9, 1.0, 1.1]},
        {"do_rescale": False, "rescale_factor": 0.5, "image_mean": [128.0] * 3, "image_std": [64.0] * 3},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {
            "do_rescale": None,
            "rescale_factor": None,
            "do_normalize": None,
            "image_mean": [0.4] * 3,
            "image_std": [0.3] * 3,
        },
    ],
    ids=["0 to 255", "0 to 2", "factor of no use", "not normalised", "null is the default"],
)
def test_pixels_are_what_the_image_processor_makes_of_bytes(saved, tmp_path, processor):
    folder = edited(saved, "clip", tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "do_resize": False}))
    stored = torch.randint(0, 256, (2, 3, *SQUARE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = {key: value for key, value in processor.items() if value is not None}
    theirs = transformers.CLIPImageProcessor(**given, do_resize=False, do_center_crop=False)
    pixels = theirs(list(stored), return_tensors="pt").pixel_values
    model = saved["clip"][0]
    x = build("clip", folder)(stored.float() / 255).x
    torch.testing.assert_close(
        x, model.visual_projection(model.vision_model(pixels).pooler_output), rtol=1e-4, atol=1e-5
    )


def test_clip_with_patch_14_loses_no_pixel():
    teacher = build("clip", arch=dict(CLIP, patch_size=14, image_size=56), image_size=(64, 96))
    images = pictures((64, 96))
    assert teacher(images).maps[0].shape == (2, 5, 7, 32)  # 70×98 seen, not 56×84
    corner = images.clone()
    corner[:, :, -4:, -4:] = 1 - corner[:, :, -4:, -4:]  # what a plain stride-14 convolution would cut off
    assert (teacher(images).maps[0] - teacher(corner).maps[0]).abs().amax() > 0.1


# What a student does to find a teacher's grid: round pixels / stride. 224 is a multiple of 14; 512×512 → 37×37 has one
# ratio on both axes; 256×512 → 18×37 and its transpose would be 18×36 by the geometric mean of a cell's sides.
@pytest.mark.parametrize("size", [(224, 224), (256, 512), (512, 256), (512, 512), (96, 160)])
@pytest.mark.parametrize("kind", ["dinov2", "clip", "grounding_dino"])
def test_strides_tell_the_grid_of_every_map(kind, size):
    arch = {"dinov2": dict(VIT, image_size=56), "clip": CLIP, "grounding_dino": SWIN}[kind]
    teacher = build(kind, arch=dict(arch, num_hidden_layers=1) if kind != "grounding_dino" else arch, image_size=size)
    maps = teacher(pictures(size, n=1)).maps
    for m, stride in zip(maps, teacher.spec.strides, strict=True):
        assert [round(side / stride) for side in size] == list(m.shape[1:3])
    if kind == "dinov2":
        assert teacher.spec.strides == (14.0,)
    else:
        assert teacher.spec.strides == {"clip": (16.0,), "grounding_dino": (8.0, 16.0, 32.0)}[kind]


def test_stride_where_no_rounding_gives_the_grid():
    # Neither one ratio nor the patch size: the geometric mean of 32 / 3 and 64 / 5.
    assert teachers._stride((32, 64), (3, 5), patch_size=4) == pytest.approx((32 / 3 * 64 / 5) ** 0.5)


# ---------------------------------------------------------------------------------------------------- frozen, dtypes


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_frozen_and_usable_in_autograd(saved, kind):
    arch = {
        "clip": CLIP,
        "siglip": SIGLIP,
        "grounding_dino": SWIN,
        "dinov2": dict(VIT, image_size=56),
        "dinov3": DINOV3,
        "sam": SAM,
        "backbone": dict(RESNET, model_type="resnet"),
    }[kind]
    teacher = build(kind, arch=arch)
    before = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    torch.nn.ModuleList([teacher]).train()
    assert not any(m.training for m in teacher.modules())
    images = pictures(SQUARE).requires_grad_()
    with torch.enable_grad():
        x, maps = teacher(images)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(f.requires_grad or f.is_inference() for f in (*maps, *([] if x is None else [x])))
    scale = torch.ones(1, requires_grad=True)
    (maps[0] * scale).sum().backward()  # the map is saved for backward
    assert scale.grad.item() == pytest.approx(maps[0].sum().item(), rel=1e-3, abs=1e-2)
    for key, value in teacher.net.state_dict().items():  # batch statistics included
        assert torch.equal(value, before[key]), key


def test_maps_are_whole_tokens_in_memory():
    maps = build("backbone", arch=dict(RESNET, model_type="resnet"), levels=[2, 3])(pictures(SQUARE)).maps
    assert all(m.is_contiguous() for m in maps)


@pytest.mark.parametrize("kind", ["clip", "siglip", "grounding_dino", "dinov2_reg", "dinov3", "sam"])
def test_bf16_weights_with_fp32_normalisation(saved, kind):
    folder = saved[kind][1]
    half = build(kind.removesuffix("_reg"), folder, dtype=torch.bfloat16)
    full = build(kind.removesuffix("_reg"), folder)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert half.mean.dtype == half.std.dtype == torch.float32
    images = pictures(SQUARE)
    for a, b in zip((half(images).x, *half(images).maps), (full(images).x, *full(images).maps), strict=True):
        if b is not None:
            assert a.dtype == torch.bfloat16
            assert (a.float() - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("kind", ["clip", "grounding_dino"])
def test_a_teacher_moved_afterwards_is_one_built_so(saved, kind):
    moved = build(kind, saved[kind][1]).bfloat16()
    built = build(kind, saved[kind][1], dtype=torch.bfloat16)
    assert torch.equal(moved.mean, built.mean)
    images = pictures(SQUARE)
    for a, b in zip(moved(images).maps, built(images).maps, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["clip", "siglip", "grounding_dino", "dinov2", "dinov3", "sam"])
def test_compiles(saved, kind):
    teacher = build(kind, saved[kind][1])
    images = pictures(SQUARE)
    expected, found = teacher(images), torch.compile(teacher, backend="aot_eager")(images)
    torch.testing.assert_close(found.maps, expected.maps)
    if expected.x is not None:
        torch.testing.assert_close(found.x, expected.x)


# ------------------------------------------------------------------------------------------------------ random weights


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("clip", CLIP),
        ("siglip", SIGLIP),
        ("grounding_dino", SWIN),
        ("dinov3", DINOV3),
        ("sam", SAM),
        ("dinov2", dict(VIT, image_size=56)),
        ("dinov2", dict(VIT, image_size=56, num_register_tokens=2)),
        ("backbone", dict(RESNET, model_type="resnet")),
    ],
)
def test_random_teachers_are_reproducible_and_see_the_image(kind, arch, caplog):
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        teacher = build(kind, arch=arch, name="guess")
    assert torch.equal(torch.get_rng_state(), state)
    assert "'guess'" in caplog.text
    assert "RANDOM" in caplog.text
    images = pictures(SQUARE, n=6)
    features = teacher(images)
    again, other = build(kind, arch=arch, name="guess")(images), build(kind, arch=arch, name="guess", seed=1)(images)
    namesake = build(kind, arch=arch, name="another")(images)
    for i, m in enumerate(features.maps):
        assert torch.equal(m, again.maps[i])
        assert (m - other.maps[i]).norm() > 0.1 * m.norm()
        assert (m - namesake.maps[i]).norm() > 0.1 * m.norm()
        rms = m.square().mean().sqrt()
        assert m.flatten(1, 2).std(1).mean() > 0.1 * rms  # between tokens of an image
        assert m.std(0).mean() > 0.1 * rms  # between images
    if features.x is not None:
        assert features.x.std(0).mean() > 0.2 * features.x.square().mean().sqrt()


def test_real_sizes_of_the_random_defaults():
    with torch.device("meta"):
        swin = build_net("grounding_dino")
        clip = build_net("clip")
        siglip, dinov3, sam = build_net("siglip"), build_net("dinov3"), build_net("sam")
    assert swin.channels == [192, 384, 768]
    assert sum(p.numel() for p in swin.parameters()) == 27_519_354 + 2_688  # Swin-T and the norms of three stages
    assert (clip.config.patch_size, clip.config.hidden_size, clip.config.projection_dim) == (16, 768, 512)
    assert sum(p.numel() for p in clip.parameters()) == 86_192_640  # the image half of CLIP B/16
    assert sum(p.numel() for p in siglip.parameters()) == 92_884_224  # the image half of SigLIP B/16 at 224
    assert sum(p.numel() for p in dinov3.parameters()) == 85_660_416  # DINOv3 ViT-B/16 and its mask token
    assert (dinov3.config.num_register_tokens, sam.config.image_size) == (4, 1024)
    assert dinov3.config.num_attention_heads == 12
    assert sum(p.numel() for p in sam.parameters()) == 89_670_912  # the image encoder of SAM ViT-B


def build_net(kind):
    return teachers._random_net("t", config(kind), seed=0)


def test_random_networks_are_shown_images_as_their_kind_usually_is():
    assert build("siglip", arch=SIGLIP).mean_std == ((0.5,) * 3, (0.5,) * 3)
    assert build("clip", arch=CLIP).mean_std == (CLIP_MEAN, CLIP_STD)
    assert build("sam", arch=SAM).mean_std == (IMAGENET_MEAN, IMAGENET_STD)


def test_a_siglip_without_a_pooling_head_has_no_x():
    assert "weights: this siglip has no vector for the image" in message(
        "siglip", arch=SIGLIP | {"vision_use_head": False}
    )


def test_two_register_tokens_make_the_model_with_registers():
    assert build("dinov2", arch=dict(VIT, image_size=56, num_register_tokens=2)).first_patch == 3
    assert build("dinov2", arch=dict(VIT, image_size=56)).first_patch == 1


# -------------------------------------------------------------------------------------------------------------- errors


def message(*args, **kwargs):
    with pytest.raises(WeightsError) as caught:
        build(*args, **kwargs)
    return str(caught.value)


def test_unknown_kind_and_idle_keys(saved):
    assert "teachers.t.kind" in message("timm")
    assert "teachers.t.levels" in message("clip", arch=CLIP, levels=[1])
    assert "teachers.t.arch" in message("clip", saved["clip"][1], arch={"patch_size": 16})


def test_arch_keywords_are_checked():
    text = message("clip", arch={"patchsize": 16})
    assert "teachers.t.arch.patchsize" in text
    assert "patch_size" in text
    assert "embed_dim" in message("grounding_dino", arch={"embed_dims": 8})
    assert "num_register_tokens" in message("dinov2", arch={"num_register_token": 2})
    assert "convnext" in message("backbone", arch={"model_type": "convnxt"})
    assert "model_type" in message("backbone", arch={"depths": [1]})
    assert "hidden_size" in message("clip", arch=dict(CLIP, hidden_size="wide"))  # wrong type
    assert "teachers.t.arch" in message("clip", arch=dict(CLIP, hidden_size=33))  # 33 channels for 2 heads


@pytest.mark.parametrize(
    ("kind", "arch", "size"),
    [("backbone", {"model_type": "hiera", "embed_dim": 8}, (96, 64)), ("clip", dict(CLIP, num_channels=1), SQUARE)],
)
def test_a_network_that_does_not_take_the_images_is_named(kind, arch, size):
    levels = [4] if kind == "backbone" else None
    text = message(kind, arch=arch, levels=levels, image_size=size)
    assert text.startswith(f"teachers.t: does not take images of {size[0]}×{size[1]}: ")
    assert len(text.splitlines()) == 1


def test_bytes_are_no_images():
    teacher = build("clip", arch=CLIP)
    with pytest.raises(ValueError, match=r"torch.uint8.*expected floating point in \[0, 1\]"):
        teacher((pictures(SQUARE) * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="images: the batch is empty"):
        teacher(pictures(SQUARE)[:0])


def test_folder_missing_or_without_a_model(tmp_path):
    text = message("clip", tmp_path / "nowhere")
    assert "teachers.t.weights" in text
    assert str(tmp_path / "nowhere") in text
    (tmp_path / "notes.txt").write_text("")
    text = message("clip", tmp_path)
    assert "notes.txt" in text
    assert "config.json" in text
    assert "hub id" in message("clip", "no/such/folder")


def test_wrong_model_in_the_folder(saved, tmp_path):
    text = message("grounding_dino", saved["clip"][1])
    assert "'clip'" in text
    assert "teachers.t.kind to 'clip'" in text
    assert "'grounding-dino'" in text
    assert "'resnet'" in message("dinov2", saved["resnet"][1])
    siglip2 = edited(saved, "siglip", tmp_path, edit_config=lambda values: values.update(model_type="siglip2"))
    assert "'siglip2'" in message("siglip", siglip2)  # reads its images in another way
    assert "'clip'" in message("backbone", saved["clip"][1])
    text = message("backbone", saved["grounding_dino"][1])
    assert text.endswith("or give weights of a type that has a backbone, such as 'swin'")


@pytest.mark.parametrize("levels", [[1, 9], [3, 2]])
def test_levels_are_checked(saved, levels):
    for text in (
        message("backbone", saved["swin"][1], levels=levels),
        message("backbone", arch=dict(RESNET, model_type="resnet"), levels=levels),
    ):
        assert text.startswith("teachers.t.levels")
        assert "4 = stage4" in text


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("clip", "visual_projection.weight"),
        ("grounding_dino", "model.backbone.conv_encoder.model.embeddings.norm.weight"),
        ("dinov2", "layernorm.bias"),
        ("siglip", "vision_model.head.probe"),
        ("dinov3", "norm.bias"),
        ("sam", "vision_encoder.neck.conv2.weight"),
        ("resnet", "resnet.embedder.embedder.normalization.running_mean"),
    ],
)
def test_missing_weights_are_named(saved, tmp_path, kind, lost):
    def drop(weights):
        del weights[lost]
        return weights

    text = message({"resnet": "backbone"}.get(kind, kind), edited(saved, kind, tmp_path, drop))
    assert lost.split(".", 1)[-1].removeprefix("backbone.conv_encoder.model.") in text
    assert "lacks" in text


@pytest.mark.parametrize(
    ("kind", "config_key"),
    [
        *((kind, "vision_config") for kind in ("clip", "siglip", "sam")),
        *((kind, None) for kind in ("dinov2", "dinov2_reg", "dinov3", "grounding_dino")),
    ],
)
def test_weights_without_a_place_are_named(saved, tmp_path, kind, config_key):
    """A config with fewer layers than the checkpoint would silently cut the network short."""

    def shorten(values):
        if kind == "grounding_dino":
            values["backbone_config"]["depths"] = [1, 1, 1, 1]
        else:
            (values[config_key] if config_key else values)["num_hidden_layers"] = 1
            for stages in ("stage_names", "out_features", "out_indices"):
                values.pop(stages, None)

    text = message(kind.removesuffix("_reg"), edited(saved, kind, tmp_path, edit_config=shorten))
    assert "no place" in text
    assert ".1." in text


def test_wrong_shapes_and_damaged_files(saved, tmp_path):
    def widen(weights):
        weights["visual_projection.weight"] = torch.zeros(9, 32)
        return weights

    folder = edited(saved, "clip", tmp_path, widen)
    assert "visual_projection.weight (9, 32), expected (24, 32)" in message("clip", folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in message("clip", folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in message("clip", folder)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", [], "holds []"),
        ("config.json", "clip", "holds clip"),
        ("preprocessor_config.json", [1], "holds [1]"),
        ("preprocessor_config.json", {"image_mean": 0.5, "image_std": 0.5}, "image_mean"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5, "a", 1]}, "image_std"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5, 0, 1]}, "above 0"),
        ("preprocessor_config.json", {"image_mean": [0.5, float("nan"), 1], "image_std": [1] * 3}, "image_mean"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 4, "image_std": [1] * 4}, "image_mean"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3}, "image_std"),
        ("processor_config.json", {"image_processor": "CLIPImageProcessor"}, "image_processor"),
        ("preprocessor_config.json", {"do_normalize": "false"}, "do_normalize"),
        ("preprocessor_config.json", {"do_rescale": 0, "image_mean": [0.5] * 3, "image_std": [1] * 3}, "do_rescale"),
        ("preprocessor_config.json", {"rescale_factor": "1/255", "do_normalize": False}, "rescale_factor"),
        ("preprocessor_config.json", {"rescale_factor": 0}, "rescale_factor"),
        ("preprocessor_config.json", {"rescale_factor": True}, "rescale_factor"),
        ("preprocessor_config.json", {"rescale_factor": float("inf")}, "rescale_factor"),
    ],
)
def test_json_of_another_form_is_named(saved, tmp_path, file, content, expected):
    folder = edited(saved, "clip", tmp_path)
    (folder / file).write_text(json.dumps(content))
    text = message("clip", folder)
    assert text.startswith("teachers.t.weights: ")
    assert str(folder / file) in text
    assert expected in text


def test_index_tables_in_old_checkpoints_do_no_harm(saved, tmp_path):
    def age(weights):
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        return weights

    build("clip", edited(saved, "clip", tmp_path, age))


# ----------------------------------------------------------------------------------------------------------------- hub


def test_hub_id_without_network_fails_fast(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.perf_counter()
    text = message("clip", "openai/clip-vit-base-patch16")
    assert time.perf_counter() - start < 5
    assert "teachers.t.weights" in text
    assert "hf download openai/clip-vit-base-patch16" in text
    assert '"random"' in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in message("clip", "openai/clip-vit-base-patch16").lower()


def test_a_published_grounding_dino_lacks_a_norm_that_no_map_passes(saved, tmp_path):
    def as_published(weights):
        kept = {
            name: w for name, w in weights.items() if not re.search(r"conv_encoder\.model\.(swin\.)?layernorm\.", name)
        }
        assert len(kept) == len(weights) - 2
        return kept

    images = pictures(SQUARE)
    found = build("grounding_dino", edited(saved, "grounding_dino", tmp_path, as_published))(images)
    for got, expected in zip(found.maps, build("grounding_dino", saved["grounding_dino"][1])(images).maps, strict=True):
        assert torch.equal(got, expected)


def test_hub_cache_is_used_without_asking_the_network(saved, monkeypatch, tmp_path):
    import huggingface_hub

    repository = tmp_path / "models--lab--clip"
    shutil.copytree(saved["clip"][1], repository / "snapshots" / "abc")
    (repository / "snapshots" / "abc" / "preprocessor_config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: pytest.fail("asked the hub"))
    images = pictures(SQUARE)
    torch.testing.assert_close(build("clip", "lab/clip")(images), build("clip", saved["clip"][1])(images))
    # A cache with a config only (another program looked) is not a model.
    (repository / "snapshots" / "abc" / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: (_ for _ in ()).throw(OSError("down")))
    assert "down" in message("clip", "lab/clip")
