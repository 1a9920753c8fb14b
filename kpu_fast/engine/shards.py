"""What DeepSpeed's files of a checkpoint hold, for any number of ranks.

ZeRO 1 to 3 leave each rank's part of the optimiser's state, at 3 of the weights too, in files of its own. DeepSpeed's
converter makes one tensor per parameter and state of them, from which its optimisers take what is theirs. What it
leaves out, frozen parameters and buffers, comes from the module's state.
"""

import contextlib
import io
import shutil
import sys
import tempfile
import zipfile
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
    target.mkdir()
    settings = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}  # more would be forked, beside a GPU's context
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as links, quiet[0], quiet[1]:
        # It looks for files by patterns that begin with these paths, and a run's may hold any character.
        for name, path in (("from", folder), ("to", target)):
            Path(links, name).symlink_to(path.resolve())
        folders = {"input_folder": f"{links}/from/{STATE}", "output_folder": f"{links}/to/{STATE}"}
        ds_to_universal.main(Namespace(**folders, **workers, **settings))


def weights_beside(folder: Path, stage: int, rank: int) -> dict[str, Tensor]:
    """What `load_merged` needs beside the merged shards on this rank. Raises as `module_state`.

    The module's state; at ZeRO 3, where the optimiser brings what is trained, its buffers, and on rank 0 all of it.
    """
    if stage < 3 or rank == 0:
        return module_state(folder)
    of_rank0 = folder / STATE / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    state = torch.load(of_rank0, map_location="cpu", weights_only=False, mmap=True)
    return {name: state["module"][name] for name in state["buffer_names"]}


def load_merged(engine, merged: Path, weights: dict[str, Tensor]) -> None:
    """What `merge` wrote and `weights_beside` found, into the engine of any number of ranks; all of them call it."""
    if engine.zero_optimization_stage() < 3:
        engine.module.load_state_dict(weights)
    else:
        _load_what_is_not_trained(engine.module, weights)
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(merged), tag=STATE)
    finally:
        engine._config.load_universal_checkpoint = False
    for parameter, state in engine.optimizer.optimizer.state.items():
        # As read: on the CPU, where no fused optimiser of a GPU takes it, and at ZeRO 3 one tensor for all parameters,
        # which every one of them would count up.
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)


def _load_what_is_not_trained(module, weights: dict[str, Tensor]) -> None:
    """At ZeRO 3 buffers, which every rank has whole, and frozen parameters, of which rank 0 hands out the shares."""
    import deepspeed

    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    with torch.no_grad(), deepspeed.zero.GatheredParameters([p for _, p in frozen], modifier_rank=0):
        for name, tensor in [*module.named_buffers(), *frozen]:
            if name in weights:
                tensor.copy_(weights[name])


def damage(path: Path) -> str | None:
    """What is wrong with a file of torch.save, read from end to end; None where it is whole."""
    try:
        with zipfile.ZipFile(path) as file:
            return None if file.testzip() is None else f"{path.name} is damaged"
    except zipfile.BadZipFile:
        return f"{path.name} is cut off"
    except Exception as error:  # of what is in it zipfile has errors of every kind
        return f"{path.name} cannot be read ({type(error).__name__}: {error})"
