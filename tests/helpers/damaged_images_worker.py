"""A run whose images are damaged between its last step and its picture. Run by test_run.py.

damaged_images_worker.py CONFIG OUTPUT IMAGES
"""

import sys
from pathlib import Path

from kpu_fast.config import load_config
from kpu_fast.engine import result
from kpu_fast.engine.loop import train
from kpu_fast.train import leave


def main(config: str, output: str, images: str) -> None:
    """Train two steps; the rows of metrics.jsonl are what is read first once the steps are done."""
    read_metrics = result.read_metrics

    def damage(folder: Path) -> list[dict]:
        for path in Path(images).iterdir():
            path.write_bytes(bytes(path.stat().st_size))
        return read_metrics(folder)

    result.read_metrics = damage
    train(load_config(config, [f"output={output}", f"source={images}", "steps=2"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
