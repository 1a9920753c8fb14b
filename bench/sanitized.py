"""Every operator of kernels/ once, for memcheck:  compute-sanitizer --tool memcheck python bench/sanitized.py

Odd sizes at every edge of the tiles, views with other strides, and sizes on the GPU that are wrong.
"""

import torch
from kpu_fast.kernels import AlignTerm, align_loss, align_losses, deform_attn, moments, resize_bilinear


def run(device: str, dtype: torch.dtype) -> None:
    """Forward and backward of all operators; nothing is compared."""

    def make(*shape):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def nchw(batch, height, width, channels):
        return make(batch, channels, height, width).permute(0, 2, 3, 1)

    for channels, form in ((41, make), (41, nchw), (401, make), (1271, make)):
        s, t = form(3, 5, 7, channels), form(3, 4, 3, channels)
        for resize, reduction in (("source", "mean"), ("target", "sample")):
            align_loss(s, t, resize=resize, reduction=reduction).sum().backward()
        resize_bilinear(s, (9, 6)).sum().backward()
    align_loss(nchw(3, 5, 7, 41), nchw(3, 5, 7, 41)).backward()
    tokens = AlignTerm(make(3, 35, 41), make(3, 36, 41)[:, 1:])
    align_losses([tokens, AlignTerm(make(3, 41), make(3, 41), l1_weight=0.0)]).sum().backward()
    valid = torch.rand(3, 5, 7, device=device) > 0.3
    for x in (make(3, 5, 7, 41), nchw(3, 5, 7, 41)):
        moments(x)
        moments(x, valid=valid)
    maps, wrong = [(5, 7), (1, 1), (3, 2)], [(9, 9), (7, 5), (2, 2)]
    for channels, queries in ((9, 13), (33, 47)):
        value, weights = make(2, 42, 3, channels), make(2, queries, 3, 3, 3)
        locations = (torch.rand(2, queries, 3, 3, 3, 2, device=device) * 1.6 - 0.3).requires_grad_()
        for sizes in (maps, torch.tensor(wrong, device=device)):
            for deterministic in (False, True):
                deform_attn(value, sizes, locations, weights, deterministic=deterministic).sum().backward()


if __name__ == "__main__":
    for kind in (torch.float32, torch.bfloat16):
        run("cuda", kind)
    torch.cuda.synchronize()
