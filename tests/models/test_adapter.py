import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kpu_fast.models.adapter import Adapter, DeformableCrossAttention, DenseCrossAttention, sampling
from kpu_fast.models.vit import ViT, normalise, resize_to_stride_16

CROSS = ["flash", "deformable"]
X_INJECTOR = pytest.mark.parametrize("x_injector", [False, True], ids=["", "x_injector"])
HEIGHT, WIDTH = 32, 64  # the smallest non-square input


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build(cross_attention, *, perturb=True, dtype=torch.float64, **changes):
    """A tiny ViT and adapter, with every parameter away from its start value so that none can be forgotten unseen.

    64 channels: the 32 groups of a GroupNorm would undo a bias if they held one channel each.
    """
    torch.manual_seed(0)
    vit = ViT(patch_size=4, dim=64, depth=4, heads=2, registers=2, image_size=16)
    adapter = Adapter(64, 4, heads=2, cross_attention=cross_attention, interactions=2, points=2, inplanes=8, **changes)
    if perturb:
        with torch.no_grad():
            for module in (vit, adapter):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vit.to(dtype).requires_grad_(False), adapter.to(dtype)


def images(batch=2):
    return torch.rand(batch, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


# ---- the adapter once more, written from the papers' equations with plain tensors ----


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def layer_norm(p, name, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def norm_2d(p, name, x):
    groups = math.gcd(32, x.shape[1] // 2)
    parts = x.reshape(len(x), groups, -1)
    parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return parts.view_as(x) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def dense_cross(p, name, query, memory):
    q, (k, v) = linear(p, f"{name}.q", query), linear(p, f"{name}.kv", memory).chunk(2, dim=-1)
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)  # one head: 32 channels inside
    return linear(p, f"{name}.out", weights @ v)


def deformable_cross(p, name, query, query_shapes, memory, shapes, heads=2, points=2):
    """Each sample as a row of weights over all cells of its map: a tent of width one cell in x and in y."""
    b, n, _ = query.shape
    levels = len(shapes)
    value = linear(p, f"{name}.value", memory).view(b, -1, heads, 32 // heads)
    samples = linear(p, f"{name}.samples", query)
    offsets = samples[..., : 2 * heads * levels * points].view(b, n, heads, levels, points, 2)
    weights = samples[..., 2 * heads * levels * points :].view(b, n, heads, -1).softmax(-1)
    weights = weights.view(b, n, heads, levels, points)
    centres = [((i + 0.5) / w, (j + 0.5) / h) for h, w in query_shapes for j in range(h) for i in range(w)]
    centres = torch.tensor(centres, dtype=torch.float64)[None, :, None, None]
    out, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        size = torch.tensor([w, h], dtype=torch.float64)
        where = centres * size - 0.5 + offsets[:, :, :, level]  # (B, N, heads, points, 2) in cells
        tent_x = (1 - (where[..., :1] - torch.arange(w)).abs()).clamp(min=0)
        tent_y = (1 - (where[..., 1:] - torch.arange(h)).abs()).clamp(min=0)
        tents = (tent_y[..., :, None] * tent_x[..., None, :]).flatten(-2)  # (B, N, heads, points, h·w)
        cells = (weights[:, :, :, level, :, None] * tents).sum(3)
        out = out + torch.einsum("bnms,bsmd->bnmd", cells, value[:, start : start + h * w])
        start += h * w
    return linear(p, f"{name}.out", out.flatten(2))


def expected_features(vit, adapter, pixels):
    p = dict(adapter.named_parameters())
    h, w = pixels.shape[-2:]
    grid, shapes = (h // 16, w // 16), [(h // s, w // s) for s in (8, 16, 32)]
    b = len(pixels)

    def cross(name, query, query_shapes, memory, memory_shapes):
        if adapter.deformable:
            return deformable_cross(p, name, query, query_shapes, memory, memory_shapes)
        return dense_cross(p, name, query, memory)

    def conv(name, index, x, stride):
        x = F.conv2d(x, p[f"spatial_prior.{name}.{index}.weight"], stride=stride, padding=1)
        return norm_2d(p, f"spatial_prior.{name}.{index + 1}", x).clamp(min=0)

    stem = conv("stem", 6, conv("stem", 3, conv("stem", 0, normalise(pixels, torch.float64), 2), 1), 1)
    pyramid = [F.max_pool2d(stem, 3, stride=2, padding=1)]
    for name in ("conv2", "conv3", "conv4"):
        pyramid.append(conv(name, 0, pyramid[-1], 2))
    c1, *coarse = (
        F.conv2d(m, p[f"spatial_prior.to_dim.{i}.weight"], p[f"spatial_prior.to_dim.{i}.bias"])
        for i, m in enumerate(pyramid)
    )
    c = torch.cat([m.flatten(2).transpose(1, 2) + p["level_embed"][i] for i, m in enumerate(coarse)], dim=1)

    x = vit.embed(resize_to_stride_16(pixels, 4))
    cls, x = x[:, :3], x[:, 3:]  # cls and two registers
    for k, extractors in enumerate((1, 3)):
        name = f"interactions.{k}.injector"
        read = cross(
            f"{name}.cross",
            layer_norm(p, f"{name}.query_norm", x),
            [grid],
            layer_norm(p, f"{name}.memory_norm", c),
            shapes,
        )
        tokens = torch.cat([cls, x + p[f"{name}.gamma"] * read], dim=1)
        for block in vit.blocks[2 * k : 2 * k + 2]:
            tokens = block(tokens)
        cls, x = tokens[:, :3], tokens[:, 3:]
        for j in range(extractors):
            name = f"interactions.{k}.extractors.{j}"
            query, memory = layer_norm(p, f"{name}.query_norm", c), layer_norm(p, f"{name}.memory_norm", x)
            c = c + cross(f"{name}.cross", query, shapes, memory, [grid])
            hidden, parts = linear(p, f"{name}.ffn.fc1", layer_norm(p, f"{name}.ffn_norm", c)), []
            for part, (hh, ww) in zip(hidden.split([hh * ww for hh, ww in shapes], 1), shapes, strict=True):
                maps = part.transpose(1, 2).reshape(b, -1, hh, ww)
                weight, bias = p[f"{name}.ffn.depthwise.weight"], p[f"{name}.ffn.depthwise.bias"]
                parts.append(F.conv2d(maps, weight, bias, padding=1, groups=maps.shape[1]).flatten(2).transpose(1, 2))
            c = c + linear(p, f"{name}.ffn.fc2", F.gelu(torch.cat(parts, 1)))

    coarse = [
        part.transpose(1, 2).reshape(b, -1, *s)
        for part, s in zip(c.split([hh * ww for hh, ww in shapes], 1), shapes, strict=True)
    ]
    spatial = [c1 + F.conv_transpose2d(coarse[0], p["up.weight"], p["up.bias"], stride=2), *coarse]
    patches, maps = x.transpose(1, 2).reshape(b, -1, *grid), []
    for i, (scale, m) in enumerate(zip((4, 2, 1, 0.5), spatial, strict=True)):
        moved = F.interpolate(patches, scale_factor=scale, mode="bilinear", align_corners=False)
        maps.append(norm_2d(p, f"norms.{i}", m + moved).permute(0, 2, 3, 1))
    cls = cls[:, :1]
    if "x_injector.gamma" in p:
        query, memory = layer_norm(p, "x_injector.query_norm", cls), layer_norm(p, "x_injector.memory_norm", c)
        cls = cls + p["x_injector.gamma"] * dense_cross(p, "x_injector.cross", query, memory)
    return vit.norm(cls[:, 0]), maps


@X_INJECTOR
@pytest.mark.parametrize("cross_attention", CROSS)
def test_equals_the_equations_written_out(cross_attention, x_injector):
    vit, adapter = build(cross_attention, x_injector=x_injector)
    out = adapter(images(), vit)
    x, maps = expected_features(vit, adapter, images())
    # Positions of the deformable samples are fp32 by design; the rest is float64.
    tolerance = 1e-4 if cross_attention == "deformable" else 1e-10
    torch.testing.assert_close(out.x, x, rtol=tolerance, atol=tolerance)
    assert [tuple(m.shape) for m in out.maps] == [(2, 32 // s, 64 // s, 64) for s in (4, 8, 16, 32)]
    for found, expected in zip(out.maps, maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.is_contiguous()


def test_dense_cross_attention_has_heads_of_64_channels():
    """Several heads, each on its own 64 channels: torch's own multi-head attention with the same weights."""
    cross = DenseCrossAttention(96, 192, "auto").double()
    assert cross.heads == 3
    query, memory = (torch.randn(2, n, 96, dtype=torch.float64) for n in (5, 7))
    theirs = nn.MultiheadAttention(192, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(192).repeat(3, 1))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(torch.eye(192))
        theirs.out_proj.bias.zero_()
    read, _ = theirs(cross.q(query), *cross.kv(memory).chunk(2, dim=-1))
    torch.testing.assert_close(cross(query, memory, None), cross.out(read))


# ---- sizes ----


def test_parameters_of_the_deformable_adapter_at_vit_b():
    with torch.device("meta"):
        adapter = Adapter(768, 12, heads=12, cross_attention="deformable")
    injectors = [count(interaction.injector) for interaction in adapter.interactions]
    extractors = [count(extractor) for interaction in adapter.interactions for extractor in interaction.extractors]
    assert count(adapter.spatial_prior) == 1_579_328
    assert injectors == 4 * [927_024]
    assert extractors == 6 * [1_004_112]
    assert count(adapter.up) == 2_360_064
    assert count(adapter.norms) == 6_144
    assert adapter.level_embed.numel() == 2_304
    assert count(adapter) == 13_680_608


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "cross_attention", "inner_ratio", "expected"),
    [
        # The published small adapter has inner_ratio 1, base and large have 0.5.
        (384, 12, 6, "deformable", 1.0, 5_830_160),
        (384, 12, 6, "deformable", 0.5, 4_353_680),
        (1024, 24, 16, "deformable", 0.5, 23_236_800),
        (384, 12, 6, "flash", 0.5, 5_329_280),
        (768, 12, 12, "flash", 0.5, 17_585_600),
        (1024, 24, 16, "flash", 0.5, 30_180_160),
    ],
)
def test_parameters_of_other_adapters(dim, depth, heads, cross_attention, inner_ratio, expected):
    with torch.device("meta"):
        adapter = Adapter(dim, depth, heads=heads, cross_attention=cross_attention, inner_ratio=inner_ratio)
    assert count(adapter) == expected


@pytest.mark.parametrize("cross_attention", CROSS)
def test_parameters_of_the_x_injector_at_vit_b(cross_attention):
    with torch.device("meta"):
        adapter = Adapter(768, 12, heads=12, cross_attention=cross_attention, x_injector=True)
    assert count(adapter.x_injector) == 1_184_640  # as each injector of the flash adapter: it is dense in both


def test_parameters_of_vit_b_with_registers_and_adapter():
    with torch.device("meta"):
        vit = ViT(patch_size=14, dim=768, depth=12, heads=12, registers=4)
        adapter = Adapter(768, 12, heads=12, cross_attention="deformable")
    assert count(vit) + count(adapter) == 100_264_160


# ---- start values ----


@X_INJECTOR
@pytest.mark.parametrize("cross_attention", CROSS)
@torch.no_grad()
def test_at_the_start_the_vit_is_left_alone(cross_attention, x_injector):
    vit, adapter = build(cross_attention, perturb=False, x_injector=x_injector)
    x, _ = vit(resize_to_stride_16(images(), 4))
    torch.testing.assert_close(adapter(images(), vit).x, x, rtol=0, atol=1e-12)


def test_an_x_injector_leaves_the_other_start_values_as_they_are():
    without, with_it = (build("flash", perturb=False, x_injector=switch)[1].state_dict() for switch in (False, True))
    assert all(torch.equal(tensor, with_it[name]) for name, tensor in without.items())
    assert with_it["x_injector.cross.out.weight"].std() > 0.05  # Xavier: (2 / (64 + 32))½ = 0.14


def test_offsets_start_as_a_square_ring():
    adapter = Adapter(64, 4, heads=8, cross_attention="deformable", interactions=2, points=2)
    cross = adapter.interactions[0].injector.cross
    offsets, weights = cross.samples.bias.split([8 * 3 * 2 * 2, 8 * 3 * 2])
    assert cross.samples.weight.count_nonzero() == weights.count_nonzero() == 0
    ring = [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]  # eight heads, 45° apart
    expected = torch.tensor(ring).float()[:, None, None] * torch.tensor([1.0, 2.0])[:, None]  # points 1 and 2 cells out
    torch.testing.assert_close(offsets.view(8, 3, 2, 2), expected.expand(8, 3, 2, 2), rtol=0, atol=1e-5)


def test_a_ring_of_one_cell_reads_the_neighbour():
    # With values equal to their column and uniform weights, heads 0 (+1 cell) and 1 (−1 cell) read column ± 1.
    cross = DeformableCrossAttention(2, 2, heads=2, levels=1, points=1)
    cross.reset_parameters()
    with torch.no_grad():
        cross.value.weight.copy_(torch.eye(2))
        cross.out.weight.copy_(torch.eye(2))
    columns = torch.arange(5.0).repeat(3)[None, :, None].expand(1, 15, 2)
    out = cross(torch.zeros(1, 15, 2), columns, sampling(((3, 5),), ((3, 5),), columns.device)).view(3, 5, 2)
    assert out[1, 2].tolist() == pytest.approx([3.0, 1.0], abs=1e-5)


# ---- training ----


def loss_of(features, levels=range(4)):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(m.shape, generator=generator, dtype=torch.float64).to(m.dtype) for m in features.maps]
    return features.x.square().sum() + sum((weights[i] * features.maps[i]).sum() for i in levels)


@X_INJECTOR
@pytest.mark.parametrize("cross_attention", CROSS)
def test_gradient_reaches_the_injectors_through_frozen_blocks(cross_attention, x_injector):
    vit, adapter = build(cross_attention, x_injector=x_injector)
    loss_of(adapter(images(), vit)).backward()
    assert all(parameter.grad is None for parameter in vit.parameters())
    without = [name for name, parameter in adapter.named_parameters() if parameter.grad.abs().max() < 1e-9]
    assert without == []
    # The first injector's γ is behind all four blocks: its gradient against a finite difference.
    gamma = adapter.interactions[0].injector.gamma
    direction = torch.randn(gamma.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    analytic, step, values = (gamma.grad * direction).sum(), 3e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            gamma += sign * step * direction
            values.append(loss_of(adapter(images(), vit)))
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), analytic, rtol=1e-3, atol=0)


@pytest.mark.parametrize("cross_attention", CROSS)
def test_a_zero_gamma_still_learns(cross_attention):
    vit, adapter = build(cross_attention, perturb=False, x_injector=True)
    loss_of(adapter(images(), vit)).backward()
    injectors = [interaction.injector for interaction in adapter.interactions] + [adapter.x_injector]
    assert all(injector.gamma.grad.abs().max() > 0 for injector in injectors)


@pytest.mark.parametrize("cross_attention", CROSS)
def test_activation_checkpointing_changes_no_gradient(cross_attention):
    gradients = []
    for switch in (False, True):
        vit, adapter = build(cross_attention, activation_checkpointing=switch)
        runs = []
        adapter.interactions[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        loss_of(adapter(images(), vit)).backward()
        assert len(runs) == 1 + switch  # once more in backward
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("level", range(4))
def test_level_parameters_are_those_that_no_other_level_uses(level):
    vit, adapter = build("flash")
    loss_of(adapter(images(), vit), levels=[i for i in range(4) if i != level]).backward()
    unused = {name for name, parameter in adapter.named_parameters() if parameter.grad is None}
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    assert {names[id(parameter)] for parameter in adapter.level_parameters(level)} == unused


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    vit, adapter = build("flash")
    together, alone = adapter(images(), vit), adapter(images()[1:], vit)
    for a, b in zip(together.maps, alone.maps, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cross_attention", CROSS)
@torch.no_grad()
def test_bf16_stays_close_to_fp32(cross_attention):
    exact = build(cross_attention, perturb=False, dtype=torch.float32)
    rounded = build(cross_attention, perturb=False, dtype=torch.bfloat16)
    # Large enough for the norm of the coarsest map to have more than a handful of values to average.
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    for a, b in zip(exact[1](pixels, exact[0]).maps, rounded[1](pixels, rounded[0]).maps, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).norm() < 0.03 * a.norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Adapter(32, 4, heads=2, cross_attention="dense"), "cross_attention 'dense' is not one of"),
        (lambda: Adapter(32, 4, heads=2, interactions=3), "interactions 3 must divide the ViT's depth 4"),
        (lambda: Adapter(32, 4, heads=3, cross_attention="deformable"), "16 must be a multiple of heads 3"),
        (lambda: Adapter(388, 4, heads=2), "194 must be a multiple of 64"),
        (lambda: Adapter(32, 4, heads=2, attention="fast"), "'fast' is unknown"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_image_sizes_are_named():
    vit, adapter = build("flash", dtype=torch.float32)
    with pytest.raises(ValueError, match="multiples of 32, got 32×48"):
        adapter(torch.rand(1, 3, 32, 48), vit)
