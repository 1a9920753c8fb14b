"""Ranks that found different images do not train together."""

import os
import subprocess
import sys

import pytest

WORKER = """
import sys
from types import SimpleNamespace
import torch
from torch import distributed
from kpu_fast.engine import loop
from kpu_fast.engine.distributed import World

rank, meet, *digests = sys.argv[1:]
distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=int(rank), world_size=2)
world = World(int(rank), 2, torch.device("cpu"), int(rank), distributed.group.WORLD)
teachers = {name: SimpleNamespace(data=SimpleNamespace(source=f"/{name}")) for name in ("same", "grown")}
indexes = {"/same": "1", "/grown": digests[int(rank)]}
loop.load_or_scan = lambda source: SimpleNamespace(digest=lambda: indexes[source])
try:
    print(sorted(loop._find_images(SimpleNamespace(teachers=teachers), world)))
except loop.RunError as error:
    print(error)
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("digests", "said"),
    [
        (("2", "2"), "['grown', 'same']"),
        (("2", "3"), "source /grown changed while the run started: start again when nothing writes to it (rank 1)"),
    ],
)
def test_a_source_that_grew_between_the_ranks_stops_all_of_them(tmp_path, digests, said):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meet"), *digests],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.communicate(timeout=120)[0].strip() for process in ranks] == [said, said]
