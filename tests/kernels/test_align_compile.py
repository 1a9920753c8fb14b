import pytest
import torch
from align_inputs import make, mask, run, sides
from kpu_fast.kernels import (
    AlignLoss,
    AlignTerm,
    align_loss,
    align_loss_reference,
    align_losses,
    moments,
    resize_bilinear,
)
from torch._dynamo.testing import CompileCounterWithBackend

torch.set_num_threads(1)


def test_compiled_torch_func(device):
    """The same transforms inside compiled code, and a compiled loss of a dual tensor."""
    s, t = make((3, 2, 2, 2, 8), device), make((3, 2, 2, 2, 8), device, seed=1)

    def mapped(a):
        return torch.func.vmap(lambda x, y: align_loss(x, y, reduction="sample"))(a, t).sum() + (a**2).sum()

    def pushed(a):
        return torch.func.jvp(lambda x: align_loss(x, t[0]), (a,), (t[0],))[1]

    def graded(a):
        return torch.func.grad(lambda x: align_loss(x, t[0]))(a)

    torch._dynamo.reset()
    compiled = [torch.compile(f, backend="aot_eager") for f in (mapped, pushed, graded)]
    for f, c in zip((mapped, pushed, graded), compiled, strict=True):
        torch.testing.assert_close(c(s if f is mapped else s[0]), f(s if f is mapped else s[0]))
    leaf = s.clone().requires_grad_()
    found, expected = (torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled[0], mapped))
    torch.testing.assert_close(found, expected)
    assert (expected - 2 * s).abs().max() > 1e-3  # the loss's part


LOSSES = [{}, {"reduction": "sample"}, {"reduction": "token"}, {"cos_over": "map"}]


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_export_keeps_the_batch_symbolic(options, masked):
    class Loss(torch.nn.Module):
        def forward(self, source, target, valid=None):
            return [loss(source, target, valid=valid, **options) for loss in (align_loss, align_loss_reference)]

    def inputs(batch):
        return torch.rand(batch, 5, 8), torch.rand(batch, 5, 8), *[torch.rand(batch, 5) > 0.3] * masked

    sizes = ({0: torch.export.Dim.DYNAMIC},) * (2 + masked)
    exported = torch.export.export(Loss(), inputs(2), dynamic_shapes=sizes, strict=False).module()
    four = inputs(4)
    torch.testing.assert_close(exported(*four), Loss()(*four))


@pytest.mark.parametrize("resize", ["source", "target"])
def test_export_keeps_the_grids_symbolic(resize):
    class Loss(torch.nn.Module):
        def forward(self, source, target):
            return [loss(source, target, resize=resize) for loss in (align_loss, align_loss_reference)]

    free = torch.export.Dim.DYNAMIC
    sizes = ({1: free, 2: free}, {1: free, 2: free})
    exported = torch.export.export(Loss(), (torch.rand(2, 9, 7, 8), torch.rand(2, 5, 6, 8)), dynamic_shapes=sizes)
    for grids in (((9, 7), (5, 6)), ((4, 11), (8, 3)), ((5, 6), (5, 6))):
        source, target = (torch.rand(2, *grid, 8) for grid in grids)
        torch.testing.assert_close(exported.module()(source, target), Loss()(source, target))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_as_many_tokens_as_a_mask_has(strict):
    class Masked(torch.nn.Module):
        def forward(self, source, target, keep):
            return align_loss(source[keep], target[keep])

    source, target = torch.rand(2, 6, 8), torch.rand(2, 6, 8)
    some, most = torch.rand(2, 6) > 0.6, torch.rand(2, 6) > 0.2
    exported = torch.export.export(Masked(), (source, target, some), strict=strict).module()
    torch.testing.assert_close(exported(source, target, most), align_loss(source[most], target[most]))


def test_export_bounds_no_open_side():
    """A `Dim` without `max`: the kernels' limits are not asked about where they do not run."""
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))

    class All(torch.nn.Module):
        def forward(self, x, y):
            alone = align_loss(x, y, resize="source"), align_losses([AlignTerm(y, y), AlignTerm(y, y)])
            return *alone, resize_bilinear(x, (3, 2)), moments(y).mean

    sides = torch.rand(2, 9, 7, 8), torch.rand(2, 5, 6, 8)
    sizes = ({0: batch, 1: height, 2: width}, {0: batch})
    for strict in (False, True):
        program = torch.export.export(All(), sides, dynamic_shapes=sizes, strict=strict).module()
        others = torch.rand(3, 4, 11, 8), torch.rand(3, 5, 6, 8)
        torch.testing.assert_close(program(*others), All()(*others))


@pytest.mark.parametrize("loss", ["align_loss", "align_losses", "moments"])
def test_compiled_of_nothing_is_the_error_that_it_is_in_eager_mode(loss):
    def selected(x, keep):
        x = x[keep]
        if loss == "moments":
            return moments(x).mean
        return align_loss(x, x + 1) if loss == "align_loss" else align_losses([AlignTerm(x, x + 1)] * 2)

    torch._dynamo.reset()
    x, keep = torch.rand(6, 8), torch.tensor([True, False, True, True, False, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(selected, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, keep), selected(x, keep))
        for called in (selected, compiled):
            with pytest.raises(ValueError, match="at least one"):
                called(x, torch.zeros_like(keep))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_losses_of_other_weights(dynamic):
    """The second weights make symbols of the numbers."""
    torch.compiler.reset()
    source, target = torch.rand(2, 5, 8, requires_grad=True), torch.rand(2, 5, 8)
    for weights in ({}, {"cos_weight": 0.5, "l1_weight": 0.5}, {"cos_weight": 1, "beta": 0.25}, {"beta": 0}):
        loss = AlignLoss(**weights)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        found, expected = (
            (value, *torch.autograd.grad(value, source))
            for value in (form(source, target) for form in (compiled, loss))
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_loss_takes_new_shapes_without_compiling_anew(options, masked):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(source, target, valid):
        return align_loss(source, target, valid=valid, **options).sum()

    torch.compiler.reset()
    for batch, tokens in ((2, 5), (3, 6), (4, 7), (5, 9)):  # the second makes symbols of the sizes
        source, target = torch.rand(batch, tokens, 8, requires_grad=True), torch.rand(batch, tokens, 8)
        loss(source, target, torch.rand(batch, tokens) > 0.3 if masked else None).backward()
    assert counter.frame_count == 2


@pytest.mark.parametrize("options", [{}, {"cos_over": "map"}, {"reduction": "token"}, {"reduction": "sample"}], ids=str)
@pytest.mark.parametrize("resize", ["none", "source"])
def test_opcheck(options, resize):
    source, target = sides((2, 3, 4, 6), (2, 2, 5, 6) if resize == "source" else (2, 3, 4, 6), "cpu")
    valid = mask(target.shape[:3], "cpu")
    chosen = (resize, False, options.get("cos_over", "token"), options.get("reduction", "mean"))
    torch.library.opcheck(
        torch.ops.kpu_fast.align_forward,
        (source, target, torch.zeros(6), torch.ones(6), valid, 0.9, 0.1, 1.0, *chosen, False, True, True),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"resize": "source"}, {"resize": "target", "reduction": "sample"}, {"cos_over": "map"}],
    ids=str,
)
def test_fullgraph_compile(options, impl, device):
    source, target = sides((2, 3, 4, 24), (2, 5, 3, 24) if "resize" in options else (2, 3, 4, 24), device)

    def step(source, target):
        return align_loss(source * 2, target, impl=impl, **options)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, found = run(step, source, target), run(compiled, source, target)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
