"""resize_bilinear against F.interpolate on channels-last maps, forward + backward."""

import pytest
import torch
import torch.nn.functional as F
from kpu_fast.kernels import resize_bilinear

SHAPES = {
    "student 1/16 → clip, 32×16²→14²×768": ((32, 16, 16, 768), (14, 14)),
    "clip → student 1/16, 32×14²→16²×768": ((32, 14, 14, 768), (16, 16)),
    "gdino, 1×50×84→25×42×384": ((1, 50, 84, 384), (25, 42)),
}


def interpolate(x, size, antialias):
    nchw = x.permute(0, 3, 1, 2)
    return F.interpolate(nchw, size=size, mode="bilinear", antialias=antialias).permute(0, 2, 3, 1)


def ours(x, size, antialias):
    return resize_bilinear(x, size, antialias=antialias)


@pytest.mark.parametrize("row", [interpolate, ours], ids=["F.interpolate", "resize_bilinear"])
@pytest.mark.parametrize("antialias", [False, True], ids=["bilinear", "antialias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_resize(shape, antialias, row, device, measure, benchmark):
    benchmark.group = f"resize_bilinear {device} {'antialias ' if antialias else ''}{shape}"
    x_shape, size = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out_shape = (x_shape[0], *size, x_shape[3])

    def make():
        x = torch.randn(x_shape, device=device, dtype=dtype, requires_grad=True)
        return x, torch.randn(out_shape, device=device, dtype=dtype)

    def step(x, upstream):
        x.grad = None
        row(x, size, antialias).backward(upstream)

    elements = 2 * (torch.Size(x_shape).numel() + torch.Size(out_shape).numel())
    measure(make, step, elements * dtype.itemsize)
