import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kpu_fast.kernels import AlignLoss, align_loss, align_loss_reference, align_op, align_torch
from kpu_fast.kernels.align import takes_triton
from kpu_fast.kernels.launch import MAX_TOKENS, tokens_adjacent
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

torch.set_num_threads(1)


def sides(source_shape, target_shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in (source_shape, target_shape)
    )


def make(shape, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def mask(shape, device, seed=3):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4).to(device)


def run(loss, source, target, upstream=None, **options):
    """(loss, gradients of what requires one) under an upstream gradient that is not 1."""
    value = loss(source, target, **options)
    if upstream is None:
        upstream = torch.linspace(-1.5, 2.5, value.numel()).reshape(value.shape) if value.dim() else torch.tensor(-2.5)
    wanted = [x for x in (source, target) if x.requires_grad]
    return value, *torch.autograd.grad(value, wanted, upstream.to(value.device, value.dtype))


def as_double(*tensors):
    return tuple(x.detach().double().requires_grad_(x.requires_grad) for x in tensors)


def check(impl, source, target, upstream=None, **options):
    """Error against float64 at most twice that of plain torch in the same dtype (and a few ulp of float32)."""
    constants = {k: v.double() if k.startswith("target_") else v for k, v in options.items()}
    exact = run(align_loss_reference, *as_double(source, target), upstream, **constants)
    plain = run(align_loss_reference, source, target, upstream, **options)
    ours = run(align_loss, source, target, upstream, impl=impl, **options)
    assert ours[0].dtype == torch.float32
    for got, torchs, truth in zip(ours, plain, exact, strict=True):
        assert got.shape == truth.shape
        error, allowed = (got.double() - truth).abs().max(), (torchs.double() - truth).abs().max()
        # Triton's interpreter cuts float32 → bfloat16 off where every GPU rounds.
        cut = 2.0**-8 if impl == "triton" and not source.is_cuda and got.dtype == torch.bfloat16 else 0
        # The cosine of one channel has no gradient: two equal numbers cancel, and leave the last bits of a root and a
        # quotient, which a GPU does not round exactly.
        few = 1e-5 if source.is_cuda and source.shape[-1] == 1 else 2e-6
        assert error <= 2 * allowed + (few + cut) * truth.abs().max(), (error, allowed)
    return ours


