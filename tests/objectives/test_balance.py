import pytest
import torch
from kpu_fast.kernels import align_loss
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kpu_fast.objectives.balance import teacher_drop

torch.set_num_threads(1)


def by_hand(losses, p, draws):
    """Coefficients by a walk over samples and teachers."""
    kept = [[1.0] * losses.shape[1] for _ in losses]
    for sample, column in enumerate(losses.t().tolist()):
        for teacher, loss in enumerate(column):
            if loss < max(column) and draws[teacher][sample] < p:
                kept[teacher][sample] = 0.0
    kept = torch.tensor(kept, dtype=torch.float64)
    return kept / kept.sum()


def draws(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 32), (2, 41), (1, 5), (3, 1)])
def test_equals_the_walk_over_samples_and_teachers(shape, p):
    losses = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = teacher_drop(losses, p=p, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, by_hand(losses, p, draws(shape, 1)), rtol=1e-12, atol=0)


def test_every_sample_keeps_the_teacher_it_is_furthest_from():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(5, 300, generator=generator)  # losses below 0, too
    kept = teacher_drop(losses, p=0.9, generator=generator) > 0
    assert kept.gather(0, losses.argmax(0, keepdim=True)).all()
    others = kept.sum() - losses.shape[1]
    assert 58 < others < 182  # 120 of 1200 are expected, six standard deviations are 62


def test_equal_losses_keep_one_teacher():
    assert ((teacher_drop(torch.ones(3, 50), p=1.0) > 0).sum(0) == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_coefficients_are_constants_that_sum_to_one(dtype):
    losses = torch.rand(7, 999).to(dtype).requires_grad_()
    found = teacher_drop(losses)
    assert not found.requires_grad
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(found.double().sum().item() - 1) < 1e-5
    assert found.unique().numel() == 2
    (gradient,) = torch.autograd.grad((found * losses.to(found.dtype)).sum(), losses)
    assert torch.equal(gradient, found.to(dtype))


def step(sources, targets):
    """One UNIC step: losses per sample, dropping, backward."""
    losses = torch.stack(
        [
            align_loss(source, target, cos_weight=0.5, l1_weight=0.5, reduction="sample")
            for source, target in zip(sources, targets, strict=True)
        ]
    )
    return (teacher_drop(losses) * losses).sum()


def features(device, grad=False):
    shapes = [(4, 16), (4, 9, 16), (4, 3, 5, 8)]
    return [torch.randn(shape, device=device, requires_grad=grad) for shape in shapes]


def test_nothing_waits_for_the_gpu():
    # Fake tensors have no values: reading one, or a shape that depends on one, is an error.
    with FakeTensorMode():
        sources = features("cpu", grad=True)
        gradients = torch.autograd.grad(step(sources, features("cpu")), sources)
        assert [g.shape for g in gradients] == [s.shape for s in sources]
        with pytest.raises(DataDependentOutputException):
            step(sources, features("cpu")).item()
    if torch.cuda.is_available():
        sources, targets = features("cuda", grad=True), features("cuda")
        step(sources, targets).backward()  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(sources, targets).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_fullgraph_compile():
    torch._dynamo.reset()
    sources, targets = features("cpu", grad=True), features("cpu")
    torch.manual_seed(3)
    expected = step(sources, targets)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    found = compiled(sources, targets)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, sources), torch.autograd.grad(expected, sources), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("losses", "p", "message"),
    [
        (torch.ones(3), 0.5, r"losses: expected \(teachers, samples\), found shape \(3,\)"),
        (torch.ones(0, 3), 0.5, r"found shape \(0, 3\)"),
        (torch.ones(2, 3), 1.5, "p: expected a probability, found 1.5"),
    ],
)
def test_bad_input_is_named(losses, p, message):
    with pytest.raises(ValueError, match=message):
        teacher_drop(losses, p=p)
