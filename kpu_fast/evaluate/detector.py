"""GroundingDINO with the student in place of its vision backbone, and boxes for class names out of either."""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpu_fast.models.mean_std import IMAGENET_MEAN, IMAGENET_STD
from kpu_fast.models.student import Student

STRIDE = 32  # the student's coarsest map: sides are multiples of it
MOST = 300  # boxes of an image, as GroundingDINO is evaluated on COCO; COCO then takes 100 of each class


class StudentBackbone(nn.Module):
    """Stands in for `GroundingDinoConvEncoder`: its list of (map (B, C, H, W), mask (B, H, W) bool), finest first.

    The maps are those of `student` in the space of `teacher` (h_s2t), computed in the student's dtype and given in
    that of `reader`, a tensor of what reads them. mean, std: what `pixel_values` were normalised with; the student
    normalises for itself, so that is undone.
    """

    def __init__(self, student: Student, teacher: str, mean: Sequence[float], std: Sequence[float], reader: Tensor):
        super().__init__()
        self.model, self.teacher = student, teacher  # `model` is where transformers looks for the network
        self.intermediate_channel_sizes = list(student.head_specs[teacher].map_dims)
        self.mean, self.std = tuple(mean), tuple(std)
        # Empty, for its dtype: a buffer follows the detector's `.to(dtype)` as what reads the maps does.
        self.register_buffer("reader", reader.detach().new_empty(0), persistent=False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """pixel_values (B, 3, H, W), H and W multiples of 32; pixel_mask (B, H, W), 0 on padding."""
        channels = pixel_values.float().unbind(1)
        images = torch.stack([c * s + m for c, m, s in zip(channels, self.mean, self.std, strict=True)], dim=1)
        maps = self.model.project(self.model(images), self.teacher).maps
        out = []
        for m in maps:
            m = m.permute(0, 3, 1, 2).to(self.reader.dtype)  # (B, C, h, w)
            mask = F.interpolate(pixel_mask[None].float(), size=m.shape[-2:])[0].bool()
            out.append((m, mask))
        return out


def with_student_backbone(
    detector: nn.Module,
    student: Student,
    teacher_name: str,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> nn.Module:
    """`detector`, transformers' (MM) GroundingDino, whole or its Model, made to see through `student`, in place.

    Everything behind the backbone stays: neck, text tower, encoder, decoder. Inputs stay what the processor gives;
    sides that are no multiples of 32 are padded, with `pixel_mask` saying so, as batches of several sizes are. The
    detector and the student may be of different dtypes.
    mean, std: those of the detector's image processor. Raises ValueError where the head for `teacher_name` does not
    give the maps that the backbone gave, KeyError where there is no such head.
    """
    model = getattr(detector, "model", detector)
    expected = tuple(model.backbone.conv_encoder.intermediate_channel_sizes)
    if teacher_name not in student.head_specs:
        raise KeyError(f"the student has no head for {teacher_name!r}; it has {sorted(student.head_specs)}")
    found = tuple(student.head_specs[teacher_name].map_dims)
    if found != expected:
        raise ValueError(
            f"the student's head for {teacher_name!r} gives maps of {found} channels, the detector's backbone "
            f"{expected}; give the detector that the student was trained with"
        )
    reader = next(model.input_proj_vision.parameters())
    model.backbone.conv_encoder = StudentBackbone(student, teacher_name, mean, std, reader)
    names = list(inspect.signature(model.forward).parameters)

    def pad(_, args, kwargs):
        return (), _padded({**dict(zip(names, args, strict=False)), **kwargs})

    model.register_forward_pre_hook(pad, with_kwargs=True)
    return detector


def cast_backbone(detector: nn.Module, dtype: torch.dtype) -> None:
    """Have a detector's own image backbone compute in `dtype`, in place; what reads its maps stays as it was."""
    encoder = detector.model.backbone.conv_encoder
    reader = next(detector.model.input_proj_vision.parameters()).dtype
    encoder.to(dtype)
    encoder.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
    encoder.register_forward_hook(lambda _, args, maps: [(m.to(reader), mask) for m, mask in maps])


def _padded(inputs: dict) -> dict:
    """The detector's inputs with images padded to multiples of 32 at the bottom and on the right."""
    pixels, mask = inputs["pixel_values"], inputs.get("pixel_mask")
    height, width = pixels.shape[-2:]
    more = (0, -width % STRIDE, 0, -height % STRIDE)
    if any(more):
        mask = pixels.new_ones(len(pixels), height, width, dtype=torch.long) if mask is None else mask
        inputs = inputs | {"pixel_values": F.pad(pixels, more), "pixel_mask": F.pad(mask, more)}
    return inputs


class Prompt(NamedTuple):
    """Class names as one text, "a. b. c.", and where each of them is in it.

    input_ids, attention_mask, token_type_ids: (1, L). spans: (classes, L) float, 1 / n on the n tokens of a class.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    spans: Tensor


def make_prompt(classes: Sequence[str], tokenizer, max_tokens: int) -> Prompt:
    """The prompt for class names, in their order, in lower case, as GroundingDINO was trained.

    Raises ValueError for names with a full stop or a question mark, where GroundingDINO ends a phrase; names that the
    tokenizer has no tokens for, or does not know in part; and more than `max_tokens`.
    """
    names = [name.strip().lower() for name in classes]
    for name in names:
        if not name or "." in name or "?" in name:
            raise ValueError(f"class {name!r}: a name is not empty and has no '.' or '?', which separate names")
    ends = torch.tensor([len(name) + 2 for name in names]).cumsum(0).tolist()  # ". " after each
    tokens = tokenizer(". ".join(names) + ".", return_offsets_mapping=True, return_tensors="pt")
    length = tokens["input_ids"].shape[1]
    if length > max_tokens:
        raise ValueError(f"{len(names)} class names make {length} tokens, the text tower takes {max_tokens}")
    spans = torch.zeros(len(names), length)
    for row, name, end in zip(spans, names, ends, strict=True):
        first, last = end - len(name) - 2, end - 2
        for i, (start, stop) in enumerate(tokens["offset_mapping"][0].tolist()):
            row[i] = stop > start and start >= first and stop <= last
        if not row.any():
            raise ValueError(f"class {name!r}: the tokenizer makes no token of it")
        if tokenizer.unk_token_id in tokens["input_ids"][0, row > 0].tolist():
            raise ValueError(f"class {name!r}: the tokenizer does not know some of it; choose other words")
        row /= row.sum()
    types = tokens.get("token_type_ids", torch.zeros_like(tokens["input_ids"]))
    return Prompt(tokens["input_ids"], tokens["attention_mask"], types, spans)


def detect_boxes(
    detector: nn.Module, pixel_values: Tensor, pixel_mask: Tensor, prompt: Prompt, sizes: Tensor, most: int = MOST
) -> list[dict[str, Tensor]]:
    """The `most` best boxes of each image, on the CPU: {"boxes" (n, 4) xyxy, "scores" (n,), "labels" (n,)}.

    sizes: (B, 2) height and width of each image in the pixels that its boxes are to be told in. A query scores
    for a class the mean of its probabilities on the class's tokens, and may score for several, as GroundingDINO is
    evaluated on COCO.
    """
    text = [t.to(pixel_values.device).expand(len(pixel_values), -1) for t in prompt[:3]]
    out = detector(
        pixel_values=pixel_values,
        pixel_mask=pixel_mask,
        input_ids=text[0],
        attention_mask=text[1],
        token_type_ids=text[2],
    )
    length = prompt.spans.shape[1]
    spans = prompt.spans.to(pixel_values.device)
    probabilities = out.logits[..., :length].float().sigmoid() @ spans.T  # (B, Q, classes)
    classes = probabilities.shape[-1]
    best = probabilities.flatten(1).topk(min(most, probabilities[0].numel()), dim=1)
    center, extent = out.pred_boxes.float().split(2, dim=-1)
    boxes = torch.cat([center - extent / 2, center + extent / 2], dim=-1)  # (B, Q, 4) xyxy in [0, 1]
    boxes = boxes.gather(1, (best.indices // classes)[..., None].expand(-1, -1, 4)).cpu()
    boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None].float()
    return [
        {"boxes": b, "scores": s, "labels": n}
        for b, s, n in zip(boxes, best.values.cpu(), (best.indices % classes).cpu(), strict=True)
    ]
