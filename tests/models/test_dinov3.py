"""DINOv3 as the student's ViT: positions are rotations of queries and keys, keys have no bias."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vit_inputs import imagenet, images

from kpu_fast import export
from kpu_fast.models import Student, ViT
from kpu_fast.models.hub import WeightsError
from kpu_fast.models.mean_std import IMAGENET_MEAN, IMAGENET_STD
from kpu_fast.models.vit import rotate, rotations

transformers = pytest.importorskip("transformers", reason="the reference is transformers' DINOv3ViTModel")

TINY = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_register_tokens": 4,
    "image_size": 64,
    "layerscale_value": 0.7,
}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
ROPE = {"patch_size": 16, "dim": 32, "depth": 2, "heads": 2, "registers": 1, "image_size": 64, "rope_theta": 100.0}
DEFORMABLE = {"cross_attention": "deformable", "interactions": 2, "inplanes": 8}
HEADS = {"clip": {"x_dim": 12, "map_dims": (20,), "strides": (16.0,)}}


def reference(**changes):
    """transformers' model with every parameter away from its start value, so that none can be forgotten unseen."""
    torch.manual_seed(0)
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TINY | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = torch.zeros_like(parameter) if "register" in name else parameter  # those are left as memory was
            parameter.copy_(start + 0.05 * torch.randn_like(parameter))
    return model.eval()


def student(adapter=DEFORMABLE, **changes):
    torch.manual_seed(0)
    made = Student(vit=ROPE, adapter=adapter, heads=HEADS, head_hidden=16, **changes)
    for name, parameter in made.named_parameters():
        if name.endswith(("gamma", "cls_token", "register_tokens", "bias")):  # zeros at the start: nothing to compare
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


# ---- against transformers ----


@torch.no_grad()
def test_masked_patches_are_transformers_masked_patches():
    model = reference()
    hidden = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    _, patches = ViT.from_hf(model)(images(64, 96), hidden)
    expected = model(pixel_values=imagenet(images(64, 96)), bool_masked_pos=hidden).last_hidden_state[:, 5:]
    torch.testing.assert_close(patches.flatten(1, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, GATED, {"num_register_tokens": 0}, {"key_bias": True}, {"rope_theta": 10.0, "layer_norm_eps": 0.01}]
)
@torch.no_grad()
def test_equals_transformers(changes):
    model = reference(**changes)
    vit = ViT.from_hf(model)
    skip = 1 + model.config.num_register_tokens
    for size in ((64, 64), (96, 160), (16, 256)):
        x, patches = vit(images(*size))
        expected = model(pixel_values=imagenet(images(*size)))
        torch.testing.assert_close(x, expected.pooler_output, rtol=0, atol=1e-5)
        torch.testing.assert_close(patches.flatten(1, 2), expected.last_hidden_state[:, skip:], rtol=0, atol=1e-5)
        assert patches.shape[1:3] == (size[0] // 16, size[1] // 16)


def test_the_published_sizes():
    sizes = {
        "S": (384, 12, 6, 4.0, False, 21_601_152),
        "S+": (384, 12, 6, 6.0, True, 28_697_472),
        "B": (768, 12, 12, 4.0, False, 85_669_632),
        "L": (1024, 24, 16, 4.0, False, 303_154_176),
        "H+": (1280, 32, 20, 6.0, True, 840_633_600),
    }
    for dim, depth, heads, ratio, gated, expected in sizes.values():
        hidden = int(dim * ratio * (2 / 3 if gated else 1))
        more = {**GATED, "use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
        config = transformers.DINOv3ViTConfig(
            hidden_size=dim, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=heads,
            num_register_tokens=4, **more,
        )  # fmt: skip
        with torch.device("meta"):
            theirs = transformers.DINOv3ViTModel(config)
            ours = ViT.from_hf(theirs)
        assert ours.config["mlp_ratio"] == ratio
        count = sum(p.numel() for p in ours.parameters())
        assert count == expected
        assert count == sum(p.numel() for p in theirs.parameters()) + depth * dim  # the keys' biases


def test_loads_a_folder_and_names_what_is_missing(tmp_path):
    model = reference()
    model.save_pretrained(tmp_path)
    expected, found = ViT.from_hf(model).state_dict(), ViT.from_hf(str(tmp_path)).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not any(found[f"blocks.{i}.attn.qkv.bias"][48:96].any() for i in range(3))
    assert torch.equal(found["embed.mask_token"], model.embeddings.mask_token[0])
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layer.1.mlp.up_proj.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"student\.vit\.weights: .*layer\.1\.mlp\.up_proj\.weight"):
        ViT.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("mean", "std", "taken"),
    [
        (IMAGENET_MEAN, IMAGENET_STD, True),
        ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143), False),
        ((0.5,) * 3, (0.5,) * 3, False),
    ],
)
def test_weights_for_images_normalised_otherwise_are_refused(mean, std, taken, tmp_path):
    reference().save_pretrained(tmp_path)
    processor = {"do_normalize": True, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    if taken:
        ViT.from_hf(tmp_path)
    else:
        with pytest.raises(
            WeightsError, match=r"student\.vit\.weights: .* normalises images with mean .*take weights made"
        ):
            ViT.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("value_bias", False, "value_bias is False in the config of the model, only True works"),
        ("query_bias", False, "query_bias is False in the config of the model, only True works"),
        ("hidden_act", "silu", "hidden_act is 'silu' in the config of the model, only 'gelu' works"),
        ("use_gated_mlp", True, "hidden_act is 'gelu' in the config of the model, only 'silu' works"),
        ("num_attention_heads", 24, "each head must have a multiple of 4 channels, got 2"),
        ("rope_theta", 0.0, "rope_theta must be above 0, got 0.0"),
        ("intermediate_size", 100, "the weights of the model are not those of its config"),
        ("num_hidden_layers", 4, "the weights of the model are not those of its config"),
    ],
)
def test_a_config_that_the_vit_does_not_follow_is_named(key, value, message):
    other = copy.deepcopy(reference())
    setattr(other.config, key, value)
    with pytest.raises(WeightsError, match=f"student.vit.weights: .*{message}"):
        ViT.from_hf(other)


