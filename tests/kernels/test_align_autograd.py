import pytest
import torch
from align_inputs import as_double, make, mask, run, sides
from kpu_fast.kernels import AlignTerm, align_loss, align_loss_reference, align_losses, align_op
from torch.autograd import forward_ad

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options",
    [{"resize": "source"}, {"resize": "target", "reduction": "token"}, {"resize": "source", "cos_over": "map"}],
    ids=str,
)
@pytest.mark.parametrize("loss", [align_loss_reference, align_loss])
def test_gradcheck(loss, options):
    source, target = sides((2, 2, 3, 3), (2, 3, 2, 3), "cpu", torch.float64)
    options = options | {"target_std": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)}
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, **options), (source, target))


def test_operator_and_direct_call_are_the_same(impl, device):
    source, target = sides((2, 3, 4, 24), (2, 3, 4, 24), device)
    arguments = (None, None, None, 0.9, 0.1, 1.0, "none", False, "token", "mean", impl == "triton", True, True)
    direct = run(align_loss, source, target, impl=impl)
    operator = run(lambda s, t: align_op._forward(s, t, *arguments)[0], source, target)
    assert all(torch.equal(a, b) for a, b in zip(direct, operator, strict=True))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"reduction": "sample"}),
        (torch.float32, {"reduction": "token", "resize": "target"}),
        (torch.float32, {"cos_over": "map"}),
        (torch.float16, {}),  # the mean whose gradient is made in the backward
    ],
    ids=str,
)
def test_a_teacher_run_under_inference_mode(dtype, options, direct, impl, device):
    source, target = sides((2, 3, 4, 24), (2, 5, 3, 24) if "resize" in options else (2, 3, 4, 24), device, dtype)
    rest = [target.detach(), make((24,), device), make((24,), device).abs() + 0.5, mask((2, 3, 4), device)]
    with torch.inference_mode():
        inferred = [x.clone() for x in rest]

    def one(target, mean, std, valid):
        if direct:
            chosen = options | {"target_mean": mean, "target_std": std, "valid": valid, "impl": impl}
            return run(align_loss, source, target, **chosen)
        resize, over, reduction = (
            options.get(*x) for x in (("resize", "none"), ("cos_over", "token"), ("reduction", "mean"))
        )
        call = (mean, std, valid, 0.9, 0.1, 1.0, resize, False, over, reduction, impl == "triton", True, False)
        return run(lambda s, t: align_op._forward(s, t, *call)[0], source, target)

    assert all(x.is_inference() for x in inferred)
    assert all(torch.equal(a, b) for a, b in zip(one(*inferred), one(*rest), strict=True))


def test_nothing_is_kept_without_a_gradient(impl, device, monkeypatch):
    with torch.inference_mode():
        source, target = (make((2, 3, 4, 8), device, seed) for seed in (0, 1))
        monkeypatch.setattr(torch.Tensor, "clone", lambda x: pytest.fail("copied"))
        assert align_loss(source, target, target_mean=target[0, 0, 0], reduction="sample", impl=impl).isfinite().all()


def test_float16_gradient_survives_a_loss_scaler(impl, device):
    # 1/(N·C) ≈ 4e-5: most of the gradient is below float16's smallest normal number until 65536 multiplies it.
    source, target = sides((1, 8, 16, 192), (1, 8, 16, 192), device, torch.float16)
    exact = run(align_loss_reference, *as_double(source, target), torch.tensor(65536.0))
    found = run(align_loss, source, target, torch.tensor(65536.0), impl=impl)
    for got, truth in zip(found[1:], exact[1:], strict=True):
        assert (got.double() - truth).abs().max() < 1e-3 * truth.abs().max()


def test_walking_the_graph_twice_gives_the_same_gradient(impl, device):
    # The gradient made in the forward is scaled in place; a second walk must not find it scaled.
    source, target = sides((2, 3, 4, 24), (2, 3, 4, 24), device)
    loss = align_loss(source, target, impl=impl)
    first = torch.autograd.grad(loss * 3, (source, target), retain_graph=True)
    second = torch.autograd.grad(loss * 0.5, (source, target), retain_graph=True)
    third = torch.autograd.grad(loss, (source, target))
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, 6 * b)
        torch.testing.assert_close(a, 3 * c)


TRANSFORMED = [{}, {"reduction": "sample"}, {"reduction": "token"}, {"cos_over": "map"}, {"resize": "source"}]


