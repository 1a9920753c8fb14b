"""One of two ranks of test_moments.py: moments of this rank's tokens, reduced over both.

moments_worker.py RANK RENDEZVOUS OUT
"""

import os
import sys

import torch
from kpu_fast.kernels import moments
from torch import distributed

TOKENS = (37, 260)  # of rank 0, of rank 1


def features() -> torch.Tensor:
    """(297, 19) tokens of both ranks, the second's far from the first's."""
    x = torch.randn(sum(TOKENS), 19, generator=torch.Generator().manual_seed(0))
    x[TOKENS[0] :] += 100
    return x


def main(rank: str, rendezvous: str, out: str) -> None:
    """Save what this rank holds after the reduction, and how many collectives that took."""
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
    calls = []
    reduce = distributed.all_reduce
    distributed.all_reduce = lambda tensor, **options: calls.append(tensor.numel()) or reduce(tensor, **options)
    found = moments(features().split(TOKENS)[int(rank)]).all_reduce()
    torch.save({"count": found.count, "total": found.total, "square": found.square, "calls": calls}, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # as train.py ends, for the same reason
