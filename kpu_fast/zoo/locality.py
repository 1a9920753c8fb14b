"""A start for a ViT's attention in which each head looks at one neighbour, so that a small data set is enough."""

import math

import torch
from torch import Tensor, nn

# Position (r, c) is written into the last 4·F channels of its embedding as cos and sin of F frequencies of r and of c.
# There p(i)·p(j) = Σ cos ω_f(r_i − r_j) + Σ cos ω_f(c_i − c_j): 2F where i = j, F on i's row and column, else
# about 0.
# A head with W_q = s·R(δ) and W_k = s on these channels, R(δ) the rotation that moves a position by δ, therefore looks
# at the neighbour at distance δ. Heads take the 8 neighbours in turn: layers begin as 3×3 convolutions do, and learn
# from there. Tokens without a position (cls, registers) have zeros there and begin by looking at all patches alike.

_NEIGHBOURS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
_AMPLITUDE = 0.7
_LOGIT_GAP = 3.5  # by which the neighbour's logit is above those on its row and column


@torch.no_grad()
def start_local(
    patch: nn.Conv2d, positions: Tensor, prefix: int, others: list[Tensor], queries: list, keys: list, heads: int
) -> None:
    """Write the start described above into a ViT's weights.

    patch: its patch embedding. positions: (prefix + n·n, D) embeddings, the first `prefix` of tokens that are no
    patches. others: embeddings (…, D) of such tokens. queries, keys: each layer's Linear(D, D).
    """
    dim = positions.shape[1]
    grid = math.isqrt(len(positions) - prefix)
    head = dim // heads
    count = min(head, 32) // 4
    place = 4 * count
    omega = torch.arange(1, count + 1) * math.pi / max(count, grid)
    line = torch.arange(grid)[:, None] * omega
    code = torch.cat([line.cos(), line.sin()], 1)  # (n, 2F)
    rows, columns = code.repeat_interleave(grid, 0), code.repeat(grid, 1)
    positions[:, -place:] = 0
    positions[prefix:, -place:] = _AMPLITUDE * torch.cat([rows, columns], 1)
    patch.weight[-place:] = 0
    for token in others:
        token[..., -place:] = 0
    # After the layer norm a token has variance 1; at the start it has about 0.5², so its amplitude is doubled.
    scale = math.sqrt(_LOGIT_GAP * math.sqrt(head) / (count * (2 * _AMPLITUDE) ** 2))
    number = 0
    for query, key in zip(queries, keys, strict=True):
        for h in range(heads):
            turn = _rotation(omega, *_NEIGHBOURS[number % 8])
            query.weight[h * head : h * head + place, -place:] += scale * turn
            key.weight[h * head : h * head + place, -place:] += scale * torch.eye(place)
            number += 1


def _rotation(omega: Tensor, down: int, right: int) -> Tensor:
    blocks = []
    for move in (down, right):
        cos, sin = torch.diag((omega * move).cos()), torch.diag((omega * move).sin())
        blocks.append(torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]))
    return torch.block_diag(*blocks)
