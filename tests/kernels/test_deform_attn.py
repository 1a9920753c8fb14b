import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kpu_fast.kernels import MultiScaleDeformableAttention, deform_attn, deform_attn_reference, ms_deform_attn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.set_num_threads(1)

ADAPTER = [(8, 12), (4, 6), (2, 3)]  # the adapter's 2:1 pyramid
ODD = [(5, 7), (1, 1), (3, 2)]
ROWS = [(1, 9), (3, 1)]
NAN, INF = math.nan, math.inf


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


def make(shapes, *, b=2, q=5, m=2, d=3, points=2, dtype=torch.float64, fine=None, device="cpu", seed=0):
    """(value, locations, weights); `fine` is the locations' dtype. They run from −0.3 to 1.3, so some lie outside."""
    generator = torch.Generator().manual_seed(seed)
    cells, samples = sum(h * w for h, w in shapes), (b, q, m, len(shapes), points)
    value = torch.randn(b, cells, m, d, generator=generator, dtype=torch.float64)
    locations = torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.randn(samples, generator=generator, dtype=torch.float64)
    kinds = (dtype, fine or dtype, dtype)
    return [x.to(device, kind).requires_grad_() for x, kind in zip((value, locations, weights), kinds, strict=True)]


def run(attend, inputs, shapes, **options):
    """(result, gradients) under an upstream gradient that is not 1."""
    value, locations, weights = inputs
    out = attend(value, shapes, locations, weights, **options)
    upstream = (torch.arange(out.numel(), device=out.device) % 11 / 4 - 1).reshape(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, upstream)


def check(impl, inputs, shapes, **options):
    """Error against float64 at most twice that of `grid_sample`, in each of the result and the three gradients."""
    exact = run(deform_attn_reference, [x.detach().double().requires_grad_() for x in inputs], shapes)
    plain = run(deform_attn_reference, inputs, shapes)
    ours = run(deform_attn, inputs, shapes, impl=impl, **options)
    for got, torchs, truth, like in zip(ours, plain, exact, (inputs[0], *inputs), strict=True):
        assert got.dtype == like.dtype
        assert got.shape == truth.shape
        error, allowed = (got.double() - truth).abs().max(), (torchs.double() - truth).abs().max()
        # Triton's interpreter cuts float32 → bfloat16 off where every GPU rounds.
        cut = 2.0**-8 if impl == "triton" and not got.is_cuda and got.dtype == torch.bfloat16 else 0
        assert error <= 2 * allowed + (1e-6 + cut) * truth.abs().max(), (error, allowed)
    return ours


def can_be_deterministic(impl, device):
    return impl == "triton" or device == "cpu"  # torch's gradient on CUDA is summed in no fixed order


# --------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("shapes", [ADAPTER, ODD, ROWS], ids=str)
def test_matches_loops_written_from_the_definition(shapes, impl, device):
    value, locations, weights = make(shapes, dtype=torch.float64 if impl == "torch" else torch.float32, device=device)
    tolerance = 1e-12 if impl == "torch" else 1e-5
    expected = naive(value.cpu(), shapes, locations.cpu(), weights.cpu()).to(device, value.dtype)
    for sizes in (shapes, torch.tensor(shapes), torch.tensor(shapes, device=device, dtype=torch.int32)):
        found = deform_attn(value, sizes, locations, weights, impl=impl)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "channels", [1, 8, 24, 32, 64, 100]
)  # a channel alone, padded to powers of two, and exact ones
def test_matches_float64(channels, dtype, impl, device):
    deterministic = channels in (24, 32) and can_be_deterministic(impl, device)
    check(impl, make(ODD, d=channels, dtype=dtype, fine=torch.float32, device=device), ODD, deterministic=deterministic)


@pytest.mark.parametrize("points", [1, 3, 4, 6, 8])  # the kernels take four, two or one at a time
def test_every_number_of_points(points, impl, device):
    check(impl, make(ODD, d=8, points=points, dtype=torch.float32, device=device), ODD)


def test_widest_head_and_most_maps(impl, device):
    check(impl, make([(2, 3)], b=1, d=256, dtype=torch.float32, device=device), [(2, 3)])
    shapes = [(level + 1, 9 - level) for level in range(8)]
    check(impl, make(shapes, b=1, d=8, dtype=torch.float32, device=device), shapes)


