"""What an export holds so that transformers and the hub know what to do with it; made without either of them."""

import functools
import json
from collections.abc import Iterable

import torch

MODEL_TYPE = "kpu_fast_student"

_MODULE = "modeling_kpu_fast"
_LARGEST = 224  # pixels; what classification is usually done at, where a student was not made for less


def auto_keys(dtypes: Iterable[torch.dtype]) -> dict:
    """What config.json says to AutoModel. dtypes: of the weights; transformers loads all of them in the widest."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    widest = functools.reduce(torch.promote_types, floating) if floating else torch.float32
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["KPUStudentModel"],
        "auto_map": {"AutoConfig": f"{_MODULE}.KPUStudentConfig", "AutoModel": f"{_MODULE}.KPUStudentModel"},
        "dtype": str(widest).removeprefix("torch."),
    }


def usual_size(vit: dict) -> int:
    """A side in pixels for square images: on it the learned positions need no resize, but at most 224.

    vit: keyword arguments of `ViT`.
    """
    return max(32, min(_LARGEST, vit["image_size"] // vit["patch_size"] * 16) // 32 * 32)


def code_files(vit: dict) -> dict[str, str]:
    """Name → text of the files that AutoModel and AutoImageProcessor read beside config.json."""
    size = usual_size(vit)
    processor = {
        "image_processor_type": "BitImageProcessor",  # DINOv2's own; ViT's squashes what is not square
        "do_convert_rgb": True,  # greyscale, palettes and transparency too
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,  # the student does that itself
    }
    return {
        f"{_MODULE}.py": "# For AutoModel; needs the package kpu_fast.\n"
        "from kpu_fast.models.hf import KPUStudentConfig, KPUStudentModel  # noqa: F401\n",
        "preprocessor_config.json": json.dumps(processor, indent=2) + "\n",
    }


def front_matter(base_model: str | None = None, paper: str | None = None) -> str:
    """The lines that the hub reads at the top of README.md.

    base_model: hub id of the ViT, where it has one. paper: arXiv number of the recipe, where it is known.
    """
    lines = ["library_name: transformers", "pipeline_tag: image-feature-extraction"]
    if base_model is not None:
        lines.append(f"base_model: {base_model}")
    lines += ["tags:", "- kpu_fast", "- knowledge-distillation", "- custom_code"]
    if paper is not None:
        lines.append(f"- arxiv:{paper}")
    return "\n".join(["---", *lines, "---", ""])
