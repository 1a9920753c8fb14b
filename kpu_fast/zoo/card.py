"""The README.md of a teacher of the zoo: every number in it comes from the run."""

import json
from datetime import datetime, timezone
from pathlib import Path

from kpu_fast.machine import circumstances

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_LICENCE = """The images come from CIFAR-10 (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009), a labelled part of the "80 Million Tiny Images" that were gathered from the web. CIFAR-10 names no
licence, the rights in its pictures lie with their unknown authors, and the larger set has been withdrawn by its makers.
These weights are for trying out and testing software."""
_OTHER_LICENCE = (
    "The licence of the images above applies to what was learned from them: check it before you pass this on."
)

_WHAT = {
    "clip": (
        "A small CLIP",
        """Images and captions ("a photo of a ship", nine templates) in one space. Images of one class have the same
captions; so unlike in CLIP's loss, an image's answer is its class's caption, and a caption's answers are all images of
its class alike (soft targets), in both directions.""",
    ),
    "gdino": (
        "A small GroundingDINO with a Swin backbone",
        """Text such as "cat. ship." in, boxes out. The Swin first learned to classify the images; then the whole was
trained with the detection loss of transformers (Hungarian matching; focal, L1 and GIoU terms at every decoder layer and
at the proposals) on mosaics: canvases with one to four images as objects, the class names of the text in random order.
Boxes are therefore the borders of rectangular pictures, not of things.""",
    ),
    "dinov2": (
        "A small DINOv2-shaped ViT",
        """Trained without labels: two distorted views of an image (part, flip, colours) find each other among all views
of the batch (NT-Xent), once by cls and once by the mean of the patch tokens. This is a contrastive loss and not
DINOv2's self-distillation: that one needs far more steps than this budget has before it is of any use.""",
    ),
}


def write_card(folder: Path, name: str, facts: dict, told: dict, figures: dict) -> None:
    """README.md and training.json in `folder`.

    facts: {"train": {source, images}, "test": …, "classes", "seed", "recipe", "device"}. told: what `fit` returned, or
    a dict of these by phase. figures: {name: {"value", "on"}} measured with the saved weights.
    """
    phases = told if "steps" not in told else {"training": told}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    where = circumstances()
    versions = {name: where["versions"][name] for name in ("torch", "transformers")} | {"python": where["python"]}
    record = {**facts, "phases": phases, "figures": figures, "versions": versions | {"date": date}}
    record["commit"] = where["commit"]
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    title, how = _WHAT[name]
    classes = facts["classes"]
    rows = [
        ("training images", f"{facts['train']['images']:,} from `{facts['train']['source']}`"),
        ("classes", f"{len(classes)}: {', '.join(classes)}"),
        *[
            (
                phase,
                f"{t['steps']:,} steps, {t['images']:,} {'mosaics' if phase == 'detector' else 'images'} seen, "
                f"{t['seconds'] / 60:.1f} minutes, last loss {t['loss']:.4f}",
            )
            for phase, t in phases.items()
        ],
        ("device", facts["device"]),
        ("parameters", f"{facts['parameters']:,} in bf16"),
        ("seed", str(facts["seed"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("date", date),
        ("commit", where["commit"] or "unknown"),
    ]
    measured = [f"| {key} | {value['value']:.4f} | {value['on']} |" for key, value in figures.items()]
    licence = _CIFAR10_LICENCE if tuple(classes) == _CIFAR10 else _OTHER_LICENCE
    text = f"""---
library_name: transformers
tags: [kpu_fast, toy]
---
# {title}

{how}

Made by `python -m kpu_fast.zoo`; loads with transformers, and as a teacher of kpu_fast.

## Measured

With these bf16 weights, computed in fp32, on images that no training saw:

| figure | value | on |
|---|---|---|
{chr(10).join(measured)}

## Training

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in rows)}

`training.json` holds the same with the recipe, `metrics.jsonl` the losses.

## Not for

Anything but demonstrations, tests and small experiments: it knows {len(classes)} classes at {facts["pixels"]}×\
{facts["pixels"]} pixels, enlarged. It was not examined for bias, and says nothing useful about other pictures.

## Licence of the data

{licence}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