def test_more_queries_than_one_program_takes(impl, device):
    check(impl, make(ROWS, b=1, q=41, d=32, dtype=torch.float32, device=device), ROWS)  # 32, then 9


def test_borders_centres_and_corners(impl, device):
    height, width = 4, 8  # powers of two: every position is exact in float32, on either side of a cell's border
    # Centres, where one neighbour has all the weight; cell borders; the map's edge; half a cell outside, where the last
    # weight vanishes. Where the derivative jumps, both forms take the one to the right.
    across = torch.tensor([0.5, 1, 2.5, 0, 8, -0.5, 8.5, -0.25, 8.25]) / width
    down = torch.tensor([0.5, 1.5, 1, 0, 4, -0.5, 4.5, -0.25, 4.25]) / height
    locations = torch.cartesian_prod(across, down).view(1, 81, 1, 1, 1, 2)
    value, _, weights = make([(height, width)], b=1, q=81, m=1, d=8, points=1, dtype=torch.float32)
    inputs = [x.detach().to(device).requires_grad_() for x in (value, locations, weights)]
    out = check(impl, inputs, [(height, width)])[0]
    centre = out[0, 0] / weights[0, 0].item()  # (0.5, 0.5): the first cell
    torch.testing.assert_close(centre.cpu(), value[0, 0, 0].detach())
    edge = out.view(9, 9, 8)  # [x, y]
    assert edge[5:7].abs().max() == 0
    assert edge[:, 5:7].abs().max() == 0
    assert edge[7:, 7:].abs().min() > 0


@pytest.mark.parametrize("fine", [torch.float16, torch.float32], ids=str)
def test_mixed_dtypes(fine, impl, device):
    inputs = make(ODD, d=8, dtype=torch.bfloat16, fine=fine, device=device)
    inputs[2] = inputs[2].detach().float().requires_grad_()
    check(impl, inputs, ODD)


def test_strides(impl, device):
    value, locations, weights = make(ODD, q=6, d=8, points=4, dtype=torch.float32, device=device)
    torch.manual_seed(0)
    heads_first = value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    channels_apart = torch.randn(2, 42, 2, 16, device=device)[..., ::2].requires_grad_()
    xy_apart = locations.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    points_apart = weights.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()
    every_other = torch.rand(2, 12, 2, 3, 4, 2, device=device)[:, ::2].requires_grad_()
    check(impl, [heads_first, xy_apart, points_apart], ODD)
    check(impl, [channels_apart, every_other, weights], ODD)
    shared = value.detach()[:1].expand(2, -1, -1, -1).requires_grad_()
    check(impl, [shared, locations, weights], ODD)


def test_expanded_and_transposed_gradients(impl, device):
    inputs = make(ODD, d=8, dtype=torch.float32, device=device)
    out = deform_attn(inputs[0], ODD, *inputs[1:], impl=impl)
    upstream = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1)).to(device).transpose(0, 1)
    for grad in (torch.ones((), device=device).expand_as(out), upstream):
        found = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        expected = torch.autograd.grad(out, inputs, grad.contiguous(), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if device == "cpu" else 1e-6)  # float atomics


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_asked_for(wanted, impl, device):
    inputs = make(ODD, d=8, dtype=torch.float32, device=device)
    exact = run(deform_attn_reference, inputs, ODD)
    for place, x in enumerate(inputs):
        x.requires_grad_(place in wanted)
    out = deform_attn(inputs[0], ODD, *inputs[1:], impl=impl)
    upstream = (torch.arange(out.numel(), device=device) % 11 / 4 - 1).reshape(out.shape)
    out.backward(upstream)
    for place, x in enumerate(inputs):
        if place in wanted:
            torch.testing.assert_close(x.grad, exact[1 + place])
        else:
            assert x.grad is None


