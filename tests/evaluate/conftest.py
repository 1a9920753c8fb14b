"""Tiny models as transformers saves them, with tokenizers, a student whose heads fit them, and coloured images."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from kpu_fast.evaluate.__main__ import main  # noqa: E402
from kpu_fast.models import FeatureSpec, Student  # noqa: E402

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "sky_blue": (0, 0, 255)}
WORDS = ["[PAD]", "<s>", "</s>", "[UNK]", "a", "photo", "of", "the", ".", "red", "green", "sky", "blue"]
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
SIGLIP = {**VIT, "intermediate_size": 48, "patch_size": 16, "image_size": 64}
SAM = {**VIT, "mlp_dim": 48, "image_size": 288, "window_size": 4, "global_attn_indexes": [1], "output_channels": 24}
CLIP = {**VIT, "intermediate_size": 48, "patch_size": 16, "image_size": 64, "projection_dim": 24}


def save_tokenizer(folder):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """{name: folder} of a CLIP, a SigLIP, a GroundingDINO, a DINOv2 and a SAM."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "max_position_embeddings": 32}
    dino = {
        "backbone_config": {**SWIN, "model_type": "swin", "out_indices": [2, 3, 4]},
        "text_config": {**text, "model_type": "bert"},
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_queries": 6,
        "max_text_len": 32,
    }
    clip_text = {**text, "projection_dim": 24, "bos_token_id": 1, "eos_token_id": 2}
    hf = transformers
    torch.manual_seed(0)
    nets = {
        "clip": hf.CLIPModel(hf.CLIPConfig(text_config=clip_text, vision_config=CLIP, projection_dim=24)),
        "siglip": hf.SiglipModel(hf.SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=SIGLIP)),
        "gdino": hf.GroundingDinoForObjectDetection(hf.GroundingDinoConfig(**dino)),
        "dinov2": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT, patch_size=16, image_size=64)),
        "sam": hf.SamVisionModel(hf.SamVisionConfig(**SAM)),
    }
    root = tmp_path_factory.mktemp("zoo")
    generator = torch.Generator().manual_seed(0)
    for name, net in nets.items():
        with torch.no_grad():
            for parameter in net.parameters():  # so that images and texts differ clearly
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        net.eval().save_pretrained(root / name)
        if name not in ("dinov2", "sam"):
            save_tokenizer(root / name)
    return {name: root / name for name in nets}


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """The folder of a student with heads for that CLIP and that GroundingDINO."""
    torch.manual_seed(1)
    heads = {
        "clip": FeatureSpec(24, (32,), (16.0,)),
        "gdino": FeatureSpec(None, (16, 32, 64), (8.0, 16.0, 32.0)),
    }
    vit = {"patch_size": 16, "dim": 32, "depth": 2, "heads": 2, "image_size": 64}
    adapter = {"cross_attention": "flash", "interactions": 2, "inplanes": 8}
    folder = tmp_path_factory.mktemp("student")
    Student(vit=vit, adapter=adapter, heads=heads, head_hidden=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coloured(tmp_path_factory):
    """A folder of class folders: 12 noisy images of each colour, of several sizes."""
    root, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(12):
            noise = rng.integers(-60, 60, (40 + i, 64, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def copied(coloured, tmp_path_factory):
    """The same images in other files."""
    return shutil.copytree(coloured, tmp_path_factory.mktemp("copied") / "images")


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """evaluate(*words) runs the command and returns its JSON."""
    monkeypatch.chdir(tmp_path)  # where pictures go that no --picture places

    def run(*words):
        path = tmp_path / "result.json"
        assert main([*map(str, words), "--json", str(path)]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == ""
        return json.loads(path.read_text())

    return run


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """refused(*words) runs a command that must fail and returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        assert main([*map(str, words)]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (out, len(lines)) == ("", 1)
        assert "Traceback" not in err
        return lines[0].removeprefix("error: ")

    return run
