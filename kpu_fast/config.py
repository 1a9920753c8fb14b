"""The tree of configs/*.json: strict, checked before anything heavy is imported, errors that name the key.

`load_config` reads a file (and the file its `extends` names), applies `--set` overrides and validates. Unknown keys,
wrong types and impossible combinations raise `ConfigError`, one line per mistake: key, what was found, what would do.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from kpu_fast.config_deepspeed import check_deepspeed
from kpu_fast.config_errors import explain
from kpu_fast.config_objective import GKDConfig, KPUConfig, ObjectiveBlock
from kpu_fast.config_strict import Strict, changed, impossible
from kpu_fast.config_tree import ConfigError, apply_override, read_tree, settle_teachers

_Text = Annotated[str, BeforeValidator(lambda x: str(x) if type(x) is int else x)]  # --set name=20261129 is JSON
Name = Annotated[_Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]*$")]
Source = str | list[str]  # folder, shards, glob, package:NAME/path, or a list of these
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Multiple32 = Annotated[int, Field(ge=32, multiple_of=32)]

_WITH_X = {"clip", "siglip", "dinov2", "dinov3"}  # kinds of teachers that have a vector for the image as a whole


class DataConfig(Strict):
    """Images of a teacher, or of several: where from, how many at once, how large, how fitted."""

    source: Source  # left out: the config's own `source`
    batch_size: int = Field(ge=1)  # images per rank and step
    size: tuple[Multiple32, Multiple32]  # (H, W) in pixels
    fit: Literal["crop", "pad"] = "crop"  # random-resized crop | keep aspect, pad, mask
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)  # share of the image's area that a crop keeps
    flip: bool = True  # left and right change places in half of the images
    aspect_ratio_grouping: bool = True  # fit "pad": images that lie otherwise than size get batches of (W, H)
    # … and those that a smaller (H, W) shows as large get batches of it
    buckets: list[tuple[Multiple32, Multiple32]] = Field(default=[])
    threads: int = Field(default=4, ge=1)  # decoding threads
    hw_decoder_load: Fraction = 0.65  # share of JPEGs for the GPU's hardware decoder

    @model_validator(mode="after")
    def _scale_fits(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0.0 < low <= high:
            raise impossible(f"crop_scale: found [{low}, {high}]; expected 0 < low <= high <= 1")
        if self.fit == "pad" and changed(self, "crop_scale"):
            raise impossible('crop_scale: belongs to fit "crop"; found "pad"')
        if self.fit == "crop" and (others := changed(self, "aspect_ratio_grouping", "buckets")):
            raise impossible(f'{others[0]}: belongs to fit "pad"; found "crop"')
        return self

    @model_validator(mode="after")
    def _buckets_are_smaller(self) -> DataConfig:
        if self.buckets and not self.aspect_ratio_grouping:
            raise impossible("buckets: belongs to aspect_ratio_grouping true; found false: set buckets to [] as well")
        for height, width in self.buckets:
            if height > self.size[0] or width > self.size[1] or (height, width) == self.size:
                raise impossible(
                    f"buckets: [{height}, {width}] is not smaller than size {list(self.size)}: one side is to be "
                    "shorter and none longer (portraits get each bucket turned); take it out, or set buckets to []"
                )
            for large in (self.size, self.size[::-1]):
                if large[0] > height and large[1] > width:
                    raise impossible(
                        f"buckets: [{height}, {width}] suits no image, each is larger on {list(large)}; make one side "
                        "as long as one of size"
                    )
        return self


class TeacherConfig(Strict):
    """One frozen teacher and the images it teaches on."""

    kind: Literal["clip", "siglip", "grounding_dino", "dinov2", "dinov3", "sam", "backbone"]
    weights: str = Field(min_length=1)  # hub id, local folder, or "random"
    arch: dict[str, Any] = Field(default={})  # keyword arguments of the transformers config; only with weights "random"
    levels: Annotated[list[int], Field(min_length=1)] | None = None  # kind "backbone": which feature levels
    weight: float = Field(default=1.0, gt=0.0)  # of its losses among the teachers'; the paper has 1
    images_of: Name | None = None  # teaches on the images of this teacher, for which the student then runs once
    data: DataConfig  # with images_of that teacher's: left out

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        _arch_only_with_random(self.weights, self.arch)
        if (self.kind == "backbone") != (self.levels is not None):
            raise impossible(
                f'levels: found {self.levels} with kind "{self.kind}"; kind "backbone" needs it, no other takes it'
            )
        if self.kind == "backbone" and self.weights == "random" and "model_type" not in self.arch:
            raise impossible('arch: random weights of kind "backbone" need arch.model_type, e.g. "swin"')
        return self


class ViTConfig(Strict):
    """The ViT: of a DINOv2, a DINOv3, a DINO, a DeiT or a student that was trained without an adapter, or random."""

    weights: str = Field(min_length=1)
    arch: dict[str, Any] = Field(default={})  # keyword arguments of ViT; only with weights "random"

    @model_validator(mode="after")
    def _consistent(self) -> ViTConfig:
        _arch_only_with_random(self.weights, self.arch)
        return self


def _arch_only_with_random(weights: str, arch: dict[str, Any]) -> None:
    if arch and weights != "random":
        raise impossible(
            f'arch: found with weights "{weights}", which bring their own; remove it or set weights to "random"'
        )


class AdapterConfig(Strict):
    """ViT-Adapter (arXiv 2205.08534); "flash" is dense softmax cross-attention, another architecture."""

    cross_attention: Literal["flash", "deformable"] = "flash"
    interactions: int = Field(default=4, ge=1)  # how often ViT and spatial tokens read each other; the paper's K
    heads: int | None = Field(default=None, ge=1)  # of deformable attention; None: as many as the ViT
    points: int = Field(default=4, ge=1)  # sampling points per head and level
    inner_ratio: float = Field(default=0.5, gt=0.0, le=1.0)  # width inside the cross-attention, over the ViT's
    ffn_ratio: float = Field(default=0.25, gt=0.0)  # hidden width of the convolutional FFN, over the ViT's
    inplanes: int = Field(default=64, ge=1)  # channels of the stem, the first convolutions
    x_injector: bool = False  # cls reads the spatial tokens itself at the end; not in the published adapter

    @model_validator(mode="after")
    def _consistent(self) -> AdapterConfig:
        others = changed(self, "heads", "points")
        if self.cross_attention == "flash" and others:
            raise impossible(f'{others[0]}: belongs to cross_attention "deformable"; found "flash"')
        return self


class StudentConfig(Strict):
    """The model that is trained."""

    vit: ViTConfig
    freeze_vit: bool = True  # false: the ViT is trained too
    adapter: AdapterConfig | None = AdapterConfig()  # null: the bare ViT
    attention: Literal["auto", "sdpa", "cudnn", "fa2", "fa3", "fa4"] = "auto"  # whose kernel; docs/student.md
    head_hidden: int = Field(default=1280, ge=1)  # width of every MLP head

    @model_validator(mode="after")
    def _something_to_train(self) -> StudentConfig:
        if self.adapter is None and self.freeze_vit:
            raise impossible(
                "freeze_vit: true without an adapter leaves no encoder to train; set it to false or give an adapter"
            )
        return self


class OptimizerConfig(Strict):
    """AdamW with linear warm-up and cosine decay."""

    impl: Literal["auto", "torch", "deepspeed", "apex"] = "auto"  # whose fused AdamW; auto: torch's
    lr: float = Field(default=2e-4, gt=0.0)  # after the warm-up
    min_lr: float = Field(default=0.0, ge=0.0)  # what it falls towards, and has reached after the last step
    weight_decay: float = Field(default=0.05, ge=0.0)  # of linear layers' and convolutions' weights, nothing else's
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    warmup_steps: int = Field(default=0, ge=0)  # in which the rate rises linearly to lr
    clip_grad_norm: float | None = Field(default=None, gt=0.0)  # of all trained weights' gradients; null: no clipping

    @model_validator(mode="after")
    def _decays(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise impossible(f"min_lr: found {self.min_lr}, more than lr = {self.lr}")
        return self


class CheckpointConfig(Strict):
    """How often to keep the state of the run, and how many of them."""

    every: int = Field(default=1000, ge=1)  # steps
    keep: int = Field(default=3, ge=1)  # the newest
    keep_every: int | None = Field(default=None, ge=1)  # checkpoints at multiples of this many steps stay as well

    @model_validator(mode="after")
    def _stays_what_is_written(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.every:
            raise impossible(f"keep_every: found {self.keep_every}; expected a multiple of every = {self.every}")
        return self


class Config(Strict):
    """A whole run."""

    name: Name  # of the run, and of its folder
    output: str = Field(default="runs", min_length=1)  # folder of the runs' folders
    steps: int = Field(ge=1)  # in all, also of a run that goes on
    seed: int = Field(default=0, ge=0, lt=2**32)  # of weights, order of images, crops and flips
    precision: Literal["bf16", "fp32"]  # bf16: with fp32 master weights
    gradient_accumulation_steps: int = Field(default=1, ge=1)  # backwards per step, each of batches of its own
    activation_checkpointing: bool = False  # less memory: what blocks compute is computed again in the backward
    compile: bool = False  # torch.compile of student, heads and teachers
    source: Source | None = None  # images for every teacher that names none of its own
    student: StudentConfig
    teachers: dict[Name, TeacherConfig] = Field(min_length=1)
    objective: ObjectiveBlock = KPUConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: dict[str, Any] = Field(default={})  # handed on to DeepSpeed; docs/running.md

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.optimizer.warmup_steps > self.steps:
            raise impossible(
                f"optimizer.warmup_steps: found {self.optimizer.warmup_steps}, more than steps = {self.steps}"
            )
        if self.objective.balance != "equal" and len(self.teachers) == 1:
            raise impossible(
                f'objective.balance: found "{self.objective.balance}" with one teacher; a balance needs two, '
                'set it to "equal"'
            )
        for name, teacher in self.teachers.items():
            if teacher.images_of is None:
                continue
            other = self.teachers.get(teacher.images_of)
            if other is None or other.images_of is not None or other.data != teacher.data:
                raise impossible(
                    f"teachers.{name}.images_of: found {json.dumps(teacher.images_of)}; expected another teacher with "
                    "images of its own, and data that is equal to its"
                )
        weighed = [name for name, teacher in self.teachers.items() if teacher.weight != 1.0]
        if self.objective.balance != "equal" and weighed:
            raise impossible(
                f'teachers.{weighed[0]}.weight: belongs to objective.balance "equal"; found '
                f'"{self.objective.balance}", which weighs the teachers itself'
            )
        if self.objective.balance == "famo" and self.gradient_accumulation_steps > 1:
            raise impossible(
                f"gradient_accumulation_steps: found {self.gradient_accumulation_steps}; objective.balance "
                '"famo" compares a batch before and after its own step; set it to 1, or take another balance'
            )
        if isinstance(self.objective, GKDConfig):
            _check_gkd(self, self.objective)
        else:
            _check_kpu(self, self.objective)
        check_deepspeed(self)
        if patterns := sorted(set(self.output) & set("*?[")):
            raise impossible(
                f"output: found {self.output!r}; DeepSpeed takes {' '.join(patterns)} in a checkpoint's path for a "
                "pattern, choose another folder"
            )
        return self

    def streams(self) -> dict[str, list[str]]:
        """The teachers that have images of their own, each with all that teach on them: itself and its `images_of`."""
        return {
            name: [name, *(other for other, its in self.teachers.items() if its.images_of == name)]
            for name, teacher in self.teachers.items()
            if teacher.images_of is None
        }

    def images_per_step(self) -> int:
        """Images that one rank sees in a step."""
        return self.gradient_accumulation_steps * self.images_per_backward()

    def images_per_backward(self) -> int:
        """Images in one backward of one rank."""
        return sum(self.teachers[name].data.batch_size for name in self.streams())

    def offloads_optimizer(self) -> bool:
        """Whether the optimiser's state and step are the host's, not the device's."""
        zero = self.deepspeed.get("zero_optimization", {})
        block = zero.get("offload_optimizer")
        return zero.get("stage", 0) > 0 and isinstance(block, dict) and block.get("device", "none") != "none"

    def deepspeed_config(self) -> dict[str, Any]:
        """The `deepspeed` block as given, plus the keys DeepSpeed requires and the block leaves to this config."""
        ours = {
            "train_micro_batch_size_per_gpu": self.images_per_backward(),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.optimizer.clip_grad_norm or 0.0,  # without the key DeepSpeed clips at 1
            "steps_per_print": self.steps + 1,  # our own monitor reports
            # It would wait for the GPU before every forward and after every step.
            "timers": {"throughput": {"enabled": False}},
            "zero_force_ds_cpu_optimizer": False,  # an offloaded optimiser may be torch's, which needs no compiler
        }
        if self.optimizer.impl == "apex":
            ours["zero_allow_untested_optimizer"] = True
        # ZeRO 1 and 2 would look at every gradient for NaN, and wait; the monitor looks at their norm, if there is one.
        normed = self.deepspeed.get("zero_optimization", {}).get("compute_grad_norm", True)
        half = {
            "enabled": self.precision == "bf16",
            "check_grad_overflow": not normed,
            # ZeRO 1 with data_types.grad_accum_dtype fp32 would empty the gradients before each forward's part of the
            # one backward, so that only the first teacher's count.
            "immediate_grad_update": True,
        }
        return ours | self.deepspeed | {"bf16": half | self.deepspeed.get("bf16", {})}


