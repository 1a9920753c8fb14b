"""The training loop: one forward per stream, losses weighed and summed, one backward; a step after one or more."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from kpu_fast.config import Config
from kpu_fast.data.pipeline import Batch, Stream
from kpu_fast.engine.build import Parts, RunError, announce, build, networks, open_streams, together
from kpu_fast.engine.checkpoint import CheckpointError, Checkpoints, is_finite, newest_checkpoint, resolve_resume
from kpu_fast.engine.distributed import World, first_problem, from_rank0, init_distributed, shared
from kpu_fast.engine.monitor import NOT_FINITE, Diverged, Monitor
from kpu_fast.engine.optimizer import restore_settings
from kpu_fast.engine.result import write_result
from kpu_fast.engine.run_folder import (
    OutputError,
    changed_settings,
    claim_run_folder,
    read_claim,
    record_run,
    see_claim,
)
from kpu_fast.engine.terminal import say_from_handler, terminal_may_go
from kpu_fast.machine import is_out_of_memory
from kpu_fast.models.features import Features
from kpu_fast.objectives.balance import FAMO
from kpu_fast.objectives.standardize import Seen, merged

log = logging.getLogger(__name__)

CALIBRATION_SEED = 2**48  # added to a stream's seed: no run's stream has it, the statistics are of other crops


@terminal_may_go()
def train(cfg: Config, resume: str | None = None, skip: int = 0) -> None:
    """Train `cfg` to its last step and write the result; every rank calls it.

    resume: None (a new run), "auto" (the run's newest checkpoint, or a new run) or a checkpoint's folder. skip: batches
    of each stream to pass over before the first step.
    Raises RunError where data, models or output cannot be used, Diverged where a loss or the gradient is not finite,
    CheckpointError or OutputError when a checkpoint or another file cannot be written.
    """
    world = init_distributed()
    folder = Path(os.path.expanduser(cfg.output)) / cfg.name  # Path.expanduser raises where a user has no home
    constants = {"objective.recipe": cfg.objective.recipe, "precision": cfg.precision, "seed": cfg.seed}
    constants |= {"teachers": list(cfg.teachers)}
    keep, keep_every = cfg.checkpoint.keep, cfg.checkpoint.keep_every
    checkpoints = Checkpoints(folder / "checkpoints", keep, world, constants, keep_every)
    with together(world):
        lock = claim_run_folder(folder) if world.rank == 0 else None
        checkpoint = resolve_resume(resume, checkpoints.folder) if world.rank == 0 else None
    checkpoint, claim = from_rank0(world, (checkpoint, read_claim(folder)))
    with together(world):
        see_claim(folder, claim)
    parts = build(cfg, world)
    checkpoints.constants |= networks(cfg, parts.engine.module.student)
    checkpoints.notes |= {"heads": {name: spec._asdict() for name, spec in parts.engine.module.specs.items()}}
    state = {"step": 0, "streams": {}}
    if checkpoint is not None:
        state = _resume(cfg, world, parts, checkpoints, checkpoint)
    elif parts.engine.module.standardize:  # a checkpoint has the statistics
        _calibrate(cfg, world, parts)
    with together(world):
        streams = open_streams(cfg, parts.indexes, world, state["streams"], skip=skip)
        if world.rank == 0:
            checkpoints.discard_partial()
            changes = record_run(folder, cfg, None if checkpoint is None else checkpoint.parents[1], state["step"])
    if world.rank == 0:
        announce(cfg, world, parts)
        begin = "from the beginning"
        if checkpoint is not None:
            others = f", which {state['ranks']} rank{'s' * (state['ranks'] > 1)} wrote" * (state["ranks"] != world.size)
            origin = f", the newest of this run, which began from {state['origin']}" * (state["origin"] is not None)
            begin = f"from step {state['step']} of {checkpoint}{others}{origin}"
        after = f", passing over {skip:,} batches of each stream" * (skip > 0)
        print(begin + after)
        if changes:
            print(f"  with other settings than before: {', '.join(changes)}", flush=True)
    try:
        finished = _run_steps(cfg, world, parts, streams, checkpoints, state["step"])
    except (Diverged, OutputError, RunError) as error:
        newest = newest_checkpoint(checkpoints.folder) or checkpoint or "none: no step was saved"
        blame = isinstance(error, (Diverged, RunError))
        past = "; if a batch is to blame, --resume auto --skip N passes over the next N" * blame
        named = type(error)(f"{error}. The last good checkpoint is {newest}{past}")
        raise (shared(named) if hasattr(error, "shared") else named) from error
    if finished:
        try:
            write_result(cfg, folder, world, parts.engine.module, parts.teachers, parts.indexes)
        except OSError as error:
            raise OutputError(f"{folder}: the result cannot be written ({error}); go on with --resume auto") from error
    dist.barrier(group=world.patient)  # rank 0 makes the pictures
    if lock is not None:
        lock.close()


def _calibrate(cfg: Config, world: World, parts: Parts) -> None:
    """Statistics of the teachers' features for `objective.standardize`, from streams that the run does not read."""
    count, standardize = cfg.objective.standardize_batches, parts.engine.module.standardize
    with together(world):  # nothing in here waits for another rank
        streams = open_streams(cfg, parts.indexes, world, {}, seed=cfg.seed * len(cfg.teachers) + CALIBRATION_SEED)
        seen: dict[str, list[Seen]] = {}
        for stream, names in parts.streams.items():
            batches = (_next_batch(stream, streams[stream]) for _ in range(count))
            what = f"statistics of {', '.join(names)}"
            for batch in tqdm(batches, what, count, unit="batch", disable=world.rank != 0):
                for name in names:
                    new = standardize[name].look([(parts.teachers[name](batch.images), batch.valid)])
                    seen[name] = merged(seen[name], new) if name in seen else new
    with together(world):
        for name, statistics in seen.items():
            standardize[name].fit(statistics)


def _resume(cfg: Config, world: World, parts: Parts, checkpoints: Checkpoints, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint; the config's settings hold, also where the checkpoint was written with others."""
    engine, changed = parts.engine, changed_settings(checkpoint.parents[1], cfg)
    try:
        state = checkpoints.load(engine, checkpoint, changed)
    except CheckpointError as error:
        raise shared(RunError(str(error))) from error
    in_checkpoint = {"student.vit.weights", "objective.standardize_batches"} & set(changed)
    for keys, whose in ((set(changed) - in_checkpoint, "this config's"), (in_checkpoint, "the checkpoint's")):
        if keys and world.rank == 0:
            log.warning("%s: its run had another %s; %s holds", checkpoint, ", ".join(sorted(keys)), whose)
    if state["step"] > cfg.steps:
        raise shared(RunError(f"steps: found {cfg.steps}, but {checkpoint} is already at step {state['step']}"))
    restore_settings(cfg.optimizer, engine.lr_scheduler)
    if hasattr(engine.optimizer, "clip_grad"):  # ZeRO's optimisers take it from the checkpoint
        engine.optimizer.clip_grad = engine.gradient_clipping()
    _set_rng(state["rng"], world.device)
    if isinstance(parts.balance, FAMO) and "famo" in state:
        parts.balance.load_state_dict(state["famo"])
    return state


def targets_of(parts: Parts, batches: dict[str, Batch]) -> dict[str, dict[str, Features]]:
    """What the teachers see: for each batch, by the name of its stream, {teacher: features}."""
    return {
        stream: {name: parts.teachers[name](batch.images) for name in parts.streams[stream]}
        for stream, batch in batches.items()
    }


def forward(engine, batches: dict[str, Batch], targets: dict[str, dict[str, Features]]) -> dict[str, torch.Tensor]:
    """One forward of the student per batch; the loss terms of all teachers, as the objective returns them."""
    terms = {}
    for stream, batch in batches.items():
        terms |= engine(batch.images, targets[stream], batch.valid)
    return terms


def train_step(
    parts: Parts, batches: dict[str, Batch], mark: Callable[[str], None] = lambda part: None
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Forwards, one backward, one step: (loss terms, total, the teachers' shares in it or None if all are equal).

    batches: by the names of the teachers that have images of their own.
    With `gradient_accumulation_steps` k it is every k-th call that takes the step, along the mean of k gradients.
    mark(part): called when that part of the step has been issued (bench/step.py times them).
    """
    engine, objective, balance = parts.engine, parts.engine.module, parts.balance
    targets = targets_of(parts, batches)
    mark("teachers")
    terms = forward(engine, batches, targets)
    shares = None if balance is None else balance.shares(objective.losses(terms))
    total = objective.total(terms, shares)
    mark("student and losses")
    engine.backward(total)
    mark("backward")
    last = engine.is_gradient_accumulation_boundary()
    engine.step()  # before the last one DeepSpeed only counts here
    if isinstance(balance, FAMO):  # what has this step done to each teacher's loss on this batch?
        with torch.no_grad():
            balance.learn(objective.losses(forward(engine, batches, targets)))
    if last:
        objective.after_step(engine.gradient_accumulation_steps())
    mark("optimizer")
    return {key: term.detach() for key, term in terms.items()}, total.detach(), shares


def _run_steps(cfg, world, parts: Parts, streams: dict[str, Stream], checkpoints: Checkpoints, start: int) -> bool:
    """Steps start+1 ... cfg.steps; True if it got there, False if a signal ended it after a checkpoint."""
    engine, balance = parts.engine, parts.balance
    images = world.size * cfg.images_per_step()
    others = engine.monitor if engine.monitor.enabled else None
    engine.monitor.enabled = False  # what DeepSpeed would tell them itself counts images, and wandb takes no step back
    monitor = Monitor(
        checkpoints.folder.parent, world, start=start, steps=cfg.steps, images_per_step=images, others=others
    )
    with _stop_signals() as asked:
        try:
            began = time.perf_counter()
            for step in range(start + 1, cfg.steps + 1):
                lr, waited, done = engine.get_lr()[0], 0.0, []
                for _ in range(cfg.gradient_accumulation_steps):
                    before = time.perf_counter()
                    batches = {name: _next_batch(name, stream) for name, stream in streams.items()}
                    waited += time.perf_counter() - before
                    done.append(train_step(parts, batches))
                terms, total, shares = _mean(done)
                now = time.perf_counter()
                facts = {"lr": lr, "step_seconds": now - began, "data_wait_percent": 100.0 * waited / (now - began)}
                began = now
                named = {} if shares is None else dict(zip(cfg.teachers, shares.unbind(), strict=True))
                norm = engine.get_global_grad_norm()
                monitor.push(step, engine.module.unweighed(terms), total, norm, named, bool(asked), facts)
                if not engine.was_step_applied():  # some of DeepSpeed's optimisers leave out what is not finite
                    monitor.flush()  # which raises, with the terms, if it is a loss that is not
                    raise shared(Diverged(NOT_FINITE.format(step=step)))
                if step % cfg.checkpoint.every == 0 or step == cfg.steps or monitor.stop:
                    monitor.flush()
                    if first_problem(world, None if is_finite(engine) else "NaN") is not None:
                        raise shared(Diverged(f"step {step}: a trained weight is NaN or Inf"))
                    states = {name: stream.state() for name, stream in streams.items()}
                    rank_state = {"streams": states, "rng": _get_rng(world.device)}
                    if isinstance(balance, FAMO):
                        rank_state["famo"] = balance.state_dict()
                    checkpoints.save(engine, step, rank_state)
                    began = time.perf_counter()  # a checkpoint is no part of the next step
                if monitor.stop and step < cfg.steps:
                    monitor.say(f"stopped after step {step}; go on with --resume auto")
                    return False
        finally:
            monitor.close()
    return True


def _mean(done: list[tuple]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """What `train_step` returned for each of a step's batches → the same for the step."""
    if len(done) == 1:
        return done[0]
    terms, totals, shares = zip(*done, strict=True)
    return (
        {key: torch.stack([some[key] for some in terms]).mean(0) for key in terms[0]},
        torch.stack(totals).mean(0),
        None if shares[0] is None else torch.stack(shares).mean(0),
    )


def _next_batch(name: str, stream: Stream):
    try:
        return next(stream)
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"teachers.{name}.data: {error}") from error


_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect what asks a run to stop while steps run, instead of dying in the middle of one.

    SIGHUP comes when a terminal goes, SIGUSR1 from SLURM where it is told so (--signal); a run that was started to
    ignore one, as by nohup, does. Launchers send several, and more than once; only a Ctrl-C seconds after the first one
    means "now".
    """
    asked: list[int] = []
    first = 0.0

    def note(number: int, _frame) -> None:
        nonlocal first
        if not asked:
            first = time.monotonic()
            say_from_handler("stopping after this step, with a checkpoint; Ctrl-C again to stop at once")
        elif number == signal.SIGINT and time.monotonic() - first > 3.0:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _get_rng(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
