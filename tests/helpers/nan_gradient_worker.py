"""A run whose third step has finite losses and a gradient that is NaN. Run by test_run.py.

nan_gradient_worker.py CONFIG OUTPUT [KEY=VALUE ...]
"""

import sys

from torch.utils._python_dispatch import TorchDispatchMode

from kpu_fast.config import load_config
from kpu_fast.engine import loop
from kpu_fast.engine.monitor import Diverged
from kpu_fast.objectives.kpu import KPU
from kpu_fast.train import leave


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads from a tensor: on a GPU each is a wait."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Reads.count += function.overloadpacket.__name__ == "_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def main(config: str, output: str, *switches: str) -> None:
    """Train and print what stopped it, and how many numbers the optimiser's steps had read until then."""
    total, build, calls = KPU.total, loop.build, []

    def poisoned(self, *args):
        calls.append(1)
        loss = total(self, *args)
        if len(calls) == 3:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    def watched(*args, **kwargs):
        parts = build(*args, **kwargs)
        step = parts.engine.step

        def counted():
            with Reads():
                step()

        parts.engine.step = counted
        return parts

    KPU.total, loop.build = poisoned, watched
    try:
        loop.train(load_config(config, [f"output={output}", *switches]))
    except Diverged as error:
        print(f"stopped: {error}")
    print(f"read: {Reads.count}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
