"""A CLIP from images and the names of their classes, in captions such as "a photo of a ship"."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpu_fast.data.labelled import to_batch
from kpu_fast.models.mean_std import CLIP_MEAN_STD
from kpu_fast.zoo.fit import ZooError, fit
from kpu_fast.zoo.locality import start_local
from kpu_fast.zoo.pixels import Pixels, crop_and_flip, generator, rows_of_step
from kpu_fast.zoo.recipes import ClipRecipe

TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a small photo of a {}",
    "a blurry photo of a {}",
    "a good photo of a {}",
    "an image of a {}",
    "one {} in a photo",
    "{}",
)
_TEXT_LENGTH = 32
_PADDED = {"padding": "max_length", "max_length": _TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
_MAX_SCALE = 4.6052  # ln 100, as CLIP


def train_clip(pixels: Pixels, recipe: ClipRecipe, folder: Path, *, device, seed, facts, minutes=None):
    """A CLIPModel trained on `pixels`, its tokenizer, and what `fit` tells of the run."""
    tokenizer = make_tokenizer(pixels.classes)
    torch.manual_seed(seed)
    model = _network(recipe, tokenizer, device)
    captions = [tokenizer([t.format(name) for name in pixels.classes], **_PADDED) for t in TEMPLATES]
    captions = torch.stack([c["input_ids"] for c in captions]).to(device)  # (templates, classes, length)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in CLIP_MEAN_STD)
    every_class = torch.arange(len(pixels.classes))

    def loss_of_step(net: nn.Module, step: int) -> dict[str, Tensor]:
        random = generator(seed, 3, step)
        rows = rows_of_step(step, recipe.fit.batch, len(pixels.labels), seed)
        images = crop_and_flip(pixels.images[rows], random).to(device)
        images = (to_batch(images, recipe.image_size) - mean) / std
        labels = pixels.labels[rows].to(device)
        template = torch.randint(len(TEMPLATES), (len(pixels.classes),), generator=random)
        scale = net.logit_scale.float().clamp(max=_MAX_SCALE).exp()
        logits = scale * embed_images(net, images) @ embed_text(net, captions[template, every_class]).T
        return contrastive(logits, labels)

    told = fit(
        model,
        loss_of_step,
        recipe.fit,
        folder,
        device=device,
        seed=seed,
        name="clip",
        facts=facts,
        minutes=minutes,
    )
    return model, tokenizer, told


def contrastive(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """CLIP's symmetric loss where images of one class share their caption: logits (B, classes), labels (B,).

    CLIP would take another image's equal caption for a wrong answer. Here an image's answer is its class's caption, and
    a caption's answers are all images of its class alike.
    """
    positive = F.one_hot(labels, logits.shape[1]).to(logits)
    to_text = F.cross_entropy(logits, labels, label_smoothing=0.05)
    share = positive / positive.sum(0).clamp(min=1)
    present = positive.any(0).to(logits)  # a class without an image in the batch has no answer
    to_image = -(share * logits.log_softmax(0)).sum() / present.sum()
    correct = (logits.argmax(1) == labels).float().mean()
    return {"loss": (to_text + to_image) / 2, "to_text": to_text, "to_image": to_image, "accuracy": correct}


def embed_images(net: nn.Module, pixels: Tensor) -> Tensor:
    """Normalised image embeddings (B, D), fp32."""
    pixels = pixels.to(net.visual_projection.weight.dtype)
    pooled = net.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(net.visual_projection(pooled).float(), dim=-1)


def embed_text(net: nn.Module, tokens: Tensor) -> Tensor:
    """Normalised text embeddings (N, D), fp32, of token ids (N, length)."""
    # The end token also pads: what stands behind the first one cannot be seen by it.
    pooled = net.text_model(input_ids=tokens).pooler_output
    return F.normalize(net.text_projection(pooled).float(), dim=-1)


def check_captions(classes: tuple[str, ...]) -> None:
    """Raises ZooError for a class whose captions are too long, or are those of another."""
    tokenizer = make_tokenizer(classes).backend_tokenizer  # transformers' own would warn of long texts by itself
    seen: dict[tuple[int, ...], str] = {}
    for name in classes:
        length = max(len(tokenizer.encode(t.format(name)).ids) for t in TEMPLATES)
        if length > _TEXT_LENGTH:
            raise ZooError(f"class {name!r}: captions of {length} tokens, and clip takes {_TEXT_LENGTH}; shorten it")
        other = seen.setdefault(tuple(tokenizer.encode(name).ids), name)
        if other != name:
            raise ZooError(f"classes {other!r} and {name!r} are one to clip's tokenizer; rename one")


def make_tokenizer(classes: tuple[str, ...]):
    """A CLIPTokenizer whose vocabulary is every byte and what merges make of the captions' words."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    words = sorted({word for t in TEMPLATES for name in classes for word in t.format(name).lower().split()})
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        for text, _ in split.pre_tokenize_str(word):
            parts = _merge([*text[:-1], text[-1] + "</w>"], merges)
            while len(parts) > 1:  # each word becomes one token, its beginnings on the way
                merges.append((parts[0], parts[1]))
                vocabulary.append(parts[0] + parts[1])
                parts = _merge([*text[:-1], text[-1] + "</w>"], merges)
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=_TEXT_LENGTH
    )


def _merge(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for left, right in merges:
        i = 0
        while i + 1 < len(parts):
            if parts[i] == left and parts[i + 1] == right:
                parts[i : i + 2] = [left + right]
            i += 1
    return parts


def _network(recipe: ClipRecipe, tokenizer, device: torch.device) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": recipe.dim,
        "num_hidden_layers": recipe.depth,
        "num_attention_heads": recipe.heads,
        "intermediate_size": recipe.mlp,
        "image_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.text_dim,
        "num_hidden_layers": recipe.text_depth,
        "num_attention_heads": 2,
        "intermediate_size": 2 * recipe.text_dim,
        "max_position_embeddings": _TEXT_LENGTH,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # In the parts too: one tower alone, as a teacher is loaded, reads its own.
    shared = {"projection_dim": recipe.projection}
    config = CLIPConfig(vision_config=vision | shared, text_config=text | shared, **shared)
    model = CLIPModel._from_config(config, attn_implementation=attention(device))
    vit = model.vision_model
    attentions = [layer.self_attn for layer in vit.encoder.layers]
    start_local(
        vit.embeddings.patch_embedding,
        vit.embeddings.position_embedding.weight,
        1,
        [vit.embeddings.class_embedding],
        [a.q_proj for a in attentions],
        [a.k_proj for a in attentions],
        recipe.heads,
    )
    return model


def attention(device: torch.device) -> str:
    """transformers' name of the attention to train with. On a CPU, plain matrix products are faster (docs/zoo.md)."""
    return "eager" if device.type == "cpu" else "sdpa"


def save_clip(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write `folder` as CLIPModel, CLIPTokenizer and CLIP's image processor do; weights in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    write_processor(folder, "CLIPImageProcessor", CLIP_MEAN_STD, **centre_crop(model.config.vision_config.image_size))


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write the tokenizer's files, without the padding and truncation that its last call left switched on."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)


def write_processor(folder: Path, kind: str, mean_std: tuple, size: dict, **more) -> None:
    """preprocessor_config.json for an image processor of transformers; size: as that one wants it."""
    values = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(mean_std[0]),
        "image_std": list(mean_std[1]),
        **more,
    }
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(values, indent=2) + "\n")


def centre_crop(size: int) -> dict:
    """What an image processor needs to be told for the centred square of an image, `size` pixels wide."""
    return {
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
    }
