import math

import pytest
import torch
from kpu_fast.kernels import deform_attn, deform_attn_reference

# Odd, non-square and single-row maps beside the adapter's 2:1 pyramid.
PYRAMIDS = [[(8, 12), (4, 6), (2, 3)], [(5, 7)], [(1, 9), (3, 1)]]


def naive(value, shapes, locations, weights):
    """Loops over every sample and its four neighbours, written from the definition in float64."""
    value, locations, weights = value.double(), locations.double(), weights.double()
    b, _, m, d = value.shape
    _, q, _, levels, points, _ = locations.shape
    out = torch.zeros(b, q, m, d, dtype=torch.float64)
    for ib, iq, im, level, p in torch.cartesian_prod(*map(torch.arange, (b, q, m, levels, points))).tolist():
        h, w = shapes[level]
        start = sum(hh * ww for hh, ww in shapes[:level])
        x = locations[ib, iq, im, level, p, 0].item() * w - 0.5
        y = locations[ib, iq, im, level, p, 1].item() * h - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for col in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= col < w:
                    share = (1 - abs(y - row)) * (1 - abs(x - col))
                    out[ib, iq, im] += weights[ib, iq, im, level, p] * share * value[ib, start + row * w + col, im]
    return out.flatten(2)


def make(shapes, *, b=2, q=5, m=2, d=3, points=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in shapes)
    value = torch.randn(b, cells, m, d, generator=generator, dtype=torch.float64).to(dtype)
    # From −0.3 to 1.3, so that some samples lie partly and some wholly outside.
    locations = torch.rand(b, q, m, len(shapes), points, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.randn(b, q, m, len(shapes), points, generator=generator, dtype=torch.float64).to(dtype)
    return value, shapes, locations, weights


@pytest.mark.parametrize("shapes", PYRAMIDS)
def test_matches_naive_loops(shapes):
    value, shapes, locations, weights = make(shapes)
    expected = naive(value, shapes, locations, weights)
    torch.testing.assert_close(deform_attn(value, shapes, locations, weights), expected, rtol=1e-12, atol=1e-12)
    out = deform_attn(value, torch.tensor(shapes), locations, weights)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_low_precision_is_computed_in_fp32_and_returned_in_its_dtype(dtype, tolerance):
    value, shapes, locations, weights = make([(40, 60), (20, 30)], q=9, dtype=dtype)
    out = deform_attn(value, shapes, locations.float(), weights)
    assert out.dtype == dtype
    expected = naive(value, shapes, locations.float(), weights)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_match_finite_differences():
    value, shapes, locations, weights = make([(3, 4), (2, 2)], b=1, q=2, m=2, d=2)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, s, w: deform_attn(v, shapes, s, w), inputs)


def test_strided_value_and_compiled_call():
    value, shapes, locations, weights = make([(6, 5), (3, 2)])
    strided = value.transpose(0, 1).contiguous().transpose(0, 1)
    expected = deform_attn_reference(value, shapes, locations, weights)
    compiled = torch.compile(deform_attn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(strided, shapes, locations, weights), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, p, w: (v[0], s, p, w), r"value must be \(B, S, M, D\)"),
        (lambda v, s, p, w: (v, [(5, 6)], p, w), "hold 30 cells but value has S = 35"),
        (lambda v, s, p, w: (v, [(5, 7, 1)], p, w), "must be pairs"),
        (lambda v, s, p, w: (v, s, p[..., :1], w), "sampling_locations must be"),
        (lambda v, s, p, w: (v, s, p[:, :, :1], w), "sampling_locations have"),
        (lambda v, s, p, w: (v, s, p, w[..., :1]), "attention_weights must be"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        deform_attn(*change(*make([(5, 7)])))
