"""What can be evaluated, behind one call: a student's export, or a teacher or sentinel as transformers saves it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from kpu_fast.evaluate.result import EvaluateError
from kpu_fast.machine import is_out_of_memory
from kpu_fast.models.features import Features
from kpu_fast.models.hf_files import usual_size
from kpu_fast.models.hub import WeightsError, find_folder, import_transformers, load_config, read_json
from kpu_fast.models.student import Student, is_student
from kpu_fast.models.teachers import MODEL_TYPES, Teacher, backbone_types, build_teacher
from kpu_fast.models.vit import ViT

_TEACHERS = {model_type: kind for kind, types in MODEL_TYPES.items() for model_type in types or ()}
_SENTINELS = (*MODEL_TYPES["dinov2"], "vit")
_LARGEST = 224  # pixels; what classification is usually evaluated at, where a model does not ask for less


class Encoder(nn.Module):
    """A frozen encoder: images (B, 3, H, W) in [0, 1], H and W multiples of 32 → `Features` of `net`.

    kind: "student", "sentinel", or the kind of a teacher. image_size: pixels a side that it is best evaluated at.
    """

    def __init__(self, name: str, kind: str, net: nn.Module, image_size: int):
        super().__init__()
        self.name, self.kind, self.net, self.image_size = name, kind, net, image_size
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @torch.inference_mode()
    def forward(self, images: Tensor, space: str | None = None) -> Features:
        """Features of the encoder's own or, of a student, in the space and on the grids of teacher `space`."""
        try:
            features = self.net(images.to(self.device))
        except Exception as error:  # each network of transformers has its own way of refusing a size
            if is_out_of_memory(error) or not isinstance(self.net, Teacher):
                raise
            size, reason = "×".join(map(str, images.shape[-2:])), " ".join(str(error).split())[:300]
            raise EvaluateError(f"{self.name}: fails on images of {size}: {type(error).__name__}: {reason}") from error
        return features if space is None else self.net.project(features, space)

    def space(self, name: str | None, *, x_dim: int | None = None, map_dims: Sequence[int] | None = None) -> str | None:
        """The teacher whose head gives x of `x_dim` channels, or maps of `map_dims`: `name`, or the only one that fits.

        None for what is no student. Raises EvaluateError where no head or several heads fit, or `name` does not.
        """
        wanted = f"x of {x_dim} channels" if map_dims is None else f"maps of {tuple(map_dims)} channels"
        if self.kind != "student":
            if name is not None:
                raise EvaluateError(f"--teacher-name {name}: {self.name} is no student and has no heads; leave it out")
            return None
        heads = self.net.head_specs
        fits = [
            head for head, spec in heads.items() if x_dim in (None, spec.x_dim) and map_dims in (None, spec.map_dims)
        ]
        if name is not None and name not in heads:
            raise EvaluateError(f"--teacher-name {name}: {self.name} has heads for {_names(heads)}")
        if name is not None and name not in fits:
            raise EvaluateError(f"--teacher-name {name}: that head of {self.name} gives no {wanted}")
        if not fits:
            has = _names(heads) if heads else "none, as a student of GKD or one without a teacher"
            raise EvaluateError(f"{self.name}: no head gives {wanted}; it has {has}")
        if name is None and len(fits) > 1:
            several = f"several heads give {wanted}: {_names(fits)}"
            raise EvaluateError(f"{self.name}: {several}; choose one with --teacher-name")
        return name or fits[0]

    def vectors(self, images: Tensor, features: str = "x", space: str | None = None) -> Tensor:
        """(B, C) float32: x, or with features="map" the mean over the cells of each map, one map after another."""
        x, maps = self(images, space)
        if features == "map":
            return torch.cat([m.float().mean((1, 2)) for m in maps], dim=1)
        if x is None:
            raise EvaluateError(f"{self.name}: has no x for an image as a whole; use --features map")
        return x.float()


def load_encoder(
    weights: str | Path,
    *,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    key: str = "--model",
    sentinel: bool = True,
) -> Encoder:
    """An encoder from a folder: an exported student, a teacher of any kind, or any backbone of transformers.

    weights: a folder, or a hub id. A DINOv2, a DINO or a DeiT is seen as the sentinel it is in a student: the same ViT,
    on images resized to its patches at stride 16 as the student resizes them, so that the two compare; with `sentinel`
    False, as the teacher that a run has.
    Raises EvaluateError, naming `key`, where it is none of these or does not load.
    """
    name = str(weights)
    try:
        folder = find_folder(key, weights, processor=True)
        file = folder / "config.json"
        config = read_json(key, file)
        model_type = _checked(file, "model_type", config.get("model_type"), str | None)
        if is_student(config):
            net: nn.Module = Student.from_pretrained(folder)
            net = net.to(device=device, dtype=dtype)
            kind, size = "student", usual_size(net.vit.config)
        elif sentinel and model_type in _SENTINELS:
            vit = ViT.from_hf(folder)
            net = Student(vit=vit.config, adapter=None)
            net.vit.load_state_dict(vit.state_dict())
            net = net.to(device=device, dtype=dtype)
            kind, size = "sentinel", usual_size(net.vit.config)
        else:
            kind, size = _TEACHERS.get(model_type, "backbone"), _LARGEST
            import_transformers(key)
            if kind == "backbone" and model_type not in backbone_types():
                raise EvaluateError(
                    f"{key}: {folder} holds a model of type {model_type!r}; expected a student, a CLIP, "
                    "SigLIP, DINO, DeiT, DINOv2, DINOv3, GroundingDINO or SAM, or one that transformers has a backbone "
                    "for, such as 'swin'"
                )
            if kind in ("clip", "siglip", "sam"):
                vision = _checked(file, "vision_config", config.get("vision_config", config), dict)
                if "image_size" not in vision:  # as older versions of transformers saved what is usual
                    whole = load_config(key, folder)
                    vision = getattr(whole, "vision_config", whole).to_dict()
                size = _checked(file, "image_size", vision["image_size"], int)
            asked = SimpleNamespace(kind=kind, weights=str(folder), arch={}, levels=None)
            net = build_teacher("model", asked, device=device, dtype=dtype, image_size=(size, size))
    except WeightsError as error:
        # The loaders name the configuration's keys.
        message = str(error).replace("student.vit.weights", key)
        raise EvaluateError(message.replace("teachers.model.weights", key).replace("teachers.model", key)) from error
    except EvaluateError:
        raise
    except (OSError, ValueError) as error:
        raise EvaluateError(f"{key}: {error}") from error
    if kind != "sam":  # which takes no other size
        size = max(32, min(size, _LARGEST) // 32 * 32)
    return Encoder(name, kind, net, size)


def walk(encoder: Encoder, batches, features: str, space: str | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(vectors (B, C) float32 on the encoder's device, labels (B,)) of each batch of (images, labels).

    Raises EvaluateError for features that are NaN or Inf: every score made from them would be wrong.
    """
    seen = 0
    for images, labels in batches:
        vectors = encoder.vectors(images, features, space)
        if not torch.isfinite(vectors).all():
            raise EvaluateError(f"{encoder.name}: NaN or Inf in the features of images {seen} to {seen + len(labels)}")
        seen += len(labels)
        yield vectors, labels


def _checked(file: Path, name: str, value, kind):
    if not isinstance(value, kind):
        raise ValueError(f"{file}: {name} is {value!r}; fetch the model again")
    return value


def _names(heads) -> str:
    return json.dumps(sorted(heads))[1:-1] or "none"
