"""What transformers' DINOv2, DINOv3 and ViT are in terms of `ViT`: keyword arguments, and the weights by its names."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from kpu_fast.models.hub import PROCESSORS, WeightsError, find_folder, import_transformers, load_net, read_json
from kpu_fast.models.mean_std import IMAGENET_MEAN_STD, read_mean_std

KEY = "student.vit.weights"

_DINOV3 = "dinov3_vit"
_PLAIN = "vit"  # DINO's and DeiT's
_NETS = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    _DINOV3: "DINOv3ViTModel",
    _PLAIN: "ViTModel",
}
# What `ViT` has no argument for.
_DINOV2_HAS = {"hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6, "num_channels": 3}
_DINOV3_HAS = {
    "hidden_act": "gelu",
    **dict.fromkeys(("query_bias", "value_bias", "proj_bias", "mlp_bias"), True),
    "num_channels": 3,
}
_PLAIN_HAS = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}


def read_model(weights: str | Path) -> nn.Module:
    """transformers' model from a folder or hub id. Raises WeightsError, naming `KEY`, where it cannot be had."""
    folder = find_folder(KEY, weights, processor=True)
    model_type = read_json(KEY, folder / "config.json").get("model_type")
    _check_model_type(model_type, folder)
    if any((folder / file).is_file() for file in PROCESSORS):
        _check_mean_std(read_mean_std(KEY, model_type, folder), folder)
    elif model_type == _PLAIN:
        raise WeightsError(
            f"{KEY}: {folder} has no {PROCESSORS[0]}, and a plain ViT's images may have been normalised with "
            "ImageNet's mean and std or with 0.5; put the file beside the weights"
        )
    hf = import_transformers(KEY)
    # A plain ViT's pooler is for a classifier, and not in DINO's checkpoint.
    optional = ("pooler.",) if model_type == _PLAIN else ()
    return load_net(KEY, getattr(hf, _NETS[model_type]), folder, dtype=torch.float32, optional=optional)


def read_arguments(config) -> dict:
    """`ViT`'s keyword arguments from a config of transformers. Raises WeightsError for one that it cannot follow."""
    _check_model_type(config.model_type, source(config))
    read = {_DINOV3: _dinov3_arguments, _PLAIN: _plain_arguments}.get(config.model_type, _dinov2_arguments)
    return read(config)


def read_state(hf: dict[str, Tensor], depth: int, model_type: str) -> dict[str, Tensor]:
    """The state_dict of a `ViT` of `depth` blocks from that of transformers' model. Raises KeyError for one missing."""
    if model_type == _DINOV3:
        return _dinov3_state(hf, depth)
    return _dinov2_state(hf, depth, layer_scale=model_type != _PLAIN)


def source(config) -> str:
    """What an error message calls the model of this config."""
    return config.name_or_path or "the model"


def _check_model_type(model_type, where) -> None:
    if model_type not in tuple(_NETS):  # of a damaged config it may be no string
        raise WeightsError(
            f"{KEY}: {where} holds a model of type {model_type!r}; expected dinov2, dinov2_with_registers, "
            f"{_DINOV3} or {_PLAIN}, such as facebook/dinov2-base"
        )


def _check_mean_std(found: tuple, folder: Path) -> None:
    if any(abs(a - b) > 1e-3 for a, b in zip(sum(IMAGENET_MEAN_STD, ()), sum(found, ()), strict=True)):
        raise WeightsError(
            f"{KEY}: {folder} normalises images with mean {found[0]} and std {found[1]}, the student's ViT with "
            f"ImageNet's, {IMAGENET_MEAN_STD[0]} and {IMAGENET_MEAN_STD[1]}; take weights made for those"
        )


def _check(config, has: dict) -> None:
    for key, expected in has.items():
        if (value := getattr(config, key)) != expected:
            raise WeightsError(f"{KEY}: {key} is {value!r} in the config of {source(config)}, only {expected!r} works")


def _side(config, key: str) -> int:
    """A size in pixels; transformers takes (height, width) as well, and ours must be square."""
    value = getattr(config, key)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise WeightsError(f"{KEY}: {key} is {value!r} in the config of {source(config)}, only squares work")
    return sides.pop()


def _common_arguments(config) -> dict:
    return {
        "patch_size": _side(config, "patch_size"),
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "image_size": _side(config, "image_size"),
        "layer_scale": getattr(config, "layerscale_value", 1.0),  # a plain ViT has none, which is 1
    }


# ------------------------------------------------------------------------------------------- DINOv2, and the plain ViT


def _dinov2_arguments(config) -> dict:
    _check(config, _DINOV2_HAS)
    if config.model_type == "dinov2_with_registers" and not config.num_register_tokens:
        # Positions are resized with antialias in that model and without in Dinov2Model; ours asks the registers which.
        raise WeightsError(f"{KEY}: num_register_tokens is 0 in the config of {source(config)}, only 1 or more works")
    return {
        **_common_arguments(config),
        "mlp_ratio": config.mlp_ratio,
        "registers": getattr(config, "num_register_tokens", 0),
        "swiglu": config.use_swiglu_ffn,
    }


