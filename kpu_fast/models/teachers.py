"""Frozen teachers: CLIP, SigLIP, DINO, GroundingDINO, SAM or any vision backbone; images in [0, 1] → `Features`.

Which features each kind gives, and why: docs/teachers.md.
"""

import difflib
import inspect
import logging
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpu_fast.machine import is_out_of_memory
from kpu_fast.models.features import Features, FeatureSpec, cells
from kpu_fast.models.hub import WeightsError, find_folder, import_transformers, load_config, load_net, read_json
from kpu_fast.models.mean_std import read_mean_std, usual_mean_std
from kpu_fast.models.vit import check_images

log = logging.getLogger(__name__)


# What config.json may call itself; None: every model type transformers has a backbone class for.
MODEL_TYPES = {
    "clip": ("clip", "clip_vision_model"),
    "siglip": ("siglip", "siglip_vision_model"),
    "grounding_dino": ("grounding-dino", "mm-grounding-dino"),
    "dinov2": ("dinov2", "dinov2_with_registers"),
    "dinov3": ("dinov3_vit",),
    "sam": ("sam", "sam_vision_model"),
    "backbone": None,
}
# Kinds with an x and a map of patch tokens: which output of transformers is x.
_X = {"clip": "image_embeds", "siglip": "pooler_output", "dinov2": "pooler_output", "dinov3": "pooler_output"}
# Kind or model type → configuration and network in transformers; "backbone" has one of each for every model type.
_CLASSES = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "sam": ("SamVisionConfig", "SamVisionModel"),
    "grounding_dino": ("SwinConfig", "SwinBackbone"),  # random ones; a checkpoint brings its own backbone
}
# Random networks take the sizes of CLIP-B/16, SigLIP-B/16, Swin-T, DINOv2-B/14, DINOv3-B/16 and SAM-B where
# transformers' own defaults differ.
_RANDOM_SIZES = {
    "clip": {"patch_size": 16},
    "grounding_dino": {"out_indices": [2, 3, 4]},
    "dinov2": {"patch_size": 14, "image_size": 518},
    "dinov3": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_register_tokens": 4},
}
_DINO_BACKBONE = "backbone.conv_encoder."


