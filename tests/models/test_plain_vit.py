"""transformers' plain ViT, which DINO and DeiT are, as the student's: features, folders, what is refused."""

import json

import pytest
import torch
from vit_inputs import imagenet, images

from kpu_fast.evaluate.encoder import load_encoder
from kpu_fast.models.hub import WeightsError
from kpu_fast.models.mean_std import IMAGENET_MEAN_STD
from kpu_fast.models.vit import ViT

transformers = pytest.importorskip("transformers", reason="the reference is transformers' ViT")

ARCH = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 144, "patch_size": 16,
    "image_size": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    """With every parameter away from its start value, so that none can be forgotten unseen."""
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**ARCH))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def save(model, folder, mean_std=IMAGENET_MEAN_STD):
    model.save_pretrained(folder)
    if mean_std is not None:
        processor = {"do_normalize": True, "image_mean": mean_std[0], "image_std": mean_std[1]}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


# The grid of the learned positions (6×6), a larger square, 3:5.
@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 96), (160, 160), (96, 160)])
def test_equals_transformers(size, reference):
    x, patches = ViT.from_hf(reference)(images(*size))
    expected = reference(pixel_values=imagenet(images(*size)), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(x, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(patches.flatten(1, 2), expected[:, 1:], rtol=0, atol=1e-5)


def test_a_width_that_is_no_multiple_of_the_dimension():
    """960 / 208 is rounded down, and 208 times that to 959."""
    model = transformers.ViTModel(
        transformers.ViTConfig(**ARCH | {"hidden_size": 208, "num_attention_heads": 4, "intermediate_size": 960})
    )
    vit = ViT.from_hf(model)
    assert vit.blocks[0].mlp.fc1.out_features == 960
    assert ViT(**vit.config).blocks[0].mlp.fc1.out_features == 960


class OldNames(torch.nn.Module):
    """The same weights under the names that transformers had before it renamed them."""

    def __init__(self, model):
        super().__init__()
        self.config, self.state = model.config, model.state_dict()

    def state_dict(self):
        old = {
            "attention.q_proj": "attention.attention.query",
            "attention.k_proj": "attention.attention.key",
            "attention.v_proj": "attention.attention.value",
            "attention.o_proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }
        found = {}
        for name, tensor in self.state.items():
            for new, before in old.items():
                name = name.replace(new, before)
            found[f"encoder.layer.{name[7:]}" if name.startswith("layers.") else name] = tensor
        return found


def test_reads_the_names_of_older_transformers(reference):
    if not any("attention.q_proj" in name for name in reference.state_dict()):
        pytest.skip("this transformers has the older names itself")
    expected, found = ViT.from_hf(reference).state_dict(), ViT.from_hf(OldNames(reference)).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_folder_with_a_pooler_without_one_and_with_a_classifier(reference, tmp_path):
    """DINO's checkpoint has no pooler, DeiT's a classifier."""
    bare = transformers.ViTModel(reference.config, add_pooling_layer=False)
    classifier = transformers.ViTForImageClassification(reference.config)
    weights = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("pooler.")}
    bare.load_state_dict(weights)
    classifier.vit.load_state_dict(weights)
    expected = ViT.from_hf(reference).state_dict()
    for number, model in enumerate((reference, bare, classifier)):
        (tmp_path / str(number)).mkdir()
        found = ViT.from_hf(save(model, tmp_path / str(number))).state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(torch.equal(expected[name], value) for name, value in ViT.from_hf(classifier).state_dict().items())


@torch.no_grad()
def test_evaluation_sees_the_sentinel_it_is_in_a_student(reference, tmp_path):
    encoder = load_encoder(save(reference, tmp_path))
    assert (encoder.kind, encoder.image_size) == ("sentinel", 96)
    expected = reference(pixel_values=imagenet(images(96, 160)), interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.vectors(images(96, 160)), expected, rtol=0, atol=1e-5)


def test_the_means_of_googles_vit_are_refused(reference, tmp_path):
    with pytest.raises(WeightsError, match=r"normalises images with mean \(0\.5, 0\.5, 0\.5\)"):
        ViT.from_hf(save(reference, tmp_path, ((0.5,) * 3, (0.5,) * 3)))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')  # what transformers takes then
    with pytest.raises(WeightsError, match=r"normalises images with mean \(0\.5, 0\.5, 0\.5\)"):
        ViT.from_hf(str(tmp_path))


def test_without_a_processor_nobody_knows_the_means(reference, tmp_path):
    with pytest.raises(WeightsError, match=r"has no preprocessor_config\.json, .* put the file beside the weights"):
        ViT.from_hf(save(reference, tmp_path, None))


@torch.no_grad()
def test_a_mask_token_is_the_same(reference):
    model = transformers.ViTModel(reference.config, use_mask_token=True).eval()
    model.load_state_dict(reference.state_dict(), strict=False)
    torch.nn.init.normal_(model.embeddings.mask_token)
    hidden = torch.rand(2, 36, generator=torch.Generator().manual_seed(0)) < 0.4
    _, patches = ViT.from_hf(model)(images(96, 96), hidden)
    expected = model(pixel_values=imagenet(images(96, 96)), bool_masked_pos=hidden).last_hidden_state
    torch.testing.assert_close(patches.flatten(1, 2), expected[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qkv_bias", False, "qkv_bias is False"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("num_channels", 1, "num_channels is 1"),
    ],
)
def test_forms_that_ours_has_not_are_named(key, value, message):
    model = transformers.ViTModel(transformers.ViTConfig(**ARCH, **{key: value}))
    with pytest.raises(WeightsError, match=message):
        ViT.from_hf(model)