@pytest.mark.parametrize("learned", [0, 1, 2])
@pytest.mark.parametrize("b", [1, 2])  # of one image, grid_sample reads the maps where they are
def test_inputs_made_under_inference_mode(learned, b, impl, device):
    inputs = [x.detach() for x in make(ODD, b=b, d=8, dtype=torch.float32, device=device)]
    wanted = inputs[learned].requires_grad_()
    with torch.inference_mode():
        inferred = [x if x is wanted else x.clone() for x in inputs]
        shapes = torch.tensor(ODD, device=device)
    found, expected = (
        torch.autograd.grad(deform_attn(x[0], shapes, *x[1:], impl=impl).sum(), wanted)[0] for x in (inferred, inputs)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if device == "cpu" else 1e-6)  # float atomics


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_kept_where_no_gradient_is_recorded(grad, device, monkeypatch):
    module = importlib.import_module("kpu_fast.kernels.deform_attn")
    kept = []
    monkeypatch.setattr(module, "keepable", lambda x: kept.append(x) or x)
    inputs = make(ODD, dtype=torch.float32, device=device)
    with torch.set_grad_enabled(grad):
        value, locations, weights = (x.detach() for x in inputs) if grad else inputs
        deform_attn(value, ODD, locations, weights, impl="triton")
    assert not kept


@pytest.mark.parametrize("kind", ["tensors", "numpy", "negative view"])
def test_sizes_of_any_kind(kind, impl, device):
    value, locations, weights = make(ODD, dtype=torch.float32, device=device)
    sizes = torch.tensor(ODD)
    sizes = {"tensors": list(sizes), "numpy": sizes.numpy(), "negative view": torch._neg_view(-sizes.to(device))}[kind]
    found = deform_attn(value, sizes, locations, weights, impl=impl)
    torch.testing.assert_close(found, deform_attn(value, ODD, locations, weights, impl=impl), rtol=0, atol=0)


def test_tensors_that_hooks_hand_back_as_negative_views(device):
    inputs = make(ODD, dtype=torch.float32, device=device)
    expected = run(deform_attn, inputs, ODD, impl="triton")
    unpack = lambda x: torch._neg_view(-x) if x.is_floating_point() else x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        found = run(deform_attn, inputs, ODD, impl="triton")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_match_finite_differences():
    inputs = make([(3, 4), (2, 2)], b=1, q=2, m=2, d=2)
    assert torch.autograd.gradcheck(lambda v, s, w: deform_attn(v, [(3, 4), (2, 2)], s, w), inputs)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
    queries=st.integers(1, 6),
    channels=st.sampled_from([1, 5, 16, 33]),
    points=st.integers(1, 5),
    triton=st.booleans(),
    deterministic=st.booleans(),
)
def test_any_pyramid(shapes, queries, channels, points, triton, deterministic):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make(shapes, b=1, q=queries, d=channels, points=points, dtype=torch.float32, device=device)
    exact = run(deform_attn_reference, [x.detach().double().requires_grad_() for x in inputs], shapes)
    options = {"deterministic": deterministic and (triton or device == "cpu")}
    found = run(deform_attn, inputs, shapes, impl="triton" if triton else "torch", **options)
    for got, truth in zip(found, exact, strict=True):
        assert (got.double() - truth).abs().max() <= 1e-5 * (1 + truth.abs().max())


# ------------------------------------------------------------------------------------------------ extreme values


@pytest.mark.parametrize("far", [INF, -INF, 1e30, -1e30, 3e9, -3e9, 3.4e38])
def test_far_locations_read_zeros(far, impl, device):
    value, locations, weights = make(ODD, d=8, dtype=torch.float32, device=device)
    expected = run(deform_attn_reference, (value, locations, weights), ODD)
    spoilt = locations.detach().clone()
    spoilt[:, 1::2, ..., 0] = far
    spoilt[:, ::2, 1, ..., 1] = far
    spoilt.requires_grad_()
    found = run(deform_attn, (value, spoilt, weights), ODD, impl=impl)
    for got in found:
        assert got.isfinite().all()
    per_head = found[0].unflatten(2, (2, 8))
    assert per_head[:, 1::2].abs().max() == 0
    assert per_head[:, ::2, 1].abs().max() == 0
    torch.testing.assert_close(per_head[:, ::2, 0], expected[0].unflatten(2, (2, 8))[:, ::2, 0])
    for grad, untouched in zip(found[2:], expected[2:], strict=True):
        assert grad[:, 1::2].abs().max() == 0
        assert grad[:, ::2, 1].abs().max() == 0
        torch.testing.assert_close(grad[:, ::2, 0], untouched[:, ::2, 0])


