import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from align_inputs import as_double, make, mask, run, sides
from hypothesis import given, settings
from hypothesis import strategies as st
from kpu_fast.kernels import AlignLoss, align_loss, align_loss_reference, align_torch
from kpu_fast.kernels.align import takes_triton
from kpu_fast.kernels.launch import MAX_TOKENS
from kpu_fast.kernels.tensors import tokens_adjacent

torch.set_num_threads(1)


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


@pytest.mark.parametrize("options", [{}, {"resize": "source", "cos_over": "map"}, {"reduction": "token"}], ids=str)
def test_layout_is_a_view(options, impl, device):
    """Of maps (B, C, H, W): results and gradients of their permuted views, bit for bit, also from the module."""
    grids = ((2, 24, 3, 4), (2, 24, 5, 4)) if "resize" in options else ((2, 24, 3, 4),) * 2
    source, target = sides(*grids, device)
    views = [x.detach().permute(0, 2, 3, 1).requires_grad_() for x in (source, target)]
    expected = align_loss(*views, impl=impl, **options)
    expected.sum().backward()
    for loss in (
        align_loss(source, target, layout="NCHW", impl=impl, **options),
        AlignLoss(layout="NCHW", impl=impl, **options)(source, target),
    ):
        source.grad = target.grad = None
        loss.sum().backward()
        assert torch.equal(loss, expected)
        assert torch.equal(source.grad.permute(0, 2, 3, 1), views[0].grad)
        assert torch.equal(target.grad.permute(0, 2, 3, 1), views[1].grad)


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
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_invalid_tokens_may_hold_anything(layout, reduction, impl, device):
    source, target = sides((2, 3, 4, 24), (2, 3, 4, 24), device)
    if layout == "NCHW":
        source, target = (nchw((2, 3, 4, 24), device, seed=seed) for seed in (0, 1))
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
        ({"target": torch.zeros(2, 3, 5, 7), "resize": "source"}, ValueError, r'take layout="NCHW"'),
        ({"layout": "NCWH"}, ValueError, "layout: expected one of"),
        ({"layout": "NCHW", "source": torch.zeros(2, 15, 7)}, ValueError, r"source: expected \(B, C, H, W\)"),
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at the overflow
@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_a_norm_that_overflows_has_one_value_whatever_needs_a_gradient(needs, impl, device):
    """Its cosine is 0, as in PyTorch."""
    source = torch.full((1, 2, 8), 1e25, device=device, requires_grad=needs[0])
    target = torch.linspace(-1, 2, 16, device=device).view(1, 2, 8).requires_grad_(needs[1])
    loss = align_loss(source, target, cos_weight=1.0, l1_weight=0.0, impl=impl)
    torch.testing.assert_close(loss, torch.ones_like(loss))


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


def test_a_cast_of_the_model_leaves_the_statistics_as_they_are():
    mean, std = torch.full((6,), 1.001), torch.full((6,), 1e-9)
    module = torch.nn.Sequential(torch.nn.Linear(6, 6), AlignLoss(target_mean=mean, target_std=std)).half()
    assert module[0].weight.dtype == torch.float16
    assert torch.equal(module[1].target_mean, mean)
    assert torch.equal(module[1].target_std, std)
    assert module.to("meta")[1].target_mean.is_meta
    assert module.to_empty(device="cpu")[1].target_std.dtype == torch.float32


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