class Teacher(nn.Module):
    """A frozen network: images (B, 3, H, W) in [0, 1] → `Features` in the network's dtype, never with a gradient.

    Images are normalised in fp32 and then cast. A side that is no multiple of the patch size is first resized (bicubic,
    antialiased) to the nearest multiple, so that no pixel is cut off; where patches overlap, as Hiera's, their stride
    stands for their size. `spec` describes the features of images of `image_size` (H, W). The module stays in eval mode
    whatever `.train()` is told.

    net: a network of transformers, on its device and in its dtype. mean, std: three numbers each, for [0, 1] images.
    """

    def __init__(self, name: str, kind: str, net: nn.Module, mean, std, image_size: tuple[int, int]):
        super().__init__()
        self.name, self.kind, self.net = name, kind, net
        # Where patches overlap (Hiera: 7 pixels, one every 4) the config says how far apart they are.
        patch = getattr(net.config, "patch_stride", None) or getattr(net.config, "patch_size", None) or 1
        self.patch_size = max(patch) if isinstance(patch, (list, tuple)) else patch
        self.first_patch = 0 if kind == "siglip" else 1 + getattr(net.config, "num_register_tokens", 0)
        self.mean_std = tuple(mean), tuple(std)
        self._place_mean_std()
        self.requires_grad_(False).eval()
        self.spec = self._probe(image_size)

    def _place_mean_std(self) -> None:
        device = next(self.net.parameters()).device
        self.mean, self.std = (torch.tensor(three, device=device).view(3, 1, 1) for three in self.mean_std)

    def _apply(self, fn, recurse: bool = True) -> "Teacher":
        super()._apply(fn, recurse)
        self._place_mean_std()  # not a buffer, which `.bfloat16()` would round
        return self

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode: a teacher's dropout, drop path and batch statistics never move."""
        return super().train(False)

    # no_grad and not inference_mode: the student's losses save these features for their backward pass.
    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W) in [0, 1], any float dtype → Features; maps are channels last, finest first.

        Raises ValueError for images that are not floating point.
        """
        check_images(images)
        pixels = (self._fit(images.float()) - self.mean) / self.std
        pixels = pixels.to(next(self.net.parameters()).dtype)
        any_size = {"interpolate_pos_encoding": True} if self.kind in ("clip", "siglip") else {}
        out = self.net(pixel_values=pixels, **any_size)
        if self.kind in _X:
            return Features(getattr(out, _X[self.kind]), (self._grid(out.last_hidden_state, pixels),))
        maps = (out.last_hidden_state,) if self.kind == "sam" else out.feature_maps  # NCHW in memory
        # The one copy that h_t2s's Linear would make: with it, both losses that read a map share the launch of others.
        return Features(None, tuple(m.permute(0, 2, 3, 1).contiguous() for m in maps))

    def _fit(self, images: Tensor) -> Tensor:
        p = self.patch_size
        size = [cells(side, p) * p for side in images.shape[-2:]]
        if size == list(images.shape[-2:]):
            return images
        return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)

    def _grid(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        h, w = (side // self.patch_size for side in pixels.shape[-2:])
        return tokens[:, self.first_patch :].unflatten(1, (h, w))  # (B, h, w, C)

    def check_sizes(self, image_sizes: Sequence[tuple[int, int]]) -> None:
        """Raises WeightsError unless images of every (H, W) give maps as they should.

        Of (W, H) after (H, W) the same, turned; of others as many cells as its strides promise, give or take 1. Some
        networks of transformers read a map by the image size in their config: they mix the cells of any other.
        """
        known: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for height, width in image_sizes:
            remedy = f"set teachers.{self.name}.data.aspect_ratio_grouping to false, and buckets to []"
            try:
                grids = [tuple(m.shape[1:3]) for m in self._look((height, width)).maps]
            except WeightsError as error:
                raise WeightsError(f"{error}; {remedy}") from error
            turned = known.get((width, height))
            known[height, width] = grids
            expected = (
                [(cells(height, stride), cells(width, stride)) for stride in self.spec.strides]
                if turned is None
                else [(h, w) for w, h in turned]
            )
            spare = 1 if turned is None else 0
            if any(
                abs(n - m) > spare for pair in zip(grids, expected, strict=True) for n, m in zip(*pair, strict=True)
            ):
                found, right = (", ".join(f"{h}×{w}" for h, w in some) for some in (grids, expected))
                raise WeightsError(
                    f"teachers.{self.name}: takes images of one shape: those of {height}×{width} give maps of {found} "
                    f"cells, not {right}; {remedy}"
                )

    def _look(self, image_size: tuple[int, int]) -> Features:
        height, width = image_size
        try:
            return self(torch.zeros(1, 3, height, width, device=self.mean.device))
        except Exception as error:  # each network of transformers has its own way of refusing a size
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".")
            if self.kind == "sam" and {height, width} != {side := self.net.config.image_size}:
                reason = f"a SAM takes one size, and this one was made for {side}×{side}"
            raise WeightsError(f"teachers.{self.name}: does not take images of {height}×{width}: {reason}") from error

    def _probe(self, image_size: tuple[int, int]) -> FeatureSpec:
        x, maps = self._look(image_size)
        if x is None and self.kind in _X:
            raise WeightsError(
                f"teachers.{self.name}.weights: this {self.kind} has no vector for the image as a whole "
                "(vision_use_head is false in its config.json)"
            )
        for m in maps:
            if m.ndim != 4:
                raise WeightsError(
                    f"teachers.{self.name}: a feature map of shape {tuple(m.shape)}, expected (B, h, w, C)"
                )
        strides = tuple(_stride(image_size, m.shape[1:3], self.patch_size) for m in maps)
        return FeatureSpec(None if x is None else x.shape[1], tuple(m.shape[3] for m in maps), strides)


def _stride(size: tuple[int, int], grid: tuple[int, int], patch_size: int) -> float:
    """Pixels per cell of a (h, w) grid on an (H, W) image: one number from which a student can find the grid again."""
    # Sides were resized to multiples of the patch: cells are not quite square, but rounding gives their number.
    if all(cells(side, patch_size) == n for side, n in zip(size, grid, strict=True)):
        return float(patch_size)
    by_height, by_width = (side / n for side, n in zip(size, grid, strict=True))
    return math.sqrt(by_height * by_width)


def build_teacher(name: str, cfg, *, device, dtype: torch.dtype, image_size: tuple[int, int], seed: int = 0) -> Teacher:
    """The teacher `teachers.NAME` of a configuration, frozen, on `device` and in `dtype`.

    cfg: kind (one of MODEL_TYPES); weights: a local folder, a hub id (the local cache is asked first) or "random";
    arch: keyword arguments of transformers' configuration class, for random weights only; levels: stage indices of a
    "backbone" (None: its last). image_size: (H, W) in pixels of the images to come, for
    `spec`. seed: of random weights, mixed with `name`; torch's global generator is left as it was.

    Raises WeightsError when the key, the files or the weights are not right.
    """
    if cfg.kind not in MODEL_TYPES:
        raise WeightsError(f"teachers.{name}.kind: {cfg.kind!r} is not one of {', '.join(MODEL_TYPES)}")
    if cfg.levels is not None and cfg.kind != "backbone":
        raise WeightsError(
            f'teachers.{name}.levels: only kind "backbone" has levels, this is {cfg.kind!r}; remove the key'
        )
    if cfg.arch and cfg.weights != "random":
        raise WeightsError(
            f'teachers.{name}.arch: only "weights": "random" takes an architecture, {cfg.weights!r} brings its own; '
            "remove one of the two"
        )
    if cfg.weights == "random":
        net = _random_net(name, cfg, seed)
        _, mean, std = usual_mean_std(cfg.kind)
    else:
        folder = find_folder(f"teachers.{name}.weights", cfg.weights, processor=True)
        net = _load_net(name, cfg, folder, dtype)
        mean, std = read_mean_std(f"teachers.{name}.weights", cfg.kind, folder)
    return Teacher(name, cfg.kind, net.to(device=device, dtype=dtype), mean, std, image_size)


def backbone_types() -> list[str]:
    """The model types that transformers has a backbone class for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    return [t for t in MODEL_FOR_BACKBONE_MAPPING_NAMES if t != "timm_backbone"]


