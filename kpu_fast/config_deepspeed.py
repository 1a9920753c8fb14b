"""The `deepspeed` block of a config, checked beside the rest of it."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any

from kpu_fast.config_strict import impossible

if TYPE_CHECKING:
    from kpu_fast.config import Config

# What a `deepspeed` block is made of: DeepSpeed passes over a key it does not know, so one that is nearly one of these
# would do nothing. Others go through with a warning, as a newer DeepSpeed may know more.
_DEEPSPEED_KEYS = (
    "activation_checkpointing", "aio", "amp", "bf16", "checkpoint", "comms_logger", "communication_data_type",
    "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather",
    "dump_state", "elasticity", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "memory_breakdown", "optimizer", "prescale_gradients", "scheduler",
    "sparse_gradients", "steps_per_print", "tensorboard", "timers", "torch_autocast",
    "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip


def check_deepspeed(cfg: Config) -> None:
    """The block goes through untouched, so what would silently fight the rest of the config is an error here."""
    block = cfg.deepspeed
    for key in block:
        close = difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1, cutoff=0.85)
        if close and key not in _DEEPSPEED_KEYS:
            raise impossible(f"deepspeed.{key}: unknown key; did you mean {close[0]!r}?")
    managed = {"optimizer": "optimizer", "scheduler": "optimizer.warmup_steps and min_lr", "bfloat16": "precision"}
    for key, instead in managed.items():
        if key in block:
            raise impossible(f"deepspeed.{key}: set it through {instead}")
    ours = cfg.gradient_accumulation_steps
    if (found := block.get("gradient_accumulation_steps", ours)) != ours:
        raise impossible(
            f"deepspeed.gradient_accumulation_steps: found {found}, but gradient_accumulation_steps = {ours}; "
            "leave it out"
        )
    if "train_batch_size" in block:
        raise impossible(
            f"deepspeed.train_batch_size: found {block['train_batch_size']}; it depends on the number of ranks, and "
            "one that does not fit turns into gradient accumulation; leave it out"
        )
    batch = cfg.images_per_backward()
    if block.get("train_micro_batch_size_per_gpu", batch) != batch:
        found = block["train_micro_batch_size_per_gpu"]
        raise impossible(
            f"deepspeed.train_micro_batch_size_per_gpu: found {found}; the teachers' batches make {batch}, leave it out"
        )
    for key in ("fp16", "amp", "torch_autocast"):
        if _enabled(block, key):
            raise impossible(f'deepspeed.{key}: not supported; set precision to "bf16" or "fp32"')
    if "bf16" in block and _enabled(block, "bf16") != (cfg.precision == "bf16"):
        raise impossible(f'deepspeed.bf16: found {block["bf16"]}, which contradicts precision = "{cfg.precision}"')
    if (found := block.get("bf16", {}).get("immediate_grad_update", True)) is not True:
        raise impossible(
            f"deepspeed.bf16.immediate_grad_update: found {json.dumps(found)}; unless it is true, DeepSpeed's "
            "BF16_Optimizer keeps the gradient of one of several forwards; leave it out"
        )
    if "gradient_clipping" in block and (block["gradient_clipping"] or None) != cfg.optimizer.clip_grad_norm:
        found = block["gradient_clipping"]
        raise impossible(
            f"deepspeed.gradient_clipping: found {found}, but optimizer.clip_grad_norm = {cfg.optimizer.clip_grad_norm}"
        )
    zero = block.get("zero_optimization", {})
    if not isinstance(zero, dict) or isinstance(zero.get("stage"), bool) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise impossible(f"deepspeed.zero_optimization: found {zero}; expected an object with stage 0, 1, 2 or 3")
    if "cpu_offload" in zero:
        raise impossible('deepspeed.zero_optimization.cpu_offload: set "offload_optimizer": {"device": "cpu"} instead')
    if zero.get("round_robin_gradients"):
        raise impossible(
            "deepspeed.zero_optimization.round_robin_gradients: not supported: it orders the optimizer's state "
            "otherwise and no checkpoint says so, so that a resume would mix it up; leave it out"
        )
    for key in ("wall_clock_breakdown", "flops_profiler"):
        on = _enabled(block, key) if isinstance(block.get(key), dict) else block.get(key)
        if on and len(cfg.streams()) > 1:
            raise impossible(
                f"deepspeed.{key}: found it on, but DeepSpeed's timers take one forward in a step and here are "
                f"{len(cfg.streams())}; leave it out, bench/step.py times the parts of a step"
            )
    if zero.get("compute_grad_norm", True) is not True and cfg.optimizer.clip_grad_norm is not None:
        raise impossible(
            "deepspeed.zero_optimization.compute_grad_norm: not true, but clipping needs the norm; "
            "set optimizer.clip_grad_norm to null with it"
        )


def unknown_deepspeed_keys(cfg: Config) -> list[str]:
    """The keys of the deepspeed block that are not known here: new in DeepSpeed, or mistaken."""
    return [key for key in cfg.deepspeed if key not in _DEEPSPEED_KEYS]


def _enabled(block: dict[str, Any], key: str) -> bool:
    value = block.get(key, {})
    if not isinstance(value, dict):
        raise impossible(f'deepspeed.{key}: found {value!r}; expected an object such as {{"enabled": true}}')
    return bool(value.get("enabled", False))