@pytest.mark.parametrize("options", TRANSFORMED, ids=str)
def test_torch_func(options, device):
    """vmap, grad, jvp and forward mode, against one call at a time."""
    grid = (3, 5) if options.get("resize") else (4, 4)
    s, t = make((3, 2, 4, 4, 8), device), make((3, 2, *grid, 8), device, seed=1)

    def loss(s, t):
        return align_loss(s, t, **options)

    plain = s.clone().requires_grad_()
    each = torch.stack([loss(a, b) for a, b in zip(plain, t, strict=True)])
    expected = torch.autograd.grad(each.sum(), plain)[0]
    mapped = s.clone().requires_grad_()
    found = torch.func.vmap(loss)(mapped, t)
    torch.testing.assert_close(found, each)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), mapped)[0], expected)
    torch.testing.assert_close(torch.func.grad(lambda a: loss(a, t[0]).sum())(s[0]), expected[0])
    direction = make(s[0].shape, device, seed=2)
    value, tangent = torch.func.jvp(lambda a: loss(a, t[0]).sum(), (s[0],), (direction,))
    torch.testing.assert_close(tangent, (direction * expected[0]).sum())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(s[0], direction), t[0]).sum())
    torch.testing.assert_close(dual.tangent, tangent)
    torch.testing.assert_close(dual.primal, value)


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("options", TRANSFORMED, ids=str)
def test_batched_upstream_gradients(options, again, impl, device):
    grid = (3, 5) if options.get("resize") else (4, 4)
    sides = [make((2, 4, 4, 8), device).requires_grad_(), make((2, *grid, 8), device, seed=1).requires_grad_()]
    loss = align_loss(*sides, impl=impl, **options)
    upstreams = make((3, *loss.shape), device, seed=2)
    one_by_one = [torch.autograd.grad(loss, sides, upstream, retain_graph=True) for upstream in upstreams]
    mapped = torch.func.vmap(lambda upstream: torch.autograd.grad(loss, sides, upstream, retain_graph=True))(upstreams)
    batched = torch.autograd.grad(loss, sides, upstreams, is_grads_batched=True, retain_graph=again)
    for some, a, b in zip(zip(*one_by_one, strict=True), mapped, batched, strict=True):
        torch.testing.assert_close(a, torch.stack(some))
        torch.testing.assert_close(b, torch.stack(some))


@pytest.mark.parametrize("options", [{}, {"reduction": "sample"}], ids=str)
def test_a_derivative_of_the_backward_is_refused(options, impl, device):
    x, y = make((2, 3, 3, 8), device).requires_grad_(), make((2, 3, 3, 8), device, seed=1)
    loss = align_loss(x, y, impl=impl, **options)

    def backward(u):
        return torch.autograd.grad(loss, x, u, retain_graph=True)[0]

    one = torch.ones_like(loss)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.jvp(backward, (one,), (one,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="cannot be differentiated again"):
        backward(forward_ad.make_dual(one, one))


def test_no_upstream_gradients_at_all(impl, device):
    x, y = make((2, 3, 3, 8), device).requires_grad_(), make((2, 3, 3, 8), device, seed=1)
    loss = align_loss(x, y, impl=impl, reduction="sample")
    found = torch.func.vmap(lambda u: torch.autograd.grad(loss, x, u, retain_graph=True)[0])(make((0, 2), device))
    assert found.shape == (0, 2, 3, 3, 8)


def test_statistics_stay_constants_under_a_transform(device):
    x, y, mean = make((2, 4, 8), device), make((2, 4, 8), device, seed=1), make((8,), device, seed=2).double()
    plain = align_loss(x, y, target_mean=mean)
    mapped = torch.func.vmap(lambda a, b: align_loss(a, b, target_mean=mean))(x[None], y[None])
    assert mapped.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(mapped[0], plain)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mean, torch.ones_like(mean))
        assert forward_ad.unpack_dual(align_loss(x, y, target_mean=dual)).tangent is None


@pytest.mark.parametrize("options", [{}, {"resize": "source"}, {"resize": "target"}, {"reduction": "sample"}], ids=str)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_upstream_is_not_rounded_to_bfloat16(options, again, dtype, impl, device):
    """0.9 lies between two bfloat16: a rounded factor would shorten the whole gradient by 0.17 %."""
    grids = {"source": ((2, 5, 6, 64), (2, 9, 8, 64)), "target": ((2, 9, 8, 64), (2, 5, 6, 64))}
    shapes = grids.get(options.get("resize"), ((2, 9, 8, 64), (2, 9, 8, 64)))
    source, target = sides(*shapes, device, dtype)
    value = align_loss(source, target, impl=impl, **options)
    truth = run(align_loss_reference, *as_double(source, target), torch.full(value.shape, 0.9), **options)
    found = torch.autograd.grad(value, (source, target), torch.full_like(value, 0.9), retain_graph=again)
    for got, expected in zip(found, truth[1:], strict=True):
        ratio = (got.double() * expected).sum() / expected.square().sum()
        # The interpreter cuts bfloat16 off, which shortens every number by about half an ulp, twice here.
        cut = 2.0**-7 if impl == "triton" and not source.is_cuda and dtype == torch.bfloat16 else 0
        assert abs(ratio - 1) <= 4e-4 + cut


