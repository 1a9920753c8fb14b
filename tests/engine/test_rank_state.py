"""What a rank keeps beside DeepSpeed's state: it loads where no GPU of that number is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kpu_fast.engine import checkpoint
from kpu_fast.engine.checkpoint import CheckpointError, Checkpoints
from kpu_fast.engine.distributed import World
from kpu_fast.engine.shards import damage, load_merged
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


@pytest.mark.parametrize("text", ["\nthe disk is full", "the disk is full\nhere", "", "\n"])
def test_what_could_not_be_written_always_has_a_word(text):
    def write():
        raise RuntimeError(text)

    assert checkpoint._unwritten(write) == ("the disk is full" if "disk" in text else "RuntimeError")


def test_damage_is_seen_before_deepspeed_loads(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"weight": torch.ones(1000)}, path)
    whole = path.read_bytes()
    assert damage(path) is None
    at = whole.index(torch.ones(16).numpy().tobytes())
    path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    assert damage(path) == "state.pt is damaged"
    path.write_bytes(whole[:-100])
    assert damage(path) == "state.pt is cut off"
    assert damage(tmp_path).startswith(f"{tmp_path.name} cannot be read (IsADirectoryError")


def test_shards_that_are_not_there_and_shards_without_room(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "first_problem", lambda world, problem: problem)
    checkpoints = Checkpoints(tmp_path / "run", 1, World(0, 1, torch.device("cpu"), 0, None))
    (tmp_path / "state").mkdir()
    torch.save({}, tmp_path / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    checkpoints._see_whole(tmp_path, 1, ())
    with pytest.raises(CheckpointError, match=r"2 ranks wrote it, and 1 of their files \*optim_states.pt are there"):
        checkpoints._see_whole(tmp_path, 2, ())

    def full(folder, target):
        raise RuntimeError("iostream error")

    monkeypatch.setattr(checkpoint, "merge", full)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 1)
    with pytest.raises(CheckpointError, match=r"could not be put together in .*/run/\.partial-merged .*iostream.*room"):
        checkpoints._load_of_other_ranks(engine, tmp_path, ())

    # What rank 0 has put together, another node does not see yet: nobody begins to load.
    monkeypatch.setattr(checkpoint, "merge", lambda folder, target: target.mkdir(parents=True))
    monkeypatch.setattr(checkpoint, "weights_beside", lambda *_: {})
    monkeypatch.setattr(checkpoint, "load_merged", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(checkpoint, "from_rank0", lambda world, files: [*files, "state/zero/x/fp32.pt"])
    with pytest.raises(CheckpointError, match=r"not the files that rank 0 has put together are in .*\.partial-merged"):
        checkpoints._load_of_other_ranks(engine, tmp_path, ())


def test_a_checkpoint_that_lacks_a_rank_is_not_published(tmp_path):
    """As where the ranks of another node write to another folder of that name."""
    checkpoints = Checkpoints(tmp_path, 1, World(0, 2, torch.device("cpu"), 0, None))
    partial, final = tmp_path / ".partial-step-00000002", tmp_path / "step-00000002"
    partial.mkdir()
    (partial / "rank-0.pt").write_bytes(b"")
    with pytest.raises(OSError, match="nothing of rank 1 is in"):
        checkpoints._publish(partial, final, {})
    assert not final.exists()


def test_merged_steps_go_where_the_optimizer_steps():
    """A GPU's fused AdamW takes no step counter of the CPU; "meta" stands for the GPU."""
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: 1,
        module=nn.Linear(2, 2),
        _config=SimpleNamespace(load_universal_checkpoint=False),
        load_checkpoint=lambda *_, tag: None,
        optimizer=SimpleNamespace(optimizer=SimpleNamespace(state={})),
    )
    # DeepSpeed leaves one tensor for all.
    step, state = torch.tensor(3.0), engine.optimizer.optimizer.state
    for device in ("meta", "cpu", "cpu"):
        state[nn.Parameter(torch.empty(2, device=device))] = {"step": step}
    load_merged(engine, "nowhere", engine.module.state_dict())
    found = [some["step"] for some in state.values()]
    assert [tensor.device.type for tensor in found] == ["meta", "cpu", "cpu"]
    assert found[1] == found[2] == 3
    assert len({id(tensor) for tensor in [step, *found]}) == 4
    assert len({tensor.data_ptr() for tensor in [step, *found[1:]]}) == 3
