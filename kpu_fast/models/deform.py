"""Put `kpu_fast.kernels.deform_attn` into models of transformers that attend to a feature pyramid by sampling."""

import inspect
from types import FunctionType

from torch import nn

from kpu_fast.kernels import MultiScaleDeformableAttention, deform_attn

_MODULE = "MultiScaleDeformableAttention"  # GroundingDINO, Deformable DETR, RT-DETR, OmDet-Turbo, RF-DETR, …
_FUNCTION = "multi_scale_deformable_attention"  # called by name in the pixel decoders of Mask2Former and OneFormer


def use_deform_attn(model: nn.Module) -> int:
    """Replace multi-scale deformable attention everywhere inside a transformers model, in place; returns how often.

    Recognised by name: modules of the class `MultiScaleDeformableAttention`, and modules whose forward calls a function
    `multi_scale_deformable_attention`. The modules stay and change their class, so weights, their names, hooks and
    save_pretrained stay as they are; no other model is touched. A second call changes nothing more.
    Raises ValueError where the model has no such attention, where one has weights (the published GroundingDINO's and
    mmcv's include their projections), or where the forward of one is wrapped in something that would be lost or would
    go on calling the old one; nothing is changed then.
    """
    changes = []
    for name, module in model.named_modules():
        cls = type(module)
        forward = inspect.unwrap(cls.forward)
        if cls.__name__ == _MODULE:
            if next(module.parameters(), None) is not None:
                raise ValueError(
                    f"use_deform_attn: {name or cls.__name__}: this {_MODULE} has weights of its own, so it does "
                    "more than transformers' class of that name; use deform_attn inside it"
                )
            ours = MultiScaleDeformableAttention
        elif isinstance(forward, FunctionType) and _FUNCTION in forward.__code__.co_names:
            ours = _calling_ours(cls, forward)
        else:
            continue
        if "forward" in vars(module):
            found, advice = "a forward of its own, not its class's", "call this before hooks of accelerate are attached"
            raise ValueError(f"use_deform_attn: {name or cls.__name__} has {found}; {advice}")
        if forward is not cls.forward:
            raise ValueError(
                f"use_deform_attn: {name or cls.__name__}: the forward of {cls.__name__} is decorated, "
                "and what the decorator does would be lost; expected a plain one"
            )
        changes.append((module, ours))
    if not changes:
        raise ValueError(
            f"use_deform_attn: {type(model).__name__} holds no {_MODULE} and calls no {_FUNCTION}; "
            "expected a model such as GroundingDinoForObjectDetection or Mask2FormerForUniversalSegmentation"
        )
    for module, ours in changes:
        module.__class__ = ours
    return len(changes)


def _calling_ours(cls: type, forward: FunctionType) -> type:
    """A subclass whose forward is the same code and finds our function under that name."""
    if forward.__globals__.get(_FUNCTION) is deform_attn:
        return cls
    # Without __name__: torch.compile would look names up in the module of that name, where they mean something else.
    names = {name: found for name, found in forward.__globals__.items() if name != "__name__"} | {
        _FUNCTION: deform_attn
    }
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(cls.__name__, (cls,), {"forward": ours, "__module__": cls.__module__})