@pytest.mark.parametrize("options", [{"reduction": "sample"}, {"cos_over": "map"}], ids=str)
def test_statistics_may_move_on_before_the_backward(options, impl, device):
    source, target = sides((2, 3, 4, 8), (2, 3, 4, 8), device)
    mean, std = make((8,), device, seed=5), make((8,), device, seed=6).abs() + 0.5
    options = options | {"target_mean": mean, "target_std": std, "impl": impl}
    (expected,) = torch.autograd.grad(align_loss(source, target, **options).sum(), source)
    loss = align_loss(source, target, **options).sum()
    mean.mul_(0.5)
    std.data.mul_(2.0)
    assert torch.equal(torch.autograd.grad(loss, source)[0], expected)


def test_a_gradient_longer_than_the_scaling_programs_take_at_once(device, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels import align_launch, launch

    monkeypatch.setattr(align_launch, "SCALE_TILE", launch.Tile(1, 64, 4))
    monkeypatch.setattr(align_launch, "SCALE_PROGRAMS", 3)
    monkeypatch.setattr(align_launch, "FINISH_TILE", launch.Tile(32, 4, 4))
    source, target = sides((1, 4, 9, 24), (1, 4, 9, 24), device)
    found, expected = (align_loss(source, target, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(found, expected)
    for factor in (-1.5, 1.0):
        made, wanted = (
            torch.autograd.grad(factor * align_loss(source, target, impl=impl), (source, target))
            for impl in ("triton", "torch")
        )
        torch.testing.assert_close(made, wanted)


def test_second_derivative_is_refused():
    source, target = sides((1, 2, 2, 24), (1, 2, 2, 24), "cpu")
    with pytest.raises(RuntimeError, match="align_loss_reference"):
        torch.autograd.grad(align_loss(source, target), source, create_graph=True)


def test_no_gradient_no_work(impl, device, monkeypatch):
    kept = []
    allocate = align_op._allocate_gradients
    monkeypatch.setattr(align_op, "_allocate_gradients", lambda *a: kept.append(allocate(*a)) or allocate(*a))
    source, target = sides((1, 2, 2, 24), (1, 2, 2, 24), device)
    with torch.no_grad():
        assert not align_loss(source, target, impl=impl).requires_grad
    assert [g.numel() for pair in kept for g in pair] == [0, 0]


@pytest.mark.parametrize("reduction", ["mean", "sample"])
@pytest.mark.parametrize("resize", ["source", "target", None])
def test_tensors_that_hooks_hand_back_as_negative_views(resize, reduction, impl, device):
    source, target = (make((2, 4, 5, 6), device, seed=seed) for seed in (1, 2))
    if resize:
        target = make((2, 3, 4, 6), device, seed=2)
    options = {"resize": resize, "reduction": reduction, "impl": impl}
    sides = source.requires_grad_(), target.requires_grad_()
    expected = run(align_loss, *sides, **options)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: torch._neg_view(-x)):
        found = run(align_loss, *sides, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("many", [False, True], ids=["align_loss", "align_losses"])
def test_a_hook_may_give_the_kept_gradient_back_with_gaps(many, impl, device):
    source, target = sides((2, 3, 4, 8), (2, 3, 4, 8), device)
    target, pages = target.detach(), []

    def unpack(kept):
        if kept.dim() < 2:
            return kept
        pages.append(torch.full((*kept.shape[:-1], 2 * kept.shape[-1]), 7.0, device=kept.device))
        return pages[-1][..., : kept.shape[-1]].copy_(kept)

    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
        if many:
            loss = align_losses([AlignTerm(source, target), AlignTerm(source.detach(), target)], impl=impl)[0]
        else:
            loss = align_loss(source, target, impl=impl)
    (3 * loss).backward()
    (expected,) = torch.autograd.grad(3 * align_loss_reference(source, target), source)
    torch.testing.assert_close(source.grad, expected)
    assert pages
    assert all((page[..., 8:] == 7).all() for page in pages)


@pytest.mark.parametrize("many", [False, True], ids=["align_loss", "align_losses"])
def test_of_a_float16_teacher_nothing_is_kept(many, impl, device):
    source = make((2, 3, 4, 8), device).requires_grad_()
    target, kept = make((2, 3, 4, 8), device, 1).half(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        if many and impl == "triton":
            loss = align_losses([AlignTerm(source, target)] * 2, impl=impl)[0]
        else:
            loss = align_loss(source, target, impl=impl)
    assert not [x for x in kept if x.dtype == torch.float16 and x.numel()]
    value, gradient = run(align_loss_reference, *as_double(source, target), torch.tensor(1.0))
    torch.testing.assert_close(loss.double(), value)
    torch.testing.assert_close(torch.autograd.grad(loss, source)[0].double(), gradient, rtol=1e-5, atol=1e-7)
