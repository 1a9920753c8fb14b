import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kpu_fast.kernels import AlignTerm, align_loss, align_loss_reference, align_losses

torch.set_num_threads(1)


def make(shape, device, dtype=torch.float32, seed=0, grad=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return x.requires_grad_(grad)


def mask(shape, device, seed=5):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4).to(device)


def step(device, dtype=torch.float32):
    """The terms of a small KPU step: x, maps of three widths, masks, statistics, gradients to one side and to both."""
    shapes = [(6, 40), (2, 3, 5, 40), (1, 7, 3, 24), (1, 4, 2, 48), (1, 2, 1, 96), (1, 7, 3, 40), (2, 9, 40)]
    terms = []
    for i, shape in enumerate(shapes):
        target = make(shape, device, dtype, 100 + i, grad=i % 3 == 2)
        terms.append(
            AlignTerm(make(shape, device, dtype, i), target, cos_weight=0.3 + i, l1_weight=0.1 * i, beta=i / 3)
        )
    terms[1] = terms[1]._replace(valid=mask((2, 3, 5), device))
    terms[5] = terms[5]._replace(valid=mask((1, 7, 3), device))
    terms[3] = terms[3]._replace(
        target_mean=torch.ones(48, device=device), target_std=torch.full((48,), 2.0).to(device)
    )
    return terms


def each(terms, impl, loss=align_loss):
    """The same losses one by one."""
    options = {} if loss is align_loss_reference else {"impl": impl}
    return torch.stack(
        [
            loss(
                term.source, term.target, cos_weight=term.cos_weight, l1_weight=term.l1_weight, beta=term.beta,
                target_mean=term.target_mean, target_std=term.target_std, valid=term.valid, **options,
            )
            for term in terms
        ]
    )  # fmt: skip


def gradients(losses, terms, upstream=None):
    wanted = [x for term in terms for x in term[:2] if x.requires_grad]
    upstream = torch.linspace(-1.5, 2.5, len(terms)) if upstream is None else upstream
    return losses, *torch.autograd.grad(losses, wanted, upstream.to(losses.device, losses.dtype))


