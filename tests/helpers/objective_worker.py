"""One of two ranks of test_standardize.py: statistics of this rank's batches, shares of this rank's losses.

objective_worker.py RANK RENDEZVOUS OUT
"""

import sys

import torch
from torch import distributed

from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.objectives.balance import FAMO, TeacherDrop
from kpu_fast.objectives.standardize import FeatureStandardizer
from kpu_fast.train import leave

KINDS = ("meanstd", "phi_s")
BATCHES, STEPS = 6, 5


def spec() -> FeatureSpec:
    """A teacher with x and two maps."""
    return FeatureSpec(20, (12, 24), (8.0, 16.0))


def features(number: int) -> Features:
    """Batch `number`, float64; later batches lie elsewhere, so that no rank alone sees the whole."""
    generator = torch.Generator().manual_seed(number)
    shapes = [(8, 20), (8, 4, 6, 12), (8, 2, 3, 24)]
    x, *maps = (torch.randn(s, generator=generator, dtype=torch.float64) * (1 + number) + number for s in shapes)
    return Features(x, tuple(maps))


def losses(step: int) -> torch.Tensor:
    """(3 teachers, 2 ranks)."""
    return torch.rand(3, 2, generator=torch.Generator().manual_seed(step)) + 0.1


def main(rank: str, rendezvous: str, out: str) -> None:
    """Save what this rank holds in the end."""
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
    found = {}
    for kind in KINDS:
        one = FeatureStandardizer("clip", spec(), kind).double()
        one.fit(one.look((features(i), None) for i in range(int(rank), BATCHES, 2)))
        found[kind] = one.state_dict()
    famo, mine = FAMO(3, "cpu"), [losses(step)[:, int(rank)] for step in range(STEPS + 1)]
    for step in range(STEPS):
        found["famo shares"] = famo.shares(mine[step])
        famo.learn(mine[step + 1])
    found["famo"] = famo.w.detach()
    torch.manual_seed(0)
    drop = TeacherDrop()
    found["drop shares"] = [drop.shares(mine[step]) for step in range(STEPS)]
    torch.save(found, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
