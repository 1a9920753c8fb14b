"""deform_attn against one grid_sample per map, on the attentions of a KPU step and of GroundingDINO's encoder."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kpu_fast.kernels import deform_attn

EIGHTH, SIXTEENTH, THIRTY_SECOND = (100, 168), (50, 84), (25, 42)  # of 800 × 1344


class Attention(NamedTuple):
    """Queries at the cells of some maps, reading others."""

    query_maps: tuple[tuple[int, int], ...]
    maps: tuple[tuple[int, int], ...]
    heads: int


# The ViT-Adapter-B of a GroundingDINO batch of 4, heads of 32 channels, 4 points per map. On the CPU, where a step of
# these takes seconds, one sample with a quarter of every side, in one buffer: its time is not that of memory.
CPU_PASSES = 1
ATTENTIONS = {
    "injector 50x84 reads 3 maps": Attention((SIXTEENTH,), (EIGHTH, SIXTEENTH, THIRTY_SECOND), 12),
    "extractor 22050 read 50x84": Attention((EIGHTH, SIXTEENTH, THIRTY_SECOND), (SIXTEENTH,), 12),
    "gdino encoder 22323 read 4 maps": Attention(
        (EIGHTH, SIXTEENTH, THIRTY_SECOND, (13, 21)), (EIGHTH, SIXTEENTH, THIRTY_SECOND, (13, 21)), 8
    ),
}
CHANNELS, POINTS = 32, 4
DETERMINISTIC, MSDA = "deterministic", "msda-triton"
EXTRA_ROWS = {DETERMINISTIC: ["cuda"], MSDA: ["cuda"]}


def eager(value, locations, weights, maps):
    """What transformers and the projects before it run without their CUDA extension: all in value's dtype."""
    batch, _, heads, channels = value.shape
    grids = (2 * locations - 1).to(value.dtype).transpose(1, 2)  # (B, M, Q, L, P, 2)
    samples = []
    for level, part in enumerate(value.split([height * width for height, width in maps], dim=1)):
        planes = part.flatten(2).mT.reshape(batch * heads, channels, *maps[level])
        samples.append(F.grid_sample(planes, grids[:, :, :, level].flatten(0, 1), align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, locations.shape[1], -1)
    out = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)  # (B·M, D, Q)
    return out.view(batch, heads * channels, -1).mT.contiguous()


def ours(value, locations, weights, maps):
    return deform_attn(value, maps, locations, weights)


def deterministic(value, locations, weights, maps):
    return deform_attn(value, maps, locations, weights, deterministic=True)


def msda_triton(device, dtype, maps):
    """github.com/rziga/msda-triton, its kernels and never the plain torch that it falls back to without a word."""
    reason = "msda-triton, https://github.com/rziga/msda-triton, is not installed"
    frontend = pytest.importorskip("msda_triton.frontend", reason=reason)
    if dtype == torch.bfloat16:
        pytest.skip("msda-triton takes no bf16")
    sizes = torch.tensor(maps, device=device)  # it takes no other; made once, as a captured graph cannot make it

    def attend(value, locations, weights, maps):
        found = frontend.triton_multiscale_deformable_attention(value, sizes, locations, weights, "zeros", False)
        return found.flatten(2)

    return attend


def centres(maps, device):
    """(Q, 1, 1, 1, 2) xy of the maps' cells."""
    found = []
    for height, width in maps:
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
        found.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(found)[:, None, None, None]


def random_inputs(attention, batch, device, dtype, grad):
    """value, locations, weights and the upstream gradient."""
    query_maps, maps, heads = attention
    queries, cells = (sum(h * w for h, w in some) for some in (query_maps, maps))
    samples = (batch, queries, heads, len(maps), POINTS)
    value = torch.randn(batch, cells, heads, CHANNELS, device=device, dtype=dtype, requires_grad=grad)
    # A few cells around each query, as learned offsets are; uniform ones would make every read a miss.
    cell = 1 / torch.tensor([(w, h) for h, w in maps], device=device)[:, None]
    locations = centres(query_maps, device) + 2 * torch.randn(*samples, 2, device=device) * cell
    weights = torch.randn(samples, device=device).flatten(3).softmax(-1).view(samples).to(dtype)
    upstream = torch.randn(batch, queries, heads * CHANNELS, device=device, dtype=dtype)
    return value, locations.requires_grad_(grad), weights.requires_grad_(grad), upstream


def counted_bytes(attention, batch, size):
    """Of a forward: every input and output once, `size` bytes a number, locations 4."""
    query_maps, maps, heads = attention
    queries, cells = (sum(h * w for h, w in some) for some in (query_maps, maps))
    samples = batch * queries * heads * len(maps) * POINTS
    return batch * (cells + queries) * heads * CHANNELS * size + samples * (size + 2 * 4)


@pytest.mark.parametrize("shape", ATTENTIONS)
def test_deform_attn(shape, row, dtype, mode, device, measure, compiled, benchmark):
    benchmark.group = f"deform_attn {device} {str(dtype)[6:]} {mode} {shape}"
    query_maps, maps, heads = ATTENTIONS[shape]
    batch = 4
    if device == "cpu":
        batch = 1
        query_maps, maps = (tuple((-(-h // 4), -(-w // 4)) for h, w in some) for some in (query_maps, maps))
    attention = Attention(query_maps, maps, heads)
    attend = {"ours": ours, DETERMINISTIC: deterministic}.get(row, eager)
    attend = msda_triton(device, dtype, maps) if row == MSDA else compiled(attend) if row == "compile" else attend
    grad = mode != "forward"

    def make():
        return random_inputs(attention, batch, device, dtype, grad)

    def step(value, locations, weights, upstream):
        out = attend(value, locations, weights, maps)
        return torch.autograd.grad(out, (value, locations, weights), upstream) if grad else out

    once = counted_bytes(attention, batch, dtype.itemsize)
    measure(make, step, 2 * once if grad else once)