def as_double(terms):
    return [
        AlignTerm(
            *(
                x.detach().double().requires_grad_(x.requires_grad)
                if isinstance(x, torch.Tensor) and x.is_floating_point()
                else x
                for x in term
            )
        )
        for term in terms
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_float64(dtype, impl, device):
    terms, exact = step(device, dtype), as_double(step(device, dtype))
    truths = gradients(each(exact, impl, align_loss_reference), exact)
    singles = gradients(each(terms, impl), terms)
    for got, single, truth in zip(gradients(align_losses(terms, impl=impl), terms), singles, truths, strict=True):
        error, allowed = (got.double() - truth).abs().max(), (single.double() - truth).abs().max()
        assert error <= 2 * allowed + 2e-6 * truth.abs().max()


def test_statistics_of_several_dtypes(impl, device):
    terms = [
        AlignTerm(
            make((4, 8), device, seed=i),
            make((4, 8), device, seed=7),
            target_mean=torch.ones(8, dtype=dtype).to(device),
        )
        for i, dtype in enumerate((torch.float32, torch.bfloat16))
    ]
    torch.testing.assert_close(align_losses(terms, impl=impl), each(terms, impl))


def test_terms_share_launches(device, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels import align_group_launch, launch

    launched = []

    def counted(*arguments, **constants):
        launched.append(constants["COUNT"])
        launch.run_kernel(*arguments, **constants)

    monkeypatch.setattr(align_group_launch, "run_kernel", counted)
    terms = [AlignTerm(make((1, 2, 2, 40), device, seed=i), make((1, 2, 2, 40), device, grad=False)) for i in range(11)]
    losses = align_losses(terms, impl="triton")
    assert launched == [launch.MAX_SLOTS, 11 - launch.MAX_SLOTS, 11]
    torch.testing.assert_close(losses, each(terms, "torch"))
    gradients(losses, terms)
    assert launched[3:] == [launch.MAX_SLOTS, 11 - launch.MAX_SLOTS]


def test_terms_like_earlier_ones_are_not_looked_at_again(device, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels import align_group

    def term(**changes):
        sides = make((2, 3, 5, 24), device, seed=1), make((2, 3, 5, 24), device, seed=2, grad=False)
        mean, valid = torch.zeros(24, device=device), torch.ones(2, 3, 5, dtype=torch.bool, device=device)
        return AlignTerm(*sides, target_mean=mean, valid=valid)._replace(**changes)

    first = align_losses([term(), term()], impl="triton")

    def look(*tensors):
        raise ValueError("looked at")

    monkeypatch.setattr(align_group, "check_tensors", look)
    assert torch.equal(align_losses([term(), term()], impl="triton"), first)
    other = term()
    for change in (
        {"source": other.source.double()},
        {"target": other.target.transpose(1, 2).contiguous().transpose(1, 2)},
        {"target_mean": torch.zeros(24, device=device, requires_grad=True)},
        {"target_mean": None},
        {"target_std": torch.ones(24, device=device)},
        {"valid": other.valid.int()},
        {"valid": other.valid[:1]},
    ):
        with pytest.raises(ValueError, match="term 1: looked at"):
            align_losses([term(), term(**change)], impl="triton")
    with pytest.raises(ValueError, match="term 1: beta: expected 0 or a number"):
        align_losses([term(), term(beta=-1.0)], impl="triton")


@pytest.mark.parametrize("shape", [(3, 24), (3, 5, 24), (3, 2, 4, 24)])
def test_exported_with_an_open_batch(shape):
    pytest.importorskip("triton", reason="triton is not installed")

    class Losses(torch.nn.Module):
        def forward(self, x, y):
            return align_losses([AlignTerm(x, y), AlignTerm(y, x)], impl="triton")

    open_batch = {0: torch.export.Dim.DYNAMIC}
    sides = make(shape, "cpu", grad=False), make(shape, "cpu", seed=1, grad=False)
    program = torch.export.export(Losses(), sides, dynamic_shapes=(open_batch, open_batch), strict=False)
    more = [torch.cat([side, side + 1]) for side in sides]
    torch.testing.assert_close(program.module()(*more), Losses()(*more))


def test_more_terms_than_one_finish_takes(device):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels.launch import FINISH_TILE

    terms = [
        AlignTerm(make((3, 8), device, seed=i), make((3, 8), device, seed=99), cos_weight=float(i))
        for i in range(FINISH_TILE.rows + 3)
    ]
    torch.testing.assert_close(align_losses(terms, impl="triton"), each(terms, "torch"))


def test_more_partials_than_the_finish_adds_at_once(device, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels import align_group_launch, launch

    monkeypatch.setattr(align_group_launch, "FINISH_TILE", launch.Tile(32, 4, 4))
    terms = [AlignTerm(make((1, 900, 32), device, seed=i), make((1, 900, 32), device, seed=9)) for i in range(2)]
    torch.testing.assert_close(align_losses(terms, impl="triton"), each(terms, "torch"))


def test_gradients_longer_than_the_scaling_programs_take_at_once(device, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels import align_group_launch, launch

    monkeypatch.setattr(align_group_launch, "SCALE_TILE", launch.Tile(1, 64, 4))
    monkeypatch.setattr(align_group_launch, "SCALE_PROGRAMS", 7)
    terms = [AlignTerm(make((n, 32), device, seed=n), make((n, 32), device, seed=9)) for n in (1, 37, 12)]
    upstream = torch.tensor([-1.5, 2.5, 1.0], device=device)
    found, expected = (
        gradients(losses, terms, upstream) for losses in (align_losses(terms, impl="triton"), each(terms, "torch"))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_views_share_launches(device, monkeypatch):
    """Patch tokens behind a cls token, as CLIP and DINOv2 give them; tokens ahead of samples; one sample expanded."""
    pytest.importorskip("triton", reason="triton is not installed")
    from kpu_fast.kernels import align_group

    monkeypatch.setattr(align_group, "align_loss", None)  # nothing is left to a call of its own
    views = [
        lambda x: x[:, 1:],
        lambda x: x[:, 1:].unflatten(1, (2, 3)),
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(3, 7, 40),
        lambda x: x[:, 0],
    ]
    wholes = [[make((3, 7, 40), device, seed=10 * i + j) for i in range(len(views))] for j in (0, 1)]
    terms = [AlignTerm(view(s), view(t), beta=0.5) for view, s, t in zip(views, *wholes, strict=True)]
    upstream = torch.linspace(-1.5, 2.5, len(terms)).to(device)
    leaves = [x for some in wholes for x in some]
    found = align_losses(terms, impl="triton")
    expected = each(terms, None, align_loss_reference)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_under_a_transform(impl, device):
    terms = step(device)[:2]
    sides = [x.detach() for term in terms for x in term[:2]]

    def total(*sides):
        pairs = zip(terms, sides[::2], sides[1::2], strict=True)
        return align_losses([term._replace(source=s, target=t) for term, s, t in pairs], impl=impl).sum()

    plain = [x.clone().requires_grad_() for x in sides]
    expected = torch.autograd.grad(total(*plain), plain)
    wide = [AlignTerm(torch.zeros(2, 8), torch.zeros(2, 8).double())] * 2  # which the kernels do not take
    assert torch.func.vmap(lambda a: align_losses([t._replace(source=a) for t in wide], impl=impl))(
        torch.zeros(3, 2, 8)
    ).shape == (3, 2)
    for a, b in zip(torch.func.grad(total, argnums=(0, 1, 2, 3))(*sides), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_share_still_counts(impl, device):
    nchw = make((2, 8, 3, 4), device, seed=1, grad=False).permute(0, 2, 3, 1).requires_grad_()
    half = make((2, 3, 4, 8), device, torch.float16, 2)
    terms = [
        AlignTerm(make((4, 8), device), make((4, 8), device, seed=7)),
        AlignTerm(nchw, make((2, 3, 4, 8), device, seed=3)),
        AlignTerm(half, make((2, 3, 4, 8), device, torch.float16, 4)),
        AlignTerm(make((4, 16), device), make((4, 16), device, seed=7)),
    ]
    found, expected = gradients(align_losses(terms, impl=impl), terms), gradients(each(terms, impl), terms)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_upstream_of_one_leaves_the_gradient_as_it_was_made(impl, device):
    terms = step(device)
    ones = gradients(align_losses(terms, impl=impl), terms, torch.ones(len(terms)))
    of_sum = torch.autograd.grad(
        align_losses(terms, impl=impl).sum(), [x for term in terms for x in term[:2] if x.requires_grad]
    )
    assert all(torch.equal(a, b) for a, b in zip(ones[1:], of_sum, strict=True))


def test_two_runs_and_two_walks_are_equal(impl, device):
    terms = step(device)
    first, second = (gradients(align_losses(terms, impl=impl), terms) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    losses = align_losses(terms, impl=impl)
    wanted = [x for term in terms for x in term[:2] if x.requires_grad]
    twice = torch.autograd.grad(losses.sum() * 2, wanted, retain_graph=True)
    once = torch.autograd.grad(losses.sum(), wanted)
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_no_gradient_and_partly_unused(impl, device):
    terms = step(device)
    with torch.no_grad():
        assert not align_losses(terms, impl=impl).requires_grad
    losses = align_losses(terms, impl=impl)
    grads = torch.autograd.grad(losses[2], [terms[2].source, terms[0].source], allow_unused=True)
    expected = torch.autograd.grad(each(terms, impl)[2], terms[2].source)[0]
    torch.testing.assert_close(grads[0], expected)
    assert grads[1] is None or not grads[1].any()


def test_nothing_valid_is_zero_and_padding_may_hold_nan(impl, device):
    a, b = make((1, 3, 3, 40), device, seed=1), make((1, 3, 3, 40), device, seed=2)
    valid = mask((1, 3, 3), device)
    with torch.no_grad():
        a[~valid] = float("nan")
    terms = [
        AlignTerm(a, b, valid=valid),
        AlignTerm(make((5, 40), device), make((5, 40), device), valid=torch.zeros(5, dtype=torch.bool, device=device)),
    ]
    losses, grad_a, grad_b, *nothing = gradients(align_losses(terms, impl=impl), terms)
    assert losses.isfinite().all()
    assert losses[1] == 0
    assert not any(x.any() for x in nothing)
    assert grad_a.isfinite().all()
    assert not grad_a[~valid].any()
    assert not grad_b[~valid].any()


def test_second_derivative_is_refused(impl, device):
    terms = step(device)
    with pytest.raises(RuntimeError, match="align_loss_reference"):
        torch.autograd.grad(align_losses(terms, impl=impl).sum(), terms[0].source, create_graph=True)


def test_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed")
    terms = step(device)[:4]
    sources, targets, cos, l1, betas, means, stds, valids = (list(c) for c in zip(*terms, strict=True))
    needs = [x.requires_grad for x in sources], [x.requires_grad for x in targets]
    torch.library.opcheck(
        torch.ops.kpu_fast.align_group_forward,
        (sources, targets, means, stds, valids, cos, l1, betas, *needs),
    )


@pytest.mark.parametrize("every_term", ["as they come", "masked", "with statistics"])
def test_fullgraph_compile(every_term, impl, device):
    terms = step(device)
    if every_term == "masked":
        terms = [term._replace(valid=mask(term.source.shape[:-1], device)) for term in terms]
    if every_term == "with statistics":
        terms = [
            term._replace(target_mean=make(c, device, grad=False), target_std=make(c, device, grad=False).abs() + 1)
            for term, c in ((term, term.source.shape[-1:]) for term in terms)
        ]

    def losses(*tensors):
        pairs = zip(tensors[: len(terms)], tensors[len(terms) :], strict=True)
        return align_losses(
            [term._replace(source=s * 2, target=t) for term, (s, t) in zip(terms, pairs, strict=True)], impl=impl
        )

    torch._dynamo.reset()
    tensors = [t.source for t in terms] + [t.target for t in terms]
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    expected, found = gradients(losses(*tensors), terms), gradients(compiled(*tensors), terms)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([1, 8, 33, 40, 65])).map(lambda s: (s[0], s[1])),
        min_size=2,
        max_size=6,
    ),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    masked=st.booleans(),
)
def test_any_terms(shapes, dtypes, masked):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    terms = [
        AlignTerm(
            make(shape, device, dtypes[0], i), make(shape, device, dtypes[1], 50 + i, grad=i % 2 == 0),
            valid=mask(shape[:1], device, i) if masked else None,
        )
        for i, shape in enumerate(shapes)
    ]  # fmt: skip
    found, expected = gradients(align_losses(terms, impl="triton"), terms), gradients(each(terms, "torch"), terms)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 2 * torch.finfo(a.dtype).eps * 2 * b.abs().max() + 2e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(2, 7)}, ValueError, "term 1: source, target: expected equal channels"),
        ({"target": torch.zeros(2, 6, dtype=torch.long)}, TypeError, "term 1: target: expected a floating-point"),
        ({"beta": -1.0}, ValueError, "term 1: beta: expected 0 or a number"),
        ({"target": torch.zeros(2, 6).to_sparse_csr()}, TypeError, "term 1: target: expected a dense tensor"),
        ({"target": torch.nested.nested_tensor([torch.zeros(6)] * 2)}, TypeError, "term 1: target: expected a dense"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, r"term 1: valid: expected shape \(2,\)"),
        (
            {"source": torch.zeros(2, 6, device="meta"), "target": torch.zeros(2, 6, device="meta")},
            ValueError,
            "device",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = AlignTerm(torch.zeros(2, 6), torch.zeros(2, 6))
    with pytest.raises(error, match=message):
        align_losses([good, good._replace(**change)])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_upstream_is_not_rounded_to_bfloat16(again, dtype, impl, device):
    """As of align_loss alone: 0.9 lies between two bfloat16."""
    random = torch.Generator().manual_seed(0)
    sides = [torch.randn(2, 6, 64, generator=random).to(device, dtype).requires_grad_() for _ in range(4)]
    terms = [AlignTerm(*sides[:2]), AlignTerm(*sides[2:])]
    found = torch.autograd.grad(align_losses(terms, impl=impl).sum() * 0.9, sides, retain_graph=again)
    doubles = [x.detach().double().requires_grad_() for x in sides]
    exact = align_loss_reference(*doubles[:2]) + align_loss_reference(*doubles[2:])
    for got, truth in zip(found, torch.autograd.grad(exact * 0.9, doubles), strict=True):
        ratio = (got.double() * truth).sum() / truth.square().sum()
        cuts = impl == "triton" and not got.is_cuda and dtype == torch.bfloat16  # the interpreter does not round
        cut = 2.0**-7 if cuts else 0
        assert abs(ratio - 1) <= 4e-4 + cut


def test_terms_are_what_they_must_be():
    good = AlignTerm(torch.zeros(2, 6), torch.zeros(2, 6))
    for wrong, found in (([good, tuple(good)], "term 1: expected an AlignTerm, found tuple"), (good, "found Tensor")):
        with pytest.raises(TypeError, match=found):
            align_losses(wrong)
    assert align_losses(good for _ in range(3)).shape == (3,)


def test_no_terms_and_unknown_impl_are_refused():
    with pytest.raises(ValueError, match="at least one term"):
        align_losses([])
    with pytest.raises(ValueError, match="impl: expected one of"):
        align_losses([AlignTerm(torch.zeros(2, 6), torch.zeros(2, 6))], impl="cuda")
