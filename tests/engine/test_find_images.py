"""Each rank's index of the images: who looks for them, and that ranks with different ones do not train together."""

import os
import subprocess
import sys

WORKER = """
import os
import sys
from types import SimpleNamespace
import torch
from torch import distributed
from kpu_fast.engine import build
from kpu_fast.engine.distributed import World

rank, meet, ranks_of_a_node, *digests = sys.argv[1:]
size, local = len(digests), int(rank) % int(ranks_of_a_node)
distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=int(rank), world_size=size)
world = World(int(rank), size, torch.device("cpu"), local, distributed.group.WORLD)
teachers = {name: SimpleNamespace(data=SimpleNamespace(source=f"/{name}")) for name in ("same", "grown")}
indexes = {"/same": "1", "/grown": digests[int(rank)]}
work = {"/same": "", "/grown": ""}


def index(source):
    return SimpleNamespace(digest=lambda: indexes[source])


def load_or_scan(source):
    work[source] += "scans"
    return index(source)


def load_same(source, digest, look):
    work[source] += "looks " if look else "reads "
    return index(source) if indexes[source] == digest and "STALE" not in os.environ else None


build.load_or_scan, build.load_same = load_or_scan, load_same
cfg = SimpleNamespace(teachers=teachers, streams=lambda: {name: [name] for name in teachers})
try:
    print(sorted(build.find_images(cfg, world)), work["/same"], "|", work["/grown"])
except build.RunError as error:
    print(error)
distributed.destroy_process_group()
"""


def ranks(tmp_path, ranks_of_a_node, digests):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER]
    place = [str(tmp_path / "meet"), str(ranks_of_a_node), *digests]
    started = [
        subprocess.Popen([*command, str(rank), *place], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(len(digests))
    ]
    return [process.communicate(timeout=120)[0].strip() for process in started]


def test_one_rank_scans_one_per_further_node_looks_and_the_rest_read(tmp_path):
    found = "['grown', 'same'] "
    assert ranks(tmp_path, 2, "2222") == [
        f"{found}scans | scans", f"{found}reads  | reads", f"{found}looks  | looks", f"{found}reads  | reads",
    ]  # fmt: skip


def test_a_node_with_another_cache_scans_for_itself(tmp_path, monkeypatch):
    """What it has stored is of other images; what it finds is the same as rank 0's."""
    monkeypatch.setenv("STALE", "1")
    assert ranks(tmp_path, 1, "22")[1] == "['grown', 'same'] looks scans | looks scans"


def test_a_source_that_differs_between_the_ranks_stops_all_of_them(tmp_path):
    said = (
        "source /grown: not the images that rank 0 has there; copies on several nodes must be equal, and nothing may "
        "write to them while a run starts (rank 1)"
    )
    assert ranks(tmp_path, 2, "23") == [said, said]
