"""What a rank keeps beside DeepSpeed's state: it loads where no GPU of that number is."""

import pytest
import torch

from kpu_fast.engine import checkpoint
from kpu_fast.engine.checkpoint import Checkpoints
from kpu_fast.engine.distributed import World
from kpu_fast.objectives.balance import FAMO


def test_tensors_of_a_gpu_arrive_on_the_cpu_and_famo_goes_on_from_them(monkeypatch, tmp_path):
    losses = torch.tensor([1.0, 2.0])
    first, second = FAMO(2, "cpu"), FAMO(2, "cpu")
    first.shares(losses)
    first.learn(losses / torch.tensor([1.0, 2.0]))
    with monkeypatch.context() as patch:  # a file as a run on a GPU leaves it, also where there is none
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"famo": first.state_dict()}, tmp_path / "rank-0.pt")
    monkeypatch.setattr(checkpoint, "first_problem", lambda world, problem: problem)
    world = World(0, 1, torch.device("cpu"), 0, None)
    state = Checkpoints(tmp_path.parent, 1, world)._read_rank_state(tmp_path, 0)["famo"]
    assert state["w"].device.type == "cpu"
    second.load_state_dict(state)
    assert torch.equal(second.w, first.w)
    assert first.w.abs().max() > 0.01
    assert torch.equal(second.adam.state[second.w]["exp_avg"], first.adam.state[first.w]["exp_avg"])


def test_a_checkpoint_that_lacks_a_rank_is_not_published(tmp_path):
    """As where the ranks of another node write to another folder of that name."""
    checkpoints = Checkpoints(tmp_path, 1, World(0, 2, torch.device("cpu"), 0, None))
    partial, final = tmp_path / ".partial-step-00000002", tmp_path / "step-00000002"
    partial.mkdir()
    (partial / "rank-0.pt").write_bytes(b"")
    with pytest.raises(OSError, match="nothing of rank 1 is in"):
        checkpoints._publish(partial, final, {})
    assert not final.exists()