# Source and target grids, channels, options. Kept small where the interpreter walks the programs one by one.
CASES = {
    "odd everything, no row aligned": ((2, 3, 5, 41), None, {}),
    "odd channels just over a tile; each sample its own loss": ((2, 1, 3, 401), None, {"reduction": "sample"}),
    "1271 tokens: the last program is partly empty": ((1, 31, 41, 8), None, {}),
    "Swin-T channels, not a power of two": ((1, 2, 3, 192), None, {"beta": 2.0, "reduction": "token"}),
    "ViT-B channels": ((1, 2, 2, 768), None, {"beta": 0.0}),
    "CLIP's x": ((8, 512), None, {}),
    "widest tile": ((1, 1, 2, 4096), None, {"reduction": "sample"}),
    "one channel": ((2, 2, 2, 1), None, {"reduction": "token"}),
    "tokens without a grid": ((2, 7, 24), None, {"reduction": "sample"}),
    "theia": ((3, 2, 3, 24), None, {"cos_over": "map"}),
    "student up to the teacher's grid": ((2, 3, 4, 41), (2, 7, 5, 41), {"resize": "source"}),
    "student down, rows of it never read": ((1, 11, 9, 24), (1, 3, 2, 24), {"resize": "source", "reduction": "token"}),
    "teacher up": ((2, 6, 5, 24), (2, 2, 3, 24), {"resize": "target", "reduction": "sample"}),
    "teacher down in one axis, up in the other": ((2, 3, 8, 24), (2, 7, 2, 24), {"resize": "target"}),
    "map cosine through a resize": (
        (2, 3, 4, 24), (2, 5, 5, 24), {"resize": "source", "cos_over": "map", "reduction": "sample"}
    ),
    "equal grids: the resize is none": ((2, 3, 4, 24), None, {"resize": "source"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, dtype, impl, device):
    source_shape, target_shape, options = CASES[case]
    check(impl, *sides(source_shape, target_shape or source_shape, device, dtype), **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sample"},
        {"resize": "target", "reduction": "token"},
        {"resize": "target"},
        {"cos_over": "map"},
        {"resize": "source", "cos_over": "map", "reduction": "sample"},
    ],
    ids=str,
)
def test_mask_and_standardisation(options, masked, impl, device):
    source, target = sides((2, 3, 4, 41), (2, 5, 3, 41) if "resize" in options else (2, 3, 4, 41), device)
    grid = target if options.get("resize") == "source" else source
    if masked:
        options = options | {"valid": mask(grid.shape[:3], device)}
    mean, std = torch.linspace(-1, 1, 41, device=device), torch.linspace(0.2, 3, 41, device=device)
    check(impl, source, target, target_mean=mean, target_std=std, **options)


def test_standard_deviation_alone_in_half_precision(impl, device):
    std = torch.linspace(0.2, 3, 41, device=device).bfloat16()
    check(impl, *sides((2, 1, 3, 41), (2, 1, 3, 41), device), target_std=std)


def test_reference_is_what_torch_says():
    source, target = sides((2, 3, 4, 5), (2, 6, 5, 5), "cpu", torch.float64)
    resized = F.interpolate(source.permute(0, 3, 1, 2), size=(6, 5), mode="bilinear").permute(0, 2, 3, 1)
    cosine = 1 - F.cosine_similarity(resized, target, dim=-1).mean()
    expected = 0.9 * cosine + 0.1 * F.smooth_l1_loss(resized, target, beta=0.5)
    torch.testing.assert_close(align_loss_reference(source, target, beta=0.5, resize="source"), expected)
    cosine = 1 - F.cosine_similarity(resized.flatten(1), target.flatten(1), dim=-1)
    expected = 0.9 * cosine + 0.1 * F.smooth_l1_loss(resized, target, reduction="none").flatten(1).mean(1)
    found = align_loss_reference(source, target, resize="source", cos_over="map", reduction="sample")
    torch.testing.assert_close(found, expected)


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


@pytest.mark.parametrize("options", [{}, {"reduction": "token"}], ids=str)
def test_strides(options, impl, device):
    base, target = sides((2, 24, 3, 4), (2, 3, 8, 24), device, torch.bfloat16)
    source = base.detach().permute(0, 2, 3, 1).requires_grad_()  # NCHW as the convolutions leave it
    halves = target.detach()[:, :, ::2].requires_grad_()  # every second token
    _, grad, _ = check(impl, source, halves, **options)
    assert grad.stride() == source.stride()  # no copy to change layout on the way back either
    constant = target.detach()[:1, :1, :1].expand(2, 3, 4, 24)  # a stride of 0, as a text embedding has
    check(impl, source, constant, **options)
    every_second_channel = torch.randn(2, 3, 4, 48, device=device)[..., ::2].requires_grad_()
    check(impl, every_second_channel, halves.detach().float().requires_grad_(), **options)


def nchw(shape, device, dtype=torch.float32, seed=0):
    """(B, H, W, C) view of an NCHW tensor."""
    batch, height, width, channels = shape
    x = sides((batch, channels, height, width), (1,), device, dtype, seed)[0].detach()
    return x.permute(0, 2, 3, 1).requires_grad_()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "token", "beta": 0.0},
        {"reduction": "sample"},
        {"cos_over": "map"},
        {"resize": "source"},
        {"resize": "target", "reduction": "sample"},
        {"resize": "source", "cos_over": "map", "reduction": "sample"},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layouts", ["both", "source", "target", "lines apart"])
