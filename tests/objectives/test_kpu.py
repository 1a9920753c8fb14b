"""Eq. 1-4 against a second writing of them in plain torch, float64, with the same weights."""

import pytest
import torch
from torch.nn import functional as F

from kpu_fast.config_objective import KPUConfig
from kpu_fast.models import Student
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.objectives.kpu import KPU, valid_cells

SPECS = {
    "one": FeatureSpec(x_dim=10, map_dims=(12,), strides=(16.0,)),
    "many": FeatureSpec(x_dim=None, map_dims=(6, 8, 10), strides=(8.0, 16.0, 32.0)),
    "odd": FeatureSpec(
        x_dim=7, map_dims=(9,), strides=(96 / 7,)
    ),  # a /14 ViT at 96 pixels: no student map has this size
}
GRIDS = {"one": [(6, 6)], "many": [(12, 16), (6, 8), (3, 4)], "odd": [(7, 7)]}


def make(adapter: bool = True, weights=None, **objective) -> KPU:
    torch.manual_seed(0)
    student = Student(
        vit={"dim": 32, "depth": 2, "heads": 2, "patch_size": 14, "image_size": 56},
        adapter={"cross_attention": "flash", "interactions": 2, "inner_ratio": 1.0} if adapter else None,
        freeze_vit=adapter,
        heads={name: spec._asdict() for name, spec in SPECS.items()},
        head_hidden=16,
    )
    model = KPU(student, SPECS, KPUConfig(**objective), weights).double()
    with torch.no_grad():  # γ = 0 at the start would hide the injectors
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(name: str, size=(96, 96), pad=False):
    spec = SPECS[name]
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    maps = tuple(
        torch.randn(2, *grid, c, dtype=torch.float64) for grid, c in zip(GRIDS[name], spec.map_dims, strict=True)
    )
    x = None if spec.x_dim is None else torch.randn(2, spec.x_dim, dtype=torch.float64)
    valid = torch.ones(2, *size, dtype=torch.bool)
    valid[0, 40:] = False
    valid[1, :, 70:] = False
    return images, Features(x, maps), valid if pad else None


def given(name: str, *args, **kwargs):
    """`batch` as KPU takes it."""
    images, target, valid = batch(name, *args, **kwargs)
    return images, {name: target}, valid


# -- the second writing ------------------------------------------------------------------------------------------------


def resized(v, grid):
    return F.interpolate(v.permute(0, 3, 1, 2), size=grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def aligned(a: Features, b: Features, valid, l1=1.0, l2=0.9, l3=0.1):
    total = 0.0
    for v1, v2 in zip(a.maps, b.maps, strict=True):
        keep = torch.ones(v1.shape[:3], dtype=torch.bool)
        if valid is not None:  # the pixel at a cell's centre decides
            rows = ((torch.arange(v1.shape[1]) + 0.5) * valid.shape[1] / v1.shape[1]).long()
            cols = ((torch.arange(v1.shape[2]) + 0.5) * valid.shape[2] / v1.shape[2]).long()
            keep = valid[:, rows][:, :, cols]
        cos = (1 - F.cosine_similarity(v1, v2, dim=-1))[keep].mean()
        total = total + l2 * cos + l3 * F.smooth_l1_loss(v1[keep], v2[keep])
    loss = total / len(a.maps)
    if a.x is not None and b.x is not None:
        loss = loss + l1 * (1 - F.cosine_similarity(a.x, b.x, dim=-1)).mean()
    return loss


def written_out(model: KPU, name: str, images, target: Features, valid) -> dict:
    student, levels = model.student(images), {"one": [1], "many": [0, 1, 2], "odd": [1]}[name]  # no 1/4
    ours = Features(student.x if target.x is not None else None, tuple(student.maps[i] for i in levels))
    grids, own = [v.shape[1:3] for v in target.maps], [v.shape[1:3] for v in ours.maps]

    def h(heads, features, to):
        maps = tuple(mlp(resized(v, grid)) for mlp, v, grid in zip(heads.maps, features.maps, to, strict=True))
        return Features(heads.x(features.x) if features.x is not None else None, maps)

    unified = h(model.h_t2s[name], target, own)
    return {
        f"{name}/s2t": aligned(h(model.student.heads[name], ours, grids), target, valid),
        f"{name}/t2s": aligned(ours, unified, valid),
        f"{name}/rec": aligned(h(model.h_rec[name], unified, grids), target, valid),
    }


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_terms_and_gradients_equal_the_equations(name, pad):
    model = make()
    images, target, valid = batch(name, (96, 128) if name == "many" else (96, 96), pad)
    terms = model(images, {name: target}, valid)
    expected = written_out(model, name, images, target, valid)
    assert terms.keys() == expected.keys()
    for key in terms:
        torch.testing.assert_close(3 * terms[key], expected[key], rtol=1e-9, atol=1e-9)  # three teachers
        torch.testing.assert_close(model.unweighed(terms)[key], expected[key].detach(), rtol=1e-9, atol=1e-9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(3 * sum(terms.values()), parameters, allow_unused=True)
    theirs = torch.autograd.grad(sum(expected.values()), parameters, allow_unused=True)
    reached = 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)
            reached += 1
    assert reached > 50


def test_t2s_gives_gradient_to_both_sides():
    model = make()
    images, target, _ = batch("one")
    loss = model(images, {"one": target})["one/t2s"]
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.adapter.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.h_t2s["one"].parameters())


