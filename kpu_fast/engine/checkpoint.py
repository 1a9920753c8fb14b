"""Checkpoints that are whole or not there: written beside, then renamed. `latest` is for people to read.

checkpoints/latest            the name of the newest one, written last
checkpoints/step-00000120/    state/ (DeepSpeed: model and optimiser), rank-<r>.pt (RNG, data), meta.json
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kpu_fast.engine.distributed import World, first_problem, from_rank0, shared
from kpu_fast.engine.run_folder import differences
from kpu_fast.engine.shards import STATE, damage, load_merged, merge, weights_beside

LATEST = "latest"
META = "meta.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit this run."""


class Checkpoints:
    """The checkpoints of one run; keeps the newest `keep`, and all at multiples of `keep_every` steps.

    All ranks save and load together. constants: settings by name, as JSON has them, that a run may go on only with as
    they were. notes: what else meta.json tells, for readers of the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World,
        constants: Mapping[str, Any] | None = None,
        keep_every: int | None = None,
    ):
        self.folder, self.world, self.constants = folder, world, dict(constants or {})
        self.keep, self.keep_every = keep, keep_every
        self.notes: dict[str, Any] = {}

    def save(self, engine, step: int, rank_state: dict[str, Any]) -> None:
        """Write the state after `step`. Raises CheckpointError on all ranks; older checkpoints stay as they were."""
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{final.name}"
        try:
            self._agree(_unwritten(lambda: _fresh_folder(partial)) if self.world.rank == 0 else None, step)
            own = partial / f"rank-{self.world.rank}.pt"
            self._agree(_save_engine(engine, partial) or _unwritten(lambda: torch.save(rank_state, own)), step)
            meta = {"step": step, "world_size": self.world.size, **self._constants(engine), **self.notes}
            meta |= {"torch": torch.__version__, "id": uuid.uuid4().hex}
            self._agree(_unwritten(lambda: self._publish(partial, final, meta)) if self.world.rank == 0 else None, step)
        except CheckpointError:
            if self.world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def load(self, engine, folder: Path, changed: Sequence[str] = ()) -> dict[str, Any]:
        """Load a checkpoint into the engine; returns this rank's state, with "step" and "ranks", how many wrote it.

        Where that is another number than now, the state is rank 0's: nothing in it is of one rank alone. "origin" is,
        of this run's own checkpoint, that of another run from which it began, or None; meta.json has it from then on.
        Raises CheckpointError. changed: settings that the run had otherwise, named where the checkpoint does not fit.
        """
        meta = self._read_meta(folder)
        for key, value in self._constants(engine).items():
            for name, (before, now) in differences({key: meta.get(key, value)}, {key: value}).items():
                raise CheckpointError(f"{folder}: written with {name} = {before}, this run has {now}; set it back")
        same = meta["world_size"] == self.world.size
        sharded = engine.zero_optimization_stage() > 0
        self._see_whole(folder, meta["world_size"] if sharded else 0, changed)
        state = self._read_rank_state(folder, self.world.rank if same else 0, changed)
        if same or not sharded:
            self._agree_on_load(_problem(lambda: _load_engine(engine, folder)), folder, changed)
        else:
            self._load_of_other_ranks(engine, folder, changed)
        origin = None
        if folder.resolve().parent != self.folder.resolve():
            self.notes["origin"] = {"checkpoint": str(folder.resolve()), "id": meta.get("id")}
        elif meta.get("origin") is not None:
            self.notes["origin"] = meta["origin"]
            origin = meta["origin"]["checkpoint"]
        return state | {"step": meta["step"], "ranks": meta["world_size"], "origin": origin}

    def _load_of_other_ranks(self, engine, folder: Path, changed: Sequence[str]) -> None:
        merged, weights = self.folder / ".partial-merged", {}
        stage, rank = engine.zero_optimization_stage(), self.world.rank
        try:
            problem = first_problem(self.world, _problem(lambda: merge(folder, merged)) if rank == 0 else None)
            if problem is not None:
                reason = f"the shards of {folder} could not be put together in {merged} ({problem})"
                raise shared(CheckpointError(f"{reason}; make room there, or start as many ranks as wrote it"))
            problem = _problem(lambda: weights.update(weights_beside(folder, stage, rank)))
            files = sorted(str(file.relative_to(merged)) for file in merged.rglob("*.pt"))
            if files != from_rank0(self.world, files):
                problem = f"not the files that rank 0 has put together are in {merged}"
            self._agree_on_load(problem, folder, changed)
            self._agree_on_load(_problem(lambda: load_merged(engine, merged, weights)), folder, changed)
        finally:
            if rank == 0:
                shutil.rmtree(merged, ignore_errors=True)

    def _constants(self, engine) -> dict[str, Any]:
        return {"zero_stage": engine.zero_optimization_stage(), **self.constants}

    def _read_meta(self, folder: Path) -> dict[str, Any]:
        """Rank 0's, on every rank."""
        problem = meta = None
        if self.world.rank == 0:
            try:
                meta = json.loads((folder / META).read_text(encoding="utf-8"))
                meta |= {key: meta[key] for key in ("step", "world_size", "zero_stage")}
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = f"{META} cannot be used: {in_one_line(error)}"
        self._agree_on_load(problem, folder, ())
        return from_rank0(self.world, meta)

    def _see_whole(self, folder: Path, shards: int, changed: Sequence[str]) -> None:
        """See that every file is whole, each rank some of them: DeepSpeed's loading needs all ranks to the end."""
        files = sorted((folder / STATE).glob("*.pt"))
        damaged = (damage(file) for file in files[self.world.rank :: self.world.size])
        problem = next((problem for problem in damaged if problem is not None), None)
        found = sum(file.name.endswith("optim_states.pt") for file in files)
        if shards and found != shards:
            problem = f"{shards} ranks wrote it, and {found} of their files *optim_states.pt are there"
        self._agree_on_load(problem, folder, changed)

    def _read_rank_state(self, folder: Path, rank: int, changed: Sequence[str] = ()) -> dict[str, Any]:
        """That rank's own file."""
        problem = state = None
        try:
            state = torch.load(folder / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling can raise anything
            problem = in_one_line(error)
        self._agree_on_load(problem, folder, changed)
        return state

    def _agree_on_load(self, problem: str | None, folder: Path, changed: Sequence[str]) -> None:
        problem = first_problem(self.world, problem)
        if problem is not None:
            older = [path.name for path in whole_checkpoints(folder.parent) if path.name < folder.name]
            hint = f"; an older one is {older[-1]}" if older else ""
            hint = f"; its run had another {', '.join(changed[:3])}" if changed else hint
            raise shared(CheckpointError(f"{folder}: does not fit this config or is damaged ({problem}){hint}"))

    def discard_partial(self) -> None:
        """Remove what a kill left half written; rank 0 only."""
        for partial in self.folder.glob(".partial-*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, final: Path, meta: Mapping[str, Any]) -> None:
        missing = [rank for rank in range(self.world.size) if not (partial / f"rank-{rank}.pt").is_file()]
        if missing:
            raise OSError(f"nothing of rank {missing[0]} is in {partial}")
        (partial / META).write_text(json.dumps(meta), encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            _flush_to_disk(path)
        os.replace(partial, final)
        _flush_to_disk(self.folder)
        pointer = self.folder / f".{LATEST}"
        pointer.write_text(final.name, encoding="utf-8")
        _flush_to_disk(pointer)
        os.replace(pointer, self.folder / LATEST)
        _flush_to_disk(self.folder)
        for old in filter(self._may_go, whole_checkpoints(self.folder)[: -self.keep]):
            gone = old.with_name(f".partial-{old.name}")  # a kill in the middle must not leave half a checkpoint
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _may_go(self, old: Path) -> bool:
        step = re.fullmatch(r"step-(\d+)", old.name)
        return self.keep_every is None or step is None or int(step[1]) % self.keep_every != 0

    def _agree(self, problem: str | None, step: int) -> None:
        """Raise CheckpointError on every rank if any rank has a problem."""
        problem = first_problem(self.world, problem)
        if problem is None:
            return
        newest = newest_checkpoint(self.folder)
        kept = f"the last good checkpoint is {newest}" if newest else "there is no earlier checkpoint"
        what = f"{self.folder}: the checkpoint of step {step} was not written: {problem}{_room(self.folder)}"
        raise shared(CheckpointError(f"{what}; {kept}"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in the folder; None if there is none."""
    return max(whole_checkpoints(folder), default=None)


def resolve_resume(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: None and "auto" look in the run's own folder, else a folder is named.

    A run that began from the named checkpoint goes on from its own newest: a job that is submitted again as it was.
    Raises CheckpointError when a run is there but no --resume was given, when the named folder holds none, or when the
    run's own folder holds others.
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
    candidates = filter(None, (named, newest_checkpoint(named), newest_checkpoint(named / "checkpoints")))
    found = next((path for path in candidates if (path / META).is_file()), None)
    if newest is not None and _all_began_from((found or named).resolve(), folder):
        return newest
    if found is None:
        raise CheckpointError(
            f"--resume {resume}: no checkpoint there; name a run's folder, a step-… folder in it, or auto"
        )
    return _check_rewind(found.resolve(), folder.resolve())


def _all_began_from(chosen: Path, folder: Path) -> bool:
    """Whether every checkpoint in `folder` says that its run began from `chosen`, which may have been pruned since.

    The id tells it from another run's that has come to its place; what an older version wrote has its path alone.
    """
    written = _read(chosen).get("id")
    origins = [_read(path).get("origin") or {} for path in whole_checkpoints(folder)]
    if written is not None:
        return all(origin.get("id") == written for origin in origins)
    return all(origin.get("checkpoint") == str(chosen) for origin in origins)


def _read(checkpoint: Path) -> dict[str, Any]:
    """Its meta.json; nothing where that cannot be read."""
    try:
        return dict(json.loads((checkpoint / META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _check_rewind(chosen: Path, folder: Path) -> Path:
    """Going on from `chosen` must not leave checkpoints of another course of the run in `folder`."""
    mine = chosen.parent == folder
    others = [path.name for path in whole_checkpoints(folder) if not (mine and path.name <= chosen.name)]
    if others:
        raise CheckpointError(
            f"--resume {chosen}: {folder} holds {others[-1]}, which a run from there would contradict; set another "
            "name, or delete it"
        )
    return chosen


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder, the oldest first. Only whole ones carry the name step-…"""
    return sorted(path.parent for path in folder.glob(f"step-*/{META}"))


def in_one_line(error: Exception) -> str:
    """Its type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _problem(work: Callable[[], None]) -> str | None:
    """Do `work`; what went wrong: shapes, keys, unpickling, whatever damage or another model can lead to."""
    try:
        work()
    except Exception as error:
        return in_one_line(error)
    return None


def _load_engine(engine, folder: Path) -> None:
    if engine.load_checkpoint(str(folder), tag=STATE)[0] is None:
        raise OSError("DeepSpeed found no state in it")


def _fresh_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _flush_to_disk(path: Path) -> None:
    """A file's contents, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _room(folder: Path) -> str:
    """How much the folder's disk has left: what torch says of a full one is of its own file format."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there)"
    except OSError:
        return ""


def _unwritten(work: Callable[[], None]) -> str | None:
    """Do `work`; why it could not write, in place of raising: a rank that left would leave others waiting."""
    try:
        work()
    except (OSError, RuntimeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _save_engine(engine, folder: Path) -> str | None:
    """DeepSpeed's part of a checkpoint; returns what failed. Its save has barriers that every rank must reach."""
    problems: list[str | None] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def guarded(*args, **kwargs):
        problems.append(_unwritten(lambda: write(*args, **kwargs)))

    writer.save = guarded
    engine._copy_recovery_script = lambda folder: None  # copies two scripts that nobody needs here, and can fail too
    try:
        problems.append(_unwritten(lambda: engine.save_checkpoint(str(folder), tag=STATE, save_latest=False)))
    finally:
        del writer.save, engine._copy_recovery_script
    return next(filter(None, problems), None)


def is_finite(engine) -> bool:
    """Whether every trained weight that this rank holds is a finite number: nothing else is worth a checkpoint."""
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    return bool(torch.stack([_share(p).detach().isfinite().all() for p in trained]).all())


def _share(p: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter; under ZeRO 3 that is ds_tensor, whose end may be padding."""
    if not hasattr(p, "ds_tensor"):
        return p
    start = dist.get_rank() * p.ds_tensor.numel()
    return p.ds_tensor.narrow(0, 0, max(0, min(p.ds_tensor.numel(), p.ds_numel - start)))