def test_a_nan_location_is_nan_in_its_own_output_only(impl, device):
    inputs = make(ODD, d=8, dtype=torch.float32, device=device)
    clean = run(deform_attn, inputs, ODD, impl=impl)
    spoilt = inputs[1].detach().clone()
    spoilt[0, 2, 1, 0, 1, 0] = NAN
    found = run(deform_attn, (inputs[0], spoilt.requires_grad_(), inputs[2]), ODD, impl=impl)
    lost = torch.zeros_like(found[0], dtype=torch.bool).view(2, 5, 2, 8)
    lost[0, 2, 1] = True
    assert torch.equal(found[0].isnan(), lost.flatten(2))
    torch.testing.assert_close(found[0].nan_to_num(), clean[0].masked_fill(lost.flatten(2), 0))
    assert all(grad.isfinite().all() for grad in found[1:])
    assert found[2][0, 2, 1, 0, 1].abs().max() == 0


def test_nan_and_inf_in_value_come_through(impl, device):
    value, locations, weights = make(ODD, d=8, dtype=torch.float32, device=device)
    with torch.no_grad():
        value[0, :35, 0, 3] = NAN
    locations = locations.detach() * 0.2 + 0.4  # all inside
    out = deform_attn(value, ODD, locations, weights, impl=impl).unflatten(2, (2, 8))
    assert out[0, :, 0, 3].isnan().all()
    assert out.isnan().sum() == 5


@pytest.mark.parametrize("sizes", [[(99, 99), (7, 5), (2, 2)], [(-4, 3), (0, 7), (2**31 - 1, 2**31 - 1)]], ids=str)
def test_wrong_sizes_on_the_gpu_stay_inside_value(sizes, device):
    pytest.importorskip("triton", reason="triton is not installed")
    # Value and its gradient are slices of larger tensors: what reads beside them finds NaN.
    whole = torch.full((3, 42, 2, 8), NAN, device=device)
    whole[1] = 1
    _, locations, weights = make(ODD, b=1, d=8, dtype=torch.float32, device=device)
    value = whole[1:2].detach().requires_grad_()
    out = deform_attn(value, torch.tensor(sizes, device=device), locations, weights, impl="triton")
    assert out.isfinite().all()
    out.sum().backward()
    assert value.grad.isfinite().all()


@pytest.mark.parametrize("fixed", [False, True])
def test_wrong_sizes_on_the_gpu_write_only_into_the_gradient(fixed, device):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels.deform_attn_triton import launch_backward

    value, locations, weights = (x.detach() for x in make(ODD, b=1, d=8, dtype=torch.float32, device=device))
    locations = locations * 2 - 0.5
    grad = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(1)).to(device)
    # Cells that barely do not exist: what is added to them lands in the samples around.
    sizes = torch.tensor([(9, 9), (7, 5), (2, 2)], device=device)
    around = torch.zeros((5, *value.shape[1:]), dtype=torch.int64 if fixed else torch.float32, device=device)
    others = torch.empty_like(locations), torch.empty_like(weights)
    largest = (grad.abs().max(), weights.abs().max()) if fixed else None
    unit = 2.0**54 if fixed else 1.0
    launch_backward(grad, value, sizes, [], locations, weights, largest, unit, around[1:2], *others)
    assert around[1].abs().max() > 0
    around[1] = 0
    assert around.abs().max() == 0


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-3, 1e18, 1e30])
def test_fixed_point_follows_the_size_of_the_gradient(scale, impl, device):
    if scale == 1e-38 and not can_be_deterministic(impl, device):
        pytest.skip("atomic additions on a GPU make 0 of subnormal numbers")
    value, locations, weights = make(ODD, d=8, dtype=torch.float32, device=device)
    upstream = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(device)

    def gradient(factor, **options):
        out = deform_attn(value, ODD, locations, weights, **options)
        return torch.autograd.grad(out, value, upstream * factor)[0]

    found = gradient(scale, impl=impl, deterministic=can_be_deterministic(impl, device)).double() / scale
    expected = gradient(1.0, impl="torch").double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if scale > 1e-37 else 1e-3)