def _check_kpu(cfg: Config, objective: KPUConfig) -> None:
    for name, teacher in cfg.teachers.items():
        if not (objective.cos_weight or objective.l1_weight or teacher.kind in _WITH_X):
            raise impossible(
                f'objective.cos_weight: found 0 for cos_weight and l1_weight, but teacher "{name}" has no x (kind '
                f'"{teacher.kind}"), which trains nothing; set one above 0'
            )


def _check_gkd(cfg: Config, objective: GKDConfig) -> None:
    if cfg.student.adapter is not None:
        raise impossible(
            'student.adapter: objective.recipe "gkd" trains a bare ViT; set adapter to null and freeze_vit to false'
        )
    if changed(cfg.student, "head_hidden"):
        raise impossible(
            'student.head_hidden: found with objective.recipe "gkd", whose heads have no hidden layer; leave it out '
            "or at 1280"
        )
    for name, teacher in cfg.teachers.items():
        data = teacher.data
        if data.fit != "crop":
            raise impossible(f'teachers.{name}.data.fit: objective.recipe "gkd" knows no padding; set it to "crop"')
        if not (objective.feature_weight or objective.patch_weight or teacher.kind in _WITH_X):
            raise impossible(
                f'objective.feature_weight: found 0 for feature_weight and patch_weight, but teacher "{name}" has '
                f'no x (kind "{teacher.kind}"), which trains nothing; set one above 0'
            )
        patches = math.prod(side // 16 for side in data.size)
        images, lacking = objective.masked(data.batch_size, patches)
        if objective.patch_weight and not images:
            raise impossible(
                f"objective.mask_images: {objective.mask_images} of teachers.{name}.data.batch_size {data.batch_size} "
                "is not one image; raise either, or set patch_weight to 0"
            )
        if objective.patch_weight and not lacking:
            raise impossible(
                f"objective.mask_patches: {objective.mask_patches} of the {patches} patches of teachers.{name}.data."
                f"size {list(data.size)} is not one; raise either"
            )


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, merge, override and validate a config file.

    path: a JSON file; its optional top-level `extends` names another file, relative to it, that it is merged over.
    overrides: `path.to.key=value` strings; the value is JSON, or else a string; `*` stands for every key of an object
        that is not null there.
    Raises ConfigError with one line per mistake.
    """
    tree = read_tree(Path(path))
    for override in overrides or []:
        apply_override(tree, override)
    try:
        settle_teachers(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        text = json.dumps(tree, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: {error.object[error.start : error.end]!r} is no character of any text") from None
    try:
        return Config.model_validate_json(text)
    except ValidationError as error:
        # What is wrong with images that several teachers share is said once, of the one they belong to.
        teachers = tree["teachers"].items() if isinstance(tree.get("teachers"), dict) else ()
        shared = [f"teachers.{n}.data" for n, its in teachers if isinstance(its, dict) and its.get("images_of")]
        lines = [line for line in explain(error, Config) if not line.startswith(tuple(shared))]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None
