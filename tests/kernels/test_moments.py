import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kpu_fast.kernels import Moments, moments, moments_reference
from kpu_fast.kernels.launch import MAX_TOKENS
from moments_worker import TOKENS, features
from torch._subclasses.fake_tensor import FakeTensorMode

torch.set_num_threads(1)
WORKER = Path(__file__).parents[1] / "helpers" / "moments_worker.py"


def make(shape, device, dtype=torch.float32, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + offset).to(device, dtype)


def slack(impl, x):
    """Relative error beyond plain torch's; Triton's interpreter adds a program's 256 tokens one after the other."""
    return 4e-6 if impl == "triton" and not x.is_cuda else 1e-6


def check(x, impl, valid=None):
    """Counts exact, mean and variance as two passes in float64 give them, error at most twice plain float32's."""
    found = moments(x, valid=valid, impl=impl)
    assert all(value.dtype == torch.float64 for value in (*fields(found), found.mean, found.var))
    rows = x.double().reshape(-1, x.shape[-1])
    rows = rows if valid is None else rows[valid.reshape(-1)]
    assert found.count.item() == len(rows)
    mean, var = rows.mean(0), rows.var(0, correction=0)
    wide = rows.to(torch.promote_types(x.dtype, torch.float32))  # what an eager user would convert to first
    for got, plain, truth in (
        (found.mean, wide.mean(0), mean),
        (found.var, wide.var(0, correction=0), var),
        (found.std, wide.std(0, correction=0), var.sqrt()),
        (found.total, wide.sum(0), rows.sum(0)),
    ):
        error, allowed = (got - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= 2 * allowed + slack(impl, x) * truth.abs().max(), (error, allowed)
    reference = moments_reference(x, valid=valid)
    torch.testing.assert_close(found.total, reference.total, rtol=slack(impl, x), atol=1e-5 * len(rows) ** 0.5)
    torch.testing.assert_close(found.square, reference.square, rtol=slack(impl, x), atol=1e-12)
    return found


JAGGED = torch.nested.nested_tensor([torch.zeros(4, 5)], layout=torch.jagged)
SHAPES = {
    "CLIP's map": (2, 14, 14, 768),
    "odd in everything": (3, 5, 7, 41),
    "one more token than a program takes": (1, 257, 33),
    "tokens": (2, 197, 64),
    "x": (5, 401),
    "one token": (1, 7),
    "one channel": (3, 11, 1),
    "five dimensions": (2, 2, 3, 4, 6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_matches_float64(case, dtype, impl, device):
    check(make(SHAPES[case], device, dtype, offset=0.5), impl)


def strided(case, device):
    """Views whose tokens lie in memory in every order that a user has them."""
    return {
        "NCHW": lambda: make((2, 24, 17, 18), device).permute(0, 2, 3, 1),
        "NCHW, one sample": lambda: make((1, 24, 17, 18), device).permute(0, 2, 3, 1),
        "every second of everything": lambda: make((2, 9, 10, 48), device)[:, ::2, ::2, ::2],
        "patch tokens behind a cls token": lambda: make((3, 50, 40), device)[:, 1:],
        "expanded": lambda: make((1, 1, 9, 8), device).expand(3, 4, 9, 8),
        "transposed in space": lambda: make((2, 6, 7, 8), device).transpose(1, 2),
        "five dimensions that do not join": lambda: make((2, 4, 4, 4, 6), device)[:, ::2, ::2, ::2],
        "channels first, half of them": lambda: make((2, 20, 5, 9), device).permute(0, 2, 3, 1)[..., 3:13],
    }[case]()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        "NCHW", "NCHW, one sample", "every second of everything", "patch tokens behind a cls token", "expanded",
        "transposed in space", "five dimensions that do not join", "channels first, half of them",
    ],
)  # fmt: skip
def test_strides(case, masked, impl, device):
    x = strided(case, device)
    valid = make(x.shape[:-1], device, seed=1) > 0.3 if masked else None
    found = check(x, impl, valid)
    dense = moments(x.contiguous(), valid=valid, impl=impl)
    torch.testing.assert_close(found.var, dense.var, rtol=slack(impl, x), atol=0)


@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_a_mean_far_above_the_spread(ratio, impl, device):
    x = make((3, 300, 33), device, offset=ratio)  # its rounding to float32 belongs to x: the variance is that of x
    rows = x.double().reshape(-1, 33)
    found, truth = moments(x, impl=impl), rows.var(0, correction=0)
    assert ((found.var - truth).abs() / truth).max() < max(slack(impl, x), 1e-15 * ratio**2)
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-14, atol=0)
    # What summing squares in float32 would give: nothing of the variance.
    plain = rows.float().square().mean(0) - rows.float().mean(0) ** 2
    assert ((plain - truth).abs() / truth).max() > 0.01


