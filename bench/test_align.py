"""align_loss against the same loss in plain PyTorch, forward + backward to the source (the student)."""

import pytest
import torch
import torch.nn.functional as F
from kpu_fast.kernels import align_loss

# Source, target: KPU's teachers as the student meets them. On the CPU in float32 and with GroundingDINO's batch at 1.
SHAPES = {
    "clip x 32×512": ((32, 512), (32, 512)),
    "clip map 32×14²×768": ((32, 14, 14, 768), (32, 14, 14, 768)),
    "clip map 16²→14² 32×768": ((32, 16, 16, 768), (32, 14, 14, 768)),
    "gdino map 50×84×384": ((4, 50, 84, 384), (4, 50, 84, 384)),
}


def eager(source, target, resize):
    """What RADIO, theia and others write."""
    if resize and source.shape != target.shape:
        nchw = source.permute(0, 3, 1, 2)
        source = F.interpolate(nchw, size=target.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
    cosine = 1 - F.cosine_similarity(source, target, dim=-1)
    return 0.9 * cosine.mean() + 0.1 * F.smooth_l1_loss(source, target)


@pytest.mark.parametrize("row", ["eager", "align_loss"])
@pytest.mark.parametrize("shape", SHAPES)
def test_align(shape, row, device, measure, benchmark):
    benchmark.group = f"align_loss {device} {shape}"
    source_shape, target_shape = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu" and source_shape[0] == 4:
        source_shape, target_shape = (1, *source_shape[1:]), (1, *target_shape[1:])
    resize = "source" if source_shape != target_shape else None

    def make():
        source = torch.randn(source_shape, device=device, dtype=dtype, requires_grad=True)
        return source, torch.randn(target_shape, device=device, dtype=dtype)

    def step(source, target):
        source.grad = None
        loss = eager(source, target, resize) if row == "eager" else align_loss(source, target, resize=resize)
        loss.backward()

    elements = 2 * torch.Size(source_shape).numel() + torch.Size(target_shape).numel()
    measure(make, step, elements * dtype.itemsize)
