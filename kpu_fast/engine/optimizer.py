"""AdamW over the trainable parameters, with linear warm-up and cosine decay."""

import math

import torch
from torch import nn


class OptimizerError(ValueError):
    """The optimiser asked for is not usable on this machine."""


def build_optimizer(cfg, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW on what requires grad; weight decay on the weights of linear layers and convolutions only.

    cfg: `Config.optimizer`. impl "auto" and "torch" are torch's fused AdamW, which needs nothing compiled.
    device: where it steps; of a module on a GPU whose optimiser is offloaded that is the CPU.
    Raises OptimizerError when an implementation is not installed.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if p.ndim >= 2 and name.endswith(".weight")]  # no tokens, no positions
    rest = [p for name, p in trainable if p.ndim < 2 or not name.endswith(".weight")]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
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


def restore_settings(cfg, scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """After a checkpoint was loaded: what the config says holds, not what it said when the checkpoint was written."""
    for group, decay in zip(scheduler.optimizer.param_groups, (cfg.weight_decay, 0.0), strict=True):
        group.update(weight_decay=decay, betas=cfg.betas, eps=cfg.eps, initial_lr=cfg.lr)
    scheduler.base_lrs = [cfg.lr] * len(scheduler.base_lrs)
    for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = cfg.lr * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]  # what get_last_lr() reads


def _deepspeed_adam(groups, options, device):
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    try:
        if device.type == "cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return FusedAdam(groups, adam_w_mode=True, **options)
    except Exception as error:  # DeepSpeed's own for an nvcc unlike torch's CUDA is a bare Exception
        raise OptimizerError(
            f'optimizer.impl: found "deepspeed", whose Adam could not be compiled here ({_first_line(error)}); '
            'it needs ninja and a C++ compiler (CUDA: nvcc). Set it to "torch"'
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _apex_adam(groups, options, device):
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:  # the PyPI package named apex is not NVIDIA's and has no optimizers
        raise OptimizerError(
            'optimizer.impl: found "apex", but NVIDIA\'s apex (github.com/NVIDIA/apex, built from source; not the PyPI '
            'package of that name) cannot be imported. Set it to "torch"'
        ) from error
    if device.type != "cuda":
        raise OptimizerError('optimizer.impl: found "apex", which steps on CUDA only. Set it to "torch"')
    return FusedAdam(groups, adam_w_mode=True, **options)
