"""GKD against a second writing of it in plain torch, float64: two whole forwards, attention and MSE written out."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from kpu_fast.config_objective import GKDConfig
from kpu_fast.models import Student
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.objectives import gkd
from kpu_fast.objectives.gkd import GKD
from kpu_fast.objectives.recipe import build_objective

SPECS = {
    "same": FeatureSpec(x_dim=10, map_dims=(12,), strides=(16.0,)),  # the student's own grid
    "other": FeatureSpec(x_dim=7, map_dims=(9,), strides=(96 / 7,)),  # a /14 ViT at 96 pixels
    "maps": FeatureSpec(x_dim=None, map_dims=(6, 8), strides=(8.0, 32.0)),  # no x, finer and coarser than the student
}
GRIDS = {"same": [(6, 6)], "other": [(7, 7)], "maps": [(12, 12), (3, 3)]}
SIZE, BATCH, HIDDEN, WITHOUT = 96, 5, 2, 18  # pixels, images, those seen masked, and patches they are seen without


def make(specs=SPECS, weights=None, dtype=torch.float64, **objective) -> GKD:
    torch.manual_seed(0)
    # Positions made for the 6×6 patches of SIZE: they are resized in fp32 otherwise.
    vit = {"dim": 32, "depth": 2, "heads": 2, "patch_size": 14, "image_size": 84, "registers": 2}
    student = Student(vit=vit, adapter=None, freeze_vit=False)
    model = GKD(student, specs, GKDConfig(recipe="gkd", **objective), weights).to(dtype)
    with torch.no_grad():  # the mask token is 0 at the start
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(names=tuple(SPECS), scale=1.0):
    torch.manual_seed(1)
    images = torch.rand(BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    targets = {}
    for name in names:
        maps = zip(GRIDS[name], SPECS[name].map_dims, strict=True)
        maps = tuple(scale * torch.randn(BATCH, *grid, c, dtype=torch.float64) for grid, c in maps)
        x = None if SPECS[name].x_dim is None else scale * torch.randn(BATCH, SPECS[name].x_dim, dtype=torch.float64)
        targets[name] = Features(x, maps)
    return images, targets


# -- the second writing ------------------------------------------------------------------------------------------------


def resized(v, size):
    return F.interpolate(v.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def projected(weights, key, tokens):
    """Linear(LayerNorm(tokens)), by hand."""
    spread = tokens - tokens.mean(-1, keepdim=True)
    normed = spread / (spread.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * weights[f"{key}.0.weight"] + weights[f"{key}.0.bias"]
    return normed @ weights[f"{key}.1.weight"].T + weights[f"{key}.1.bias"]


def found(weights, head, v, theirs, query):
    """h(V), by hand."""
    tokens, keys = resized(v, theirs.shape[1:3]).flatten(1, 2), theirs.flatten(1, 2)
    value = projected(weights, f"{head}.value", tokens)
    if not query:
        return value
    logits = torch.einsum("bnc,bmc->bnm", projected(weights, f"{head}.query", tokens), keys)
    return torch.einsum("bnm,bmc->bnc", torch.softmax(logits, -1), value)


def written_out(model: GKD, images, targets, masks, query=True) -> dict:
    weights = dict(model.named_parameters())
    whole = torch.zeros(BATCH, 36, dtype=torch.bool)
    whole[: len(masks)] = masks
    x, (clean,) = model.student(images)
    _, (partly,) = model.student(images, whole)  # a second forward of all images, as the authors have it
    terms = {}
    for name, target in targets.items():
        heads, count = f"heads.{name}", len(target.maps)
        feature = patch = 0.0
        for i, theirs in enumerate(target.maps):
            ours, both = found(weights, f"{heads}.feature.{i}", clean, theirs, query), theirs.flatten(1, 2)
            if target.x is not None:
                token = projected(weights, f"{heads}.token", x)
                terms[f"{name}/token"] = F.mse_loss(token, target.x)
            if target.x is not None and token.shape[-1] == ours.shape[-1]:  # as the authors': one list of tokens
                ours, both = torch.cat([token[:, None], ours], 1), torch.cat([target.x[:, None], both], 1)
                feature = feature + F.mse_loss(ours, both) / count
            elif target.x is not None:  # of unequal widths each token is a mean over its own channels
                each = torch.cat([(token - target.x).square().mean(-1)[:, None], (ours - both).square().mean(-1)], 1)
                feature = feature + each.mean() / count
            else:
                feature = feature + F.mse_loss(ours, both) / count
            seen = found(weights, f"{heads}.patch.{i}", partly, theirs, query)
            patch = patch + F.mse_loss(seen, theirs.flatten(1, 2)) / count
        terms[f"{name}/feature"], terms[f"{name}/patch"] = feature, patch
    return terms


def masks_of(model: GKD, images, seed: int):
    torch.manual_seed(seed)
    return model._draw_masks(images)


@pytest.mark.parametrize(("query", "scale"), [(True, 1.0), (False, 1.0), (False, 1e4)], ids=str)
def test_terms_and_gradients_are_those_written_out(query, scale):
    """With features of the size that any teacher has, or far above: the kernels' loss is a square there, too."""
    model, (images, targets) = make(query=query), batch(scale=scale)
    masks = masks_of(model, images, 3)
    torch.manual_seed(3)
    terms = model(images, targets)
    expected = written_out(model, images, targets, masks, query)
    assert terms.keys() == expected.keys() == model.unweighed(terms).keys()
    for key, value in model.unweighed(terms).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12, msg=key)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(model.total(terms), parameters)
    theirs = torch.autograd.grad(sum(expected.values()) / len(targets), parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * scale**2, msg=name)
        assert b.abs().max() > 0, f"{name} learns nothing"