def _choose_levels(name: str, config, levels) -> None:
    if levels is None:
        return
    try:
        config.out_indices = list(levels)
    except ValueError as error:
        stages = ", ".join(f"{i} = {stage}" for i, stage in enumerate(config.stage_names))
        raise WeightsError(f"teachers.{name}.levels: {list(levels)} are not ascending levels of {stages}") from error


# ---------------------------------------------------------------------------------------------------- random weights


def _random_net(name: str, cfg, seed: int) -> nn.Module:
    hf = import_transformers(f"teachers.{name}.weights")
    arch = dict(cfg.arch)
    if cfg.kind == "backbone":
        model_type = arch.pop("model_type", None)
        if model_type not in backbone_types():
            raise WeightsError(
                f'teachers.{name}.arch: a random "backbone" needs "model_type", found {model_type!r}; '
                + (_close(str(model_type), backbone_types()) or f"one of {', '.join(backbone_types())}")
            )
        config_class = hf.CONFIG_MAPPING[model_type]
        net_class = hf.MODEL_FOR_BACKBONE_MAPPING[config_class]
    else:
        registers = cfg.kind == "dinov2" and "num_register_tokens" in arch
        names = _CLASSES["dinov2_with_registers" if registers else cfg.kind]
        config_class, net_class = (getattr(hf, name) for name in names)

    known = inspect.signature(config_class.__init__).parameters.keys() | config_class.attribute_map.keys()
    known = {key for key in known - inspect.signature(hf.PreTrainedConfig.__init__).parameters.keys() if key[0] != "_"}
    if cfg.kind == "dinov2":
        known.add("num_register_tokens")  # chooses the class above
    for key in arch:
        if key not in known:
            raise WeightsError(
                f"teachers.{name}.arch.{key}: no such keyword of transformers.{config_class.__name__}; "
                + (_close(key, known) or f"it has {', '.join(sorted(known))}")
            )
    try:
        config = config_class(**{**_RANDOM_SIZES.get(cfg.kind, {}), **arch})
        for field, value in vars(config).items():
            if isinstance(value, tuple):  # a default; some backbones only add lists, which is what config.json gives
                setattr(config, field, list(value))
        _choose_levels(name, config, cfg.levels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + zlib.crc32(name.encode()))  # two random teachers of one kind must differ
            net = net_class(config)
            _init_random(net)
    except WeightsError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise WeightsError(
            f"teachers.{name}.arch: {config_class.__name__} does not take {cfg.arch}: {error}"
        ) from error
    log.warning(
        'teacher %r (%s) has RANDOM weights ("weights": "random"): good for trying out, not for training',
        name,
        cfg.kind,
    )
    return net


