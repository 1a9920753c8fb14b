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
    `multi_scale_deformable_attention`. Neither has parameters, so weights, their names and save_pretrained stay as they
    are; only this model changes, no other of its class. A second call changes nothing more.
    Raises ValueError where the model has no such attention.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == _MODULE:
                setattr(parent, name, MultiScaleDeformableAttention())
                count += 1
        forward = inspect.unwrap(type(parent).forward)
        if isinstance(forward, FunctionType) and _FUNCTION in forward.__code__.co_names:
            parent.__class__ = _calling_ours(type(parent), forward)
            count += 1
    if not count:
        raise ValueError(
            f"use_deform_attn: {type(model).__name__} holds no {_MODULE} and calls no {_FUNCTION}; "
            "expected a model such as GroundingDinoForObjectDetection or Mask2FormerForUniversalSegmentation"
        )
    return count


def _calling_ours(cls: type, forward: FunctionType) -> type:
    """A subclass whose forward is the same code and finds our function under that name."""
    if forward.__globals__.get(_FUNCTION) is deform_attn:
        return cls
    names = {**forward.__globals__, _FUNCTION: deform_attn}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(cls.__name__, (cls,), {"forward": ours, "__module__": cls.__module__})
