"""A run whose third step does not end. Run by test_run.py.

endless_step_worker.py CONFIG OUTPUT
"""

import sys
import time

from kpu_fast.engine import loop
from kpu_fast.train import leave, main


def patiently(step):
    """The first two steps as they are; the third says that it has begun, and waits."""
    calls = []

    def taken(*args):
        calls.append(1)
        if len(calls) == 3:
            print("in step 3", flush=True)
            for _ in range(600):  # in pieces, as work is: a signal is noticed between two of them
                time.sleep(0.1)
        return step(*args)

    return taken


if __name__ == "__main__":
    config, output = sys.argv[1:]
    loop.train_step = patiently(loop.train_step)
    leave(main(["--config", config, "--set", f"output={output}"]))
