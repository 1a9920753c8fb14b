import copy
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vit_inputs import imagenet, images

from kpu_fast.models.hub import WeightsError
from kpu_fast.models.mean_std import IMAGENET_MEAN
from kpu_fast.models.vit import ViT, normalise, resize_to_stride_16

transformers = pytest.importorskip("transformers", reason="the reference is transformers' Dinov2")

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 98,
    "layerscale_value": 0.7,
}
REAL = {**TINY, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 518}


def reference(with_registers, **arch):
    """transformers' model with every parameter away from its start value, so that none can be forgotten unseen."""
    torch.manual_seed(0)
    if with_registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=4, **arch)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**arch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def tiny():
    return reference(True, **TINY)


# The grid of the learned positions (7×7), a larger square, 3:5, and 49 patches in another shape than 7×7.
SIZES = [(98, 98), (140, 140), (84, 140), (14, 686)]


@pytest.mark.parametrize("with_registers", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
@torch.no_grad()
def test_equals_transformers(with_registers, swiglu):
    model = reference(with_registers, use_swiglu_ffn=swiglu, **TINY)
    vit = ViT.from_hf(model)
    for size in SIZES:
        x, patches = vit(images(*size))
        expected = model(pixel_values=imagenet(images(*size)))
        skip = 5 if with_registers else 1
        torch.testing.assert_close(x, expected.pooler_output, rtol=0, atol=1e-5)
        torch.testing.assert_close(patches.flatten(1, 2), expected.last_hidden_state[:, skip:], rtol=0, atol=1e-5)
        assert patches.shape[1:3] == (size[0] // 14, size[1] // 14)


@torch.no_grad()
def test_equals_transformers_at_the_size_of_vit_b():
    model = reference(True, **REAL)
    x, patches = ViT.from_hf(model)(images(84, 140, batch=1))
    expected = model(pixel_values=imagenet(images(84, 140, batch=1)))
    torch.testing.assert_close(x, expected.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(patches.flatten(1, 2), expected.last_hidden_state[:, 5:], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("with_registers", [True, False])
def test_masked_patches_are_transformers_masked_patches(with_registers):
    model = reference(with_registers, **TINY)
    hidden = torch.rand(2, 60, generator=torch.Generator().manual_seed(0)) < 0.4
    x, patches = ViT.from_hf(model)(images(84, 140), hidden)
    expected = model(pixel_values=imagenet(images(84, 140)), bool_masked_pos=hidden)
    torch.testing.assert_close(x, expected.pooler_output, rtol=0, atol=1e-5)
    tokens = expected.last_hidden_state[:, 5 if with_registers else 1 :]
    torch.testing.assert_close(patches.flatten(1, 2), tokens, rtol=0, atol=1e-5)
    assert (patches - ViT.from_hf(model)(images(84, 140))[1]).abs().max() > 0.1


class OldNames(nn.Module):
    """The same weights under the names that transformers had before it renamed them."""

    def __init__(self, model):
        super().__init__()
        self.config, self.state = model.config, model.state_dict()

    def state_dict(self):
        old = {}
        for name, tensor in self.state.items():
            for new, before in (("q", "query"), ("k", "key"), ("v", "value")):
                name = name.replace(f"attention.{new}_proj", f"attention.attention.{before}")
            name = name.replace("attention.o_proj", "attention.output.dense").replace(
                "mlp.down_proj", "mlp.weights_out"
            )
            if "gate_proj" in name:
                up = self.state[name.replace("gate_proj", "up_proj")]
                name, tensor = name.replace("gate_proj", "weights_in"), torch.cat([tensor, up])
            if "up_proj" not in name:
                old[name] = tensor
        return old


@pytest.mark.parametrize("swiglu", [False, True])
def test_reads_the_names_of_older_transformers(swiglu):
    model = reference(False, use_swiglu_ffn=swiglu, **TINY)
    if not any("attention.q_proj" in name for name in model.state_dict()):
        pytest.skip("this transformers has the older names itself")
    expected = ViT.from_hf(model).state_dict()
    found = ViT.from_hf(OldNames(model)).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_loads_a_local_folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    expected, found = ViT.from_hf(tiny).state_dict(), ViT.from_hf(str(tmp_path)).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def broken(model, folder, edit_weights=lambda weights: None, **config):
    """`folder` with the model as save_pretrained writes it, its weights edited in place and its config changed."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    edit_weights(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def refusal(weights):
    with pytest.raises(WeightsError, match=r"^student\.vit\.weights: ") as caught:
        ViT.from_hf(weights)
    return str(caught.value)


@pytest.mark.parametrize("lost", ["encoder.layer.1.norm1.bias", "embeddings.register_tokens", "layernorm.weight"])
def test_a_missing_tensor_is_not_filled_in_at_random(tiny, tmp_path, lost):
    assert f"lacks {lost}" in refusal(str(broken(tiny, tmp_path, lambda weights: weights.pop(lost))))


def test_a_checkpoint_may_lack_the_mask_token(tiny, tmp_path):
    folder = broken(tiny, tmp_path, lambda weights: weights.pop("embeddings.mask_token"))
    expected, found = ViT.from_hf(tiny).state_dict(), ViT.from_hf(folder).state_dict()
    assert not found.pop("embed.mask_token").any()
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_a_surplus_layer_is_not_dropped(tiny, tmp_path):
    two = broken(tiny, tmp_path, num_hidden_layers=2, stage_names=None, out_features=None, out_indices=None)
    text = refusal(two)
    assert "no place" in text
    assert "encoder.layer.2." in text


def test_weights_of_another_shape_are_named(tiny, tmp_path):
    def widen(weights):
        weights["layernorm.bias"] = torch.zeros(49)

    assert "layernorm.bias (49,), expected (48,)" in refusal(broken(tiny, tmp_path, widen))


def test_damaged_files_are_named(tiny, tmp_path):
    path = broken(tiny, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    text = refusal(tmp_path)
    assert str(tmp_path) in text
    assert "damaged" in text
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path / 'config.json'} is not readable JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert f"{tmp_path / 'config.json'} holds []" in refusal(tmp_path)
    assert "hf download" not in text  # no hub can help with a local folder


def test_folders_without_a_model(tmp_path):
    assert "'./no/such/folder' is not a folder" in refusal("./no/such/folder")
    assert "'no/such' is not a folder" in refusal(Path("no/such"))  # a Path is no hub id
    assert "has no file; expected config.json and model.safetensors" in refusal(tmp_path)


def test_a_hub_id_without_network_fails_fast(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.perf_counter()
    text = refusal("facebook/dinov2-base")
    assert time.perf_counter() - start < 5
    assert "hf download facebook/dinov2-base" in text


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    text = refusal(broken(tiny, tmp_path, model_type="deit"))
    assert "of type 'deit'; expected dinov2" in text
    assert str(tmp_path) in text
    other = copy.deepcopy(tiny)
    other.config = transformers.DeiTConfig()
    assert "of type 'deit'" in refusal(other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "relu", "hidden_act is 'relu' in the config of the model, only 'gelu' works"),
        ("qkv_bias", False, "qkv_bias is False"),
        ("layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05"),
        ("num_channels", 1, "num_channels is 1"),
        ("num_register_tokens", 0, "num_register_tokens is 0 in the config of the model, only 1 or more works"),
        ("image_size", [98, 112], r"image_size is \[98, 112\] in the config of the model, only squares work"),
        ("image_size", 100, "the config of the model describes no ViT: ViT: image_size 100 must be a multiple"),
    ],
)
def test_a_config_that_the_vit_does_not_follow_is_named(key, value, message, tiny):
    other = copy.deepcopy(tiny)
    setattr(other.config, key, value)
    with pytest.raises(WeightsError, match=f"student.vit.weights: .*{message}"):
        ViT.from_hf(other)


def test_forms_of_a_model_that_are_the_same_vit(tiny):
    expected = ViT.from_hf(tiny)(images(98, 98, batch=1))
    torch.manual_seed(0)
    around = transformers.Dinov2WithRegistersForImageClassification(tiny.config)
    around.base_model.load_state_dict(tiny.state_dict())
    listed = copy.deepcopy(tiny)
    listed.config.image_size, listed.config.patch_size = [98, 98], [14, 14]
    for model in (around, listed):
        for found, want in zip(ViT.from_hf(model)(images(98, 98, batch=1)), expected, strict=True):
            assert torch.equal(found, want)


def test_weights_that_do_not_belong_to_the_config_are_named(tiny):
    for key, value in (("image_size", 112), ("num_hidden_layers", 4)):
        other = copy.deepcopy(tiny)
        setattr(other.config, key, value)
        with pytest.raises(
            WeightsError, match=r"student.vit.weights: the weights of the model are not those of its con"
        ):
            ViT.from_hf(other)


def test_a_layer_scale_that_is_not_there_is_not_1(tiny):
    """It is for a plain ViT, which has none; of a DINOv2 it is missing."""
    other = OldNames(tiny)
    other.state = {name: tensor for name, tensor in other.state.items() if not name.endswith("1.layer_scale2.lambda1")}
    with pytest.raises(WeightsError, match=r"encoder\.layer\.1\.layer_scale2\.lambda1"):
        ViT.from_hf(other)


def test_without_transformers_the_message_says_what_to_install(tiny, tmp_path, monkeypatch):
    folder = broken(tiny, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for weights in (folder, "facebook/dinov2-base"):
        assert "pip install transformers" in refusal(weights)


def small(**changes):
    torch.manual_seed(0)
    arch = {"patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "registers": 1, "image_size": 16}
    return ViT(**{**arch, **changes})


def test_normalises_in_fp32_before_the_cast():
    pixels = images(8, 12)
    torch.testing.assert_close(normalise(pixels, torch.float32), imagenet(pixels), rtol=0, atol=0)
    assert torch.equal(normalise(pixels, torch.bfloat16), imagenet(pixels).bfloat16())
    # The mean colour, with which batches are padded, is exactly 0 afterwards, whatever the model's dtype.
    grey = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert normalise(grey, torch.bfloat16).abs().max() < 1e-6


@torch.no_grad()
def test_bf16_stays_close_to_fp32():
    vit = small()
    exact, rounded = vit(images(16, 24)), copy.deepcopy(vit).bfloat16()(images(16, 24))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.float(), rtol=0, atol=0.1)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for switch in (False, True):
        vit = small(activation_checkpointing=switch)
        runs = []
        vit.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        x, patches = vit(images(16, 24))
        (x.sum() + patches.square().sum()).backward()
        assert len(runs) == 1 + switch  # once more in backward
        gradients.append([parameter.grad for parameter in vit.parameters() if parameter.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def antialiased_bicubic(n_in, n_out):
    """(n_out, n_in) weights of the cubic kernel with a = −½, widened by the scale of the reduction."""
    scale = n_in / n_out
    t = ((torch.arange(n_in) + 0.5)[None] - (torch.arange(n_out) + 0.5)[:, None].double() * scale).abs() / scale
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    return weights / weights.sum(1, keepdim=True)


def test_stride_16_resize_gives_one_patch_per_16_pixels():
    pixels = images(64, 96)
    rows, columns = antialiased_bicubic(64, 4 * 14), antialiased_bicubic(96, 6 * 14)
    expected = torch.einsum("ih,bchw,jw->bcij", rows, pixels.double(), columns)
    torch.testing.assert_close(resize_to_stride_16(pixels, 14).double(), expected, rtol=0, atol=1e-5)
    assert resize_to_stride_16(pixels, 16) is pixels


def test_parameters_of_vit_b():
    arch = {"patch_size": 14, "dim": 768, "depth": 12, "heads": 12}
    with torch.device("meta"):
        plain, registers = ViT(**arch), ViT(**arch, registers=4)
    assert sum(p.numel() for p in plain.parameters()) == 86_580_480
    assert sum(p.numel() for p in registers.parameters()) == 86_580_480 + 4 * 768


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(heads=3), "dim 16 must be a multiple of heads 3"),
        (lambda: small(image_size=18), "image_size 18 must be a multiple of patch_size 4"),
        (lambda: small()(images(16, 18)), "multiples of patch_size 4, got 16×18"),
        (lambda: small()(images(16, 16)[:, :1]), r"expected \(B, 3, H, W\)"),
        (lambda: small()((images(16, 16) * 255).to(torch.uint8)), r"expected floating point in \[0, 1\]"),
        (lambda: small(mlp_ratio=-1), "mlp_ratio · dim must be 1 or more, got -16"),
        (lambda: resize_to_stride_16(images(64, 90), 14), "multiples of 16, got 64×90"),
        (lambda: small(attention="flash"), "unknown"),
    ],
)
def test_wrong_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