def test_equal_widths_are_one_list_of_tokens():
    """The authors' form: cls and patches concatenated, one MSE."""
    specs = {"square": FeatureSpec(x_dim=12, map_dims=(12,), strides=(16.0,))}
    model, (images, targets) = make(specs), batch(("same",))
    targets = {"square": Features(torch.randn(BATCH, 12, dtype=torch.float64), targets["same"].maps)}
    masks = masks_of(model, images, 3)
    torch.manual_seed(3)
    terms = model(images, targets)
    expected = written_out(model, images, targets, masks)
    for key, value in model.unweighed(terms).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12, msg=key)


def test_each_masked_image_lacks_as_many_patches_of_its_own():
    model, (images, _) = make(), batch()
    masks = masks_of(model, images, 0)
    assert masks.shape == (HIDDEN, 36)
    assert masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [WITHOUT] * HIDDEN
    assert not torch.equal(masks[0], masks[1])
    often = torch.stack([masks_of(model, images, seed) for seed in range(400)]).double().mean((0, 1))
    assert (often - 0.5).abs().max() < 5 * 0.5 / 800**0.5  # every patch as often as any other
    few = make(mask_images=0.7, mask_patches=0.1)
    assert masks_of(few, images, 0).sum(1).tolist() == [3] * 3  # int(0.1 · 36) of int(0.7 · 5) images


def test_ranks_mask_otherwise_and_draw_alike(monkeypatch):
    """As many numbers on every rank: what draws after them, TeacherDrop, agrees on all."""
    model, (images, _) = make(), batch()
    monkeypatch.setattr(gkd.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(gkd.distributed, "get_world_size", lambda: 2)
    masks, states = [], []
    for rank in range(2):
        monkeypatch.setattr(gkd.distributed, "get_rank", lambda rank=rank: rank)
        masks.append(masks_of(model, images, 0))
        states.append(torch.get_rng_state())
    assert not torch.equal(*masks)
    assert torch.equal(*states)


def test_masked_patches_are_not_seen():
    """What is behind a mask changes nothing, what is not behind one does."""
    model = make().student
    images, hidden = batch()[0][:1], torch.zeros(1, 36, dtype=torch.bool)
    hidden[0, 7] = True
    other = images.clone()
    other[:, :, 16:32, 16:32] = 0.0  # patch 7, and at its borders what the resize to 14 pixels mixes in
    inner = images.clone()
    inner[:, :, 22:26, 22:26] = 0.0
    seen, same = model(images, hidden), model(inner, hidden)
    torch.testing.assert_close(seen.maps[0], same.maps[0], rtol=0, atol=0)
    assert (model(inner).maps[0] - model(images).maps[0]).abs().max() > 1e-3
    assert (model(other, hidden).maps[0] - seen.maps[0]).abs().max() > 0


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        ({"token_weight": 0.0}, {"feature", "patch"}),
        ({"feature_weight": 0.0}, {"token", "patch"}),
        ({"patch_weight": 0.0}, {"token", "feature"}),
        ({"feature_weight": 0.0, "patch_weight": 0.0}, {"token"}),
    ],
)
def test_a_weight_of_0_leaves_out_the_term_and_what_it_would_train(objective, terms):
    model, (images, targets) = make(**objective), batch(("same", "other"))
    found_terms = model(images, targets)
    assert {key.split("/")[1] for key in found_terms} == terms
    model.total(found_terms).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name.startswith("heads.maps.") for name in idle), idle  # the teacher that is not in the batch