def test_fixed_point_cannot_overflow_where_every_sample_meets_in_one_cell(impl, device):
    queries, points = 130, 4
    value = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
    locations = torch.full((1, queries, 1, 1, points, 2), 0.5, device=device)  # the centre of the only cell
    weights = torch.full((1, queries, 1, 1, points), 1.9999, device=device)
    deterministic = can_be_deterministic(impl, device)
    out = deform_attn(value, [(1, 1)], locations, weights, impl=impl, deterministic=deterministic)
    upstream = torch.full_like(out, -1.9999)
    found = torch.autograd.grad(out, value, upstream)[0].item()
    assert abs(found / (-(1.9999**2) * queries * points) - 1) < 1e-5


def test_fixed_point_of_a_large_gradient_and_small_weights(impl, device):
    """Before the weights' size comes in, the sum of the gradients alone would overflow float32."""
    value = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
    locations = torch.full((1, 130, 1, 1, 4, 2), 0.5, device=device)
    deterministic = can_be_deterministic(impl, device)
    for large, small in ((1e38, 1e-5), (1e-5, 1e38)):
        weights = torch.full((1, 130, 1, 1, 4), small, device=device)
        out = deform_attn(value, [(1, 1)], locations, weights, impl=impl, deterministic=deterministic)
        found = torch.autograd.grad(out, value, torch.full_like(out, large))[0].item()
        assert abs(found / (520 * 1e33) - 1) < 1e-5


def test_fixed_point_of_nothing_and_of_nan(device):
    pytest.importorskip("triton", reason="triton is not installed")
    value, locations, weights = make(ODD, d=8, dtype=torch.float32, device=device)
    out = deform_attn(value, ODD, locations, weights, impl="triton", deterministic=True)
    nothing = torch.autograd.grad(out, value, torch.zeros_like(out), retain_graph=True)[0]
    assert nothing.abs().max() == 0
    for bad in (NAN, INF):
        upstream = torch.ones_like(out)
        upstream[0, 0, 0] = bad
        assert torch.autograd.grad(out, value, upstream, retain_graph=True)[0].isnan().all()


# --------------------------------------------------------------------------------------------------- determinism


def test_two_runs_are_bit_equal(impl, device):
    if impl == "torch" and device == "cuda":
        pytest.skip("grid_sample's own backward uses atomics on CUDA")
    inputs = make(ADAPTER, b=1, q=41, d=8, points=4, dtype=torch.bfloat16, fine=torch.float32, device=device)
    first, second = (run(deform_attn, inputs, ADAPTER, impl=impl, deterministic=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("by_flag", [False, True])
def test_deterministic_sums_do_not_depend_on_the_order_of_programs(by_flag, device):
    pytest.importorskip("triton", reason="triton is not installed")
    # Queries handed in in another order are other programs, run in another order, for the same sums.
    value, locations, weights = make(ODD, b=1, q=60, m=1, d=4, points=4, dtype=torch.float32, device=device)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).to(device)
    upstream = torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(1)).to(device)

    def gradient(deterministic, where):
        out = deform_attn(
            value, ODD, locations[:, where], weights[:, where], impl="triton", deterministic=deterministic
        )
        return torch.autograd.grad(out, value, upstream[:, where])[0]

    straight = torch.arange(60, device=device)
    exact = torch.autograd.grad(
        deform_attn_reference(value.double(), ODD, locations, weights), value, upstream.double()
    )[0]
    floats = gradient(False, straight)
    assert not torch.equal(floats, gradient(False, order))  # so the test can see an order
    if by_flag:
        torch.use_deterministic_algorithms(True)
    try:
        fixed = [gradient(None if by_flag else True, where) for where in (straight, order)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*fixed)
    luck = 1.2 if device == "cuda" else 1  # there the floats are added in any order, and may come nearer
    assert (fixed[0] - exact).abs().max() <= luck * (floats - exact).abs().max()


def test_torch_path_on_cuda_refuses_to_be_deterministic():
    with FakeTensorMode():
        value = torch.empty(2, 42, 2, 8, device="cuda", requires_grad=True)
        locations, weights = torch.empty(2, 5, 2, 3, 2, 2, device="cuda"), torch.empty(2, 5, 2, 3, 2, device="cuda")
        with pytest.raises(RuntimeError, match="in no fixed order on CUDA"):
            deform_attn(value, ODD, locations, weights, impl="torch", deterministic=True)


