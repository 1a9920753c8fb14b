"""Every loss term of a KPU step at once (eq. 1-4): one `align_losses`, one `align_loss` per term, and plain PyTorch."""

import torch
import torch.nn.functional as F

from kpu_fast import kernels

# The paper's step on one GPU: CLIP B/16 on 224² and GroundingDINO on 800 × 1344. Grids are equal: the heads resize.
# Teachers' maps have the strides that models/teachers.py gives them: CLIP's lies behind its cls token, Swin's is dense.
WIDTH = 768  # of the student
CLIP_X, CLIP_MAP = 512, (32, 14, 14, 768)
GDINO_MAPS = ((100, 168, 192), (50, 84, 384), (25, 42, 768))  # height, width, channels
GDINO_BATCH = {"cuda": 4, "cpu": 1}
EXTRA_ROWS = {"separate": ["cpu", "cuda"]}


def pairs(device):
    """[(shape, cosine weight, smooth-L1 weight, gradient to both)] of s2t, t2s and rec, maps of a teacher averaged."""
    gdino = [(GDINO_BATCH[device], *shape) for shape in GDINO_MAPS]
    found = []
    for common, both in ((False, False), (True, True), (False, False)):  # s2t, t2s, rec
        found.append(((CLIP_MAP[0], WIDTH if common else CLIP_X), 1.0, 0.0, both))
        for maps in ([CLIP_MAP], gdino):
            shapes = [(*shape[:3], WIDTH if common else shape[3]) for shape in maps]
            found += [(shape, 0.9 / len(maps), 0.1 / len(maps), both) for shape in shapes]
    return found


def teachers_map(shape, device, dtype):
    """A random target with the strides of the teacher whose shape this is."""
    batch, *grid, channels = shape
    if shape == CLIP_MAP:
        return torch.randn((batch, 1 + grid[0] * grid[1], channels), device=device, dtype=dtype)[:, 1:].unflatten(
            1, grid
        )
    return torch.randn(shape, device=device, dtype=dtype)


def random_sides(terms, device, dtype):
    """((source, target), …) of `pairs`."""
    return tuple(
        (
            torch.randn(size, device=device, dtype=dtype, requires_grad=True),
            torch.randn(size, device=device, dtype=dtype, requires_grad=True)
            if both
            else teachers_map(size, device, dtype),
        )
        for size, _, _, both in terms
    )


def gradients(loss, sides, weights):
    """Of the sum of all terms, to every side that wants one."""
    wanted = [side for pair in sides for side in pair if side.requires_grad]
    return torch.autograd.grad(loss(sides, weights), wanted)


def eager(sides, weights):
    total = 0.0
    for (source, target), (cos_weight, l1_weight) in zip(sides, weights, strict=True):
        total = total + cos_weight * (1 - F.cosine_similarity(source, target, dim=-1)).mean()
        if l1_weight:
            total = total + l1_weight * F.smooth_l1_loss(source, target)
    return total


def separate(sides, weights):
    losses = [
        kernels.align_loss(source, target, cos_weight=cos_weight, l1_weight=l1_weight)
        for (source, target), (cos_weight, l1_weight) in zip(sides, weights, strict=True)
    ]
    return torch.stack(losses).sum()


def ours(sides, weights):
    terms = [
        kernels.AlignTerm(source, target, cos_weight=cos_weight, l1_weight=l1_weight)
        for (source, target), (cos_weight, l1_weight) in zip(sides, weights, strict=True)
    ]
    return kernels.align_losses(terms).sum()


def test_step_losses(row, dtype, mode, device, measure, compiled, benchmark):
    shape = f"clip {CLIP_MAP[0]} + gdino {GDINO_BATCH[device]}"
    benchmark.group = f"step_losses {device} {str(dtype)[6:]} {mode} {shape}"
    terms = pairs(device)
    weights = [(cos_weight, l1_weight) for _, cos_weight, l1_weight, _ in terms]
    loss = {"eager": eager, "compile": eager, "separate": separate, "ours": ours}[row]
    loss = compiled(loss) if row == "compile" else loss

    def make():
        return random_sides(terms, device, dtype)

    def step(*sides):
        if mode == "forward":
            with torch.no_grad():
                return loss(sides, weights)
        return gradients(loss, sides, weights)

    per_element = [2 if mode == "forward" else 4 if both else 3 for *_, both in terms]
    moved = sum(torch.Size(size).numel() * n for (size, *_), n in zip(terms, per_element, strict=True))
    measure(make, step, moved * dtype.itemsize)
    benchmark.extra_info["shape"] = shape  # it depends on the device, so it is not among the test's parameters
