"""The parts that make the teachers: losses against plain formulas, the start of the attention, tokenizers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kpu_fast.evaluate.boxes import Mosaics
from kpu_fast.evaluate.detect import detect, load_detector
from kpu_fast.evaluate.detector import make_prompt
from kpu_fast.zoo import clip, dinov2, gdino
from kpu_fast.zoo.pixels import Pixels, generator

CLASSES = ("red ball", "box", "stick")
CPU = torch.device("cpu")


def test_contrastive_is_clips_loss_when_every_caption_has_one_image():
    logits = torch.randn(5, 5, dtype=torch.float64)
    parts = clip.contrastive(logits, torch.arange(5))
    target = torch.eye(5, dtype=torch.float64) * 0.95 + 0.01
    to_text = -(target * logits.log_softmax(1)).sum(1).mean()
    to_image = F.cross_entropy(logits.T, torch.arange(5))
    assert parts["to_text"].item() == pytest.approx(to_text.item(), rel=1e-12)
    assert parts["to_image"].item() == pytest.approx(to_image.item(), rel=1e-12)
    assert parts["loss"].item() == pytest.approx((to_text + to_image).item() / 2, rel=1e-12)


def test_contrastive_takes_all_images_of_a_class_for_right_and_skips_absent_classes():
    logits = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 2, 0])
    by_image = logits.log_softmax(0)
    expected = -(by_image[[0, 3], 0].mean() + by_image[[1, 2], 2].mean()) / 2
    assert clip.contrastive(logits, labels)["to_image"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_find_pairs_is_nt_xent():
    rows = torch.randn(8, 6, dtype=torch.float64)
    unit = rows / rows.norm(dim=1, keepdim=True)
    terms = []
    for i in range(8):
        scores = [math.exp(float(unit[i] @ unit[j]) / 0.2) for j in range(8)]
        terms.append(-math.log(scores[(i + 4) % 8] / (sum(scores) - scores[i])))
    assert dinov2.find_pairs(rows, 0.2).item() == pytest.approx(sum(terms) / 8, rel=1e-12)
    # Views that agree and differ from all others cost next to nothing.
    assert dinov2.find_pairs(torch.eye(4).repeat(2, 1), 0.05) < 1e-6


def test_views_are_repeatable_and_differ(tiny):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    first, second = dinov2.distort(images, generator(1)), dinov2.distort(images, generator(2))
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, dinov2.distort(images, generator(1)))
    assert not torch.equal(first, second)
    # A plain image stays plain whatever part is taken: only its colour may change.
    plain = dinov2.distort(torch.full((20, 32, 32, 3), 120, dtype=torch.uint8), generator(3))
    assert (plain.amax((1, 2)) == plain.amin((1, 2))).all()


def attention_of(model, tokens, layers, heads):
    """Each layer's attention (heads, tokens, tokens) on its first input."""
    for norm, attention in layers:
        x = norm(tokens)
        q, k = (p(x).unflatten(-1, (heads, -1)).transpose(0, 1) for p in (attention.q_proj, attention.k_proj))
        yield (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)  # for which the network is made, not where