def test_x_is_among_the_tokens_of_the_feature_loss_also_where_it_has_no_loss_of_its_own():
    images, targets = batch()
    results = []
    for model in (make(), make(token_weight=0.0)):
        torch.manual_seed(3)
        results.append(model.unweighed(model(images, targets)))
    both, alone = results
    assert "same/token" not in alone
    for key, value in alone.items():
        torch.testing.assert_close(value, both[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_patch_loss_alone_sees_no_image_that_nothing_reads(share):
    images, targets = batch()
    both, alone = make(mask_images=share), make(mask_images=share, token_weight=0.0, feature_weight=0.0)
    alone.load_state_dict(both.state_dict(), strict=False)
    seen = []
    alone.student.vit.embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    results = []
    for model in (both, alone):
        torch.manual_seed(3)
        results.append(model.unweighed(model(images, targets)))
    assert seen == [BATCH]
    for key, value in results[1].items():
        torch.testing.assert_close(value, results[0][key], rtol=1e-10, atol=1e-12, msg=key)


def test_the_sums_of_the_teachers():
    """Each teacher's own terms, without the 1/T; shares take its place."""
    specs = {"one": SPECS["same"], "one2": SPECS["same"], "two": SPECS["maps"]}
    model = make(specs)
    model.weights = {key: 1.0 for key in model.weights}
    terms = {f"{name}/{term}": torch.tensor(float(10**i + 3 * j)) for i, name in enumerate(specs)
             for j, term in enumerate(("token", "feature", "patch"))}  # fmt: skip
    torch.testing.assert_close(model.losses(terms), 3 * torch.tensor([12.0, 39.0, 309.0]))
    torch.testing.assert_close(model.total(terms), torch.tensor(360.0))
    shares = torch.tensor([0.5, 0.0, 0.25])
    torch.testing.assert_close(model.total(terms, shares), torch.tensor(3 * (6.0 + 309.0 / 4)))


def test_a_config_becomes_the_recipe_with_its_weights():
    asked = []

    def new_student(heads):
        asked.append(heads)
        return make().student

    model = build_objective(GKDConfig(recipe="gkd"), SPECS, new_student, {"other": 3.0})
    assert isinstance(model, GKD)
    assert asked == [{}]
    assert model.weights["other/patch"] == 1.0
    assert model.weights["same/patch"] == pytest.approx(1 / 3)


def test_weights_of_terms_and_teachers():
    images, targets = batch()
    plain, weighed = make(), make(weights={"other": 3.0}, token_weight=2.0, feature_weight=5.0, patch_weight=0.25)
    torch.manual_seed(3)
    bare = plain.unweighed(plain(images, targets))
    torch.manual_seed(3)
    terms = weighed(images, targets)
    factors = {"token": 2.0, "feature": 5.0, "patch": 0.25}
    for key, value in terms.items():
        name, term = key.split("/")
        expected = bare[key] * factors[term] * (3.0 if name == "other" else 1.0) / 3
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=key)


def test_padding_is_refused():
    model, (images, targets) = make(), batch()
    with pytest.raises(ValueError, match=r'data\.fit "crop"'):
        model(images, targets, torch.ones(BATCH, SIZE, SIZE, dtype=torch.bool))


def test_a_batch_of_which_no_image_is_masked_is_refused():
    model, (images, targets) = make(), batch()
    with pytest.raises(ValueError, match=r"mask_images 0\.5 of 1 images is none"):
        model(images[:1], targets)


@pytest.mark.parametrize("shape", [(1, 36), (BATCH, 1), (36,), (BATCH, 37)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="masked must be bool"):
        make().student(batch()[0], torch.zeros(shape, dtype=torch.bool))


def test_an_adapter_has_no_masks():
    vit = {"dim": 32, "depth": 2, "heads": 2, "patch_size": 16, "image_size": 64}
    student = Student(vit=vit, adapter={"cross_attention": "flash", "interactions": 1, "inner_ratio": 1.0})
    with pytest.raises(ValueError, match="adapter None"):
        student(torch.rand(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="to be a bare ViT"):
        GKD(student, SPECS, GKDConfig(recipe="gkd"))


def test_bf16_looks_for_tokens_with_logits_of_hundreds():
    """In bf16 as exact as bf16's inputs let it be: a rounded softmax would be off by whole tokens."""
    torch.manual_seed(0)
    head = make().heads["same"].feature[0].float()
    tokens, theirs = torch.randn(2, 36, 32), 60 * torch.randn(2, 36, 12)
    half = head.bfloat16()
    got = half(tokens.bfloat16(), theirs.bfloat16().float()).double()  # a teacher may be in fp32
    q, v = half.query(tokens.bfloat16()).double(), half.value(tokens.bfloat16()).double()
    exact = torch.softmax(q @ theirs.bfloat16().double().mT, -1) @ v
    assert (q @ theirs.double().mT).abs().max() > 200
    torch.testing.assert_close(got, exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    if backend == "inductor" and (torch.cuda.is_available() or not shutil.which("g++")):
        pytest.skip("what inductor writes for a CPU needs g++; with a GPU the models are there")
    model, (images, targets) = make(dtype=torch.float32), batch(("same", "other"))
    images = images.float()
    targets = {n: Features(t.x.float(), tuple(v.float() for v in t.maps)) for n, t in targets.items()}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for run in (model, compiled):
        torch.manual_seed(3)
        with torch._inductor.config.patch(fallback_random=True):  # else its random numbers are its own
            results.append(run(images, targets))
    eager, traced = results
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_the_student_comes_out_without_heads(tmp_path):
    model, (images, _) = make(), batch()
    model.in_own_spaces().save_pretrained(tmp_path)
    loaded = Student.from_pretrained(tmp_path)
    assert loaded.head_specs == {}
    torch.testing.assert_close(loaded(images).maps[0], model.student.eval()(images).maps[0], rtol=0, atol=0)
    torch.testing.assert_close(loaded.vit.embed.mask_token, model.student.vit.embed.mask_token, rtol=0, atol=0)