def _init_random(net: nn.Module) -> None:
    # The usual std of 0.02 leaves x the same for every image (cosine to the mean 0.998 in CLIP-B/16). With variance
    # 1/fan_in, and queries and keys twice as large so that attention is selective, it is 0.90 (docs/teachers.md).
    for path, module in net.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            gain = 2.0 if path.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "query", "key") else 1.0
            nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _close(word: str, known) -> str:
    matches = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


# --------------------------------------------------------------------------------------------------- weights on disk


def _load_net(name: str, cfg, folder: Path, dtype: torch.dtype) -> nn.Module:
    key = f"teachers.{name}.weights"
    hf = import_transformers(key)
    model_type = read_json(key, folder / "config.json").get("model_type")
    expected = MODEL_TYPES[cfg.kind] or backbone_types()
    if model_type not in expected:
        fits = [kind for kind, types in MODEL_TYPES.items() if model_type in (types or backbone_types())]
        few = " or ".join(map(repr, expected)) if len(expected) < 4 else "that has a backbone, such as 'swin'"
        raise WeightsError(
            f"{key}: {folder} holds a model of type {model_type!r}, which kind {cfg.kind!r} cannot use; "
            + (f"set teachers.{name}.kind to {' or '.join(map(repr, fits))}, or " if fits else "")
            + f"give weights of a type {few}"
        )
    if cfg.kind == "backbone":
        config = load_config(key, folder)
        _choose_levels(name, config, cfg.levels)
        # Not AutoBackbone.from_pretrained: it asks the hub whether a local folder exists there.
        net_class = hf.MODEL_FOR_BACKBONE_MAPPING[type(config)]
        # A classifier's checkpoint has no norms for its stages: the backbone's are then scale 1 and shift 0. A saved
        # backbone may have norms for stages that `levels` leaves out.
        unread = "hidden_states_norms.", "beit.pooler."
        return load_net(key, net_class, folder, dtype=dtype, config=config, optional=unread)
    if cfg.kind == "grounding_dino":
        # Only the image backbone is kept: text tower, neck, encoder and decoder are freed here.
        # The published checkpoints are older than the Swin's last norm in transformers, which no feature map passes.
        norm = (_DINO_BACKBONE + "model.swin.layernorm.",)
        net_class = hf.GroundingDinoModel if model_type == "grounding-dino" else hf.MMGroundingDinoModel
        net = load_net(key, net_class, folder, dtype=dtype, part=_DINO_BACKBONE, optional=norm)
        return net.backbone.conv_encoder.model
    _, net_class = _CLASSES[model_type if cfg.kind == "dinov2" else cfg.kind]
    return load_net(key, getattr(hf, net_class), folder, dtype=dtype)
