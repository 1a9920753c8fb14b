import math

import pytest
import torch
import torch.nn.functional as F

from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.projector import Centre, FeatureHeads, Projector, move_centres


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


def centred(head, mean):
    head.centre = Centre(head.fc1.in_features).to(head.fc1.weight.dtype)
    head.centre.mean.copy_(mean)
    return head


@pytest.mark.parametrize("size", [None, (4, 6), (10, 7)], ids=str)
def test_a_centre_is_a_bias_of_the_first_linear(size):
    """On either side of the resize: what `plain_bias` promises an export."""
    head = perturbed(Projector(6, 10, hidden=16))
    m, mean = torch.randn(2, 8, 6, 6, dtype=torch.float64), torch.linspace(-9, 30, 6, dtype=torch.float64)
    shifted = head(m - mean, size)
    with_centre = centred(head, mean)(m, size)
    torch.testing.assert_close(with_centre, shifted, rtol=1e-12, atol=1e-12)
    plain = Projector(6, 10, hidden=16).double()
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if "centre" not in name})
    plain.fc1.bias.data = head.plain_bias()
    torch.testing.assert_close(plain(m, size), with_centre, rtol=1e-11, atol=1e-11)


def test_a_plain_bias_undoes_the_mean_that_a_bf16_forward_subtracted():
    mean = torch.linspace(50, 60, 64)  # bf16 has steps of a quarter there
    head = centred(Projector(64, 8, hidden=16).bfloat16(), torch.zeros(64))
    head.centre.float().mean.copy_(mean)  # as in training: weights in bf16, buffers in fp32
    x = (55 + torch.randn(32, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    subtracted = x.double() - head.centre(x).double()
    assert (subtracted - mean.bfloat16().double()).abs().max() < 0.05  # but for the rounding of x − m
    head.fc1.bias.data = head.fc1.bias.data.float()  # or its own rounding would hide that of the mean
    expected = mean.bfloat16().double() @ head.fc1.weight.double().T
    found = head.fc1.bias.double() - head.plain_bias().double()
    assert (found - expected).abs().max() < 1e-4
    assert (mean.double() @ head.fc1.weight.double().T - expected).abs().max() > 1e-2  # the mean itself would not do


def test_centres_follow_what_all_steps_saw():
    """1 / steps at first, so that the first step's mean counts whole; a twentieth from then on; only in training."""
    centre, steps = Centre(3), torch.zeros(())
    expected = torch.zeros(3)
    for step in range(1, 41):
        x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(step)) + 7
        assert torch.equal(centre(x), x - centre.mean)
        with torch.no_grad():
            centre(x - 100)  # a look without gradient, as FAMO's after the step
        steps += 1
        move_centres([centre], steps)
        expected += (x.mean((0, 1)) - expected) * max(1 / step, 0.05)
        torch.testing.assert_close(centre.mean, expected)
    parts = x.split(1)
    for part in parts:
        centre(part)
    centre.eval()(x + 100)
    move_centres([centre], steps, batches=len(parts))  # a step of several backwards
    torch.testing.assert_close(centre.mean, expected + (x.mean((0, 1)) - expected) * 0.05)


def test_a_head_learns_faster_centred_where_inputs_have_much_in_common():
    """The reason for it: inputs whose cosines are 0.97, as the student's are when L_t2s is trained."""
    torch.manual_seed(0)
    common = 6 * torch.randn(32)
    teach = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    losses = {}
    for centre in (False, True):
        torch.manual_seed(1)
        head, steps = Projector(32, 8, hidden=64), torch.zeros(())
        if centre:
            head.centre = Centre(32)
        optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
        for _ in range(150):
            x = torch.randn(64, 32)
            loss = (1 - F.cosine_similarity(head(x + common), teach(x).detach())).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if centre:
                steps += 1
                move_centres([head.centre], steps)
        losses[centre] = loss.item()
    assert losses[True] < 0.7 * losses[False], losses