def test_channels_of_very_different_size(impl, device):
    scale = torch.logspace(-15, 15, 31, device=device)
    x = make((2, 300, 31), device, offset=2.0) * scale
    found = moments(x, impl=impl)
    torch.testing.assert_close(found.std, x.double().std((0, 1), correction=0), rtol=slack(impl, x), atol=0)


def test_constant_channels_have_no_variance(impl, device):
    found = moments(torch.full((4, 70, 3), 0.1, device=device), impl=impl)
    torch.testing.assert_close(found.mean, torch.full_like(found.mean, 0.1), rtol=1e-7, atol=0)
    assert (found.var >= 0).all()
    assert found.var.max() < 1e-16


def test_padding_may_hold_anything(impl, device):
    x = make((2, 150, 20), device)
    valid = make((2, 150), device, seed=1) > 0
    valid[0, :90] = False
    poisoned = x.masked_fill(~valid[..., None], float("nan"))
    poisoned[0, :50] = float("inf")
    for a, b in zip(fields(moments(poisoned, valid=valid, impl=impl)), fields(check(x, impl, valid)), strict=True):
        assert torch.equal(a, b)
    every_second = torch.stack([valid, ~valid], -1)[..., 0]  # a mask with strides of its own
    assert torch.equal(moments(poisoned, valid=every_second, impl=impl).var, moments(x, valid=valid, impl=impl).var)


def test_nothing_valid_is_zero(impl, device):
    x = torch.full((2, 3, 5), float("nan"), device=device)
    found = moments(x, valid=torch.zeros(2, 3, dtype=torch.bool, device=device), impl=impl)
    for value in (*fields(found), found.mean, found.var, found.std):
        assert value.abs().max() == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at the overflow and at Inf − Inf
@pytest.mark.parametrize("size", [2e36, 1e25])  # whose sum overflows, and whose square
def test_what_overflows_is_seen(size, impl, device):
    x = make((300, 2), device) * size
    x[:, 0] = x[:, 0].abs()
    assert not moments(x, impl=impl).var[0].isfinite()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter, at Inf − Inf
def test_nan_and_inf_come_through(impl, device):
    x = make((2, 30, 3), device)
    x[0, 0, 0], x[1, 2, 1] = float("nan"), float("inf")
    found = moments(x, impl=impl)
    assert found.var.isfinite().tolist() == [False, False, True]
    assert not found.mean[:2].isfinite().any()


def fields(m):
    return m.count, m.total, m.square


def test_a_trace_is_not_of_one_size():
    """torch.jit.trace sees the operator, not the blocks into which these few rows fall."""
    traced = torch.jit.trace(lambda x: moments(x, impl="torch").mean, torch.rand(10, 8), check_trace=False)
    x = torch.rand(200_000, 8)
    torch.testing.assert_close(traced(x), moments(x).mean)


def test_statistics_follow_what_is_added_to_them(impl, device):
    one, other = (make((3, 5, 8), device, seed=seed) for seed in (1, 2))
    found, more = moments(one, impl=impl), moments(other, impl=impl)
    found.mean, found.var  # noqa: B018
    for name in ("count", "total", "square"):
        getattr(found, name).add_(getattr(more, name))
    both = moments(torch.cat([one, other]), impl=impl)
    torch.testing.assert_close(found.mean, both.mean)
    torch.testing.assert_close(found.var, both.var)


def test_two_runs_are_bit_equal(impl, device):
    x = make((2, 300, 41), device)
    for first, second in zip(fields(moments(x, impl=impl)), fields(moments(x, impl=impl)), strict=True):
        assert torch.equal(first, second)


def test_the_order_of_dimensions_is_that_of_memory(impl, device):
    x, valid = make((5, 4, 3, 24), device), torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    valid = valid.to(device)
    dense = moments(x, valid=valid, impl=impl)
    turned = moments(x.permute(2, 0, 1, 3), valid=valid.permute(2, 0, 1), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(fields(dense), fields(turned), strict=True))


def test_merge_is_the_union(impl, device):
    x = make((7, 90, 21), device)
    x[2:] += 50
    parts = [moments(part, impl=impl) for part in x.split([2, 1, 4])]
    merged, whole = parts[0].merge(parts[1]).merge(parts[2]), moments(x, impl=impl)
    assert merged.count == whole.count
    for a, b in ((merged.mean, whole.mean), (merged.var, whole.var)):
        torch.testing.assert_close(a, b, rtol=slack(impl, x), atol=1e-7)
    with pytest.raises(ValueError, match="found 21 and 1"):
        whole.merge(moments(x[..., :1], impl=impl))


def test_two_ranks_with_unequal_counts(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(tmp_path / "rendezvous"), str(tmp_path / f"{rank}.pt")],
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-3000:]
    x = features()
    alone = moments(x[: TOKENS[0]]).merge(moments(x[TOKENS[0] :]))
    rows = x.double()
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt")
        assert saved.pop("calls") == [2 * 19 + 1]
        found = Moments(**saved)
        for a, b in zip(fields(found), fields(alone), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.var, rows.var(0, correction=0), rtol=1e-7, atol=0)


