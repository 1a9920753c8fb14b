"""moments against x.mean and x.var, forward only, on channels-last maps and on NCHW maps as teachers return them."""

import pytest
import torch
from kpu_fast.kernels import moments

SHAPES = {
    "clip map 32×14²×768": (32, 14, 14, 768),
    "gdino map 4×50×84×384": (4, 50, 84, 384),
    "gdino map 4×100×168×192": (4, 100, 168, 192),
    "sam map 4×64²×256": (4, 64, 64, 256),
}


def eager(x, valid):
    if valid is None:
        return x.mean((0, 1, 2)), x.var((0, 1, 2), correction=0)
    x = x[valid]
    return x.mean(0), x.var(0, correction=0)


def ours(x, valid):
    found = moments(x, valid=valid)
    return found.mean, found.var


GPU_ONLY = {"gdino map 4×100×168×192", "sam map 4×64²×256"}  # on a CPU like the others


@pytest.mark.parametrize("row", [eager, ours], ids=["eager", "moments"])
@pytest.mark.parametrize("mode", ["forward", "graph"])
@pytest.mark.parametrize("kind", ["NHWC", "NCHW", "NHWC, masked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape, kind, mode, row, device, measure, benchmark):
    if device == "cpu" and shape in GPU_ONLY:
        pytest.skip("a shape for GPUs; others like it are measured on the CPU")
    if mode == "graph" and (device == "cpu" or "masked" in kind):  # eager's mask waits for the number of its tokens
        pytest.skip("no graph on a CPU, and none of what waits for the GPU")
    benchmark.group = f"moments {device} {mode} {kind} {shape}"
    batch, height, width, channels = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def make():
        if kind == "NCHW":
            x = torch.randn(batch, channels, height, width, device=device, dtype=dtype).permute(0, 2, 3, 1)
        else:
            x = torch.randn(batch, height, width, channels, device=device, dtype=dtype)
        valid = torch.rand(batch, height, width, device=device) > 0.2 if kind == "NHWC, masked" else None
        return x, valid

    measure(make, row, batch * height * width * channels * dtype.itemsize)
