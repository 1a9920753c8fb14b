"""align_loss against the same loss in plain PyTorch, on the pairs of maps that a KPU step compares."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kpu_fast.kernels import align_loss


class Pair(NamedTuple):
    """Source and target, and whether both take a gradient (L_t2s) or the source alone (L_s2t, L_rec)."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    both: bool = False


# CLIP B/16 sees 224², batch 32; GroundingDINO 800 × 1344, batch 4 (on the CPU 1); 768 is the student's width. SAM's
# encoder ends in 256 channels on 64², whatever its size; 8 of its 1024² images are what fits beside a teacher. Below
# 64² no student is brought to SAM's grid. The roofline pair is 268 MB a side in bf16 (on the CPU 34 MB in fp32).
PAIRS = {
    "clip x 32x512": Pair((32, 512), (32, 512)),
    "clip map 32x14x14x768": Pair((32, 14, 14, 768), (32, 14, 14, 768)),
    "clip map 32x16x16x768 to 14x14": Pair((32, 16, 16, 768), (32, 14, 14, 768)),
    "tokens 32x256x768": Pair((32, 256, 768), (32, 256, 768)),
    "gdino map 100x168x192": Pair((4, 100, 168, 192), (4, 100, 168, 192)),
    "gdino map 50x84x384": Pair((4, 50, 84, 384), (4, 50, 84, 384)),
    "gdino map 25x42x768": Pair((4, 25, 42, 768), (4, 25, 42, 768)),
    "t2s x 32x768": Pair((32, 768), (32, 768), both=True),
    "t2s clip 32x14x14x768": Pair((32, 14, 14, 768), (32, 14, 14, 768), both=True),
    "t2s gdino 100x168x768": Pair((4, 100, 168, 768), (4, 100, 168, 768), both=True),
    "sam map 64x64x256": Pair((8, 64, 64, 256), (8, 64, 64, 256)),
    "roofline 64x64x1024": Pair((32, 64, 64, 1024), (32, 64, 64, 1024)),
}
CPU_BATCH = {"gdino map 25x42x768": 1, "roofline 64x64x1024": 2}
# On a CPU each compiled row takes seconds of a C++ compiler, and these tell nothing that the others do not.
GPU_ONLY = {"tokens 32x256x768", "gdino map 100x168x192", "gdino map 50x84x384", "t2s x 32x768", "sam map 64x64x256"}
GPU_ONLY |= {"t2s gdino 100x168x768"}
LIGER = "liger TVD"
EXTRA_ROWS = {LIGER: ["cuda"]}


def eager(source, target, resize):
    """What AM-RADIO, TAO and others write."""
    if resize:
        nchw = source.permute(0, 3, 1, 2)
        source = F.interpolate(nchw, size=target.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
    cosine = 1 - F.cosine_similarity(source, target, dim=-1)
    return 0.9 * cosine.mean() + 0.1 * F.smooth_l1_loss(source, target)


def ours(source, target, resize):
    return align_loss(source, target, resize=resize)


def liger(pair, mode):
    """Total variation between rows: another loss, the same traffic (two reads; with gradient one write)."""
    tvd = pytest.importorskip("liger_kernel.transformers.tvd", reason="liger-kernel is not installed")
    if pair.both or pair.source != pair.target:
        pytest.skip("liger's TVD has neither a resize nor a gradient to both sides")
    if mode == "graph":
        pytest.skip("liger's TVD waits for the GPU in its backward and cannot be captured")
    loss = tvd.LigerTVDLoss(reduction="sum")  # the reduction that costs no further pass over the gradient
    return lambda source, target, resize: loss(source.flatten(0, -2), target.flatten(0, -2))


@pytest.mark.parametrize("shape", PAIRS)
def test_align(shape, row, dtype, mode, device, measure, compiled, benchmark):
    pair = PAIRS[shape]
    if device == "cpu" and shape in GPU_ONLY:
        pytest.skip("a shape for GPUs; others like it are measured on the CPU")
    if device == "cpu" and shape in CPU_BATCH:
        batch = CPU_BATCH[shape]
        pair = Pair((batch, *pair.source[1:]), (batch, *pair.target[1:]), pair.both)
    resize = "source" if pair.source != pair.target else None
    benchmark.group = f"align {device} {str(dtype)[6:]} {mode} {shape}"
    loss = eager if row in ("eager", "compile") else liger(pair, mode) if row == LIGER else ours
    loss = compiled(loss) if row == "compile" else loss

    def make():
        source = torch.randn(pair.source, device=device, dtype=dtype, requires_grad=True)
        return source, torch.randn(pair.target, device=device, dtype=dtype, requires_grad=pair.both)

    def step(source, target):
        if mode == "forward":
            with torch.no_grad():
                return loss(source, target, resize)
        return torch.autograd.grad(loss(source, target, resize), (source, target) if pair.both else source)

    reads = torch.Size(pair.source).numel() + torch.Size(pair.target).numel()
    writes = 0 if mode == "forward" else reads if pair.both else torch.Size(pair.source).numel()
    measure(make, step, (reads + writes) * dtype.itemsize)