# ---- rotations ----


def test_a_patch_turns_by_its_place():
    cos, sin = rotations(2, 3, 8, theta=16.0, prefix=1, device="cpu")
    y, x, f = [-0.5, 0.5], [-2 / 3, 0.0, 2 / 3], [1.0, 16**-0.5]  # centres of cells over [-1, 1]
    angles = [[0.0] * 4] + [
        [2 * math.pi * at * g for at in (y[i], x[j]) for g in f] for i in range(2) for j in range(3)
    ]
    torch.testing.assert_close(cos, torch.tensor(angles).cos())
    torch.testing.assert_close(sin, torch.tensor(angles).sin())
    v = torch.randn(1, 1, 7, 8)
    turned = torch.view_as_real(
        torch.complex(v[..., :4], v[..., 4:]) * torch.polar(torch.ones(7, 4), torch.tensor(angles))
    )
    torch.testing.assert_close(rotate(v, (cos, sin)), torch.cat(turned.unbind(-1), dim=-1))


def test_turning_has_the_gradient_of_turning_back_and_is_compiled_alike():
    turn = tuple(part.double() for part in rotations(2, 3, 8, theta=16.0, prefix=1, device="cpu"))
    v = torch.randn(2, 7, 3, 2, 8, dtype=torch.float64).unbind(2)[1].transpose(1, 2)  # as q is in qkv
    torch.autograd.gradcheck(lambda x: rotate(x, turn), v.clone().requires_grad_())
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")(v, turn)
    torch.testing.assert_close(compiled, rotate(v, turn))
    torch.testing.assert_close(rotate(v, turn).square().sum(-1), v.square().sum(-1))


def test_turning_goes_through_what_transforms_and_traces():
    turn = rotations(2, 3, 8, theta=16.0, prefix=1, device="cpu")
    v = torch.randn(2, 2, 7, 8)
    eager = rotate(v, turn)
    torch.testing.assert_close(torch.vmap(lambda x: rotate(x, turn))(v), eager)
    torch.testing.assert_close(torch.func.grad(lambda x: rotate(x, turn).square().sum())(v), 2 * v)
    traced = torch.jit.trace(lambda x: rotate(x, turn), v)
    torch.testing.assert_close(traced(v), eager)
    exact = tuple(part.double() for part in turn)
    torch.autograd.gradgradcheck(lambda x: rotate(x, exact), v.double().requires_grad_())


