import math

import pytest
import torch
import torch.nn.functional as F

from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.projector import FeatureHeads, Projector


def mlp(head, x):
    """Linear – LayerNorm – GELU – Linear from its parameters, GELU by its definition."""
    x = x @ head.fc1.weight.T + head.fc1.bias
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    x = x * head.norm.weight + head.norm.bias
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x @ head.fc2.weight.T + head.fc2.bias


def perturbed(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module.double()


def features(x_dim=6):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 8, 12, 6), (2, 5, 7, 6)]
    maps = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Features(None if x_dim is None else torch.randn(2, x_dim, generator=generator, dtype=torch.float64), maps)


def test_projector_equals_its_equation():
    head = perturbed(Projector(6, 10, hidden=16))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(head(x), mlp(head, x), rtol=1e-12, atol=1e-12)


def test_heads_resize_first_and_project_then():
    heads = perturbed(FeatureHeads(FeatureSpec(6, (6, 6), (4.0, 8.0)), FeatureSpec(3, (10, 9), (8.0, 8.0)), hidden=16))
    source, sizes = features(), [(4, 6), (10, 3)]
    out = heads(source, sizes)
    torch.testing.assert_close(out.x, mlp(heads.x, source.x), rtol=1e-12, atol=1e-12)
    for found, head, m, size in zip(out.maps, heads.maps, source.maps, sizes, strict=True):
        resized = F.interpolate(m.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        torch.testing.assert_close(found, mlp(head, resized), rtol=1e-10, atol=1e-10)


GRIDS = {  # map, size, what fc1 sees of it
    "CLIP's 14² → a 16² student": ((14, 14), (16, 16), (14, 14)),
    "a 16² student → CLIP's 14²": ((16, 16), (14, 14), (14, 14)),
    "up in both, odd": ((3, 5), (7, 8), (3, 5)),
    "down in one axis, up by more in the other": ((6, 2), (5, 9), (6, 2)),
    "up in one axis, down by more in the other": ((6, 9), (7, 2), (7, 2)),
    "as many tokens on either side": ((4, 6), (6, 4), (6, 4)),
    "the same grid": ((5, 7), (5, 7), (5, 7)),
    "from a single token": ((1, 1), (3, 2), (1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", GRIDS)
def test_fc1_runs_on_the_smaller_grid_and_nothing_else_changes(case, dtype):
    grid, size, seen = GRIDS[case]
    head = perturbed(Projector(12, 10, hidden=16)).to(dtype)
    m = torch.randn(2, *grid, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    shapes = []
    head.fc1.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    inputs = [m, *head.parameters()]
    upstream = torch.randn(2, *size, 10, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = head(m, size)
    resized = F.interpolate(m.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    expected = mlp(head, resized)
    assert shapes == [(2, *seen, 16)]
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for a, b in zip(
        (found, *torch.autograd.grad(found, inputs, upstream)),
        (expected, *torch.autograd.grad(expected, inputs, upstream)),
        strict=True,
    ):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_a_map_of_the_right_size_is_projected_as_it_is():
    heads = perturbed(FeatureHeads(FeatureSpec(6, (6, 6), (4.0, 8.0)), FeatureSpec(3, (10, 9), (8.0, 8.0)), hidden=16))
    source = features()
    out = heads(source, [(8, 12), (5, 7)])
    for found, head, m in zip(out.maps, heads.maps, source.maps, strict=True):
        torch.testing.assert_close(found, mlp(head, m), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("x_in", "x_out"), [(None, 3), (6, None), (None, None)])
def test_no_x_where_one_side_has_none(x_in, x_out):
    heads = FeatureHeads(FeatureSpec(x_in, (6, 6), (4.0, 8.0)), FeatureSpec(x_out, (10, 9), (8.0, 8.0)), hidden=16)
    assert heads.x is None
    assert heads.double()(features(x_in), [(4, 6), (5, 7)]).x is None


def test_wrong_numbers_of_maps_are_named():
    with pytest.raises(ValueError, match="2 maps come in and 1 go out"):
        FeatureHeads(FeatureSpec(6, (6, 6), (4.0, 8.0)), FeatureSpec(3, (10,), (8.0,)))
    heads = FeatureHeads(FeatureSpec(6, (6, 6), (4.0, 8.0)), FeatureSpec(3, (10, 9), (8.0, 8.0))).double()
    with pytest.raises(ValueError, match="built for 2 maps, got 2 maps and 1 sizes"):
        heads(features(), [(4, 6)])
