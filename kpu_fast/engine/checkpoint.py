"""Checkpoints that are whole or not there: written beside, renamed, then named in `latest`.

checkpoints/latest            the name of the newest one, written last
checkpoints/step-00000120/    state/ (DeepSpeed: model and optimiser), rank-<r>.pt (RNG, data), meta.json
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from kpu_fast.engine.distributed import World, all_succeeded, on_rank0

LATEST = "latest"
META = "meta.json"
STATE = "state"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit this run."""


class Checkpoints:
    """The checkpoints of one run; keeps the newest `keep`. Every method is called by all ranks together."""

    def __init__(self, folder: Path, keep: int, world: World):
        self.folder, self.keep, self.world = folder, keep, world

    def save(self, engine, step: int, rank_state: dict[str, Any]) -> None:
        """Write the state after `step`. Raises CheckpointError and leaves the older checkpoints as they were."""
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{final.name}"
        problem = None
        if not _finite(engine):
            problem = "a trainable parameter is NaN or Inf"
        self._raise_if_any(problem, step)
        on_rank0(self.world, lambda: _fresh_folder(partial))
        try:
            engine.save_checkpoint(str(partial), tag=STATE, save_latest=False)
            torch.save(rank_state, partial / f"rank-{self.world.rank}.pt")
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.folder).free / 2**20
            problem = f"{str(error).splitlines()[0]} ({free:.0f} MiB free there)"
        try:
            self._raise_if_any(problem, step)
            on_rank0(self.world, lambda: self._publish(partial, final, step, engine.zero_optimization_stage()))
        except (OSError, CheckpointError) as error:
            if self.world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(str(error)) from error

    def load(self, engine, folder: Path) -> dict[str, Any]:
        """Load a checkpoint into the engine; returns this rank's state, with "step". Raises CheckpointError."""
        meta = _read_meta(folder)
        here = {"world_size": self.world.size, "zero_stage": engine.zero_optimization_stage()}
        for key, value in here.items():
            if meta[key] != value:
                raise CheckpointError(
                    f"{folder}: written with {key} = {meta[key]}, this run has {value}; go on with the same number of "
                    "ranks and the same ZeRO stage"
                )
        try:
            loaded, _ = engine.load_checkpoint(str(folder), tag=STATE)
            state = torch.load(folder / f"rank-{self.world.rank}.pt", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{folder}: does not fit this config or is damaged ({reason})") from error
        if loaded is None:
            raise CheckpointError(
                f"{folder}: DeepSpeed found no state in it; name a checkpoint folder such as step-00000100"
            )
        return state | {"step": meta["step"]}

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return newest_checkpoint(self.folder)

    def _publish(self, partial: Path, final: Path, step: int, zero_stage: int) -> None:
        meta = {"step": step, "world_size": self.world.size, "zero_stage": zero_stage, "torch": torch.__version__}
        (partial / META).write_text(json.dumps(meta), encoding="utf-8")
        for file in partial.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        if final.exists():  # the same step again, after resuming from an older checkpoint
            shutil.rmtree(final)
        os.replace(partial, final)
        pointer = self.folder / f".{LATEST}"
        pointer.write_text(final.name, encoding="utf-8")
        _flush_to_disk(pointer)
        os.replace(pointer, self.folder / LATEST)
        older = [path for path in _whole(self.folder) if path.name <= final.name]
        for path in older[: -self.keep]:
            shutil.rmtree(path)

    def _raise_if_any(self, problem: str | None, step: int) -> None:
        if all_succeeded(self.world, problem is None):
            return
        newest = self.newest()
        kept = f"the last good checkpoint is {newest}" if newest else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{self.folder}: the checkpoint of step {step} was not written: {problem or 'another rank failed'}; {kept}"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """What `latest` names, or else the newest whole checkpoint in the folder; None if there is none."""
    try:
        named = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        named = None
    if named is not None and (named / META).is_file():
        return named
    return max(_whole(folder), default=None)


def resolve_resume(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: None and "auto" look in the run's own folder, else a folder is named.

    Raises CheckpointError when a run is there but no --resume was given, or when the named folder holds none.
    """
    newest = newest_checkpoint(folder)
    if resume is None:
        if newest is not None:
            raise CheckpointError(
                f"{folder}: holds {newest.name} of an earlier run; add --resume auto to go on, or change name"
            )
        return None
    if resume == "auto":
        return newest
    named = Path(resume)
    for candidate in (named, newest_checkpoint(named), newest_checkpoint(named / "checkpoints")):
        if candidate is not None and (candidate / META).is_file():
            return candidate.resolve()
    raise CheckpointError(
        f"--resume {resume}: no checkpoint there; name a run's folder, a step-… folder in it, or auto"
    )


def _whole(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step-*/{META}"))


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {META} cannot be read ({error})") from error


def _fresh_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _flush_to_disk(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _finite(engine) -> bool:
    # ZeRO 3 keeps a rank's share of a parameter in ds_tensor.
    shares = [getattr(p, "ds_tensor", p) for p in engine.module.parameters() if p.requires_grad]
    return bool(torch.stack([share.detach().isfinite().all() for share in shares]).all())