def test_angles_are_fp32_whatever_is_usual():
    torch.set_default_dtype(torch.bfloat16)
    try:
        turn = rotations(2, 3, 8, theta=16.0, prefix=1, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {part.dtype for part in turn} == {torch.float32}
    v = torch.randn(1, 1, 7, 8).bfloat16()
    compiled = torch.compile(rotate, backend="aot_eager")(v, turn)
    assert torch.equal(compiled, rotate(v.float(), turn).bfloat16())


def test_in_bf16_the_result_is_rounded_twice_at_most():
    turn = rotations(8, 8, 16, theta=100.0, prefix=0, device="cpu")
    v = torch.randn(1, 2, 64, 16).bfloat16()
    found = rotate(v, turn)
    assert found.dtype == torch.bfloat16
    length = torch.complex(*v.float().chunk(2, dim=-1)).abs().repeat(1, 1, 1, 2)  # of each pair
    assert ((found.float() - rotate(v.float(), turn)).abs() <= length * 2**-7).all()  # 2⁻⁸ each


# ---- in the student ----


def test_a_dinov2_is_configured_as_before():
    assert "eps" not in ViT(patch_size=4, dim=16, depth=1, heads=2, image_size=16).config
    assert ViT(**{**ROPE, "eps": 1e-5}).config["eps"] == 1e-5
    assert ViT(**{key: value for key, value in ROPE.items() if key != "image_size"}).config["image_size"] == 518
    assert ViT(patch_size=4, dim=16, depth=1, heads=2, image_size=16, eps=1e-5).config["eps"] == 1e-5


@torch.no_grad()
def test_inside_an_adapter_that_has_learned_nothing_it_is_itself():
    torch.manual_seed(0)
    made = Student(vit=ROPE, adapter=DEFORMABLE)
    torch.testing.assert_close(made(images(64, 96)).x, made.vit(images(64, 96))[0])


@pytest.mark.parametrize("adapter", [DEFORMABLE, None])
def test_comes_back_from_a_folder_and_compiles_in_one_graph(adapter, tmp_path):
    made = student(adapter)
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["version"], config["student"]["vit"]["rope_theta"]) == (2, 100.0)
    with torch.no_grad():
        expected, found = made(images(64, 96)), Student.from_pretrained(tmp_path)(images(64, 96))
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")(images(64, 96))
    for a, b, c in zip((expected.x, *expected.maps), (found.x, *found.maps), (compiled.x, *compiled.maps), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [DEFORMABLE, None])
def test_activation_checkpointing_changes_no_gradient(adapter):
    gradients = []
    for switch in (False, True):
        made = student(adapter, freeze_vit=False, activation_checkpointing=switch)
        features = made(images(64, 96))
        sum(f.square().sum() for f in (features.x, *features.maps)).backward()
        gradients.append([p.grad for p in made.parameters() if p.requires_grad and p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(gradients[0]) > 20


def test_a_pt2_file_computes_what_the_student_computes():
    made = student()
    program = export.trace(export.NamedOutputs(made, "clip"), 64, 96, batch=2)
    expected, found = made.project(made(images(64, 96)), "clip"), program.module()(images(64, 96))
    torch.testing.assert_close(found["x"], expected.x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["map16"], expected.maps[0], rtol=1e-5, atol=1e-5)


def test_dense_cross_attention_has_no_places_to_go_by(tmp_path):
    with pytest.raises(ValueError, match=r'"flash" needs a ViT with learned positions.*set it to "deformable"'):
        Student(vit=ROPE, adapter={**DEFORMABLE, "cross_attention": "flash"})
    reference().save_pretrained(tmp_path)
    cfg = SimpleNamespace(
        vit=SimpleNamespace(weights=str(tmp_path), arch={}), freeze_vit=True, adapter={**DEFORMABLE, "interactions": 3},
        attention="auto", head_hidden=16,
    )  # fmt: skip
    assert Student.from_config(cfg).vit.config["rope_theta"] == 100.0
    cfg.adapter["cross_attention"] = "flash"
    with pytest.raises(ValueError, match='student: adapter: cross_attention "flash" needs a ViT'):
        Student.from_config(cfg)
