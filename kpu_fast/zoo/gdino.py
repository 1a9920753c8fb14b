"""A GroundingDINO from mosaics of labelled images: text in, boxes out."""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpu_fast.data.labelled import to_batch
from kpu_fast.data.mosaic import make_mosaic
from kpu_fast.models.mean_std import IMAGENET_MEAN_STD
from kpu_fast.zoo.clip import save_tokenizer, write_processor
from kpu_fast.zoo.fit import ZooError, fit
from kpu_fast.zoo.pixels import Pixels, crop_and_flip, generator, rows_of_step
from kpu_fast.zoo.recipes import GdinoRecipe

# transformers' GroundingDINO finds the ends of phrases by BERT's numbers of these tokens, whatever the vocabulary.
_FIXED_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
_CLASSIFY_SIZE = 64  # pixels: about what an object has on a canvas
_TEXT_LENGTH = 64  # tokens, at least: as many as the prompt has where those are more
_CE_WEIGHT = 2.0  # what transformers' loss gives the classes' term


def train_gdino(pixels: Pixels, recipe: GdinoRecipe, folder: Path, *, device, seed, facts, minutes=None):
    """A GroundingDinoForObjectDetection trained on mosaics of `pixels`, its tokenizer, and what both runs tell.

    First its Swin learns to classify the images (a third of `minutes`), then the whole learns to detect.
    """
    tokenizer = make_tokenizer(pixels.classes)
    torch.manual_seed(seed)
    model = _network(recipe, tokenizer)
    swin = model.model.backbone.conv_encoder.model
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in IMAGENET_MEAN_STD)
    classifier = _Classifier(swin, len(pixels.classes))

    def classify(net: nn.Module, step: int) -> dict[str, Tensor]:
        random = generator(seed, 4, step)
        rows = rows_of_step(step, recipe.classify.batch, len(pixels), seed)
        images = crop_and_flip(pixels.images[rows], random).to(device)
        labels = pixels.labels[rows].to(device)
        logits = net((to_batch(images, _CLASSIFY_SIZE) - mean) / std)
        correct = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.05), "accuracy": correct}

    def detect(net: nn.Module, step: int) -> dict[str, Tensor]:
        batch = recipe.fit.batch
        mosaics = [make_mosaic(pixels, seed, step * batch + i, recipe.canvas) for i in range(batch)]
        order = torch.randperm(len(pixels.classes), generator=generator(seed, 5, step))
        text = tokenizer(prompt([pixels.classes[i] for i in order]), return_tensors="pt").to(device)
        place = order.argsort()  # of a class in the prompt
        labels = [
            {
                "class_labels": place[torch.from_numpy(numbers)].to(device),
                "boxes": _centre_size(torch.from_numpy(boxes) / recipe.canvas).to(device),
            }
            for _, boxes, numbers in mosaics
        ]
        images = torch.from_numpy(np.stack([picture for picture, _, _ in mosaics])).to(device)
        images = (to_batch(images, recipe.canvas) - mean) / std
        text = {key: value.expand(batch, -1) for key, value in text.items()}
        found = net(pixel_values=images, labels=labels, **text)
        return detection_loss(found, labels, text, net.config)

    common = {"device": device, "seed": seed}
    thirds = (minutes / 3, minutes * 2 / 3) if minutes else (None, None)
    first = fit(
        classifier,
        classify,
        recipe.classify,
        folder / "swin",
        name="gdino: swin",
        minutes=thirds[0],
        # How long the detector will train is of no concern to the classifier.
        facts={**facts, "recipe": {**facts["recipe"], "fit": None}},
        **common,
    )
    second = fit(model, detect, recipe.fit, folder / "detector", name="gdino", minutes=thirds[1], facts=facts, **common)
    return model, tokenizer, {"swin": first, "detector": second}


