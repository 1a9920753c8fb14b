"""A training step hands its work to the GPU and reads nothing back."""

from types import SimpleNamespace

import pytest
import torch
from syncs import no_syncs
from torch import nn

from kpu_fast.config_objective import GKDConfig, KPUConfig
from kpu_fast.engine.build import Parts
from kpu_fast.engine.loop import train_step
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.student import Student
from kpu_fast.objectives.balance import FAMO, build_balance
from kpu_fast.objectives.recipe import build_objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = {"clip": FeatureSpec(24, (16,), (16.0,)), "gdino": FeatureSpec(None, (8, 12), (16.0, 32.0))}


class Engine(nn.Module):
    """What the loop asks of DeepSpeed's engine, whose own waiting is its own affair."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)

    def forward(self, *args):
        return self.module(*args)

    def backward(self, loss):
        loss.backward()

    def is_gradient_accumulation_boundary(self):
        return True

    def gradient_accumulation_steps(self):
        return 1

    def step(self):
        self.optimizer.step()


def parts(objective, adapter=None, device=DEVICE):
    torch.manual_seed(0)
    vit = {"dim": 32, "depth": 2, "heads": 2, "patch_size": 16, "image_size": 64}
    if adapter is None or adapter["cross_attention"] == "deformable":
        vit["rope_theta"] = 100.0

    def student(heads):
        return Student(vit=vit, adapter=adapter, heads=heads, head_hidden=16, freeze_vit=adapter is not None)

    module = build_objective(objective, SPECS, student).to(device)

    def teacher(spec):
        x = None if spec.x_dim is None else torch.randn(2, spec.x_dim, device=device)
        maps = (torch.randn(2, int(64 // s), int(96 // s), c, device=device) for c, s in zip(*spec[1:], strict=True))
        features = Features(x, tuple(maps))
        return lambda images: features

    teachers = {name: teacher(spec) for name, spec in SPECS.items()}
    return Parts(
        {}, {name: [name] for name in SPECS}, teachers, Engine(module), build_balance(objective.balance, 2, device)
    )


def batches(device=DEVICE, padded=True):
    valid = torch.ones(2, 64, 96, dtype=torch.bool, device=device)
    valid[1, 40:] = False
    images = {name: torch.rand(2, 3, 64, 96, device=device) for name in SPECS}
    masks = {"clip": None, "gdino": valid if padded else None}
    return {name: SimpleNamespace(images=images[name], valid=masks[name]) for name in SPECS}


@pytest.mark.parametrize(
    "objective",
    [
        KPUConfig(),
        KPUConfig(balance="famo", standardize="phi_s"),
        KPUConfig(balance="teacher_drop", standardize="meanstd"),
        GKDConfig(recipe="gkd"),
    ],
    ids=["equal", "famo", "teacher_drop", "gkd"],
)
def test_a_step_waits_for_nothing(objective):
    made, given = parts(objective), batches(padded=objective.recipe == "kpu")
    _, before, _ = train_step(made, given)  # allocates the optimiser's state, compiles kernels
    famo = made.balance if isinstance(made.balance, FAMO) else None
    with no_syncs([famo.adam.state[famo.w]["step"]] if famo else []):  # Adam counts its steps on the CPU
        _, after, shares = train_step(made, given)
    assert (shares is None) == (objective.balance == "equal")
    assert not torch.equal(before, after)
    if famo:
        assert float(famo.w.detach().abs().max()) > 0


def test_famo_looks_at_the_step_and_not_at_the_centres():
    """Both looks of a step are taken with one mean: where no weight moves, no loss does."""
    made, given = parts(KPUConfig(balance="famo")), batches()
    for group in made.engine.optimizer.param_groups:
        group["lr"] = 0.0
    looks, learn = [], made.balance.learn
    made.balance.learn = lambda losses: looks.append(losses) or learn(losses)
    terms, _, _ = train_step(made, given)
    torch.testing.assert_close(looks[0], made.engine.module.losses(terms).detach())
    centres = [head.centre.mean for head in made.engine.module.h_t2s["clip"].projectors()]
    assert all(mean.abs().max() > 0 for mean in centres)  # which have moved by now


@pytest.mark.parametrize(
    ("objective", "adapter"),
    [
        (KPUConfig(), None),
        (KPUConfig(balance="famo", standardize="phi_s"), {"cross_attention": "flash", "interactions": 2}),
        (
            KPUConfig(balance="teacher_drop", standardize="meanstd"),
            {"cross_attention": "deformable", "interactions": 2},
        ),
        (GKDConfig(recipe="gkd"), None),
    ],
    ids=["equal", "famo", "teacher_drop", "gkd"],
)
def test_a_step_keeps_to_its_device(objective, adapter):
    """On a device without values, which mixes with no other: no tensor of a step is made or left on the CPU."""
    made, given = parts(objective, adapter, device="meta"), batches("meta", padded=objective.recipe == "kpu")
    terms, total, _ = train_step(made, given)
    assert {tensor.device.type for tensor in (*terms.values(), total)} == {"meta"}
    assert all(p.grad.device.type == "meta" for p in made.engine.module.parameters() if p.requires_grad)
    made.engine.module.register_forward_pre_hook(lambda _, args: (args[0] * torch.ones(96), *args[1:]))
    with pytest.raises(RuntimeError, match="device"):
        train_step(made, given)


@pytest.mark.parametrize("read", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool((x > 0).any())])
def test_a_read_would_be_seen(read):
    with pytest.raises(RuntimeError, match=r"synchron|read by the host"), no_syncs():
        read(torch.ones(3, device=DEVICE))