def test_tokens_adjacent_in_memory(layouts, masked, options, impl, device):
    # More than one chunk of channels, more than one program a sample, and a last one partly empty.
    source_shape, target_shape = (2, 7, 11, 21), ((2, 5, 13, 21) if "resize" in options else (2, 7, 11, 21))
    source, target = sides(source_shape, target_shape, device)
    if layouts != "target":
        source = nchw(source_shape, device)
    if layouts in ("both", "target"):
        target = nchw(target_shape, device, seed=1)
    if layouts == "lines apart":  # a crop: its lines do not follow one another, so it cannot be taken as one line
        source = nchw((2, 7, 16, 21), device).detach()[:, :, 2:13].requires_grad_()
    options = dict(options)
    if masked:
        options["valid"] = mask((target if options.get("resize") == "source" else source).shape[:3], device)
    mean, std = torch.linspace(-1, 1, 21, device=device), torch.linspace(0.5, 2, 21, device=device)
    ours = check(impl, source, target, target_mean=mean, target_std=std, **options)
    assert [g.stride() for g in ours[1:]] == [torch.empty_like(x).stride() for x in (source, target)]


def test_transposed_tokens(impl, device):
    source = sides((2, 21, 70), (1,), device)[0].detach().transpose(1, 2).requires_grad_()  # (B, N, C) of (B, C, N)
    check(impl, source, sides((2, 70, 21), (1,), device, seed=1)[0])


@pytest.mark.parametrize("reduction", ["mean", "sample"])
@pytest.mark.parametrize("resize", ["source", "target"])
def test_align_corners(resize, reduction, impl, device):
    for grids in [((5, 4), (3, 7)), ((1, 4), (3, 1)), ((3, 1), (1, 5)), ((2, 9), (2, 3))]:
        source, target = sides((2, *grids[0], 24), (2, *grids[1], 24), device)
        check(impl, source, target, resize=resize, reduction=reduction, align_corners=True)


def test_a_negative_bit_is_not_lost(impl, device):
    parts = [x.detach() for x in sides((2, 3, 4, 24), (2, 3, 4, 24), device)]
    lazy = torch.complex(*parts).conj().imag  # its memory holds the opposite sign
    assert lazy.is_neg()
    expected = align_loss(lazy.resolve_neg(), parts[0], impl=impl)
    torch.testing.assert_close(align_loss(lazy, parts[0], impl=impl), expected)


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


def test_strides_through_a_resize(impl, device):
    source, target = sides((2, 24, 3, 4), (2, 5, 3, 24), device)
    source = source.detach().permute(0, 2, 3, 1).requires_grad_()
    for reduction in ("mean", "sample"):
        _, grad, _ = check(impl, source, target, resize="source", reduction=reduction)
        assert grad.stride() == source.stride()


@pytest.mark.parametrize("reduction", ["mean", "sample"])
@pytest.mark.parametrize("resize", ["source", "target"])
@pytest.mark.parametrize("frozen", ["source", "target"])
def test_one_side_only(frozen, resize, reduction, impl, device):
    source, target = sides((2, 3, 4, 24), (2, 5, 3, 24), device)
    (source if frozen == "source" else target).requires_grad_(False)
    assert len(check(impl, source, target, resize=resize, reduction=reduction)) == 2


