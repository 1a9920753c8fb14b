"""A training loop of one's own around kpu_fast's parts: one device, fp32, no DeepSpeed.

    python examples/loop.py [CONFIG] [STEPS] [FOLDER]

Where `train.py` would run on several GPUs, in bf16, write checkpoints, log and stop when asked, this only trains. Any
part may be another; `own_teacher.py` has a teacher that no kind of the configs covers.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kpu_fast.config import Config, load_config
from kpu_fast.data.pipeline import Stream
from kpu_fast.data.scan import load_or_scan
from kpu_fast.engine.build import build_models
from kpu_fast.engine.optimizer import build_optimizer, build_scheduler
from kpu_fast.models import Features
from kpu_fast.objectives.objective import Objective


def main(config: str = "configs/zoo.json", steps: str = "10", folder: str = "runs/loop/student") -> None:
    """Train the student of a config for some steps and save it in a folder."""
    cfg = load_config(config, [f"steps={steps}", "optimizer.warmup_steps=1", "precision=fp32"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teachers, objective = build_models(cfg, device)  # {name: frozen encoder}, and the student with its heads
    train(cfg, device, teachers, objective, cfg.streams())
    objective.in_own_spaces().save_pretrained(Path(folder))


def train(
    cfg: Config,
    device: torch.device,
    teachers: Mapping[str, Callable[[Tensor], Features]],
    objective: Objective,
    shared: Mapping[str, Sequence[str]],
) -> None:
    """`cfg.steps` steps of `objective`.

    teachers: functions from images (B, 3, H, W) in [0, 1] to `Features`. shared: those that see the images of each
    teacher of the config, itself among them.
    """
    streams = {
        name: Stream(teacher.data, load_or_scan(teacher.data.source), rank=0, world_size=1, device=device, seed=number)
        for number, (name, teacher) in enumerate(cfg.teachers.items())
        if name in shared
    }
    optimizer = build_optimizer(cfg.optimizer, objective, device)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scheduler = build_scheduler(cfg.optimizer, optimizer, cfg.steps)
    for step in range(1, cfg.steps + 1):
        terms = {}
        for name, stream in streams.items():  # each with a batch and a resolution of its own
            batch = next(stream)
            targets = {teacher: teachers[teacher](batch.images) for teacher in shared[name]}
            terms |= objective(batch.images, targets, batch.valid)
        objective.total(terms).backward()
        if cfg.optimizer.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, cfg.optimizer.clip_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        objective.after_step()  # after_step(k) where k backwards make a step
        print(step, {name: round(value.item(), 4) for name, value in objective.unweighed(terms).items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
