"""Standardised targets: their statistics, the way back, and the losses and exports built on them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objective_worker import BATCHES, KINDS, STEPS, features, losses, spec
from torch import nn

from kpu_fast.config_objective import KPUConfig
from kpu_fast.models import Student
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.objectives import standardize
from kpu_fast.objectives.balance import FAMO, teacher_drop
from kpu_fast.objectives.kpu import KPU
from kpu_fast.objectives.standardize import FeatureStandardizer, hadamard

WORKER = Path(__file__).parents[1] / "helpers" / "objective_worker.py"
torch.set_num_threads(1)


# -- Hadamard matrices -------------------------------------------------------------------------------------------------

# 12, 20, 44: q + 1; 28, 36: 2 (q + 1); 24, 96, 192, 384, 768: doubled; 104: the only way to 1664 channels.
ORDERS = [1, 2, 4, 12, 20, 24, 28, 36, 44, 48, 96, 104, 128, 192, 384, 768]


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_is_orthogonal_with_elements_of_one_magnitude(order):
    found = hadamard(order)
    torch.testing.assert_close(found @ found.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (found.abs() - order**-0.5).abs().max() < 1e-15


def test_every_multiple_of_64_has_a_matrix():
    assert all(hadamard(order).shape == (order, order) for order in range(64, 2049, 64))


@pytest.mark.parametrize("channels", [3, 10, 52, 100, 250])
def test_channels_without_a_matrix_are_named_at_the_start(channels):
    message = rf'^objective.standardize: teachers.clip has features of {channels} channels, .* Use "meanstd"$'
    with pytest.raises(ValueError, match=message):
        FeatureStandardizer("clip", FeatureSpec(64, (channels,), (16.0,)), "phi_s")
    FeatureStandardizer("clip", FeatureSpec(64, (channels,), (16.0,)), "meanstd")
    with pytest.raises(ValueError, match=r"^objective.standardize: teachers.odd has features of 10 channels"):
        make(specs={"odd": FeatureSpec(None, (10,), (16.0,))}, standardize="phi_s")


# -- one set of features -----------------------------------------------------------------------------------------------


def skewed(tokens: int, channels: int) -> torch.Tensor:
    """Correlated channels of very different spread, far from 0."""
    generator = torch.Generator().manual_seed(channels)
    noise = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    mixed = noise * torch.logspace(-2, 1, channels) @ torch.randn(channels, channels, generator=generator).double()
    return mixed + 50 * torch.randn(channels, generator=generator)


def fitted(x: torch.Tensor, kind: str, dtype=torch.float64) -> FeatureStandardizer:
    one = FeatureStandardizer("clip", FeatureSpec(None, (x.shape[-1],), (16.0,)), kind).to(dtype)
    image = x.view(-1, 4, 5, x.shape[-1])
    one.fit(one.look((Features(None, (part,)), None) for part in image.split(3)))
    return one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [12, 28, 64])
@pytest.mark.parametrize("rows", [7, standardize._ROWS])  # of a batch's tokens that are multiplied at once
def test_every_channel_has_mean_0_and_variance_1(rows, channels, kind, monkeypatch):
    monkeypatch.setattr(standardize, "_ROWS", rows)
    x = skewed(400, channels)
    y = fitted(x, kind).maps[0](x)
    torch.testing.assert_close(y.mean(0), torch.zeros(channels).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(channels).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("channels", [12, 64])
def test_phi_s_only_rotates_and_scales(channels):
    """meanstd stretches each channel by its own factor; PHI-S has one factor for all, 1/sqrt of the mean variance."""
    x = skewed(400, channels)
    factor = x.var(0, correction=0).mean().rsqrt()
    expected, phi_s, meanstd = (
        torch.pdist(y) for y in (factor * x, *(fitted(x, kind).maps[0](x) for kind in ("phi_s", "meanstd")))
    )
    torch.testing.assert_close(phi_s, expected, rtol=1e-9, atol=0)
    assert (meanstd / expected - 1).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_folded_linear_is_the_exact_way_back(kind, dtype, tolerance):
    x = skewed(400, 24)
    one = fitted(x, kind, dtype).maps[0]
    linear, z = nn.Linear(7, 24).to(dtype), torch.randn(50, 7, dtype=dtype)
    weight, bias = one.undone(linear)
    assert weight.dtype == bias.dtype == dtype
    torch.testing.assert_close(one(nn.functional.linear(z, weight, bias)), linear(z), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 4, 6, 12, generator=generator, dtype=torch.float64)
    valid = torch.ones(3, 64, 96, dtype=torch.bool)
    valid[:, 40:], valid[1, :, 50:] = False, False  # cells of 16 pixels: two rows stay, three columns of image 1
    v[:, 2:], v[1, :, 3:] = float("nan"), float("nan")
    one = FeatureStandardizer("clip", FeatureSpec(None, (12,), (16.0,)), kind).double()
    one.fit(one.look([(Features(None, (v,)), valid)]))
    alone = torch.cat([v[0, :2].flatten(0, 1), v[1, :2, :3].flatten(0, 1), v[2, :2].flatten(0, 1)])
    expected = FeatureStandardizer("clip", FeatureSpec(None, (12,), (16.0,)), kind).double()
    expected.fit(expected.look([(Features(None, (alone[None, None],)), None)]))
    for found, other in zip(one.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, other)


def test_a_channel_that_never_varied_is_scaled_as_the_rest():
    x = skewed(400, 12)
    x[:, 3] = 7.0
    one = fitted(x, "meanstd").maps[0]
    assert one(x)[:, 3].abs().max() == 0
    x[:, 3] = 8.0
    assert one(x)[:, 3].abs().max() < 10  # one that wakes up later does not drown the others


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((400, 12), 3.0), "do not vary: 400 tokens are the same"),
        (torch.full((400, 12), float("inf")), "are not finite"),
    ],
)
def test_features_that_cannot_be_standardised_are_named(x, message, kind):
    with pytest.raises(ValueError, match=rf"^objective.standardize: teachers.clip: the features of map 0 {message}$"):
        fitted(x, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_features_are_standardised_in_float32(kind):
    x = skewed(400, 64).bfloat16()
    one = fitted(x, kind, torch.float32).maps[0]
    found, expected = one(x), one(x.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())  # nothing but the result is rounded


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """What two gloo ranks hold after statistics of half of the batches each and some steps of balancing."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(WORKER)]
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    ranks = [subprocess.Popen([*command, str(r), str(folder / "meet"), str(out)]) for r, out in enumerate(outs)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_two_ranks_are_those_of_one_process(kind, two_ranks):
    alone = FeatureStandardizer("clip", spec(), kind).double()
    alone.fit(alone.look((features(i), None) for i in range(BATCHES)))
    expected = alone.state_dict()
    first, second = (rank[kind] for rank in two_ranks)
    assert first.keys() == second.keys() == expected.keys()
    for key in expected:
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], expected[key], rtol=1e-9, atol=1e-9)