def test_mixed_dtypes_give_each_side_its_own(impl, device):
    source, target = sides((2, 3, 4, 24), (2, 3, 4, 24), device)
    source = source.detach().bfloat16().requires_grad_()
    for reduction in ("mean", "sample"):
        # The plain loss rounds once, from float32; 4 keeps the scaling of "mean"'s bf16 gradient from rounding again.
        upstream = torch.tensor([-4.0, 4.0]) if reduction == "sample" else torch.tensor(-4.0)
        _, to_source, to_target = check(impl, source, target, upstream, reduction=reduction)
        assert (to_source.dtype, to_target.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sample", "token"])
def test_invalid_tokens_may_hold_anything(reduction, impl, device):
    source, target = sides((2, 3, 4, 24), (2, 3, 4, 24), device)
    valid = mask((2, 3, 4), device)
    valid[1] = False  # a sample that is all padding
    dirty = source.detach().clone()
    dirty[~valid] = float("nan")
    dirty.requires_grad_()
    value, grad, other = run(align_loss, dirty, target, reduction=reduction, valid=valid, impl=impl)
    # Independent of any mask: the valid tokens alone, as one list.
    tokens = source.detach()[valid], target.detach()[valid]
    alone = align_loss_reference(*tokens, reduction="token")
    expected = {"mean": alone.mean(), "sample": torch.stack([alone.mean(), alone.mean() * 0]), "token": alone}[
        reduction
    ]
    torch.testing.assert_close(value[valid] if reduction == "token" else value, expected)
    for gradient in (grad, other):
        assert gradient[valid].abs().min() > 0
        assert not gradient[~valid].any()


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sample"}, {"reduction": "token"}, {"cos_over": "map"}, {"resize": "target"}], ids=str
)
def test_nothing_valid_is_zero(options, impl, device):
    shape = (2, 5, 2, 24) if "resize" in options else (2, 3, 4, 24)
    source, target = sides((2, 3, 4, 24), shape, device)
    nothing = torch.zeros(2, 3, 4, dtype=torch.bool, device=device)
    assert not any(x.any() for x in run(align_loss, source, target, valid=nothing, impl=impl, **options))


def test_a_vector_without_length_has_no_cosine_gradient(impl, device):
    source, target = sides((1, 2, 2, 24), (1, 2, 2, 24), device)
    with torch.no_grad():
        source[0, 0, 0] = 0
        target[0, 1, 1] = 0
        source[0, 1, 0] = target[0, 1, 0] = 0
    for reduction in ("mean", "token"):
        both = check(impl, source, target, reduction=reduction)
        only_l1 = run(align_loss_reference, source, target, cos_weight=0.0, reduction=reduction)
        torch.testing.assert_close(both[1][0, 0, 0], only_l1[1][0, 0, 0])
        torch.testing.assert_close(both[2][0, 1, 1], only_l1[2][0, 1, 1])
        assert all(x.isfinite().all() for x in both)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e15), (torch.float32, 1e-7), (torch.float16, 3e3)], ids=str
)
def test_extreme_values(dtype, scale, impl, device):
    source, target = sides((1, 2, 3, 41), (1, 2, 3, 41), device)
    source = (source.detach() * scale).to(dtype).requires_grad_()
    target = (target.detach() * scale).to(dtype).requires_grad_()
    assert all(x.isfinite().all() for x in check(impl, source, target, reduction="sample"))


def test_float16_gradient_survives_a_loss_scaler(impl, device):
    # 1/(N·C) ≈ 4e-5: most of the gradient is below float16's smallest normal number until 65536 multiplies it.
    source, target = sides((1, 8, 16, 192), (1, 8, 16, 192), device, torch.float16)
    exact = run(align_loss_reference, *as_double(source, target), torch.tensor(65536.0))
    found = run(align_loss, source, target, torch.tensor(65536.0), impl=impl)
    for got, truth in zip(found[1:], exact[1:], strict=True):
        assert (got.double() - truth).abs().max() < 1e-3 * truth.abs().max()


@pytest.mark.parametrize("block", [24, 200, 700], ids=["a token", "a row of tokens or more", "several samples"])
@pytest.mark.parametrize(
    "options",
    [{"resize": "source"}, {"resize": "target", "reduction": "sample"}, {"resize": "source", "cos_over": "map"}],
    ids=str,
)
def test_blocks_of_the_cpu_path_meet_without_a_seam(options, block, monkeypatch):
    source, target = sides((5, 3, 4, 24), (5, 7, 4, 24) if block < 700 else (5, 3, 3, 24), "cpu")
    common = target if options["resize"] == "source" else source
    monkeypatch.setattr(align_torch, "BLOCK", block)
    check("torch", source, target, valid=mask(common.shape[:3], "cpu"), **options)


