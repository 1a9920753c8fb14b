"""A run whose third step has finite losses and a gradient that is NaN. Run by test_run.py.

nan_gradient_worker.py CONFIG OUTPUT
"""

import sys

from kpu_fast.config import load_config
from kpu_fast.engine.loop import train
from kpu_fast.engine.monitor import Diverged
from kpu_fast.objectives.kpu import KPU
from kpu_fast.train import leave


def main(config: str, output: str) -> None:
    """Train and print what stopped it."""
    total, calls = KPU.total, []

    def poisoned(self, *args):
        calls.append(1)
        loss = total(self, *args)
        if len(calls) == 3:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    KPU.total = poisoned
    try:
        train(load_config(config, [f"output={output}"]))
    except Diverged as error:
        print(f"stopped: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
