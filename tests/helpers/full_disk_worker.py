"""Two saves on two ranks; torch.save fails on rank 1, first in DeepSpeed's file, then in ours. Run by test_run.py.

full_disk_worker.py CONFIG FOLDER
"""

import errno
import sys
from pathlib import Path

import torch

from kpu_fast.config import load_config
from kpu_fast.engine.build import build
from kpu_fast.engine.checkpoint import CheckpointError, Checkpoints
from kpu_fast.engine.distributed import init_distributed
from kpu_fast.train import leave


def main(config: str, folder: str) -> None:
    """Save twice and print what each rank was told."""
    world = init_distributed()
    engine = build(load_config(config), world).engine
    checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=1, world=world)
    write = torch.save
    for victim in ("optim_states", "rank-1.pt"):

        def full(state, path, *args, victim=victim, **kwargs):
            if world.rank == 1 and victim in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            write(state, path, *args, **kwargs)

        torch.save = full
        try:
            checkpoints.save(engine, 1, {"streams": {}, "rng": {}})
        except CheckpointError as error:
            print(f"rank {world.rank}: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
