"""What the rows of a benchmark compute: the same numbers, and no more work than a user's own code would do."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kpu_fast.kernels import deform_attn_reference, moments_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
MAPS = ((5, 7), (3, 4))


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attention(dtype=torch.float32):
    torch.manual_seed(0)
    value, weights = torch.randn(2, 47, 3, 8, dtype=dtype), torch.rand(2, 6, 3, 2, 4, dtype=dtype)
    return value, torch.rand(2, 6, 3, 2, 4, 2) * 1.6 - 0.3, weights


def test_the_plain_form_of_deform_attn():
    bench, (value, locations, weights) = load("deform_attn"), attention()
    expected = deform_attn_reference(value, MAPS, locations, weights)
    for row in (bench.eager, bench.ours, bench.deterministic):
        torch.testing.assert_close(row(value, locations, weights, MAPS), expected)
    transformers = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    theirs = transformers.MultiScaleDeformableAttention()
    assert torch.equal(
        bench.eager(value, locations, weights, MAPS), theirs(value, None, MAPS, None, locations, weights, 0)
    )


def test_the_plain_form_stays_in_the_dtype_of_value():
    bench, inputs = load("deform_attn"), attention(torch.bfloat16)
    wide = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            wide.extend(x for x in tree_leaves(out) if x.dtype != torch.bfloat16 and x.shape[-1] != 2)
            return out

    with Watch():
        out = bench.eager(*inputs, MAPS)
    assert out.dtype == torch.bfloat16
    assert not wide  # but for the locations, of which each is a pair


def test_msda_triton_is_called_as_it_wants(monkeypatch):
    bench, (value, locations, weights) = load("deform_attn"), attention()

    def stub(img, img_shapes, sampling_points, attention_weights, padding_mode, align_corners):
        assert (padding_mode, align_corners) == ("zeros", False)
        out = deform_attn_reference(img, img_shapes, sampling_points, attention_weights)
        return out.unflatten(2, img.shape[2:])  # (B, Q, M, D)

    frontend = ModuleType("msda_triton.frontend")
    frontend.triton_multiscale_deformable_attention = stub
    monkeypatch.setitem(sys.modules, "msda_triton", ModuleType("msda_triton"))
    monkeypatch.setitem(sys.modules, "msda_triton.frontend", frontend)
    found = bench.msda_triton("cpu", torch.float32, MAPS)(value, locations, weights, MAPS)
    assert torch.equal(found, deform_attn_reference(value, MAPS, locations, weights))
    with pytest.raises(pytest.skip.Exception, match="no bf16"):
        bench.msda_triton("cpu", torch.bfloat16, MAPS)


def test_the_plain_form_of_moments_copies_no_map():
    bench = load("moments")
    x = torch.randn(2, 3, 4, 5).permute(0, 2, 3, 1)
    valid = torch.rand(2, 4, 5) > 0.3
    for mask in (None, valid):
        expected = moments_reference(x, valid=mask)
        for row in (bench.eager, bench.ours):
            mean, var = row(x, mask)
            torch.testing.assert_close(mean.double(), expected.mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(var.double(), expected.var, rtol=1e-5, atol=1e-6)
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            large.extend(y for y in tree_leaves(out) if y.numel() == x.numel())
            return out

    with Watch():
        bench.eager(x, None)
    assert not large


def both_ways(loss, sides):
    """A loss, or a map, and its gradients to those of `sides` that want one."""
    out = loss(*sides)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out, *torch.autograd.grad(out, [side for side in sides if side.requires_grad], upstream)


def normal(*shape, grad=True):
    return torch.randn(shape, requires_grad=grad)


def test_every_plain_form_is_ours_in_value_and_gradient():
    """Without a gradient: moments, above."""
    align, deform, losses, resize = map(load, ("align", "deform_attn", "step_losses", "resize"))
    torch.manual_seed(0)
    cases = []
    for grids, both in itertools.product([((3, 5), (3, 5)), ((3, 5), (4, 3))], [True, False]):
        sides = normal(2, *grids[0], 7), normal(2, *grids[1], 7, grad=both)
        asked = {"resize": "source" if grids[0] != grids[1] else None}
        cases.append((align, sides, asked))
    value, locations, weights = (x.requires_grad_() for x in attention())
    cases.append((deform, (value, locations, weights), {"maps": MAPS}))
    cases += [(resize, (normal(2, 6, 5, 3),), {"size": (4, 7), "antialias": antialias}) for antialias in (0, 1)]
    for bench, sides, asked in cases:
        found, expected = (
            both_ways(lambda *s, row=row, asked=asked: row(*s, **asked), sides) for row in (bench.ours, bench.eager)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    sides = [(normal(2, 3, 5, 7), normal(2, 3, 5, 7)), (normal(4, 9), normal(4, 9, grad=False))]
    flat = [side for pair in sides for side in pair]
    found, expected, separate = (
        both_ways(lambda *_, row=row: row(sides, [(0.6, 0.4), (1.0, 0.0)]), flat)
        for row in (losses.ours, losses.eager, losses.separate)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, separate, rtol=1e-4, atol=1e-5)


def counted(name, *, device="cpu", **asked):
    """The bytes that bench/test_<name>.py counts for a row, and its inputs where they are made on the CPU."""
    seen = []
    test = getattr(load(name), f"test_{name}")
    benchmark = SimpleNamespace(group=None, extra_info={})
    test(**asked, device=device, measure=lambda *found: seen.extend(found), benchmark=benchmark)
    make, _, found = seen
    return found, make() if device == "cpu" else None


FP32, BF16 = torch.float32, torch.bfloat16
SAME, RESIZED, BOTH = "clip x 32x512", "clip map 32x16x16x768 to 14x14", "t2s clip 32x14x14x768"


@pytest.mark.parametrize(
    ("shape", "dtype", "mode", "expected"),
    [
        (SAME, FP32, "forward", 4 * 2 * 32 * 512),  # (S + T)·b
        (SAME, FP32, "full", 4 * 3 * 32 * 512),  # (2S + T)·b
        (SAME, BF16, "full", 2 * 3 * 32 * 512),
        (RESIZED, FP32, "full", 4 * (2 * 32 * 256 * 768 + 32 * 196 * 768)),
        (BOTH, FP32, "full", 4 * 2 * 2 * 32 * 196 * 768),  # 2(S + T)·b
        (BOTH, FP32, "forward", 4 * 2 * 32 * 196 * 768),
    ],
)
def test_the_bytes_of_align(shape, dtype, mode, expected):
    found, (source, target) = counted("align", compiled=None, shape=shape, row="ours", dtype=dtype, mode=mode)
    assert found == expected
    assert (source.requires_grad, target.requires_grad) == (True, shape == BOTH)


@pytest.mark.parametrize(("mode", "passes"), [("forward", 1), ("full", 2)])
def test_the_bytes_of_the_other_operators(mode, passes):
    """As docs/benchmarks.md has them: each input once and each output once, and their gradients in as many bytes."""
    shape = "extractor 22050 read 50x84"
    asked = {"row": "ours", "mode": mode, "compiled": None}
    found, inputs = counted("deform_attn", shape=shape, dtype=BF16, **asked)
    value, locations, *_ = inputs
    assert found == passes * sum(x.nbytes for x in inputs)  # the last is as large as the output
    assert (value.itemsize, locations.itemsize) == (2, 4)

    shape = "32x16x16x768 to 14x14"
    found, (x, upstream) = counted("resize", shape=shape, dtype=FP32, **asked)
    assert found == passes * (x.nbytes + upstream.nbytes) == passes * 4 * 32 * 768 * (256 + 196)


@pytest.mark.parametrize(("mode", "one", "both"), [("forward", 2, 2), ("full", 3, 4)])
def test_the_bytes_of_a_steps_losses(mode, one, both):
    """As docs/benchmarks.md works them out: s2t and rec with a gradient to one side, t2s to both."""
    maps = load("step_losses").GDINO_MAPS
    own = 32 * 196 * 768 + 4 * sum(height * width * channels for height, width, channels in maps) + 32 * 512
    common = 32 * 196 * 768 + 4 * sum(height * width * 768 for height, width, _ in maps) + 32 * 768
    found, _ = counted("step_losses", device="cuda", row="ours", dtype=BF16, mode=mode, compiled=None)
    assert found == 2 * (2 * one * own + both * common)
    assert mode == "forward" or round(found / 1e6) == 910


def test_the_bytes_of_moments_are_those_of_the_map_with_a_mask_too():
    module = load("moments")
    for kind in ("NHWC", "NCHW", "NHWC, masked"):
        found, (x, valid) = counted("moments", shape="clip map 32×14²×768", kind=kind, mode="forward", row=module.ours)
        assert found == x.nbytes == 4 * 32 * 196 * 768
        assert (valid is not None) == ("masked" in kind)


def test_a_step_is_named_by_its_batches():
    benchmark = SimpleNamespace(group=None, extra_info={})
    load("step_losses").test_step_losses(
        "ours", torch.float32, "full", "cpu", measure=lambda *_: None, compiled=None, benchmark=benchmark
    )
    assert benchmark.extra_info["shape"] == "clip 32 + gdino 1"
    assert benchmark.extra_info["shape"] in benchmark.group