def detection_loss(found, labels: list[dict[str, Tensor]], text: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' loss at every decoder layer, and the same at the encoder's proposals.

    transformers' own term for the proposals has no gradient to their boxes, and looks at the learned queries where the
    proposals' classes should be: with it the proposals never improve, and the decoder begins from wherever they are.
    """
    from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss
    from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps, build_text_mask

    weights = {"ce": _CE_WEIGHT, "bbox": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
    decoder = sum(
        value * weights[key.split("_")[1]]
        for key, value in found.loss_dict.items()
        if key.startswith("loss_") and not key.endswith("_enc")
    )
    once = copy.copy(config)
    once.two_stage = once.auxiliary_loss = False
    logits = found.enc_outputs_class
    proposals, _, _ = GroundingDinoForObjectDetectionLoss(
        logits,
        labels,
        logits.device,
        found.enc_outputs_coord_logits.sigmoid(),
        once,
        build_label_maps(logits, text["input_ids"]),
        build_text_mask(logits, text["attention_mask"]),
    )
    last = {key: found.loss_dict[key] for key in ("loss_ce", "loss_bbox", "loss_giou")}
    return {"loss": decoder + proposals, "proposals": proposals, **last}


class _Classifier(nn.Module):
    def __init__(self, swin: nn.Module, classes: int):
        super().__init__()
        self.swin = swin
        self.head = nn.Linear(swin.channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.swin(pixel_values=images.to(self.head.weight.dtype)).feature_maps
        return self.head(maps[-1].mean((2, 3))).float()


def prompt(classes) -> str:
    """The text that asks for these classes: "cat. dog."."""
    return " ".join(f"{name.lower()}." for name in classes)


def _centre_size(boxes: Tensor) -> Tensor:
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def check_prompt(classes: tuple[str, ...]) -> None:
    """Raises ZooError for a class that cannot be told from the others in a prompt."""
    tokenizer = make_tokenizer(classes)
    seen: dict[tuple[str, ...], str] = {}
    for name in classes:
        if "." in name or "?" in name:
            raise ZooError(f"class {name!r}: gdino separates names by '.' and '?', so a name has neither; rename it")
        tokens = tuple(tokenizer.tokenize(name.lower()))
        if not tokens or tokenizer.unk_token in tokens:
            raise ZooError(f"class {name!r}: gdino's tokenizer has no token for a part of it; rename it")
        other = seen.setdefault(tokens, name)
        if other != name:
            raise ZooError(
                f"classes {other!r} and {name!r} are one to gdino's tokenizer, which drops accents and capitals; "
                "rename one"
            )


def make_tokenizer(classes: tuple[str, ...]):
    """A BertTokenizer of the classes' words, of ASCII's letters and signs, and of BERT's numbers for special tokens.

    Its model_max_length is what a prompt of all classes needs, at least 64.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import BertTokenizer

    normalise, split = normalizers.BertNormalizer(lowercase=True).normalize_str, pre_tokenizers.BertPreTokenizer()
    # As BERT cuts them: a word with an accent, or with a sign in it, would never be looked up otherwise.
    words = sorted({word for name in classes for word, _ in split.pre_tokenize_str(normalise(name))})
    signs = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    letters = [sign for sign in signs if sign.isalnum()]
    wanted = [*words, *signs, *[f"##{letter}" for letter in letters]]
    wanted = [token for token in dict.fromkeys(wanted) if token not in _FIXED_IDS]
    size = max(*_FIXED_IDS.values(), len(wanted) + len(_FIXED_IDS)) + 1
    fixed = {i: token for token, i in _FIXED_IDS.items()}
    rest = iter(wanted)
    vocabulary = {fixed[i] if i in fixed else next(rest, f"[unused{i}]"): i for i in range(size)}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    tokenizer.model_max_length = max(_TEXT_LENGTH, len(tokenizer(prompt(classes))["input_ids"]))
    return tokenizer


def _network(recipe: GdinoRecipe, tokenizer) -> nn.Module:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    swin = SwinConfig(
        image_size=recipe.canvas,
        embed_dim=recipe.embed_dim,
        depths=list(recipe.depths),
        num_heads=[max(1, recipe.embed_dim * 2**i // 32) for i in range(4)],
        window_size=4,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        out_indices=[2, 3, 4],
    )
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_dim,
        num_hidden_layers=recipe.text_depth,
        num_attention_heads=2,
        intermediate_size=2 * recipe.text_dim,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=text,
        d_model=recipe.dim,
        num_queries=recipe.queries,
        encoder_layers=recipe.encoder_layers,
        decoder_layers=recipe.decoder_layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * recipe.dim,
        decoder_ffn_dim=2 * recipe.dim,
        num_feature_levels=3,
        encoder_n_points=2,
        decoder_n_points=4,
        max_text_len=tokenizer.model_max_length,
        dropout=0.0,
        fusion_droppath=0.0,
        auxiliary_loss=True,
        two_stage=True,
        # Without this, transformers would look on the hub for a compiled kernel.
        disable_custom_kernels=True,
    )
    model = GroundingDinoForObjectDetection._from_config(config, attn_implementation="eager")  # it has no other
    _start_unsure(model.model)
    return model


@torch.no_grad()
def _start_unsure(model: nn.Module) -> None:
    """Let every query begin with a probability of about 2 % for every word.

    A logit is the plain product of a query and a word, both out of layer norms: it would begin at ±√D. One channel of
    the norms becomes a constant, which gives the product an offset, and the words' other channels are scaled down.
    """
    word = model.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    word.weight.fill_(0.15)
    for norm, offset in ((word, 2.0), (model.decoder.layer_norm, -2.0), (model.enc_output_norm, -2.0)):
        norm.weight[0], norm.bias[0] = 0.0, offset


def save_gdino(model: nn.Module, tokenizer, folder: Path, recipe: GdinoRecipe) -> None:
    """Write `folder` as GroundingDinoForObjectDetection, its tokenizer and image processor do; weights in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    size = {"shortest_edge": recipe.canvas, "longest_edge": recipe.canvas}
    write_processor(folder, "GroundingDinoImageProcessor", IMAGENET_MEAN_STD, size=size)