def _ratio(hidden: int, dim: int) -> float:
    """mlp_ratio of an MLP: the quotient, but int(dim · ratio) is `hidden` also where it is rounded down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _plain_arguments(config) -> dict:
    _check(config, _PLAIN_HAS)
    widening = _ratio(config.intermediate_size, config.hidden_size)
    return {**_common_arguments(config), "mlp_ratio": widening, "eps": config.layer_norm_eps}


# Ours: theirs, where one tensor becomes one tensor. transformers renamed some of them during version 5; both are read.
_DINOV2_NAMES = {
    "norm1": ("norm1", "layernorm_before"),
    "norm2": ("norm2", "layernorm_after"),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
    "mlp.down": ("mlp.down_proj", "mlp.weights_out"),
    "mlp.gate_up": ("mlp.weights_in",),
}
_DINOV2_FUSED = {
    "attn.qkv": (
        [f"attention.{n}_proj" for n in "qkv"],
        [f"attention.attention.{n}" for n in ("query", "key", "value")],
    ),
    "mlp.gate_up": (["mlp.gate_proj", "mlp.up_proj"],),
}


def _dinov2_state(hf: dict[str, Tensor], depth: int, *, layer_scale: bool) -> dict[str, Tensor]:
    state = {
        "embed.cls_token": hf["embeddings.cls_token"],
        "embed.positions": hf["embeddings.position_embeddings"],
        "embed.patch.weight": hf["embeddings.patch_embeddings.projection.weight"],
        "embed.patch.bias": hf["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": hf["layernorm.weight"],
        "norm.bias": hf["layernorm.bias"],
    }
    # transformers leaves the mask token out where the config says use_mask_token = false.
    mask_token = hf.get("embeddings.mask_token", torch.zeros_like(hf["embeddings.cls_token"]))
    state["embed.mask_token"] = mask_token.reshape(1, -1)
    if "embeddings.register_tokens" in hf:
        state["embed.register_tokens"] = hf["embeddings.register_tokens"]
    layers = "layers" if any(name.startswith("layers.") for name in hf) else "encoder.layer"
    for i in range(depth):
        theirs, ours = f"{layers}.{i}", f"blocks.{i}"
        for n in (1, 2):
            ones = torch.ones_like(hf["layernorm.weight"])
            state[f"{ours}.ls{n}"] = hf[f"{theirs}.layer_scale{n}.lambda1"] if layer_scale else ones
        for kind in ("weight", "bias"):
            for name, candidates in _DINOV2_NAMES.items():
                for candidate in candidates:
                    if f"{theirs}.{candidate}.{kind}" in hf:
                        state[f"{ours}.{name}.{kind}"] = hf[f"{theirs}.{candidate}.{kind}"]
            for name, groups in _DINOV2_FUSED.items():
                for group in groups:
                    if f"{theirs}.{group[0]}.{kind}" in hf:
                        state[f"{ours}.{name}.{kind}"] = torch.cat([hf[f"{theirs}.{part}.{kind}"] for part in group])
    return state


# ------------------------------------------------------------------------------------------------------------- DINOv3


def _dinov3_arguments(config) -> dict:
    _check(config, _DINOV3_HAS | ({"hidden_act": "silu"} if config.use_gated_mlp else {}))
    # `SwiGLU` is two thirds as wide as its MLP would be.
    widening = _ratio(config.intermediate_size, config.hidden_size) * (1.5 if config.use_gated_mlp else 1.0)
    return {
        **_common_arguments(config),
        "mlp_ratio": widening,
        "registers": config.num_register_tokens,
        "swiglu": config.use_gated_mlp,
        "rope_theta": config.rope_theta,
        "eps": config.layer_norm_eps,
    }


def _dinov3_state(hf: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    state = {
        "embed.cls_token": hf["embeddings.cls_token"],
        "embed.mask_token": hf["embeddings.mask_token"][0],
        "embed.patch.weight": hf["embeddings.patch_embeddings.weight"],
        "embed.patch.bias": hf["embeddings.patch_embeddings.bias"],
        "norm.weight": hf["norm.weight"],
        "norm.bias": hf["norm.bias"],
    }
    if hf["embeddings.register_tokens"].shape[1]:
        state["embed.register_tokens"] = hf["embeddings.register_tokens"]
    for i in range(depth):
        theirs, ours = f"model.layer.{i}", f"blocks.{i}"
        # Keys have no bias in the published weights, which is one of 0.
        no_bias = torch.zeros_like(hf[f"{theirs}.attention.q_proj.bias"])
        state[f"{ours}.attn.qkv.weight"] = torch.cat([hf[f"{theirs}.attention.{n}_proj.weight"] for n in "qkv"])
        q, k, v = (f"{theirs}.attention.{n}_proj.bias" for n in "qkv")
        state[f"{ours}.attn.qkv.bias"] = torch.cat([hf[q], hf.get(k, no_bias), hf[v]])
        gated = f"{theirs}.mlp.gate_proj.weight" in hf
        for n in (1, 2):
            state[f"{ours}.ls{n}"] = hf[f"{theirs}.layer_scale{n}.lambda1"]
        for kind in ("weight", "bias"):
            for n in (1, 2):
                state[f"{ours}.norm{n}.{kind}"] = hf[f"{theirs}.norm{n}.{kind}"]
            state[f"{ours}.attn.proj.{kind}"] = hf[f"{theirs}.attention.o_proj.{kind}"]
            up, down = hf[f"{theirs}.mlp.up_proj.{kind}"], hf[f"{theirs}.mlp.down_proj.{kind}"]
            if gated:
                gate = hf[f"{theirs}.mlp.gate_proj.{kind}"]
                state |= {f"{ours}.mlp.gate_up.{kind}": torch.cat([gate, up]), f"{ours}.mlp.down.{kind}": down}
            else:
                state |= {f"{ours}.mlp.fc1.{kind}": up, f"{ours}.mlp.fc2.{kind}": down}
    return state