def test_h_t2s_runs_once_per_forward():
    model, calls = make(), []
    model.h_t2s["many"].register_forward_hook(lambda *_: calls.append(1))
    model(*given("many", (96, 128)))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("adapter", "switches", "terms"),
    [
        (False, {"t2s": False, "rec": False}, ["s2t"]),  # Base_a
        (True, {"t2s": False, "rec": False}, ["s2t"]),  # Base_b
        (True, {"t2s": True, "rec": False}, ["s2t", "t2s"]),  # Base_c
        (True, {}, ["s2t", "t2s", "rec"]),  # KPU
    ],
)
def test_four_recipes(adapter, switches, terms):
    model = make(adapter, **switches)
    found, loss = {}, 0.0
    for name in SPECS:
        found |= model(*given(name, (96, 128) if name == "many" else (96, 96)))
    assert list(found) == [f"{name}/{term}" for name in SPECS for term in terms]
    loss = model.total(found)
    torch.testing.assert_close(loss, sum(model.unweighed(found).values()) / 3)
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []  # whatever trains gets a gradient: nothing decays or is reduced in vain


def test_a_teachers_weight_is_of_all_its_terms_and_of_no_others():
    plain, heavy = make(), make(weights={"many": 2.5})
    for name, factor in (("many", 2.5), ("one", 1.0)):
        one = given(name, (96, 128) if name == "many" else (96, 96))
        terms, weighed = plain(*one), heavy(*one)
        for key, value in terms.items():
            torch.testing.assert_close(weighed[key], factor * value)
        torch.testing.assert_close(heavy.unweighed(weighed), plain.unweighed(terms))


def test_rec_weight_and_equal_teachers():
    plain, light, many = make(), make(rec_weight=0.25), given("many", (96, 128))
    terms, lighter = plain(*many), light(*many)
    assert lighter["many/s2t"] == terms["many/s2t"]
    torch.testing.assert_close(lighter["many/rec"], 0.25 * terms["many/rec"])
    torch.testing.assert_close(light.unweighed(lighter)["many/rec"], plain.unweighed(terms)["many/rec"])
    torch.testing.assert_close(light.total(lighter), sum(lighter.values()))


@pytest.mark.parametrize("objective", [{}, {"rec": False}, {"t2s": False, "rec": False}])
def test_teachers_on_the_same_images_add_what_each_adds_alone(objective):
    model, runs = make(**objective), []
    model.student.register_forward_hook(lambda *_: runs.append(1))
    (images, many, valid), (_, one, _), (_, odd, _) = batch("many", pad=True), batch("one"), batch("odd")
    together = model(images, {"many": many, "one": one, "odd": odd}, valid)  # 9, 6 and 6 terms
    assert len(runs) == 1
    apart = {}
    for name, target in (("many", many), ("one", one), ("odd", odd)):
        apart |= model(images, {name: target}, valid)
    assert list(together) == list(apart)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(sum(terms.values()), parameters, allow_unused=True) for terms in (together, apart)
    )
    assert [a is None for a in found] == [b is None for b in expected]
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_terms_on_equal_grids_share_a_mask(monkeypatch):
    model, (images, target, valid) = make(), batch("many", (96, 128), pad=True)
    found = []

    def align_losses(terms):
        found.extend(terms)
        return torch.zeros(len(terms))

    monkeypatch.setattr("kpu_fast.objectives.kpu.align_losses", align_losses)
    model(images, {"many": target}, valid)
    assert len(found) == 9
    assert len({id(term.valid) for term in found}) == 3
    for term in found:
        assert torch.equal(term.valid, valid_cells(valid, term.source.shape[1:3]))


