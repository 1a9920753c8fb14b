"""Zero-shot classification: the class whose text a text tower puts closest to the image's x (arXiv 2103.00020).

The tower is CLIP's, or SigLIP's (arXiv 2303.15343).
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from kpu_fast.data.labelled import read_class_names
from kpu_fast.data.sources import SourceError
from kpu_fast.evaluate.encoder import Encoder, load_encoder, walk
from kpu_fast.evaluate.images import batches, read_images
from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.models.hub import WeightsError, find_folder, import_transformers, load_net, read_json

TEMPLATES = ("a photo of a {}.",)
_TOWERS = {"clip": "CLIP", "siglip": "SigLIP"}


def zero_shot(
    encoder: Encoder,
    texts: Tensor,
    images: Dataset,
    *,
    size: int,
    batch_size: int = 64,
    workers: int = 0,
    teacher_name: str | None = None,
    tower: str = "clip",
) -> dict:
    """Top-1 accuracy of the class with the largest cosine to x, and top-5 where there are more than 5 classes.

    texts: (classes, C), what `embed_texts` gives, in the order of the images' class numbers. A student's x is taken
    through its head for `teacher_name` (None: the only head whose x has C channels, which is "head" of the result).
    tower: whose text tower the texts are of, "clip" or "siglip".
    Raises EvaluateError where x is not in the texts' space, or there is only one text.
    """
    from torchmetrics.classification import MulticlassAccuracy

    classes, channels = texts.shape
    if classes < 2:
        raise EvaluateError("--images, --classes: the name of one class only; there is nothing to choose from")
    if encoder.kind not in ("student", tower):
        raise EvaluateError(
            f"{encoder.name}: is a {encoder.kind}, whose x is not in {_TOWERS[tower]}'s space; give a student or "
            f"{_TOWERS[tower]}"
        )
    space = encoder.space(teacher_name, x_dim=channels)
    if space is not None and teacher_name is None and tower not in space.lower():
        # An export does not know what kind its teachers were of.
        print(
            f"warning: {encoder.name}: read through its head {space!r}, the only one with an x of {channels} channels; "
            f"if that teacher was no {_TOWERS[tower]}, these figures mean nothing. --teacher-name says which head "
            "is right",
            file=sys.stderr,
        )
    texts = F.normalize(texts.float(), dim=1).to(encoder.device)
    scores = {f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro") for k in (1, 5) if k == 1 or classes > 5}
    for vectors, labels in walk(
        encoder, batches(images, size, batch_size=batch_size, workers=workers, description="zero-shot"), "x", space
    ):
        if vectors.shape[1] != channels:
            raise EvaluateError(f"{encoder.name}: x has {vectors.shape[1]} channels, the text tower gives {channels}")
        similarities = (F.normalize(vectors, dim=1) @ texts.T).cpu()
        for score in scores.values():
            score.update(similarities, labels)
    seen = {"images": len(images), "size": size, "head": space}
    return {**{name: float(score.compute()) for name, score in scores.items()}, **seen}


@torch.inference_mode()
def embed_texts(
    clip: str | Path,
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    device="cpu",
    batch_size: int = 64,
) -> Tensor:
    """(classes, C) float32 of length 1: each class's mean over `templates` of the tower's normalised text embeddings.

    clip: a folder or hub id with CLIP's or SigLIP's text tower and tokenizer. templates: with {} where the class goes.
    Raises EvaluateError where there is no such tower or tokenizer, or a template has no {}.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise EvaluateError(f"--template {template!r}: expected one {{}} where the class goes")
    try:
        hf = import_transformers("--clip")
        folder = find_folder("--clip", clip)
        siglip = tower_kind(folder) == "siglip"
        net_class = hf.SiglipTextModel if siglip else hf.CLIPTextModelWithProjection
        tower = load_net("--clip", net_class, folder, dtype=torch.float32).to(device).eval()
    except WeightsError as error:
        raise EvaluateError(str(error)) from error
    tokenizer = load_tokenizer("--clip", clip)
    texts = [template.replace("{}", name) for name in classes for template in templates]
    if siglip:  # learnt from lower-case captions, which not every tokenizer published with it makes
        texts = [text.lower() for text in texts]
    embeddings = []
    for first in range(0, len(texts), batch_size):
        tokens = tokenizer(
            texts[first : first + batch_size],
            padding="max_length" if siglip else True,
            truncation=True,
            max_length=tower.config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        if siglip:  # reads its padding as text: it was trained without a mask
            vectors = tower(input_ids=tokens["input_ids"]).pooler_output
        else:
            vectors = tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds
        embeddings.append(F.normalize(vectors.float(), dim=1))
    each = torch.cat(embeddings).view(len(classes), len(templates), -1)
    return F.normalize(each.mean(1), dim=1)


def tower_kind(clip: str | Path) -> str:
    """Whose text tower a folder or hub id has: "clip" or "siglip". Raises EvaluateError for any other model."""
    try:
        folder = find_folder("--clip", clip)
        found = read_json("--clip", folder / "config.json").get("model_type")
    except WeightsError as error:
        raise EvaluateError(str(error)) from error
    for kind in _TOWERS:
        if found in (kind, f"{kind}_text_model"):
            return kind
    raise EvaluateError(
        f"--clip: {folder} holds a model of type {found!r}, expected CLIP or SigLIP with its text tower"
    )


def load_tokenizer(key: str, weights: str | Path):
    """The tokenizer beside a model's weights. Raises EvaluateError, naming `key`, where there is none."""
    from transformers import AutoTokenizer

    local = Path(weights).expanduser()
    try:
        return AutoTokenizer.from_pretrained(local if local.is_dir() else weights, local_files_only=local.is_dir())
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for files that are not there
        reason = " ".join(str(error).split())[:200]
        raise EvaluateError(f"{key}: {weights} has no tokenizer that can be read ({reason})") from error


def class_names(images: Dataset, path: Path | None) -> tuple[str, ...]:
    """The classes' names by number: the lines of `path`, else what the images bring, with spaces for underscores.

    Raises EvaluateError where there are none, fewer than class numbers, or empty ones, where the images bring WordNet's
    numbers, as ImageNet's folders do, and where `path` has the images' own names in another order. Two may be equal
    (`repeated`).
    """
    names = images.classes
    if path is not None:
        try:
            names = read_class_names(path)
        except SourceError as error:
            raise EvaluateError(f"--classes: {error}") from error
        given, own = (tuple(name.replace("_", " ").lower() for name in some or ()) for some in (names, images.classes))
        if given != own and sorted(given) == sorted(own):
            first = next(i for i, name in enumerate(given) if name != own[i])
            raise EvaluateError(
                f"--classes: {path} has the images' own class names in another order, {names[first]!r} where class "
                f"{first} is {images.classes[first]!r}; put its lines in the images' order, or leave it out"
            )
    if not names:
        raise EvaluateError("--images: the classes have no names; give --classes FILE with one name per line")
    if path is None and (numbered := [name for name in names if re.fullmatch(r"n\d{8}", name)]):
        raise EvaluateError(
            f"--images: a class is called {numbered[0]!r}, WordNet's number of it, which tells a text tower nothing; "
            "give --classes FILE with one name per line, in the order of the images' classes"
        )
    if max(images.labels) >= len(names):
        raise EvaluateError(f"--classes: {len(names)} names, but an image is of class {max(images.labels)}")
    return tuple(name.replace("_", " ") for name in names)


def repeated(names: Sequence[str]) -> list[str]:
    """The names that are there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _read_templates(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(f"--template-file: {file}: not a text file that can be read ({error})") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise EvaluateError(f"--template-file: {file}: has no template; expected one per line, with {{}} for the class")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `zero-shot` beside those of every evaluation."""
    parser.add_argument("--images", required=True, metavar="SOURCE", help="labelled images, never trained on")
    parser.add_argument("--clip", required=True, metavar="DIR", help="CLIP or SigLIP, for its text tower and tokenizer")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line (default: the images')")
    parser.add_argument(
        "--template",
        action="append",
        dest="templates",
        metavar="TEXT",
        help=f"may be repeated; default {TEMPLATES[0]!r}",
    )
    parser.add_argument("--template-file", type=Path, metavar="FILE", help="more templates, one per line")


def run(args: argparse.Namespace) -> dict:
    """`zero-shot` as the command line asks for it."""
    encoder = load_encoder(args.model, device=args.device, dtype=args.dtype)
    images = read_images("--images", args.images, args.limit, args.seed)
    names = class_names(images, args.classes)
    if twice := repeated(names):
        print(
            f"warning: {'--images' if args.classes is None else '--classes'}: {', '.join(map(repr, twice))} more than "
            "once; classes of one name have one text, which tells none of their images apart",
            file=sys.stderr,
        )
    templates = [*(args.templates or ()), *_read_templates(args.template_file)] or TEMPLATES
    texts = embed_texts(args.clip, names, templates, device=encoder.device)
    common = dict(
        batch_size=args.batch_size,
        workers=args.workers,
        teacher_name=args.teacher_name,
        tower=tower_kind(args.clip),
    )
    found = zero_shot(encoder, texts, images, size=args.size or encoder.image_size, **common)
    return {**found, "templates": list(templates)}