def test_without_a_process_group_it_is_the_same():
    alone = moments(torch.randn(5, 3))
    assert alone.all_reduce() is alone


def test_vmap_is_a_loop_of_its_own(device):
    """Not torch's for operators without a rule, which it warns about."""
    x = make((3, 5, 4), device)
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        found = torch.vmap(lambda one: moments(one).mean)(x)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    torch.testing.assert_close(found, x.double().mean(1))


def test_statistics_can_be_saved(tmp_path, impl, device):
    found = moments(make((5, 4), device), impl=impl)
    torch.save({"seen": found}, tmp_path / "seen.pt")
    again = torch.load(tmp_path / "seen.pt")["seen"]
    torch.testing.assert_close(
        [again.count, again.mean, again.var], [found.count, found.mean, found.var], rtol=0, atol=0
    )


def test_statistics_carry_no_gradient(impl, device):
    x = make((2, 9, 8), device).requires_grad_()
    found = moments(x * 2, impl=impl)
    assert not any(value.requires_grad for value in (*fields(found), found.mean, found.std))


def test_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed")
    x, valid = make((1, 2, 9, 8), device), make((1, 2, 9), device) > 0
    for triton in (True, False):
        torch.library.opcheck(torch.ops.kpu_fast.moments, (x, valid, triton))
        torch.library.opcheck(torch.ops.kpu_fast.moments, (x.bfloat16(), None, triton))


def test_fullgraph_compile(impl, device):
    x, valid = make((2, 5, 9, 8), device), make((2, 5, 9), device, seed=1) > 0

    def step(x, valid):
        found = moments(x * 2, impl=impl).merge(moments(x + 1, valid=valid, impl=impl))
        return (x - found.mean) / found.std, found

    torch._dynamo.reset()
    expected, found = step(x, valid), torch.compile(step, fullgraph=True, backend="aot_eager")(x, valid)
    torch.testing.assert_close(found[0], expected[0])
    for a, b in zip(fields(found[1]), fields(expected[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_waits_for_the_gpu(impl, device):
    def step(x, valid):
        found = moments(x, valid=valid, impl=impl).merge(moments(x, impl=impl)).all_reduce()
        return found.mean, found.std

    if device == "cuda":
        x, valid = make((2, 5, 9, 8), device), make((2, 5, 9), device, seed=1) > 0
        step(x, valid)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(x, valid)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with FakeTensorMode():  # where reading a value is an error
        x = torch.empty(2, 5, 9, 8, device="cuda")
        mean, std = step(x, torch.empty(2, 5, 9, dtype=torch.bool, device="cuda"))
        assert mean.device.type == std.device.type == "cuda"


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    channels=st.sampled_from([1, 3, 33]),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    masked=st.booleans(),
    triton=st.booleans(),
)
def test_any_shape_in_any_order(shape, channels, order, dtype, masked, triton):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [*shape, channels]
    axes = list(range(len(sizes)))
    order.shuffle(axes)
    stored = make([sizes[axis] for axis in axes], device, dtype, offset=3.0)
    x = stored.permute([axes.index(axis) for axis in range(len(sizes))])
    assert list(x.shape) == sizes
    valid = make(shape, device, seed=1) > 0 if masked else None
    if masked and not valid.any():
        valid = None
    check(x, "triton" if triton and dtype != torch.float64 else "torch", valid)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5)}, ValueError, "x: expected (…, C)"),
        ({"x": torch.zeros(0, 5)}, ValueError, "at least one token and one channel"),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, "at least one token and one channel"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x: expected a floating-point dtype"),
        ({"x": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, TypeError, "floating-point dtype of 16 bits or more"),
        ({"valid": torch.ones(4, 5, dtype=torch.bool)}, ValueError, "valid: expected shape (4,), found (4, 5)"),
        ({"valid": torch.ones(4)}, TypeError, "valid: expected torch.bool"),
        ({"valid": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "valid: expected the device of x"),
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor, found list"),
        ({"x": torch.zeros(4, 5).to_sparse()}, TypeError, "x: expected a dense tensor, found torch.sparse_coo"),
        (
            {"x": torch.nested.nested_tensor([torch.zeros(4, 5)], layout=torch.jagged)},
            TypeError,
            "x: expected a dense tensor, found nested",
        ),
        ({"valid": [True]}, TypeError, "valid: expected a tensor, found list"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error) as raised:
        moments(**({"x": torch.zeros(4, 5)} | change))
    assert message in str(raised.value)


def test_more_tokens_than_int32_counts_take_the_torch_path(device):
    pytest.importorskip("triton", reason="triton is not installed")
    x = torch.zeros((1, 1), device=device).expand(MAX_TOKENS + 1, 1)
    with pytest.raises(RuntimeError, match=f"at most {MAX_TOKENS} tokens"):
        moments(x, impl="triton")
