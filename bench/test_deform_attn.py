"""deform_attn against one grid_sample per map, on the attentions of a KPU step and of GroundingDINO's encoder."""

from typing import NamedTuple

import pytest
import torch
from kpu_fast.kernels import deform_attn, deform_attn_reference

EIGHTH, SIXTEENTH, THIRTY_SECOND = (100, 168), (50, 84), (25, 42)  # of 800 × 1344


class Attention(NamedTuple):
    """Queries at the cells of some maps, reading others."""

    query_maps: tuple[tuple[int, int], ...]
    maps: tuple[tuple[int, int], ...]
    heads: int


# The ViT-Adapter-B of a GroundingDINO batch of 4 (on the CPU 1), heads of 32 channels, 4 points per map.
ATTENTIONS = {
    "injector 50x84 reads 3 maps": Attention((SIXTEENTH,), (EIGHTH, SIXTEENTH, THIRTY_SECOND), 12),
    "extractor 22050 read 50x84": Attention((EIGHTH, SIXTEENTH, THIRTY_SECOND), (SIXTEENTH,), 12),
    "gdino encoder 22323 read 4 maps": Attention(
        (EIGHTH, SIXTEENTH, THIRTY_SECOND, (13, 21)), (EIGHTH, SIXTEENTH, THIRTY_SECOND, (13, 21)), 8
    ),
}
CHANNELS, POINTS = 32, 4
DETERMINISTIC = "deterministic"
EXTRA_ROWS = {DETERMINISTIC: ["cuda"]}


def reference(value, locations, weights, maps):
    return deform_attn_reference(value, maps, locations, weights)


def ours(value, locations, weights, maps):
    return deform_attn(value, maps, locations, weights)


def deterministic(value, locations, weights, maps):
    return deform_attn(value, maps, locations, weights, deterministic=True)


def centres(maps, device):
    """(Q, 1, 1, 1, 2) xy of the maps' cells."""
    found = []
    for height, width in maps:
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
        found.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(found)[:, None, None, None]


@pytest.mark.parametrize("shape", ATTENTIONS)
def test_deform_attn(shape, row, dtype, mode, device, measure, compiled, benchmark):
    benchmark.group = f"deform_attn {device} {str(dtype)[6:]} {mode} {shape}"
    query_maps, maps, heads = ATTENTIONS[shape]
    batch = 4 if device == "cuda" else 1
    queries, cells = (sum(h * w for h, w in some) for some in (query_maps, maps))
    samples = (batch, queries, heads, len(maps), POINTS)
    attend = reference if row in ("eager", "compile") else deterministic if row == DETERMINISTIC else ours
    attend = compiled(attend) if row == "compile" else attend
    grad = mode != "forward"

    def make():
        value = torch.randn(batch, cells, heads, CHANNELS, device=device, dtype=dtype, requires_grad=grad)
        # A few cells around each query, as learned offsets are; uniform ones would make every read a miss.
        cell = 1 / torch.tensor([(w, h) for h, w in maps], device=device)[:, None]
        locations = centres(query_maps, device) + 2 * torch.randn(*samples, 2, device=device) * cell
        weights = torch.randn(samples, device=device).flatten(3).softmax(-1).view(samples).to(dtype)
        upstream = torch.randn(batch, queries, heads * CHANNELS, device=device, dtype=dtype)
        return value, locations.requires_grad_(grad), weights.requires_grad_(grad), upstream

    def step(value, locations, weights, upstream):
        out = attend(value, locations, weights, maps)
        return torch.autograd.grad(out, (value, locations, weights), upstream) if grad else out

    value, weight = batch * cells * heads * CHANNELS, torch.Size(samples).numel()
    inputs = (value + weight) * dtype.itemsize + 2 * weight * 4
    outputs = batch * queries * heads * CHANNELS * dtype.itemsize
    measure(make, step, 2 * (inputs + outputs) if grad else inputs + outputs)
