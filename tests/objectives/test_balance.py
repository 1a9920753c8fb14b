import pytest
import torch
from kpu_fast.kernels import align_loss
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kpu_fast.objectives.balance import FAMO, TeacherDrop, build_balance, teacher_drop

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


# -- FAMO and TeacherDrop where each teacher has a batch of its own --------------------------------------------------


CENTRES = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.3, 2.0], [4.0, 1.0, 1.0]], dtype=torch.float64)
SCALES = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)


def toy_losses(theta):
    """Three teachers that pull to three places with very different forces."""
    return SCALES * ((theta - CENTRES) ** 2).sum(1) + 0.05


def famo_as_published(theta, steps, lr):
    """The update rules one by one: log losses, autograd through the softmax, Adam with L2 decay written out."""
    w, m, v = (torch.zeros(3, dtype=torch.float64) for _ in range(3))
    weights = []
    for step in range(1, steps + 1):
        theta.requires_grad_()
        z = torch.softmax(w, 0)
        distance = toy_losses(theta) - 0.0 + 1e-8
        c = (z / distance).sum().detach()
        (gradient,) = torch.autograd.grad((z * distance.log() / c).sum(), theta)
        theta = (theta - lr * gradient).detach()
        delta = (distance.log() - (toy_losses(theta) + 1e-8).log()).detach()
        jacobian = torch.autograd.functional.jacobian(lambda u: torch.softmax(u, 0), w)
        g = jacobian.T @ delta + 0.01 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.025 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        weights.append(w)
    return theta, torch.stack(weights)


def famo_of_ours(theta, famo, steps, lr):
    weights = []
    for _ in range(steps):
        theta.requires_grad_()
        losses = toy_losses(theta)
        (gradient,) = torch.autograd.grad((famo.shares(losses) * losses).sum(), theta)
        theta = (theta - lr * gradient).detach()
        famo.learn(toy_losses(theta))
        weights.append(famo.w.detach().clone())
    return theta, torch.stack(weights)


def test_famo_equals_its_rules_written_out():
    start = torch.tensor([0.2, 0.1, -0.4], dtype=torch.float64)
    expected_theta, expected_w = famo_as_published(start.clone(), 20, lr=0.05)
    theta, w = famo_of_ours(start.clone(), FAMO(3, "cpu"), 20, lr=0.05)
    torch.testing.assert_close(theta, expected_theta, rtol=1e-12, atol=0)
    torch.testing.assert_close(w, expected_w, rtol=1e-9, atol=1e-12)
    assert w[-1].abs().max() > 0.1  # the weights have moved: the equality says something


def test_famo_goes_on_exactly_from_its_state(tmp_path):
    start = torch.tensor([0.2, 0.1, -0.4], dtype=torch.float64)
    whole, w = famo_of_ours(start.clone(), FAMO(3, "cpu"), 20, lr=0.05)
    first = FAMO(3, "cpu")
    half, _ = famo_of_ours(start.clone(), first, 9, lr=0.05)
    torch.save(first.state_dict(), tmp_path / "famo.pt")
    second = FAMO(3, "cpu")
    second.load_state_dict(torch.load(tmp_path / "famo.pt", weights_only=True))
    end, rest = famo_of_ours(half, second, 11, lr=0.05)
    assert torch.equal(end, whole)
    assert torch.equal(rest, w[9:])


def test_famo_gives_less_to_the_teacher_that_gained_most():
    famo, before = FAMO(3, "cpu"), torch.tensor([2.0, 2.0, 2.0])
    torch.testing.assert_close(famo.shares(before), torch.full((3,), 1 / 3))
    famo.learn(torch.tensor([1.0, 2.0, 2.1]))
    shares = famo.shares(before)
    assert shares[0] < shares[1:].min()
    assert shares.sum() == pytest.approx(1.0)
    assert not shares.requires_grad
    large = famo.shares(torch.tensor([2.0, 2.0, 200.0]))
    assert large[2] < 0.02  # what counts is the relative change: a large loss weighs less


def test_famo_takes_a_loss_that_rounding_took_below_0_as_0():
    below, at = FAMO(2, "cpu"), FAMO(2, "cpu")
    for famo, least in ((below, -8e-8), (at, 0.0)):
        assert famo.shares(torch.tensor([least, 1.0])).tolist() == [0.0, 1.0]
        famo.learn(torch.tensor([0.1 * least, 0.5]))
    assert torch.equal(below.w, at.w)
    assert at.w.abs().max() > 0.01


def test_famo_lets_a_teacher_without_any_valid_cell_sit_the_step_out():
    famo, two = FAMO(3, "cpu"), FAMO(2, "cpu")
    with torch.no_grad():
        famo.w.copy_(torch.tensor([0.3, 2.0, -0.4]))
        two.w.copy_(famo.w[[0, 2]])
    losses = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    shares = famo.shares(losses)
    assert shares[1] == 0
    torch.testing.assert_close(shares[[0, 2]], two.shares(losses[[0, 2]]), rtol=1e-12, atol=0)
    famo.learn(torch.tensor([0.4, 0.0, 1.9]))
    assert famo.w.isfinite().all()


def test_famo_of_losses_that_are_all_0():
    famo = FAMO(2, "cpu")
    for _ in range(2):
        assert famo.shares(torch.zeros(2)).tolist() == [0.0, 0.0]
        famo.learn(torch.zeros(2))
    assert famo.w.tolist() == [0.0, 0.0]
    assert famo.shares(torch.ones(2)).tolist() == [0.5, 0.5]
    assert famo.shares(torch.tensor([float("nan"), 1.0])).isnan().any()  # not hidden: the monitor ends such a run


def test_teacher_drop_of_one_column_on_average():
    """The furthest teacher is kept; of two, the other half of the time: 1/2 * 1 + 1/2 * 1/2 of the total."""
    torch.manual_seed(0)
    drop, losses = TeacherDrop(), torch.tensor([0.3, 0.9])
    shares = torch.stack([drop.shares(losses) for _ in range(4000)])
    assert set(map(tuple, shares.tolist())) == {(0.0, 1.0), (0.5, 0.5)}
    assert shares.mean(0).tolist() == pytest.approx([0.25, 0.75], abs=0.02)  # five standard deviations


def test_teacher_drop_follows_the_seed_alone():
    drop, losses = TeacherDrop(), torch.tensor([0.3, 0.9, 0.5])

    def draws():
        return torch.stack([drop.shares(losses) for _ in range(50)])

    torch.manual_seed(5)
    first, state, rest = draws(), torch.get_rng_state(), draws()
    torch.set_rng_state(state)
    assert torch.equal(draws(), rest)
    torch.manual_seed(5)
    assert torch.equal(draws(), first)
    assert not torch.equal(first, rest)


@pytest.mark.parametrize("balance", [FAMO(3, "cpu"), TeacherDrop()], ids=lambda b: type(b).__name__)
def test_shares_need_no_host(balance):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert balance.shares(torch.rand(3)).shape == (3,)
    if torch.cuda.is_available():
        balance = FAMO(3, "cuda") if isinstance(balance, FAMO) else balance
        losses = torch.rand(3, device="cuda") + 0.1
        torch.cuda.set_sync_debug_mode("error")
        try:
            balance.shares(losses)
            if isinstance(balance, FAMO):
                balance.learn(losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_config_names():
    assert build_balance("equal", 2, "cpu") is None
    assert isinstance(build_balance("teacher_drop", 2, "cpu"), TeacherDrop)
    assert build_balance("famo", 2, "cpu").w.shape == (2,)
