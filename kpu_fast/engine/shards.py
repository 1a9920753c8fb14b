"""What DeepSpeed's files of a checkpoint hold, for any number of ranks.

ZeRO 1 to 3 leave each rank's part of the optimiser's state, at 3 of the weights too, in files of its own. DeepSpeed's
converter makes one tensor per parameter and state of them, from which its optimisers take what is theirs. What it
leaves out, frozen parameters and buffers, comes from the module's state.
"""

import contextlib
import io
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

STATE = "state"  # DeepSpeed's folder in a checkpoint's


def module_state(folder: Path) -> dict[str, Tensor]:
    """The whole state of the trained module in a checkpoint, on the CPU; of stage 3 what is trained is fp32.

    Raises what unpickling and DeepSpeed raise, which can be anything.
    """
    path = folder / STATE / "mp_rank_00_model_states.pt"
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(sys.stderr):  # where only the result belongs
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=STATE)


def merge(folder: Path, target: Path) -> None:
    """Write target/state/, from which `load_merged` loads, out of a checkpoint's folder. Raises as `module_state`."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    settings = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}  # more would be forked, beside a GPU's context
    folders = {"input_folder": str(folder / STATE), "output_folder": str(target / STATE)}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(Namespace(**folders, **workers, **settings))


def load_merged(engine, folder: Path, merged: Path) -> None:
    """A checkpoint's folder into the engine of any number of ranks, after `merge`. Raises as `module_state`."""
    _load_module(engine, module_state(folder))
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(merged), tag=STATE)
    finally:
        engine._config.load_universal_checkpoint = False
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):  # at ZeRO 3 one tensor for all, which every one would count up
            state["step"] = state["step"].clone()


def _load_module(engine, state: dict[str, Tensor]) -> None:
    """At ZeRO 3 only what the optimiser does not bring: frozen parameters and buffers."""
    if engine.zero_optimization_stage() < 3:
        engine.module.load_state_dict(state)
        return
    import deepspeed

    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    kept = {name: buffer for name, buffer in engine.module.named_buffers() if name in state}
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0):
        for name, tensor in (frozen | kept).items():
            tensor.copy_(state[name])