@pytest.mark.parametrize("up", [True, False])
def test_the_cpu_path_resizes_nchw_maps_channels_last(up, monkeypatch):
    """A resize of an NCHW map takes 20 times as long; what is transposed for it is the smaller of the two maps."""
    seen, resize = [], align_torch.resize_bilinear_reference

    def watched(x, *args, **options):
        seen.append(x.stride(3) == 1)
        return resize(x, *args, **options)

    source, target = sides((2, 24, *((3, 4) if up else (9, 8))), (2, 24, 6, 7), "cpu")
    source, target = (x.detach().permute(0, 2, 3, 1).requires_grad_() for x in (source, target))
    check("torch", source, target, resize="source")
    monkeypatch.setattr(align_torch, "resize_bilinear_reference", watched)
    align_loss(source, target, resize="source")
    assert seen == [up]


def test_nan_is_never_hidden(impl, device):
    source, target = sides((1, 2, 2, 24), (1, 2, 2, 24), device)
    with torch.no_grad():
        source[0, 1, 1, 5] = float("nan")
    assert align_loss(source, target, impl=impl).isnan()
    assert align_loss(source, target, reduction="token", impl=impl).isnan().sum() == 1


@pytest.mark.parametrize("options", [{}, {"reduction": "sample"}, {"cos_over": "map"}], ids=str)
def test_two_runs_are_bit_equal(options, impl, device):
    if impl == "torch" and device == "cuda":
        pytest.skip("PyTorch's own bilinear backward uses atomics on CUDA")
    source, target = sides((2, 3, 4, 41), (2, 7, 5, 41), device)
    first, second = (run(align_loss, source, target, resize="source", impl=impl, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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


def test_a_mean_with_a_negative_bit(impl, device):
    x, y, mean = make((2, 4, 8), device), make((2, 4, 8), device, seed=1), make((8,), device, seed=2)
    torch.testing.assert_close(
        align_loss(x, y, target_mean=torch._neg_view(mean), impl=impl), align_loss(x, y, target_mean=-mean, impl=impl)
    )


def test_more_tokens_than_int32_counts_take_the_torch_path(device):
    pytest.importorskip("triton", reason="triton is not installed")
    most, more = (torch.zeros((1, 1, 1, 1), device=device).expand(n, 1, 1, 1) for n in (MAX_TOKENS, MAX_TOKENS + 1))
    assert takes_triton("triton", most, most)
    with pytest.raises(RuntimeError, match=f"at most {MAX_TOKENS} tokens"):
        takes_triton("triton", more, more)
    assert not takes_triton("auto", more, more)


def test_an_expanded_map_is_not_taken_for_nchw():
    dense = torch.zeros(2, 3, 4, 8)
    assert not tokens_adjacent(dense)
    assert not tokens_adjacent(dense[:, :1, :1].expand(2, 3, 4, 8))
    assert not tokens_adjacent(torch.zeros(2, 3, 4, 1))
    assert tokens_adjacent(torch.zeros(2, 8, 3, 4).permute(0, 2, 3, 1))


@pytest.mark.parametrize("options", [{}, {"resize": "source"}, {"resize": "target"}, {"reduction": "sample"}], ids=str)
@pytest.mark.parametrize("again", [False, True])
def test_the_upstream_is_not_rounded_to_bfloat16(options, again, impl, device):
    """0.9 lies between two bfloat16: a rounded factor would shorten the whole gradient by 0.17 %."""
    grids = {"source": ((2, 5, 6, 64), (2, 9, 8, 64)), "target": ((2, 9, 8, 64), (2, 5, 6, 64))}
    shapes = grids.get(options.get("resize"), ((2, 9, 8, 64), (2, 9, 8, 64)))
    source, target = sides(*shapes, device, torch.bfloat16)
    value = align_loss(source, target, impl=impl, **options)
    truth = run(align_loss_reference, *as_double(source, target), torch.full(value.shape, 0.9), **options)
    found = torch.autograd.grad(value, (source, target), torch.full_like(value, 0.9), retain_graph=again)
    for got, expected in zip(found, truth[1:], strict=True):
        ratio = (got.double() * expected).sum() / expected.square().sum()
        # The interpreter cuts bfloat16 off, which shortens every number by about half an ulp, twice here.
        cut = 2.0**-7 if impl == "triton" and not source.is_cuda else 0
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


@settings(max_examples=15, deadline=None)
@given(
    grids=st.tuples(*[st.integers(1, 6)] * 4),
    channels=st.sampled_from([5, 16, 33, 41]),
    batch=st.integers(1, 3),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    layouts=st.tuples(*[st.sampled_from(["NHWC", "NCHW", "sliced"])] * 2),
    resize=st.sampled_from(["source", "target", None]),
    form=st.sampled_from(
        [("token", "mean"), ("token", "sample"), ("token", "token"), ("map", "mean"), ("map", "sample")]
    ),
    masked=st.booleans(),
    triton=st.booleans(),
)
def test_any_shape_stride_and_dtype(grids, channels, batch, dtypes, layouts, resize, form, masked, triton):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source_grid, target_grid = grids[:2], grids[2:] if resize else grids[:2]
    made = []
    for seed, (grid, dtype, layout) in enumerate(zip((source_grid, target_grid), dtypes, layouts, strict=True)):
        x = sides((batch, *grid, 2 * channels), (1,), device, dtype, seed)[0].detach()
        x = {"NHWC": x[..., :channels].contiguous(), "sliced": x[..., ::2]}.get(layout, x[..., :channels])
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if layout == "NCHW" else x
        made.append(x.requires_grad_())
    cos_over, reduction = form
    options = {"resize": resize, "cos_over": cos_over, "reduction": reduction}
    common = made[1] if resize == "source" else made[0]
    if masked:
        options["valid"] = mask(common.shape[:3], device)
    exact = run(align_loss_reference, *as_double(*made), **options)
    found = run(align_loss, *made, impl="triton" if triton else "torch", **options)
    for got, truth in zip(found, exact, strict=True):
        # ε of the result's own dtype: all arithmetic before it is float32 (1e-5 leaves room for the cancellation of
        # t/(ŝ t̂) − cos·s/ŝ² in few channels); float16 has subnormals, hence an absolute part.
        allowed = max(4 * torch.finfo(got.dtype).eps, 1e-5) * truth.abs().max() + 1e-6
        assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(2, 3, 4, 7)}, ValueError, "equal channels.*project one"),
        ({"target": torch.zeros(2, 3, 5, 7), "resize": "source"}, ValueError, "NCHW maps go in through .permute"),
        ({"target": torch.zeros(2, 3, 5, 6)}, ValueError, 'resize="source" or "target" brings'),
        ({"target": torch.zeros(3, 3, 4, 6)}, ValueError, "equal rank and batch"),
        ({"target": torch.zeros(2, 12, 6)}, ValueError, "equal rank and batch"),
        ({"target": torch.zeros(2, 3, 4, 6, device="meta")}, ValueError, "target: expected the device of source"),
        ({"source": torch.zeros(2, 3, 4, 6, dtype=torch.long)}, TypeError, "source: expected a floating-point"),
        ({"source": torch.zeros(6)}, ValueError, r"source: expected \(B, H, W, C\)"),
        ({"source": torch.zeros(0, 3, 4, 6), "target": torch.zeros(0, 3, 4, 6)}, ValueError, "at least one sample"),
        ({"valid": torch.ones(2, 3, 5, dtype=torch.bool)}, ValueError, r"valid: expected shape \(2, 3, 4\)"),
        ({"valid": torch.ones(2, 3, 4)}, TypeError, "valid: expected torch.bool"),
        ({"target_mean": torch.zeros(5)}, ValueError, r"target_mean: expected shape \(6,\)"),
        ({"target_std": torch.ones(6).requires_grad_()}, TypeError, "target_std: expected a constant.* detach it"),
        ({"target_std": torch.ones(6, dtype=torch.int64)}, TypeError, "target_std: expected a floating-point dtype"),
        ({"resize": "both"}, ValueError, "resize: expected one of"),
        ({"cos_over": "image"}, ValueError, "cos_over: expected one of"),
        ({"reduction": "sum"}, ValueError, "reduction: expected one of"),
        ({"cos_over": "map", "reduction": "token"}, ValueError, "found \"token\""),
        ({"beta": -1.0}, ValueError, "beta: expected 0 or a number from 1e-30 to 1e30, found -1.0"),
        ({"beta": "a"}, TypeError, "beta: expected a number, found 'a'"),
        ({"cos_weight": None}, TypeError, "cos_weight: expected a number, found None"),
        ({"cos_weight": [1]}, TypeError, r"cos_weight: expected a number, found \[1\]"),
        ({"source": [[1.0]]}, TypeError, "source: expected a tensor, found list"),
        ({"target": None}, TypeError, "target: expected a tensor, found NoneType"),
        ({"target_std": 2.0}, TypeError, "target_std: expected a tensor, found float"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
        ({"source": torch.zeros(2, 3, 4, 6).to(torch.float8_e4m3fn)}, TypeError, "source: .* of 16 bits or more"),
        ({"l1_weight": torch.ones(()).requires_grad_()}, TypeError, "l1_weight: expected a number, found a tensor"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    good = {"source": torch.zeros(2, 3, 4, 6), "target": torch.zeros(2, 3, 4, 6)}
    with pytest.raises(error, match=message):
        align_loss(**(good | change))


def test_tokens_and_vectors_cannot_be_resized():
    with pytest.raises(ValueError, match="only \\(B, H, W, C\\) maps"):
        align_loss(torch.zeros(2, 5, 6), torch.zeros(2, 7, 6), resize="source")


def test_triton_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="expected CUDA"):
        align_loss(torch.ones(2, 6), torch.ones(2, 6), impl="triton")
    with pytest.raises(RuntimeError, match=r"torch\.float64"):
        align_loss(torch.ones(2, 6), torch.ones(2, 6).double(), impl="triton")
    with pytest.raises(RuntimeError, match="4096 channels in align_loss"):
        align_loss(torch.ones(2, 4097), torch.ones(2, 4097), impl="triton")


def test_float64_stays_float64_and_wide_tokens_take_the_torch_path():
    source, target = sides((2, 5000), (2, 5000), "cpu", torch.float64)
    found = align_loss(source, target)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, align_loss_reference(source, target), rtol=1e-13, atol=0)


