"""resize_bilinear against F.interpolate on channels-last maps."""

import pytest
import torch
import torch.nn.functional as F
from kpu_fast.kernels import resize_bilinear

# (input, size, antialias): the student's 1/16 map to CLIP's grid and back, between two levels of GroundingDINO, SAM's
# 64 × 64 to CLIP's 14² (4.6 times smaller: without antialias 36 of 64 lines would not be read), and a roofline of
# 504 MB a pass in bf16.
SHAPES = {
    "32x16x16x768 to 14x14": ((32, 16, 16, 768), (14, 14), False),
    "32x14x14x768 to 16x16": ((32, 14, 14, 768), (16, 16), False),
    "50x84x384 to 25x42": ((4, 50, 84, 384), (25, 42), False),
    "25x42x384 to 50x84": ((4, 25, 42, 384), (50, 84), False),
    "64x64x256 to 14x14 antialias": ((8, 64, 64, 256), (14, 14), True),
    "roofline 64x64x1024 to 60x60": ((32, 64, 64, 1024), (60, 60), False),
}
GPU_ONLY = {"50x84x384 to 25x42", "25x42x384 to 50x84"}  # each compiled row takes seconds of a C++ compiler
CPU_BATCH = {
    "64x64x256 to 14x14 antialias": 2,
    "roofline 64x64x1024 to 60x60": 2,
}


def eager(x, size, antialias):
    nchw = x.permute(0, 3, 1, 2)
    return F.interpolate(nchw, size=size, mode="bilinear", antialias=antialias).permute(0, 2, 3, 1)


def ours(x, size, antialias):
    return resize_bilinear(x, size, antialias=antialias)


@pytest.mark.parametrize("shape", SHAPES)
def test_resize(shape, row, dtype, mode, device, measure, compiled, benchmark):
    x_shape, size, antialias = SHAPES[shape]
    if device == "cpu" and shape in GPU_ONLY:
        pytest.skip("a shape for GPUs; others like it are measured on the CPU")
    if device == "cpu":
        x_shape = (CPU_BATCH.get(shape, x_shape[0]), *x_shape[1:])
    benchmark.group = f"resize {device} {str(dtype)[6:]} {mode} {shape}"
    if device == "cpu" and antialias and dtype == torch.bfloat16 and row == "eager":
        pytest.skip("torch has no bf16 antialias on the CPU")
    function = ours if row == "ours" else compiled(eager) if row == "compile" else eager
    out_shape = (x_shape[0], *size, x_shape[3])

    def make():
        x = torch.randn(x_shape, device=device, dtype=dtype, requires_grad=True)
        return x, torch.randn(out_shape, device=device, dtype=dtype)

    def step(x, upstream):
        if mode == "forward":
            with torch.no_grad():
                return function(x, size, antialias)
        return torch.autograd.grad(function(x, size, antialias), x, upstream)

    moved = torch.Size(x_shape).numel() + torch.Size(out_shape).numel()
    measure(make, step, (moved if mode == "forward" else 2 * moved) * dtype.itemsize)
