"""Parameter groups, the schedule, and the implementations that may be missing."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kpu_fast.config import OptimizerConfig, load_config
from kpu_fast.engine.optimizer import OptimizerError, build_optimizer, build_scheduler


def test_decay_is_for_matrices_and_frozen_weights_have_no_state():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    module[0].requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.3), module, torch.device("cpu"))
    assert [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(0.3, 1), (0.0, 3)]
    module(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4
    assert not any(p in optimizer.state for p in module[0].parameters())


def test_warm_up_then_cosine():
    cfg = SimpleNamespace(lr=2.0, min_lr=0.5, warmup_steps=4)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.lr)
    scheduler = build_scheduler(cfg, optimizer, steps=12)
    seen = []
    for _ in range(13):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert seen[8] == pytest.approx((2.0 + 0.5) / 2)  # half of the cosine
    assert seen[12] == pytest.approx(0.5)


def test_missing_apex_is_an_error_that_says_what_to_do():
    try:
        from apex.optimizers import FusedAdam  # noqa: F401

        pytest.skip("NVIDIA's apex is installed here")
    except ImportError:
        pass
    with pytest.raises(OptimizerError, match='Set it to "torch"'):
        build_optimizer(OptimizerConfig(impl="apex"), nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"device": "cpu"}, True),
        ({"device": "nvme", "nvme_path": "/x"}, True),
        ({"device": "none"}, False),
        (None, False),
    ],
    ids=str,
)
def test_an_offloaded_optimizer_is_known_as_one(block, expected, tiny):
    zero = {"stage": 2} | ({} if block is None else {"offload_optimizer": block})
    assert load_config(tiny, ["deepspeed=" + json.dumps({"zero_optimization": zero})]).offloads_optimizer() == expected
