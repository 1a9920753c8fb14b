import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kpu_fast.kernels import resize_bilinear, resize_bilinear_reference
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

torch.set_num_threads(1)


def make(shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def run(resize, x, size, **options):
    """(result, gradient) under an upstream gradient that is not 1."""
    out = resize(x, size, **options)
    quarters = (torch.arange(out.numel()) % 11 / 4 - 1).reshape(out.shape)  # exact in any dtype
    upstream = torch.empty_like(out).copy_(quarters)  # in out's own layout, as the next operation would hand it back
    return out, torch.autograd.grad(out, x, upstream)[0]


def check(impl, x, size, **options):
    """Error against float64 at most twice that of PyTorch's own resize in the same dtype."""
    exact = run(resize_bilinear_reference, x.detach().double().requires_grad_(), size, **options)
    plain = run(resize_bilinear_reference, x, size, **options)
    ours = run(resize_bilinear, x, size, impl=impl, **options)
    for got, torchs, truth in zip(ours, plain, exact, strict=True):
        assert got.dtype == x.dtype
        assert got.shape == truth.shape
        error, allowed = (got.double() - truth).abs().max(), (torchs.double() - truth).abs().max()
        # Triton's interpreter cuts float32 → bfloat16 off where every GPU rounds.
        cut = 2.0**-8 if impl == "triton" and not x.is_cuda and x.dtype == torch.bfloat16 else 0
        assert error <= 2 * allowed + (1e-6 + cut) * truth.abs().max(), (error, allowed)
    return ours


SIZES = {
    "odd, up in both": ((2, 3, 5, 41), (7, 9)),
    "64 → 14: rows that nothing reads get gradient 0": ((1, 64, 5, 8), (14, 5)),
    "14 → 64: one input is read by ten outputs": ((1, 14, 2, 8), (64, 3)),
    "down in one axis, up in the other": ((2, 9, 2, 16), (4, 7)),
    "from a single token": ((2, 1, 1, 24), (3, 5)),
    "to a single token": ((2, 5, 4, 24), (1, 1)),
    "768 channels: two programs side by side": ((1, 2, 2, 768), (3, 3)),
    "401 channels, no row aligned": ((1, 2, 3, 401), (3, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_matches_float64(case, dtype, impl, device):
    shape, size = SIZES[case]
    check(impl, make(shape, device, dtype), size)


@pytest.mark.parametrize("antialias", [False, True])
def test_layouts_and_strides(antialias, impl, device):
    nchw = make((2, 24, 5, 4), device)
    out, grad = check(impl, nchw, (3, 7), layout="NCHW", antialias=antialias)
    assert out.is_contiguous()
    assert grad.is_contiguous()
    channels_last = nchw.detach().to(memory_format=torch.channels_last).requires_grad_()
    out, grad = check(impl, channels_last, (3, 7), layout="NCHW", antialias=antialias)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    view = nchw.detach().permute(0, 2, 3, 1).requires_grad_()
    assert check(impl, view, (3, 7), antialias=antialias)[0].permute(0, 3, 1, 2).is_contiguous()
    sliced = make((2, 5, 8, 48), device).detach()[:, :, ::2, ::2].requires_grad_()
    check(impl, sliced, (3, 7), antialias=antialias)


def test_expanded_gradient(impl, device):
    x = make((1, 3, 4, 8), device)
    grad = torch.autograd.grad(resize_bilinear(x, (5, 9), impl=impl).sum(), x)[0]  # a gradient of strides 0
    assert abs(grad.sum().item() - 5 * 9 * 8) < 1e-3  # the weights of an output sum to 1


@pytest.mark.parametrize("corners", [False, True])
def test_the_backward_visits_hardly_more_than_what_reads(corners):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels.resize_triton import _reach

    def readers(i, n_in, n_out):  # outputs between inputs i − 1 and i + 1
        places = [Fraction(o * (n_in - 1), max(n_out - 1, 1)) for o in range(n_out)]
        if not corners:
            places = [Fraction((2 * o + 1) * n_in - n_out, 2 * n_out) for o in range(n_out)]
        return sum(i - 1 < place < i + 1 for place in places)

    for n_in, n_out in itertools.product(range(1, 20), repeat=2):
        most = max(readers(i, n_in, n_out) for i in range(n_in))
        assert most <= _reach(n_in, n_out, corners), (n_in, n_out)
        if n_in > 2:  # of fewer inputs none has all its readers
            assert _reach(n_in, n_out, corners) <= most + 1, (n_in, n_out)
    assert corners or (_reach(16, 14, corners), _reach(14, 16, corners)) == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("case", SIZES)
def test_align_corners(case, layout, dtype, impl, device):
    shape, size = SIZES[case]
    if layout == "NCHW":
        shape = (shape[0], shape[3], *shape[1:3])
    check(impl, make(shape, device, dtype), size, layout=layout, align_corners=True)


def test_align_corners_of_numpys_own_kind(impl, device):
    x = make((1, 3, 4, 5), device, torch.float32)
    found, expected = (resize_bilinear(x, (5, 2), align_corners=on, impl=impl) for on in (np.True_, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_independent_of_f_interpolate(impl, device):
    # Sampling at the centres c = (o + ½)·in/out − ½, borders repeated, is grid_sample's definition.
    x = make((1, 5, 3, 4), device).detach()
    y, z = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (7, 2))
    grid = torch.stack(torch.meshgrid(z, y, indexing="xy"), -1)[None].to(device)
    expected = F.grid_sample(x.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)
    found = resize_bilinear(x, (7, 2), impl=impl)
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(14, 3), (5, 9), (64, 3), (1, 1)])
def test_antialias(size, device):
    for dtype in (torch.float64, torch.float32):
        check("auto", make((2, 16, 5, 6), device, dtype), size, antialias=True)
    # PyTorch has no bfloat16 antialias on the CPU to compare with: one rounding from float64 is the measure.
    x = make((2, 16, 5, 6), device, torch.bfloat16)
    exact = run(resize_bilinear_reference, x.detach().double().requires_grad_(), size, antialias=True)
    for got, truth in zip(run(resize_bilinear, x, size, antialias=True), exact, strict=True):
        assert (got.double() - truth).abs().max() <= 2.0**-8 * truth.abs().max()


def test_antialias_reads_every_row(device):
    x = make((1, 64, 2, 3), device)
    grad = torch.autograd.grad(resize_bilinear(x, (14, 2), antialias=True).square().sum(), x)[0]
    assert grad.abs().amin((0, 2, 3)).min() > 0
    plain = torch.autograd.grad(resize_bilinear(x, (14, 2)).square().sum(), x)[0]
    assert (plain.abs().amax((0, 2, 3)) == 0).sum() == 36


def test_equal_size_is_the_tensor_itself(impl, device):
    x = make((1, 3, 4, 8), device)
    assert resize_bilinear(x, (3, 4), impl=impl) is x
    nchw = x.permute(0, 3, 1, 2)
    assert resize_bilinear(nchw, (3, 4), layout="NCHW", antialias=True, impl=impl) is nchw


def test_two_runs_are_bit_equal(impl, device):
    if impl == "torch" and device == "cuda":
        pytest.skip("PyTorch's own bilinear backward uses atomics on CUDA")
    x = make((2, 5, 4, 41), device)
    first, second = (run(resize_bilinear, x, (9, 7), impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_float64_keeps_its_precision():
    x = make((2, 3, 4, 5), "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x: resize_bilinear(x, (5, 3)), (x,))
    assert torch.autograd.gradcheck(lambda x: resize_bilinear(x, (2, 7), antialias=True), (x,))


@pytest.mark.parametrize("adjacent", [True, False])
def test_opcheck(adjacent, device):
    pytest.importorskip("triton", reason="triton is not installed")
    x = make((1, 3, 4, 8), device) if adjacent else make((1, 8, 3, 4), device).detach().permute(0, 2, 3, 1)
    torch.library.opcheck(torch.ops.kpu_fast.resize_bilinear, (x.requires_grad_(), 5, 2, False))
    grad, scale = make((1, 5, 2, 8), device).detach(), torch.tensor(2.0, device=device)
    for triton in (True, False):
        torch.library.opcheck(torch.ops.kpu_fast.resize_bilinear_backward, (grad, scale, 3, 4, adjacent, False, triton))


@pytest.mark.parametrize("antialias", [False, True])
def test_fullgraph_compile(antialias, impl, device):
    x = make((1, 3, 4, 8), device)

    def step(x, size, **options):
        return resize_bilinear(x * 2, size, **options) * 2

    torch._dynamo.reset()
    options = {"antialias": antialias, "impl": impl}
    expected = run(step, x, (5, 3), **options)
    found = run(torch.compile(step, fullgraph=True, backend="aot_eager"), x, (5, 3), **options)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=20, deadline=None)
@given(
    source=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([1, 3, 33]),
    layout=st.sampled_from(["NHWC", "NCHW"]),
    corners=st.booleans(),
    triton=st.booleans(),
)
def test_any_size(source, size, channels, layout, corners, triton):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (2, *source, channels) if layout == "NHWC" else (2, channels, *source)
    x = make(shape, device)
    exact = run(
        resize_bilinear_reference, x.detach().double().requires_grad_(), size, layout=layout, align_corners=corners
    )
    found = run(resize_bilinear, x, size, layout=layout, align_corners=corners, impl="triton" if triton else "torch")
    for got, truth in zip(found, exact, strict=True):
        assert (got.double() - truth).abs().max() <= 2e-6 * (1 + truth.abs().max())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, ValueError, "x: expected a non-empty map of rank 4"),
        ({"x": torch.zeros(0, 3, 4, 5)}, ValueError, "x: expected a non-empty map"),
        ({"x": torch.zeros(1, 3, 4, 5, dtype=torch.uint8)}, TypeError, "x: expected a floating-point dtype"),
        ({"size": (0, 3)}, ValueError, "size: expected"),
        ({"size": (3,)}, ValueError, "size: expected"),
        ({"size": 5}, ValueError, r"size: expected \(height, width\), found 5"),
        ({"x": torch.zeros(1, 3, 4, 5).to(torch.float8_e4m3fn)}, TypeError, "x: .* of 16 bits or more"),
        ({"antialias": True, "align_corners": True}, ValueError, "at most one of them"),
        ({"layout": "NHCW"}, ValueError, "layout: expected one of"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        resize_bilinear(**({"x": torch.zeros(1, 3, 4, 5), "size": (2, 2)} | change))


def test_triton_that_cannot_run_says_why(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(RuntimeError, match=r"torch\.float64"):
        resize_bilinear(torch.zeros(1, 3, 4, 5).double(), (2, 2), impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="expected CUDA"):
        resize_bilinear(torch.zeros(1, 3, 4, 5), (2, 2), impl="triton")


def test_antialias_stays_in_float32_under_autocast():
    x = torch.randn(1, 16, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_bilinear(x, (7, 7), antialias=True)
    torch.testing.assert_close(found, resize_bilinear(x, (7, 7), antialias=True), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(2.9, 2.2), (True, 2), (2.0, 2)], ids=str)
def test_sizes_that_are_no_whole_numbers_are_refused(size):
    with pytest.raises(TypeError, match="whole numbers"):
        resize_bilinear(torch.randn(1, 4, 4, 8), size)


def test_whole_numbers_of_any_library_are_sizes():
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(resize_bilinear(x, (np.int64(2), torch.tensor(3))), resize_bilinear(x, (2, 3)))


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("view", ["dense", "one of many lines", "NCHW", "NCHW, one of many"])
def test_channels_stay_adjacent_or_apart(view, channels, impl, device):
    """Whatever layout PyTorch itself would choose: it goes by all strides, of the batch too."""
    x = torch.randn((2, 6, 5, channels) if "NCHW" not in view else (2, channels, 6, 5), device=device)
    x = x[:, ::2, 1:] if view == "one of many lines" else x[:, :, ::2, 1:] if view == "NCHW, one of many" else x
    x = x.permute(0, 2, 3, 1) if "NCHW" in view else x
    out = resize_bilinear(x, (7, 3), impl=impl)
    assert channels == 1 or (out.stride(3) == 1) == (x.stride(3) == 1)
    torch.testing.assert_close(out, resize_bilinear_reference(x, (7, 3)))


def test_torch_func(impl, device):
    x = torch.randn(3, 2, 4, 4, 8, generator=torch.Generator().manual_seed(0)).to(device)

    def total(one):
        return (resize_bilinear(one, (3, 7), impl=impl) ** 2).sum()

    plain = x.clone().requires_grad_()
    expected = torch.autograd.grad(sum(total(one) for one in plain), plain)[0]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x), expected)
    out = resize_bilinear(plain[0], (3, 7), impl=impl)
    upstreams = torch.randn((2, *out.shape), generator=torch.Generator().manual_seed(1)).to(device)
    batched = torch.autograd.grad(out, plain, upstreams, is_grads_batched=True, retain_graph=True)[0]
    for got, upstream in zip(batched, upstreams, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, plain, upstream, retain_graph=True)[0])


def test_sizes_stay_symbolic():
    """Twice as large as whatever comes: traced once, compiled once."""
    torch._dynamo.reset()

    def double(x):
        return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))

    traced = make_fx(double, tracing_mode="symbolic")(torch.randn(2, 5, 6, 8))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(double, dynamic=True, backend=counter)
    for grid in ((7, 9), (5, 6), (4, 11)):
        x = torch.randn(2, *grid, 8)
        torch.testing.assert_close(traced(x), double(x))
        torch.testing.assert_close(compiled(x), double(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("antialias", [False, True])
def test_export_keeps_the_sides_symbolic(antialias):
    class Resize(torch.nn.Module):
        def forward(self, x):
            return resize_bilinear(x, (8, 8), antialias=antialias)

    free = torch.export.Dim.DYNAMIC
    exported = torch.export.export(Resize(), (torch.rand(2, 12, 10, 4),), dynamic_shapes=({1: free, 2: free},))
    for grid in ((12, 10), (5, 20), (8, 8)):
        x = torch.rand(2, *grid, 4)
        torch.testing.assert_close(exported.module()(x), Resize()(x))


def test_a_derivative_of_the_backward_is_refused(device):
    pytest.importorskip("triton", reason="triton is not installed")
    x = torch.randn(1, 4, 4, 8, device=device, requires_grad=True)
    out = resize_bilinear(x, (3, 7), impl="triton")

    def backward(u):
        return torch.autograd.grad(out, x, u, retain_graph=True)[0]

    with pytest.raises(RuntimeError, match="derivative of its backward"):
        torch.func.jvp(backward, (out.detach(),), (out.detach(),))


@pytest.mark.parametrize("adjacent", [True, False])
def test_second_derivative(adjacent, impl, device):
    """The resize is linear: the derivative of its backward is the resize again."""
    x = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(device)
    x = (x if adjacent else x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)).requires_grad_()
    found, expected = [], []
    for resize, results in ((lambda x: resize_bilinear(x, (5, 7), impl=impl), found), (reference, expected)):
        (first,) = torch.autograd.grad(resize(x).pow(3).sum(), x, create_graph=True)
        results += [first, *torch.autograd.grad(first.pow(2).sum(), x)]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def reference(x):
    return resize_bilinear_reference(x, (5, 7))


def test_shapes_on_the_meta_device():
    for antialias in (False, True):
        x = torch.empty(2, 4, 4, 8, device="meta", requires_grad=True)
        out = resize_bilinear(x, (3, 5), antialias=antialias)
        assert (out.shape, out.device.type) == ((2, 3, 5, 8), "meta")