def test_module_is_the_function():
    source, target = sides((2, 3, 4, 6), (2, 3, 4, 6), "cpu")
    options = {"cos_weight": 0.5, "l1_weight": 0.5, "beta": 2.0, "reduction": "sample"}
    std, valid = torch.linspace(0.5, 2, 6), mask((2, 3, 4), "cpu")
    module = AlignLoss(target_std=std, **options)
    expected = align_loss(source, target, target_std=std, valid=valid, **options)
    assert torch.equal(module(source, target, valid=valid), expected)
    assert not module.state_dict()
    assert "beta=2.0" in repr(module)
    assert "reduction='sample'" in repr(module)
    with pytest.raises(ValueError, match="reduction"):
        AlignLoss(reduction="sum")


def test_import_is_light_and_works_without_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kpu_fast.kernels as k\n"
        "heavy = {'deepspeed', 'nvidia.dali', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "x = torch.randn(2, 3, 3, 4, requires_grad=True)\n"
        "k.align_loss(x, torch.randn(2, 2, 2, 4), resize='source').backward()\n"
        "assert x.grad.abs().sum() > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_more_tokens_than_a_resize_could_take(impl, device):
    """128 images of 257 tokens, flattened, are 32 896: without a resize there is no limit on a side."""
    source, target = torch.randn(1, 23001, 3, device=device), torch.randn(1, 23001, 3, device=device)
    expected = align_loss_reference(source.double(), target.double())
    torch.testing.assert_close(align_loss(source, target, impl=impl).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [float("nan"), float("inf"), 1e-39])
def test_a_beta_whose_reciprocal_is_no_number_is_refused(beta):
    with pytest.raises(ValueError, match="beta: expected 0 or a number"):
        align_loss(torch.randn(2, 3), torch.randn(2, 3), beta=beta)
    with pytest.raises(ValueError, match="impl: expected one of"):
        AlignLoss(impl="cuda")