@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_heads_begin_by_looking_at_one_neighbour_each(kind, device):
    """On a grid of the recipes' size: nearly all patches look most at the neighbour their head is for."""
    from kpu_fast.zoo.recipes import ClipRecipe, Dinov2Recipe

    torch.manual_seed(0)
    if kind == "clip":
        recipe = ClipRecipe()
        model = clip._network(recipe, clip.make_tokenizer(CLASSES), device).vision_model
        embed = lambda x: model.pre_layrnorm(model.embeddings(x))  # noqa: E731
        layers, prefix = [(layer.layer_norm1, layer.self_attn) for layer in model.encoder.layers], 1
    else:
        recipe = Dinov2Recipe()
        model = dinov2._network(recipe, device)
        embed = model.embeddings
        layers, prefix = [(layer.norm1, layer.attention) for layer in model.encoder.layer], 1 + recipe.registers
    images = F.interpolate(torch.randn(1, 3, 16, 16), (128, 128), mode="bicubic")
    seen = set()
    with torch.no_grad():
        tokens = embed(images)[0]
        for number, weights in enumerate(attention_of(model, tokens, layers, recipe.heads)):
            for head, w in enumerate(weights):
                patches = w[prefix:, prefix:]
                moves = []
                for r in range(1, 7):
                    for c in range(1, 7):
                        best = int(patches[r * 8 + c].argmax())
                        moves.append((best // 8 - r, best % 8 - c))
                most = max(set(moves), key=moves.count)
                assert moves.count(most) >= 30, (number, head, most)
                assert max(map(abs, most)) == 1
                seen.add(most)
                # cls has no position: it begins by looking everywhere
                assert w[0, prefix:].max() < 0.25
    assert len(seen) == 8


def test_clip_tokenizer_takes_any_text(tmp_path):
    tokenizer = clip.make_tokenizer(CLASSES)
    assert len(tokenizer) < 700
    ids = tokenizer("a photo of a stick")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == ["a</w>", "photo</w>", "of</w>", "a</w>", "stick</w>"]
    for text in ("Größe ☃ 日本 🦊!?", "it's 3.5%", "a box, red"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1  # which is the unknown token as well: nothing was unknown
        plain = tokenizer.decode(ids, skip_special_tokens=True)
        assert plain.replace(" ", "") == text.lower().replace(" ", "")
    long = tokenizer("box " * 100, truncation=True)["input_ids"]
    assert len(long) == 32
    assert long[-1] == tokenizer.eos_token_id
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    clip.save_clip(clip._network(_small_clip(), tokenizer, CPU), tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again("a red ball on Größe")["input_ids"] == tokenizer("a red ball on Größe")["input_ids"]


def _small_clip():
    from kpu_fast.zoo.recipes import ClipRecipe

    return ClipRecipe(image_size=32, dim=32, depth=1, heads=2, mlp=32, text_dim=32, text_depth=1, projection=16)


def test_gdino_tokenizer_keeps_berts_numbers_and_words_whole():
    tokenizer = gdino.make_tokenizer(CLASSES)
    ids = tokenizer(gdino.prompt(CLASSES))["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["[CLS]", "red", "ball", ".", "box", ".", "stick", ".", "[SEP]"]
    assert (ids[0], ids[-1], ids[3], tokenizer("?")["input_ids"][1], tokenizer.pad_token_id) == (
        101,
        102,
        1012,
        1029,
        0,
    )
    assert tokenizer.tokenize("a Box, hats")[:3] == ["a", "box", ","]
    assert tokenizer.unk_token not in tokenizer.tokenize("any words of letters 123")
    asked = make_prompt(CLASSES, tokenizer, 64)  # the evaluation asks in the words of the training
    assert asked.input_ids[0].tolist() == ids
    assert [span.nonzero().flatten().tolist() for span in asked.spans] == [[1, 2], [4], [6]]


def test_gdino_tokenizer_knows_words_as_bert_cuts_them():
    names = ("Größe", "it's", "日本", "t-shirt")
    tokenizer = gdino.make_tokenizer(names)
    gdino.check_prompt(names)
    words = [["große"], ["it", "'", "s"], ["日", "本"], ["t", "-", "shirt"]]
    assert [tokenizer.tokenize(name) for name in names] == words
    asked = make_prompt(names, tokenizer, 64)
    assert [tokenizer.convert_ids_to_tokens(asked.input_ids[0, span > 0]) for span in asked.spans] == words


def test_gdinos_tokenizer_for_cifar10_is_the_one_in_the_zoo():
    from transformers import AutoTokenizer

    folder = Path(__file__).parents[2] / "zoo"
    stored = AutoTokenizer.from_pretrained(folder / "gdino", local_files_only=True)
    made = gdino.make_tokenizer(tuple((folder / "images" / "classes.txt").read_text().split()))
    assert made.get_vocab() == stored.get_vocab()
    assert made.model_max_length == stored.model_max_length == 64


def test_a_prompt_of_many_classes_fits_the_text_tower(tiny, tmp_path):
    """162 tokens; the towers take 64 where that is enough."""
    names = tuple(f"class number {i}" for i in range(40))
    gdino.check_prompt(names)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    pixels = Pixels(images, torch.arange(40), names)
    common = {"device": CPU, "seed": 0, "facts": {"recipe": {}}}
    model, tokenizer, _ = gdino.train_gdino(pixels, tiny.gdino, tmp_path / "work", **common)
    gdino.save_gdino(model, tokenizer, tmp_path, tiny.gdino)
    again = load_detector(tmp_path)
    assert again.tokenizer.model_max_length == again.net.config.max_text_len == 162
    text = again.tokenizer(gdino.prompt(names), return_tensors="pt")
    asked = again.prompt(names)
    assert asked.input_ids.tolist() == text["input_ids"].tolist()
    assert asked.input_ids.shape == (1, 162)
    with torch.no_grad():
        logits = again.net(pixel_values=torch.randn(1, 3, 64, 64), **text).logits
    assert logits[..., :162][..., asked.spans[-1] > 0].isfinite().all()
    found = detect(again, Mosaics(pixels, 3, 64, seed=1), names)
    assert all(0 <= found[figure] <= 1 for figure in ("ap", "ap50", "ap75"))


@pytest.fixture(scope="module")
def detector():
    from kpu_fast.zoo.recipes import GdinoRecipe

    recipe = GdinoRecipe(canvas=64, embed_dim=16, depths=(1, 1, 1, 1), dim=32, queries=8, text_dim=32)
    tokenizer = gdino.make_tokenizer(CLASSES)
    torch.manual_seed(0)
    model = gdino._network(recipe, tokenizer)
    text = {key: v.expand(2, -1) for key, v in tokenizer(gdino.prompt(CLASSES), return_tensors="pt").items()}
    labels = [
        {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])},
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]])},
    ]
    return model, text, labels, recipe, tokenizer


def test_detector_begins_unsure_and_its_proposals_are_trained(detector):
    model, text, labels, *_ = detector
    found = model(pixel_values=torch.randn(2, 3, 64, 64), labels=labels, **text)
    words = found.logits[..., : text["input_ids"].shape[1]].sigmoid()
    assert 0.005 < words.mean() < 0.05
    parts = gdino.detection_loss(found, labels, text, model.config)
    model.zero_grad()
    parts["proposals"].backward(retain_graph=True)
    # transformers' own loss gives this head no gradient at all
    assert model.model.encoder_output_bbox_embed.layers[-1].bias.grad.abs().sum() > 0
    assert model.bbox_embed[0].layers[-1].bias.grad is None
    parts["loss"].backward()
    assert model.bbox_embed[0].layers[-1].bias.grad.abs().sum() > 0
    decoder = sum(
        {"ce": 2, "bbox": 5, "giou": 2}[kind] * found.loss_dict[f"loss_{kind}{layer}"]
        for kind in ("ce", "bbox", "giou")
        for layer in ("", "_0")
    )
    assert parts["loss"].item() == pytest.approx((decoder + parts["proposals"]).item(), rel=1e-6)
