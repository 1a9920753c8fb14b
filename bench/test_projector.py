"""One head of FeatureHeads with its resize before or after the first Linear, and in the order it chooses itself."""

import pytest
import torch
import torch.nn.functional as F
from kpu_fast.kernels import resize_bilinear

from kpu_fast.models.projector import Projector

# (map, size): the student's and CLIP's grids, two levels of GroundingDINO, SAM's map to CLIP's grid. On the CPU with
# fewer samples.
CPU_PASSES = 1  # a matrix product takes its time wherever its inputs lie
SHAPES = {
    "16²→14² 32×768": ((32, 16, 16, 768), (14, 14)),
    "14²→16² 32×768": ((32, 14, 14, 768), (16, 16)),
    "14²→16² 32×192": ((32, 14, 14, 192), (16, 16)),
    "25×42→50×84 4×768": ((4, 25, 42, 768), (50, 84)),
    "25×42→50×84 4×192": ((4, 25, 42, 192), (50, 84)),
    "50×84→25×42 4×768": ((4, 50, 84, 768), (25, 42)),
    "64²→14² 8×256": ((8, 64, 64, 256), (14, 14)),
}


def resize_first(head, m, size):
    return head(resize_bilinear(m, size))


def linear_first(head, m, size):
    return head.fc2(F.gelu(head.norm(resize_bilinear(head.fc1(m), size))))


ROWS = {"resize first": resize_first, "linear first": linear_first, "ours": lambda head, m, size: head(m, size)}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_projector(shape, row, device, measure, benchmark):
    benchmark.group = f"projector {device} {shape}"
    (batch, *grid, channels), size = SHAPES[shape]
    batch = max(1, batch // 16) if device == "cpu" else batch
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    head = Projector(channels, 768).to(device, dtype)

    def make():
        m = torch.randn(batch, *grid, channels, device=device, dtype=dtype, requires_grad=True)
        return m, torch.randn(batch, *size, 768, device=device, dtype=dtype)

    def step(m, upstream):
        return torch.autograd.grad(ROWS[row](head, m, size), [m, *head.parameters()], upstream)

    # The two ends only: what lies between depends on the order.
    ends = batch * (grid[0] * grid[1] * channels + size[0] * size[1] * 768)
    measure(make, step, 2 * ends * dtype.itemsize)
