"""use_deform_attn: the same outputs and gradients from transformers' models before and after."""

import copy
import functools
import importlib.util
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

from kpu_fast.kernels import MultiScaleDeformableAttention, deform_attn  # noqa: E402

from kpu_fast.models import deform  # noqa: E402
from kpu_fast.models.deform import use_deform_attn  # noqa: E402

SWIN = dict(model_type="swin", embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=4)
DETECTOR = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    num_queries=4,
    backbone_config=dict(SWIN, out_indices=[2, 3, 4]),
)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)


def grounding_dino():
    text = dict(TEXT, model_type="bert", max_position_embeddings=16)
    return transformers.GroundingDinoForObjectDetection(
        transformers.GroundingDinoConfig(text_config=text, **DETECTOR)
    ), {"input_ids": torch.tensor([[1, 7, 8, 2]])}


def deformable_detr():
    config = transformers.DeformableDetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, **DETECTOR)
    return transformers.DeformableDetrForObjectDetection(config), {}


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=dict(SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), {}


# How many attentions: encoder and decoder layers; Mask2Former's two are those of its pixel decoder.
MODELS = {
    "grounding_dino": (grounding_dino, 3, ("logits", "pred_boxes")),
    "deformable_detr": (deformable_detr, 3, ("logits", "pred_boxes")),
    "mask2former": (mask2former, 2, ("class_queries_logits", "masks_queries_logits")),
}


def build(name):
    """A random model with offsets that sample away from their references, and its inputs."""
    make, count, outputs = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "sampling_offsets" in key or "attention_weights" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    generator = torch.Generator().manual_seed(1)
    return model.eval(), {**inputs, "pixel_values": torch.rand(1, 3, 64, 96, generator=generator)}, count, outputs