def test_balance_agrees_between_ranks(two_ranks):
    famo, mean = FAMO(3, "cpu"), [losses(step).double().mean(1) for step in range(STEPS + 1)]
    for step in range(STEPS):
        shares = famo.shares(mean[step])
        famo.learn(mean[step + 1])
    assert torch.equal(two_ranks[0]["famo"], two_ranks[1]["famo"])
    torch.testing.assert_close(two_ranks[0]["famo"], famo.w.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(two_ranks[0]["famo shares"], shares.float())
    torch.manual_seed(0)
    for step in range(STEPS):
        expected = 2 * teacher_drop(losses(step))  # ranks are its samples
        found = torch.stack([rank["drop shares"][step] for rank in two_ranks], 1)
        torch.testing.assert_close(found, expected.to(found.dtype))
        assert found.mean(1).sum() == pytest.approx(1.0)


# -- in the objective --------------------------------------------------------------------------------------------------

SPECS = {
    "one": FeatureSpec(x_dim=20, map_dims=(12,), strides=(16.0,)),
    "many": FeatureSpec(x_dim=None, map_dims=(8, 24), strides=(8.0, 16.0)),
}
GRIDS = {"one": [(6, 6)], "many": [(12, 16), (6, 8)]}


def make(dtype=torch.float64, adapter: bool = True, specs=SPECS, **objective) -> KPU:
    torch.manual_seed(0)
    student = Student(
        vit={"dim": 32, "depth": 2, "heads": 2, "patch_size": 14, "image_size": 56},
        adapter={"cross_attention": "flash", "interactions": 2, "inner_ratio": 1.0} if adapter else None,
        freeze_vit=adapter,
        heads={name: spec._asdict() for name, spec in specs.items()},
        head_hidden=16,
    )
    return KPU(student, specs, KPUConfig(**objective)).to(dtype)


def batch(name: str, dtype=torch.float64, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    size = (96, 96) if name == "one" else (96, 128)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64).to(dtype)
    x = None if SPECS[name].x_dim is None else 5 + torch.randn(2, SPECS[name].x_dim, generator=generator)
    maps = (
        3 + torch.randn(2, *g, c, generator=generator) * torch.logspace(-1, 2, c)
        for g, c in zip(GRIDS[name], SPECS[name].map_dims, strict=True)
    )
    valid = torch.ones(2, *size, dtype=torch.bool)
    valid[0, 60:] = False
    return images, Features(None if x is None else x.to(dtype), tuple(v.to(dtype) for v in maps)), valid


def given(name: str):
    """`batch` as KPU takes it."""
    images, target, valid = batch(name)
    return images, {name: target}, valid


def calibrated(kind: str, dtype=torch.float64, **objective) -> KPU:
    model = make(dtype, standardize=kind, **objective)
    for name, one in model.standardize.items():
        one.fit(one.look(batch(name, dtype, seed)[1:] for seed in range(20)))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_all_three_losses_see_the_standardised_teacher(name, kind):
    model, plain = calibrated(kind), make()
    images, target, valid = batch(name)
    standardised = model.standardize[name](target)
    assert (standardised.maps[0] - target.maps[0]).abs().max() > 1
    found, expected = model(images, {name: target}, valid), plain(images, {name: standardised}, valid)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_travel_with_the_state_dict(kind):
    model, other = calibrated(kind), make(standardize=kind)
    other.load_state_dict(model.state_dict())
    for name in SPECS:
        for key, value in model(*given(name)).items():
            assert torch.equal(other(*given(name))[key], value)
    with pytest.raises(RuntimeError, match="standardize"):
        make().load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_ends_in_the_teachers_own_spaces(kind, tmp_path):
    model = calibrated(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.in_own_spaces().save_pretrained(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    exported = Student.from_pretrained(tmp_path)
    assert not any("standardize" in key for key in exported.state_dict())
    for name in SPECS:
        images, _, _ = batch(name)
        trained = model.student.project(model.student(images), name, GRIDS[name])
        own = exported.project(exported(images), name, GRIDS[name])
        back = model.standardize[name](own)
        for found, expected, raw in zip(back.maps, trained.maps, own.maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
            assert (raw - expected).abs().max() > 1  # the spaces differ
        if own.x is not None:
            torch.testing.assert_close(back.x, trained.x, rtol=0, atol=1e-9)


def test_an_export_touches_no_weight_in_training():
    model = calibrated("phi_s")
    versions = {name: p._version for name, p in model.named_parameters()}
    student = model.in_own_spaces()
    assert {name: p._version for name, p in model.named_parameters()} == versions
    head, own = model.student.heads["one"].x, student.heads["one"].x
    assert not torch.equal(own.fc2.weight, head.fc2.weight)
    assert own.fc1.weight.data_ptr() == head.fc1.weight.data_ptr()  # nothing is held twice that need not be


def test_without_standardisation_an_export_is_the_student_as_it_is():
    model = make(centre=False)
    own, found = model.student.state_dict(), model.in_own_spaces().state_dict()
    assert list(own) == list(found)
    assert all(torch.equal(value, found[key]) for key, value in own.items())
    assert not any("standardize" in key for key in model.state_dict())


def test_shares_take_the_place_of_equal_weights():
    model = make()
    terms = {key: value for name in SPECS for key, value in model(*given(name)).items()}
    bare = model.unweighed(terms)
    one, many = (sum(value for key, value in bare.items() if key.startswith(f"{name}/")) for name in SPECS)
    torch.testing.assert_close(model.losses(terms).detach(), torch.stack([one, many]))
    torch.testing.assert_close(model.total(terms, torch.tensor([0.5, 0.5])), model.total(terms))
    lopsided = model.total(terms, torch.tensor([0.9, 0.1]))
    torch.testing.assert_close(lopsided.detach(), 0.9 * one + 0.1 * many)
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(lopsided, wanted, retain_graph=True, allow_unused=True)
    parts = [sum(v for k, v in terms.items() if k.startswith(f"{name}/")) for name in SPECS]
    expected = torch.autograd.grad(2 * (0.9 * parts[0] + 0.1 * parts[1]), wanted, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_fullgraph_compile():
    """The standardised objective is one graph, whose losses and gradients are those of the eager one."""
    torch._dynamo.reset()
    model = calibrated("phi_s", torch.float32, adapter=False)
    wanted = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images, target, valid = batch("one", torch.float32)
    found, expected = (m(images, {"one": target}, valid) for m in (compiled, model))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
    grads = (torch.autograd.grad(sum(t.values()), wanted, allow_unused=True) for t in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