# ------------------------------------------------------------------------------------------- registration, compile


@pytest.mark.parametrize("on_device", [False, True])
def test_opcheck(on_device, device):
    pytest.importorskip("triton", reason="triton is not installed")
    value, locations, weights = make(ODD, d=8, points=4, dtype=torch.bfloat16, fine=torch.float32, device=device)
    value = value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    shapes = torch.tensor(ODD, device=device) if on_device else None
    sizes = [] if on_device else [side for shape in ODD for side in shape]
    inputs = (value, shapes, sizes, locations, weights)
    grad = torch.randn(2, 5, 16, device=device, dtype=torch.bfloat16)
    constants = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.library.opcheck(torch.ops.kpu_fast.deform_attn_forward, (*inputs, False))
    for deterministic, needed in (
        (True, (True, True, True)),
        (False, (True, False, False)),
        (True, (False, True, False)),
    ):
        arguments = (grad, *constants, deterministic, *needed)
        tests = ("test_schema", "test_faketensor")  # float atomics: two runs need not be bit-equal on a GPU
        torch.library.opcheck(torch.ops.kpu_fast.deform_attn_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_backward_holds_no_more_than_its_sums_and_the_gradient(deterministic, dtype, device, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module("kpu_fast.kernels.deform_attn")
    kernels = importlib.import_module("kpu_fast.kernels.deform_attn_triton")
    for name in ("launch_backward", "launch_unfix"):
        monkeypatch.setattr(kernels, name, lambda *_: None)
    value, locations, weights = (x.detach() for x in make(ODD, d=8, dtype=dtype, fine=torch.float32, device=device))
    grad, sizes = torch.zeros(2, 5, 16, device=device, dtype=dtype), [side for shape in ODD for side in shape]
    bytes_per_element = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal bytes_per_element
            out = function(*args, **(kwargs or {}))
            bytes_per_element += sum(x.itemsize for x in tree_leaves(out) if x.shape == value.shape)
            return out

    with Count():
        module._gradients._init_fn(
            grad, value, None, sizes, locations, weights, deterministic, True, False, False
        )  # of the operator, which would hide what it calls
    result = dtype.itemsize if deterministic or dtype != torch.float32 else 0  # float32 sums are the result
    assert bytes_per_element == (8 if deterministic else 4) + result


@pytest.mark.parametrize("form", ["pairs", "tensor", "dynamic"])
def test_fullgraph_compile(form, impl, device):
    if form == "tensor" and impl == "torch":
        pytest.skip("the torch path needs the sizes as Python numbers")
    inputs = make(ODD, d=8, dtype=torch.float32, device=device)
    sizes = torch.tensor(ODD, device=device) if form == "tensor" else ODD

    def step(value, sizes, locations, weights):
        return deform_attn(value * 2, sizes, locations.sin(), weights, impl=impl) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=form == "dynamic")
    for found, expected in zip(run(compiled, inputs, sizes), run(step, inputs, sizes), strict=True):
        torch.testing.assert_close(found, expected)
    if form == "dynamic":  # another pyramid through the same function
        inputs = make(ADAPTER, q=7, d=8, dtype=torch.float32, device=device)
        for found, expected in zip(run(compiled, inputs, ADAPTER), run(step, inputs, ADAPTER), strict=True):
            torch.testing.assert_close(found, expected)


def test_sizes_of_a_tensor_stay_open_under_compile(impl, device):
    """Not one compilation for every size of the map."""
    counter = CompileCounter()
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(x, locations, weights):
        value = x.flatten(2).mT.unflatten(2, (2, 3))
        return deform_attn(value, [(x.shape[2], x.shape[3])], locations, weights, impl=impl)

    _, locations, weights = (x.detach() for x in make([(1, 1)], dtype=torch.float32, device=device))
    for height in range(2, 8):
        x = torch.randn(2, 6, height, height + 3, device=device)
        value = x.flatten(2).mT.unflatten(2, (2, 3))
        expected = deform_attn(value, [(height, height + 3)], locations, weights, impl=impl)
        torch.testing.assert_close(attend(x, locations, weights), expected)
    assert counter.frame_count <= 2


def test_second_derivative_is_refused(device):
    pytest.importorskip("triton", reason="triton is not installed")
    inputs = make(ODD, d=8, dtype=torch.float32, device=device)
    out = deform_attn(inputs[0], ODD, *inputs[1:], impl="triton")
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            torch.autograd.grad(out, inputs, upstream)


def test_torch_func(impl, device):
    """vmap, grad and jvp take the reference, whatever the kernels could do."""
    inputs = make(ODD, d=8, dtype=torch.float32, device=device)

    def attend(value, locations, weights):
        return deform_attn(value, ODD, locations, weights, impl=impl)

    out, *expected = run(deform_attn_reference, inputs, ODD)
    upstream = (torch.arange(out.numel(), device=device) % 11 / 4 - 1).reshape(out.shape)
    plain = [x.detach() for x in inputs]
    found = torch.func.grad(lambda *some: (attend(*some) * upstream).sum(), argnums=(0, 1, 2))(*plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.vjp(attend, *plain)[1](upstream), tuple(expected))
    twice = [torch.stack((x, x.flip(1))) for x in plain]
    each = torch.stack([attend(*some) for some in zip(*twice, strict=True)])
    torch.testing.assert_close(torch.func.vmap(attend)(*twice), each)

    direction = torch.randn(plain[2].shape, generator=torch.Generator().manual_seed(1)).to(device)
    tangent = torch.func.jvp(lambda weights: attend(*plain[:2], weights), (plain[2],), (direction,))[1]
    torch.testing.assert_close(tangent, attend(*plain[:2], direction))  # it is linear in the weights
    with forward_ad.dual_level():
        dual = attend(*plain[:2], forward_ad.make_dual(plain[2], direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
        for place in (0, 1):  # grid_sample has no forward mode; a tangent of nothing would pass for a constant
            given = [forward_ad.make_dual(x, x) if i == place else x for i, x in enumerate(plain)]
            with pytest.raises(NotImplementedError, match="grid_sampler_2d"):
                attend(*given)


@pytest.mark.filterwarnings("error:There is a performance drop")  # which torch gives where nothing is registered
@pytest.mark.parametrize("deterministic", [False, True])
def test_batched_upstream_gradients(deterministic, impl, device):
    if impl == "torch" and device == "cuda" and deterministic:
        pytest.skip("grid_sample's own backward uses atomics on CUDA")
    inputs = make([(3, 2)], b=1, q=3, d=3, dtype=torch.float32, device=device)
    out = deform_attn(inputs[0], [(3, 2)], *inputs[1:], deterministic=deterministic, impl=impl)
    upstreams = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    one_by_one = [torch.autograd.grad(out, inputs, upstream, retain_graph=True) for upstream in upstreams]
    mapped = torch.func.vmap(lambda upstream: torch.autograd.grad(out, inputs, upstream, retain_graph=True))(upstreams)
    batched = torch.autograd.grad(out, inputs, upstreams, is_grads_batched=True)
    for some, a, b in zip(zip(*one_by_one, strict=True), mapped, batched, strict=True):
        torch.testing.assert_close(a, torch.stack(some))
        torch.testing.assert_close(b, torch.stack(some))


def test_under_autocast(impl, device):
    inputs = make(ODD, d=8, dtype=torch.bfloat16, fine=torch.float32, device=device)
    expected = deform_attn(inputs[0], ODD, *inputs[1:], impl=impl)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(deform_attn(inputs[0], ODD, *inputs[1:], impl=impl), expected)


# ------------------------------------------------------------------------------------------------------- drop-ins


def test_drop_ins_take_their_models_arguments(device):
    value, locations, weights = make(ODD, d=8, dtype=torch.float32, device=device)
    sizes = torch.tensor(ODD, device=device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    expected = deform_attn_reference(value, ODD, locations, weights)
    torch.testing.assert_close(ms_deform_attn(value, sizes, starts, locations, weights, 64), expected)
    module = MultiScaleDeformableAttention()
    assert list(module.parameters()) == []
    torch.testing.assert_close(module(value, sizes, ODD, starts, locations, weights, 64), expected)


def test_reference_against_grid_sample_written_out():
    shapes = ODD
    value, locations, weights = make(shapes, d=4)
    out = 0
    for level, part in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = part.flatten(2).transpose(1, 2).reshape(4, 4, *shapes[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        sampled = F.grid_sample(maps, grid, align_corners=False)  # (B·M, D, Q, P)
        out = out + (sampled * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    expected = out.view(2, 8, 5).transpose(1, 2)
    torch.testing.assert_close(deform_attn_reference(value, shapes, locations, weights), expected)


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v, s, p, w: (v[0], s, p, w), ValueError, r"value: expected \(B, S, M, D\)"),
        (lambda v, s, p, w: (v, [(5, 6)], p, w), ValueError, r"expected S = 35 cells as value has.* with 30"),
        (lambda v, s, p, w: (v, [(5, 7), (1, 1)], p, w), ValueError, "spatial_shapes: expected 1 maps"),
        (lambda v, s, p, w: (v, [(5, 7, 1)], p, w), ValueError, r"expected pairs \(H, W\) of whole numbers"),
        (lambda v, s, p, w: (v, (5, 7), p, w), ValueError, r"expected a list of pairs \(H, W\), found \(5, 7\)"),
        (lambda v, s, p, w: (None, s, p, w), TypeError, "value: expected a tensor, found NoneType"),
        (lambda v, s, p, w: (v, [(5.0, 7)], p, w), ValueError, r"expected pairs \(H, W\) of whole numbers"),
        (lambda v, s, p, w: (v, [(-5, -7)], p, w), ValueError, "from 1 on"),
        (lambda v, s, p, w: (v, torch.ones(2, 2), p, w), ValueError, r"expected \(1, 2\) integers"),
        (lambda v, s, p, w: (v, torch.ones(1, 2), p, w), ValueError, "found torch.float32"),
        (lambda v, s, p, w: (v, s, p[..., :1], w), ValueError, "sampling_locations: expected"),
        (lambda v, s, p, w: (v, s, p[:, :, :1], w), ValueError, "expected B = 2 and M = 2"),
        (lambda v, s, p, w: (v, s, p, w[..., :1]), ValueError, "attention_weights: expected"),
        (lambda v, s, p, w: (v[:0], s, p[:0], w[:0]), ValueError, "value: expected at least one"),
        (lambda v, s, p, w: (v, s, p[:, :0], w[:, :0]), ValueError, "sampling_locations: expected at least one"),
        (lambda v, s, p, w: (v.int(), s, p, w), TypeError, "value: expected a floating-point dtype"),
        (lambda v, s, p, w: (v.to(torch.float8_e4m3fn), s, p, w), TypeError, "value: expected .* of 16 bits or more"),
        (lambda v, s, p, w: (v, s, p.long(), w), TypeError, "sampling_locations: expected a floating-point"),
        (lambda v, s, p, w: (v, s, p, w.to("meta")), ValueError, "attention_weights: expected the device of value"),
    ],
)
def test_bad_input_is_named(change, error, message):
    value, locations, weights = (x.detach() for x in make([(5, 7)]))
    for attend in (deform_attn, deform_attn_reference):
        with pytest.raises(error, match=message):
            attend(*change(value, [(5, 7)], locations, weights))


def test_triton_that_cannot_run_says_why(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    for shapes, wide, dtype in (([(2, 3)], 257, torch.float32), ([(2, 3)], 8, torch.float64), ([(1, 1)] * 9, 8, None)):
        value, locations, weights = make(shapes, b=1, q=1, d=wide, dtype=dtype or torch.float32)
        with pytest.raises(RuntimeError, match="256 channels per head and 8 maps"):
            deform_attn(value, shapes, locations, weights, impl="triton")
        deform_attn(value, shapes, locations, weights)  # "auto" finds the way
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    value, locations, weights = make([(2, 3)], dtype=torch.float32)
    with pytest.raises(RuntimeError, match="expected CUDA"):
        deform_attn(value, [(2, 3)], locations, weights, impl="triton")
    with pytest.raises(ValueError, match="impl: expected one of"):
        deform_attn(value, [(2, 3)], locations, weights, impl="cuda")