def test_padding_does_not_count():
    model = make()
    images, target, valid = batch("many", (96, 128), pad=True)
    expected = model(images, {"many": target}, valid)
    for v, grid in zip(target.maps, GRIDS["many"], strict=True):
        v[~valid_cells(valid, grid)] = 1e6
    # The teacher's grids are the student's: nothing is mixed by a resize.
    found = model(images, {"many": target}, valid)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


def test_valid_cells_follows_the_cell_centre():
    valid = torch.zeros(1, 64, 64, dtype=torch.bool)
    valid[:, :40, :25] = True
    cells = valid_cells(valid, (4, 4))  # centres at rows 8, 24, 40, 56
    assert cells[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert valid_cells(None, (4, 4)) is None


def test_a_teacher_without_x_has_no_x_term():
    model = make(x_weight=0.0, t2s=False, rec=False)
    images, target, _ = batch("one")
    weightless = model(images, {"one": target})["one/s2t"]
    model.cfg = KPUConfig(t2s=False, rec=False)
    torch.testing.assert_close(model(images, {"one": Features(None, target.maps)})["one/s2t"], weightless)
    assert model(images, {"one": target})["one/s2t"] > weightless + 0.1


def test_centres_change_what_is_learned_from_and_nothing_else():
    """Every head has one; after a step it is the mean of what the head saw; an export is the same student without."""
    model, plain = make(), make(centre=False)
    batches = {name: batch(name) for name in SPECS}
    for _ in range(3):
        for name, (images, target, _) in batches.items():
            model(images, {name: target})
        if model.steps == 0:
            seen = [head.centre.seen.clone() for head in model._projectors()]
        model.after_step()
        if model.steps == 1:
            for head, mean in zip(model._projectors(), seen, strict=True):
                torch.testing.assert_close(head.centre.mean, mean, rtol=0, atol=0)
                assert not head.centre.seen.any()
    for name, (images, target, _) in batches.items():
        for heads in (model.student.heads[name], model.h_t2s[name], model.h_rec[name]):
            assert all(head.centre.mean.abs().max() > 1e-3 for head in heads.projectors())
        first = seen[model._projectors().index(model.h_t2s[name].maps[0])]
        torch.testing.assert_close(first, seen_by_fc1(target.maps[0], name))
        ours = model.student.project(model.student(images), name, GRIDS[name])
        exported = model.in_own_spaces()
        theirs = exported.project(exported(images), name, GRIDS[name])
        for found, expected in zip((*theirs.maps, theirs.x), (*ours.maps, ours.x), strict=True):
            if expected is not None:
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not any("centre" in name for name in exported.state_dict())
    assert exported.state_dict().keys() == plain.student.state_dict().keys()
    with torch.no_grad():  # a centre of 0 is none: the same losses and gradients
        for head in model._projectors():
            head.centre.mean.zero_()
    for name, (images, target, valid) in batches.items():
        found, expected = (m(images, {name: target}, valid) for m in (model, plain))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        gradients = [
            torch.autograd.grad(sum(terms.values()), [p for p in m.parameters() if p.requires_grad], allow_unused=True)
            for m, terms in ((model, found), (plain, expected))
        ]
        for one, other in zip(*gradients, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_without_t2s_nothing_is_centred():
    model = make(t2s=False, rec=False)
    model(*given("one"))
    model.after_step()
    assert not any("centre" in name or name == "steps" for name, _ in model.named_buffers())


def seen_by_fc1(v, name):
    """Mean over a teacher's map as h_t2s's first Linear gets it: on the smaller of the two grids."""
    side = 96 // {"one": 16, "many": 8, "odd": 16}[name]
    return (resized(v, (side, side)) if side**2 <= v.shape[1] * v.shape[2] else v).mean((0, 1, 2))
