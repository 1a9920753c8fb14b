"""Five steps on fixed batches; rank 0 saves the gathered parameters. Run by test_zero.py.

zero_worker.py CONFIG STAGE OUT RUN... (KEY=VALUE,KEY=VALUE; what each leaves is in OUT under its own text)
The `fixed_batches` and `STEPS` here are what the test's plain torch run uses too.
"""

import json
import sys
from functools import partial

import torch

from kpu_fast.config import Config, load_config
from kpu_fast.data.pipeline import Batch
from kpu_fast.train import leave

STEPS = 5


def fixed_batches(cfg: Config, step: int, ranks: int, rank: int | None) -> dict[str, Batch]:
    """Batches of a step, of one rank or (None) of all ranks together."""
    batches = {}
    for i, (name, teacher) in enumerate(cfg.teachers.items()):
        generator = torch.Generator().manual_seed(100 * step + i)
        count, data = teacher.data.batch_size, teacher.data
        images = torch.rand(ranks * count, 3, *data.size, generator=generator)
        valid = torch.ones(ranks * count, *data.size, dtype=torch.bool)
        valid[..., data.size[1] // 2 :] = i == 0  # of the second teacher's images one half is padding
        some = slice(None) if rank is None else slice(rank * count, (rank + 1) * count)
        batches[name] = Batch(images[some], valid[some] if i else None)
    return batches


def main(config: str, stage: str, out: str, *runs: str) -> None:
    """Train each and save."""
    from kpu_fast.engine.distributed import init_distributed

    world = init_distributed()
    zero: dict = {"stage": int(stage)}
    if zero["stage"] == 3:  # or parameters as small as these would never leave a rank
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
    # The same graphs as on a GPU, without waiting for a C++ compiler.
    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=zero["stage"] < 3)
    found, common = {}, "deepspeed=" + json.dumps({"zero_optimization": zero})
    for run in runs:
        found[run] = train(load_config(config, [common, *filter(None, run.split(","))]), world)
    if world.rank == 0:
        torch.save(found, out)


def train(cfg: Config, world) -> dict:
    """What one run leaves: parameters, ZeRO stage, waits for the device, gradient norms."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from kpu_fast.engine.build import build
    from kpu_fast.engine.loop import train_step

    parts = build(cfg, world, indexes={})  # its batches are made here
    waits, norms = [], []
    get_accelerator().synchronize = lambda *_: waits.append(step)  # of the host for the device
    turns = cfg.gradient_accumulation_steps
    for step in range(STEPS):
        for turn in range(turns):  # the same images in a step, however many backwards it has
            train_step(parts, fixed_batches(cfg, step, turns * world.size, turns * world.rank + turn))
        norms.append(parts.engine.get_global_grad_norm())
    module = parts.engine.module
    stage = parts.engine.zero_optimization_stage()
    if stage == 3:
        assert all(p.numel() == 0 for p in module.parameters()), "ZeRO 3 shares no parameter: this would test nothing"
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        state = {name: p.detach().clone() for name, p in module.named_parameters()}
    return {"state": state, "stage": stage, "waits": waits, "norms": norms}


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
    leave(0)
