"""Two ranks, ZeRO 0-3, against one process of plain torch on the same global batch."""

import json
from types import SimpleNamespace

import pytest
import torch
from processes import finish
from torch import nn
from zero_worker import STEPS, fixed_batches

from kpu_fast.config import ConfigError, load_config
from kpu_fast.engine.optimizer import build_scheduler
from kpu_fast.engine.zero import _clip, _norm
from kpu_fast.models.student import Student
from kpu_fast.models.teachers import build_teacher
from kpu_fast.objectives.kpu import KPU

# Each rank's images in two backwards.
HALVES = "gradient_accumulation_steps=2,teachers.clip.data.batch_size=2,teachers.gdino.data.batch_size=1"


@pytest.fixture(scope="module")
def plain(tiny) -> tuple[dict, dict, list]:
    """(parameters before, after, gradient norms) of five steps of textbook torch: no engine, the whole batch."""
    cfg = load_config(tiny)
    teachers = {
        name: build_teacher(name, t, device="cpu", dtype=torch.float32, image_size=t.data.size)
        for name, t in cfg.teachers.items()
    }
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    torch.manual_seed(cfg.seed)
    student = Student.from_config(cfg.student, specs)
    module = KPU(student, specs, cfg.objective)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainable = [p for p in module.parameters() if p.requires_grad]
    decay = cfg.optimizer.weight_decay
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    matrices = {id(m.weight) for m in layers}
    groups = [
        {"params": [p for p in trainable if id(p) in matrices], "weight_decay": decay},
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=cfg.optimizer.lr, betas=cfg.optimizer.betas, eps=cfg.optimizer.eps, fused=False
    )
    scheduler = build_scheduler(cfg.optimizer, optimizer, cfg.steps)
    norms = []
    for step in range(STEPS):
        terms = {}
        for name, batch in fixed_batches(cfg, step, ranks=2, rank=None).items():
            terms |= module(batch.images, {name: teachers[name](batch.images)}, batch.valid)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, cfg.optimizer.clip_grad_norm).item())
        optimizer.step()
        scheduler.step()
        module.after_step()
    return before, {name: p.detach() for name, p in module.named_parameters()}, norms


@pytest.mark.parametrize(
    ("stage", "runs"),
    [*[(stage, ["", HALVES]) for stage in range(4)], (1, ["compile=true"]), (3, ["activation_checkpointing=true"])],
    ids=str,
)
def test_two_ranks_equal_plain_torch(stage, runs, plain, start_helper, tmp_path):
    out = tmp_path / "after.pt"
    finish(start_helper("zero_worker.py", str(stage), str(out), *runs, ranks=2))
    results, (before, after, norms) = torch.load(out), plain
    assert list(results) == runs
    for run, found in results.items():
        assert found["stage"] == stage
        assert found["waits"] == []
        assert [float(norm) for norm in found["norms"]] == pytest.approx(norms, rel=1e-4)
        assert found["state"].keys() == after.keys()
        for name, expected in after.items():
            where = f"{run} {name}"
            torch.testing.assert_close(
                found["state"][name], expected, rtol=0, atol=1e-5, msg=lambda m, where=where: f"{where}: {m}"
            )
            frozen = name.startswith("student.vit.")
            assert torch.equal(found["state"][name], before[name]) or not frozen
    moved = sum(not torch.equal(after[name], before[name]) for name in after)
    # Nearly all that trains has moved by more than the tolerance, so that equality says something.
    far = sum((after[name] - before[name]).abs().max() > 1e-4 for name in after)
    assert far > 0.9 * moved > 50


@pytest.mark.parametrize(("length", "clip_grad"), [(5.0, 1.0), (0.25, 1.0), (5.0, 0.0)])
@pytest.mark.parametrize("loss_scale", [1.0, 4.0])
def test_clipping(length, clip_grad, loss_scale):
    """Together at most clip_grad long, at their own length if that is less, and never scaled by the loss."""
    gradients = [torch.randn(5, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    whole = torch.cat([g.flatten() for g in gradients])
    gradients = [g * (length * loss_scale / whole.norm()) for g in gradients]
    optimizer = SimpleNamespace(clip_grad=clip_grad, loss_scale=loss_scale)
    _clip(optimizer, gradients, torch.tensor(length * loss_scale))
    found = torch.cat([g.flatten() for g in gradients])
    expected = whole / whole.norm() * (min(length, clip_grad) if clip_grad else length)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(wrong, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    optimizer = SimpleNamespace(device="cpu", dp_process_group=None)
    gradients = [torch.ones(3, 4, dtype=torch.bfloat16), torch.full((5,), 2.0, dtype=torch.bfloat16)]
    padding = torch.full((9,), wrong)
    padding._zero_padding = True  # what DeepSpeed appends to the last rank's part
    assert _norm(optimizer, [*gradients, padding], None).item() == pytest.approx(32**0.5)
    assert _norm(optimizer, [], None).item() == 0
    gradients[1][3] = wrong
    assert not _norm(optimizer, gradients, None).isfinite()


def test_what_deepspeed_is_asked_for(tiny):
    """No clipping is none, not DeepSpeed's own; without a norm it looks at every gradient; a block keeps the rest."""

    def asked(block, clip="1.0"):
        cfg = load_config(
            tiny, ["precision=bf16", "deepspeed=" + json.dumps(block), f"optimizer.clip_grad_norm={clip}"]
        )
        return cfg.deepspeed_config()

    assert asked({})["gradient_clipping"] == 1.0
    assert asked({}, clip="null")["gradient_clipping"] == 0.0
    assert asked({"gradient_clipping": 0}, clip="null")["gradient_clipping"] == 0
    usual = {"enabled": True, "check_grad_overflow": False, "immediate_grad_update": True}
    assert asked({})["bf16"] == usual
    without = {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}
    assert asked(without, clip="null")["bf16"] == usual | {"check_grad_overflow": True}
    assert asked({"bf16": {"enabled": True}})["bf16"] == usual
    with pytest.raises(ConfigError, match="immediate_grad_update: found false"):
        asked({"bf16": {"enabled": True, "immediate_grad_update": False}})
