"""What the rows of a benchmark compute: the same numbers, and no more work than a user's own code would do."""

import importlib.util
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


def test_a_step_is_named_by_its_batches():
    benchmark = SimpleNamespace(group=None, extra_info={})
    load("step_losses").test_step_losses(
        "ours", torch.float32, "full", "cpu", measure=lambda *_: None, compiled=None, benchmark=benchmark
    )
    assert benchmark.extra_info["shape"] == "clip 32 + gdino 1"
    assert benchmark.extra_info["shape"] in benchmark.group
