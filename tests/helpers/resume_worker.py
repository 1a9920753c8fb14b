"""Whole runs and runs resumed in their middle, one after the other in one process per rank. Run by test_objective.py.

resume_worker.py CONFIG FOLDER KEY=VALUE,KEY=VALUE ... (one argument per run; below FOLDER they are 0, 1, ...)
"""

import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from kpu_fast.config import load_config
from kpu_fast.engine import result
from kpu_fast.engine.loop import train
from kpu_fast.train import leave


def main(config: str, folder: str, *runs: str) -> None:
    """Train each to its last step, then again from a copy of its checkpoint of step 2."""
    result.save_feature_picture = result.save_curve = lambda *_, **__: None  # they take longer than the steps
    for number, switches in enumerate(runs):
        whole, cut = (Path(folder) / str(number) / part for part in ("whole", "cut"))
        train(load_config(config, [*switches.split(","), f"output={whole}"]))
        if dist.get_rank() == 0:  # what a kill after step 3 leaves
            checkpoint = Path("tiny", "checkpoints", "step-00000002")
            shutil.copytree(whole / checkpoint, cut / checkpoint)
            shutil.copy(whole / "tiny" / "metrics.jsonl", cut / "tiny")
        dist.barrier()
        train(load_config(config, [*switches.split(","), f"output={cut}"]), resume="auto")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