def outputs_and_gradients(model, inputs, names):
    found = model(**inputs)
    tensors = [getattr(found, name) for name in names]
    total = sum((x.nan_to_num(neginf=0) * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in tensors)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return tensors, dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_in_float32(name):
    model, inputs, count, names = build(name)
    with torch.no_grad():
        before = model(**inputs)
        assert use_deform_attn(model) == count
        after = model(**inputs)
    for output in names:
        torch.testing.assert_close(getattr(after, output), getattr(before, output), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_same_gradients(name, monkeypatch):
    # In float64: in float32 the two forms' rounding, multiplied by the layers below, hides what is compared.
    model, inputs, count, names = build(name)
    model = model.double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    before, grads_before = outputs_and_gradients(model, inputs, names)
    weights_before = list(model.state_dict())
    calls = []

    def counted(*arguments):
        calls.append(isinstance(arguments[1], list) and isinstance(arguments[1][0][0], int))  # no tensor of sizes
        return deform_attn(*arguments)

    monkeypatch.setattr(importlib.import_module("kpu_fast.kernels.deform_attn"), "deform_attn", counted)
    monkeypatch.setattr(deform, "deform_attn", counted)
    assert use_deform_attn(model) == count
    after, grads_after = outputs_and_gradients(model, inputs, names)
    assert calls == [True] * count
    assert list(model.state_dict()) == weights_before

    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
    reached = 0
    for key, grad in grads_before.items():
        if grad is None:
            assert grads_after[key] is None
        else:
            torch.testing.assert_close(grads_after[key], grad, rtol=1e-7, atol=1e-9 * (1 + grad.abs().max().item()))
            reached += bool(grad.abs().max() > 0) and ("sampling_offsets" in key or "value_proj" in key)
    assert reached >= 2 * count


@pytest.mark.parametrize("name", MODELS)
def test_other_models_of_the_class_and_copies(name):
    model, inputs, count, names = build(name)
    other = build(name)[0]
    use_deform_attn(model)
    own = {type(module) for module in other.modules()}
    changed = [module for module in model.modules() if type(module) not in own]
    assert len(changed) == count
    assert use_deform_attn(model) == count  # again: found, and left as they are
    again = [module for module in model.modules() if type(module) not in own]
    assert [type(module) for module in again] == [type(module) for module in changed]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(getattr(twin(**inputs), names[0]), getattr(model(**inputs), names[0]))


def test_half_precision():
    model, inputs, _, names = build("deformable_detr")
    use_deform_attn(model)
    with torch.no_grad():
        exact = getattr(model(**inputs), names[0])
        inputs = {key: value.bfloat16() for key, value in inputs.items()}
        found = getattr(model.bfloat16()(**inputs), names[0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)


def layer_of(model):
    """An attention of a pixel decoder, its inputs for maps of 4 × 6, 2 × 3 and 1 × 2, and the name it has there."""
    find = ((n, m) for n, m in model.named_modules() if "PixelDecoderEncoderMultiscaleDef" in type(m).__name__)
    name, layer = next(find)
    hidden = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    points = torch.rand(1, 32, 3, 2, generator=torch.Generator().manual_seed(1))
    sizes = {"spatial_shapes_list": [(4, 6), (2, 3), (1, 2)], "level_start_index": torch.tensor([0, 24, 30])}
    inputs = {"hidden_states": hidden, "encoder_hidden_states": hidden, "position_embeddings": hidden}
    return layer, inputs | sizes | {"reference_points": points}, name


def test_torch_compile_of_what_calls_the_layer():
    model = build("mask2former")[0]
    use_deform_attn(model)
    layer, inputs, _ = layer_of(model)

    def caller(**inputs):
        return layer(**inputs)[0] * 2

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(caller, backend="aot_eager", fullgraph=True)(**inputs)
        torch.testing.assert_close(found, caller(**inputs))


def test_training_hooks_and_modules_with_two_names_stay():
    model = build("deformable_detr")[0].eval()
    attention = next(m for m in model.modules() if type(m).__name__ == "MultiScaleDeformableAttention")
    parent = next(m for m in model.modules() if attention in m.children())
    parent.second_name = attention
    seen = []
    attention.register_forward_hook(lambda *_: seen.append(1))
    assert use_deform_attn(model) == 3
    assert parent.second_name is parent.attn
    assert type(parent.attn) is MultiScaleDeformableAttention
    assert not any(module.training for module in model.modules())
    value, locations = torch.randn(1, 6, 1, 2), torch.rand(1, 1, 1, 1, 1, 2)
    parent.attn(value, None, [(2, 3)], None, locations, torch.ones(1, 1, 1, 1, 1), 64)
    assert seen == [1]


def test_the_attention_itself():
    path = importlib.import_module("transformers.models.deformable_detr.modeling_deformable_detr")
    attention = path.MultiScaleDeformableAttention().eval()
    assert use_deform_attn(attention) == 1
    assert type(attention) is MultiScaleDeformableAttention
    assert not attention.training


@pytest.mark.parametrize("name", ["deformable_detr", "mask2former"])
def test_a_forward_that_something_has_replaced_is_an_error(name):
    model = build(name)[0]
    attentions = [m for m in model.modules() if type(m).__name__ == "MultiScaleDeformableAttention"]
    last = attentions[-1] if attentions else layer_of(model)[0]
    last.forward = functools.partial(type(last).forward, last)  # as accelerate does
    before = {type(module) for module in model.modules()}
    with pytest.raises(ValueError, match=r"model\..* has a forward of its own"):
        use_deform_attn(model)
    assert {type(module) for module in model.modules()} == before


def test_a_decorated_forward_is_an_error():
    model = build("mask2former")[0]
    layer, _, name = layer_of(model)

    @functools.wraps(type(layer).forward)
    def decorated(*args, **kwargs):
        return type(layer).__mro__[1].forward(*args, **kwargs)

    layer.__class__ = type("Decorated", (type(layer),), {"forward": decorated})
    with pytest.raises(ValueError, match=f"{name}: the forward of Decorated is decorated"):
        use_deform_attn(model)


def test_a_model_without_any_is_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with pytest.raises(ValueError, match="Sequential holds no MultiScaleDeformableAttention"):
        use_deform_attn(model)


@pytest.mark.parametrize(
    "name", ["grounding_dino", "mm_grounding_dino", "deformable_detr", "rt_detr", "omdet_turbo", "rf_detr", "lw_detr"]
)
def test_the_module_of_that_name_takes_our_arguments(name):
    path = f"transformers.models.{name}.modeling_{name}"
    if importlib.util.find_spec(path) is None:
        pytest.skip(f"this transformers has no {name}")
    theirs = importlib.import_module(path).MultiScaleDeformableAttention
    ours = MultiScaleDeformableAttention
    assert list(inspect.signature(theirs.forward).parameters) == list(inspect.signature(ours.forward).parameters)


def test_the_adapter_hands_over_python_sizes_and_copies_nothing_to_float32(monkeypatch):
    adapter = importlib.import_module("kpu_fast.models.adapter")
    cross = adapter.DeformableCrossAttention(32, 16, heads=2, levels=2, points=4)
    cross.reset_parameters()
    where = adapter.sampling(((2, 3),), ((4, 6), (2, 3)), torch.device("cpu"))
    seen = []

    def watched(value, shapes, locations, weights):
        seen.append((value.dtype, locations.dtype, weights.dtype, value.is_contiguous()))
        assert all(type(side) is int for shape in shapes for side in shape)
        return deform_attn(value, shapes, locations, weights)

    monkeypatch.setattr(adapter, "deform_attn", watched)
    query, memory = torch.randn(1, 6, 32), torch.randn(1, 30, 32)
    exact = cross(query, memory, where)
    out = cross.bfloat16()(query.bfloat16(), memory.bfloat16(), where)
    assert seen[1] == (torch.bfloat16, torch.float32, torch.bfloat16, True)
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.02)


def test_a_class_of_that_name_with_weights_of_its_own_is_refused():
    """The published GroundingDINO and mmcv give the name to the whole layer, projections included."""
    layer = type("MultiScaleDeformableAttention", (torch.nn.Linear,), {})(4, 4)
    model = torch.nn.Sequential(layer)
    with pytest.raises(ValueError, match=r"use_deform_attn: 0: .* weights of its own"):
        use_deform_attn(model)
    assert type(model[0]) is type(layer) is not MultiScaleDeformableAttention
