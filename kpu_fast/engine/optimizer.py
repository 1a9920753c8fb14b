"""AdamW over the trainable parameters, with linear warm-up and cosine decay."""

import math

import torch
from torch import nn


class OptimizerError(ValueError):
    """The optimiser asked for is not usable on this machine."""


def build_optimizer(cfg, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW on what requires grad; weight decay on matrices and convolutions only.

    cfg: `Config.optimizer`. impl "auto" and "torch" are torch's fused AdamW, which needs nothing compiled.
    Raises OptimizerError when an implementation is not installed.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps}
    if cfg.impl == "deepspeed":
        return _deepspeed_adam(groups, options, device)
    if cfg.impl == "apex":
        return _apex_adam(groups, options, device)
    return torch.optim.AdamW(groups, fused=True, **options)


def build_scheduler(cfg, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate of a step: linear up to cfg.lr over cfg.warmup_steps, then a cosine to cfg.min_lr at `steps`."""
    floor = cfg.min_lr / cfg.lr

    def factor(done: int) -> float:
        if done < cfg.warmup_steps:
            return (done + 1) / cfg.warmup_steps
        progress = min(1.0, (done - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _deepspeed_adam(groups, options, device):
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    try:
        if device.type == "cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return FusedAdam(groups, adam_w_mode=True, **options)
    except (RuntimeError, ImportError, OSError) as error:
        raise OptimizerError(
            f'optimizer.impl: found "deepspeed", whose Adam could not be compiled here ({str(error).splitlines()[0]}); '
            'it needs ninja and a C++ compiler (CUDA: nvcc). Set it to "torch"'
        ) from error


def _apex_adam(groups, options, device):
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:  # the PyPI package named apex is not NVIDIA's and has no optimizers
        raise OptimizerError(
            'optimizer.impl: found "apex", but NVIDIA\'s apex (github.com/NVIDIA/apex, built from source; not the PyPI '
            'package of that name) cannot be imported. Set it to "torch"'
        ) from error
    if device.type != "cuda":
        raise OptimizerError('optimizer.impl: found "apex" on a machine without CUDA. Set it to "torch"')
    return FusedAdam(groups, adam_w_mode=True, **options)
