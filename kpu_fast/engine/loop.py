"""The training loop: one forward per teacher, losses weighed and summed, one backward; a step after one or more."""

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from kpu_fast.config import Config, unknown_deepspeed_keys
from kpu_fast.data.pipeline import Stream
from kpu_fast.data.sampler import canvases_of, choose_canvas
from kpu_fast.data.scan import Index, load_or_scan, load_same
from kpu_fast.engine.checkpoint import CheckpointError, Checkpoints, is_finite, resolve_resume
from kpu_fast.engine.distributed import World, first_problem, from_rank0, init_distributed, shared
from kpu_fast.engine.monitor import NOT_FINITE, Diverged, Monitor
from kpu_fast.engine.optimizer import build_optimizer, build_scheduler, restore_settings
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
from kpu_fast.engine.zero import quicken
from kpu_fast.machine import is_out_of_memory
from kpu_fast.models.attention import BackendError, describe
from kpu_fast.models.features import Features
from kpu_fast.models.student import Student
from kpu_fast.models.teachers import Teacher, build_teacher
from kpu_fast.objectives.balance import FAMO, TeacherDrop, build_balance
from kpu_fast.objectives.kpu import KPU

log = logging.getLogger(__name__)

CALIBRATION_SEED = 2**48  # added to a stream's seed: no run's stream has it, the statistics are of other crops


class RunError(ValueError):
    """Data, a model, the output folder or the optimiser cannot be used. The message says which and what to do."""


class Parts(NamedTuple):
    """What a run is made of."""

    indexes: dict[str, Index]
    teachers: dict[str, Teacher]
    engine: Any  # deepspeed.DeepSpeedEngine around KPU
    balance: TeacherDrop | FAMO | None  # None: equal teachers


@terminal_may_go()
def train(cfg: Config, resume: str | None = None, skip: int = 0) -> None:
    """Train `cfg` to its last step and write the result; every rank calls it.

    resume: None (a new run), "auto" (the run's newest checkpoint, or a new run) or a checkpoint's folder. skip: batches
    of each teacher to pass over before the first step.
    Raises RunError where data, models or output cannot be used, Diverged where a loss or the gradient is not finite,
    CheckpointError or OutputError when a checkpoint or another file cannot be written.
    """
    world = init_distributed()
    folder = Path(os.path.expanduser(cfg.output)) / cfg.name  # Path.expanduser raises where a user has no home
    constants = {"precision": cfg.precision, "seed": cfg.seed, "teachers": list(cfg.teachers)}
    checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, world, constants)
    with _together(world):
        lock = claim_run_folder(folder) if world.rank == 0 else None
        checkpoint = resolve_resume(resume, checkpoints.folder) if world.rank == 0 else None
    checkpoint, claim = from_rank0(world, (checkpoint, read_claim(folder)))
    with _together(world):
        see_claim(folder, claim)
    parts = build(cfg, world)
    checkpoints.constants |= _networks(cfg, parts.engine.module.student)
    checkpoints.notes |= {"heads": parts.engine.module.student.config["heads"]}
    state = {"step": 0, "streams": {}}
    if checkpoint is not None:
        state = _resume(cfg, world, parts, checkpoints, checkpoint)
    elif cfg.objective.standardize != "none":  # a checkpoint has the statistics
        _calibrate(cfg, world, parts)
    with _together(world):
        streams = open_streams(cfg, parts.indexes, world, state["streams"], skip=skip)
        if world.rank == 0:
            checkpoints.discard_partial()
            changes = record_run(folder, cfg, None if checkpoint is None else checkpoint.parents[1], state["step"])
    if world.rank == 0:
        _announce(cfg, world, parts)
        begin = "from the beginning"
        if checkpoint is not None:
            others = f", which {state['ranks']} rank{'s' * (state['ranks'] > 1)} wrote" * (state["ranks"] != world.size)
            begin = f"from step {state['step']} of {checkpoint}{others}"
        after = f", passing over {skip:,} batches of each teacher" * (skip > 0)
        print(begin + after)
        if changes:
            print(f"  with other settings than before: {', '.join(changes)}", flush=True)
    try:
        finished = _run_steps(cfg, world, parts, streams, checkpoints, state["step"])
    except (Diverged, OutputError, RunError) as error:
        newest = checkpoints.newest() or checkpoint or "none: no step was saved"
        past = "; if a batch is to blame, --resume auto --skip N passes over the next N" * isinstance(error, Diverged)
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


def build(cfg: Config, world: World, indexes: dict[str, Index] | None = None) -> Parts:
    """Data indexes, teachers and the DeepSpeed engine around the trainable module. Raises RunError on every rank.

    indexes: of the teachers' sources where they are known, or {} for a run without images; None looks for them.
    """
    import deepspeed

    indexes = _find_images(cfg, world) if indexes is None else indexes
    with _together(world):
        teachers, module = build_models(cfg, world.device)
        where = torch.device("cpu") if cfg.offloads_optimizer() else world.device
        optimizer = build_optimizer(cfg.optimizer, module, where)
        scheduler = build_scheduler(cfg.optimizer, optimizer, cfg.steps)
    if cfg.compile:
        # torch stops compiling a module after 8 graphs, without an error. Each of a teacher's canvases is one, and
        # FAMO's second look one more.
        graphs = 2 * sum(len(canvases_of(teacher.data)) for teacher in cfg.teachers.values())
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)
        for compiled in (module, *teachers.values()):
            # One graph for each shape, no symbols; and not DeepSpeed's hook around it, which torch 2.11 cannot trace.
            compiled.forward = torch.compile(compiled.forward, dynamic=False)
    # In bf16 at stage 0 DeepSpeed takes a step with gradient 0 to allocate the optimiser's state: it must move nothing.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=cfg.deepspeed_config()
        )
    except Exception as error:  # DeepSpeed has no error of its own for a block it cannot use
        if is_out_of_memory(error) or isinstance(error, dist.DistError):  # the ranks meet here for the first time
            raise
        reason = " ".join(str(error).split())[:300]
        problem = f"deepspeed: DeepSpeed cannot use this block ({type(error).__name__}: {reason})"
        raise shared(RunError(problem)) from error
    restore_settings(cfg.optimizer, scheduler)
    quicken(engine)
    if engine.zero_optimization_stage() == 0:
        optimizer.state.clear()
        for group in optimizer.param_groups:  # where apex counts
            group.pop("step", None)
    return Parts(indexes, teachers, engine, build_balance(cfg.objective.balance, len(teachers), world.device))


def _networks(cfg: Config, student: Student) -> dict[str, Any]:
    """What the networks compute, as JSON has it: of another one the same weights would mean something else."""
    own = {key: value for key, value in student.config.items() if key != "heads"}  # they follow the teachers and images
    fields = ("kind", "arch", "levels")
    teachers = {name: {key: getattr(teacher, key) for key in fields} for name, teacher in cfg.teachers.items()}
    return json.loads(json.dumps({"networks": {"student": own, "teachers": teachers}}))


def _find_images(cfg: Config, world: World) -> dict[str, Index]:
    """The index of every teacher's source; each source is looked through once, however many teachers share it."""
    sources = {str(teacher.data.source): teacher.data.source for teacher in cfg.teachers.values()}
    found: dict[str, Index] = {}
    with _together(world):
        if world.rank == 0:
            found = {key: load_or_scan(source) for key, source in sources.items()}
    digests = from_rank0(world, {key: index.digest() for key, index in found.items()})
    # Of a node that has images or a cache of its own one rank looks at them; the others take what it found.
    for turn in (world.local_rank == 0, True):
        with _together(world):
            for key, source in sources.items():
                if not turn or key in found:
                    continue
                index = load_same(source, digests[key], look=world.local_rank == 0)
                if index is None:
                    index = load_or_scan(source)
                    if index.digest() != digests[key]:
                        raise RunError(
                            f"source {key}: not the images that rank 0 has there; copies on several nodes must be "
                            "equal, and nothing may write to them while a run starts"
                        )
                found[key] = index
    return {name: found[str(teacher.data.source)] for name, teacher in cfg.teachers.items()}


def build_models(cfg: Config, device: torch.device) -> tuple[dict[str, Teacher], KPU]:
    """The teachers, in the run's precision, and the trainable module, in fp32. Raises as what builds them does."""
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    teachers = {
        name: build_teacher(name, teacher, device=device, dtype=dtype, image_size=teacher.data.size)
        for name, teacher in cfg.teachers.items()
    }
    for name, teacher in cfg.teachers.items():
        if len(sizes := canvases_of(teacher.data)) > 1:
            teachers[name].check_sizes(sizes)
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    torch.manual_seed(cfg.seed)  # all ranks start from the same weights
    student = Student.from_config(cfg.student, specs, activation_checkpointing=cfg.activation_checkpointing)
    weights = {name: teacher.weight for name, teacher in cfg.teachers.items()}
    return teachers, KPU(student, specs, cfg.objective, weights).to(device)


def _calibrate(cfg: Config, world: World, parts: Parts) -> None:
    """Statistics of the teachers' features for `objective.standardize`, from streams that the run does not read."""
    count, standardize = cfg.objective.standardize_batches, parts.engine.module.standardize
    with _together(world):  # nothing in here waits for another rank
        streams = open_streams(cfg, parts.indexes, world, {}, seed=cfg.seed * len(cfg.teachers) + CALIBRATION_SEED)
        seen = {}
        for name, stream in streams.items():
            batches = (_next_batch(name, stream) for _ in range(count))
            batches = tqdm(batches, f"statistics of {name}", count, unit="batch", disable=world.rank != 0)
            seen[name] = standardize[name].look((parts.teachers[name](b.images), b.valid) for b in batches)
    with _together(world):
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


@contextmanager
def _together(world: World) -> Iterator[None]:
    """What one rank cannot do, no rank goes on without: raises the same RunError on all of them."""
    problem = None
    try:
        yield
    except (ValueError, OSError, ImportError, BackendError, CheckpointError) as error:
        problem = str(error)
    problem = first_problem(world, problem)
    if problem is not None:
        raise shared(RunError(problem))


def forward(engine, batches: dict[str, Any], targets: dict[str, Features]) -> dict[str, torch.Tensor]:
    """One forward per teacher over its own batch; the loss terms of all, as the objective returns them."""
    terms = {}
    for name, batch in batches.items():
        terms |= engine(name, batch.images, targets[name], batch.valid)
    return terms


def train_step(
    parts: Parts, batches: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Forwards, one backward, one step: (loss terms, total, the teachers' shares in it or None if all are equal).

    With `gradient_accumulation_steps` k it is every k-th call that takes the step, along the mean of k gradients.
    """
    engine, objective, balance = parts.engine, parts.engine.module, parts.balance
    targets = {name: parts.teachers[name](batch.images) for name, batch in batches.items()}
    terms = forward(engine, batches, targets)
    shares = None if balance is None else balance.shares(objective.losses(terms))
    total = objective.total(terms, shares)
    engine.backward(total)
    last = engine.is_gradient_accumulation_boundary()
    engine.step()  # before the last one DeepSpeed only counts here
    if isinstance(balance, FAMO):  # what has this step done to each teacher's loss on this batch?
        with torch.no_grad():
            balance.learn(objective.losses(forward(engine, batches, targets)))
    if last:
        objective.after_step(engine.gradient_accumulation_steps())
    return {key: term.detach() for key, term in terms.items()}, total.detach(), shares


def _run_steps(cfg, world, parts: Parts, streams: dict[str, Stream], checkpoints: Checkpoints, start: int) -> bool:
    """Steps start+1 ... cfg.steps; True if it got there, False if a signal ended it after a checkpoint."""
    engine, balance = parts.engine, parts.balance
    images = world.size * cfg.images_per_step()
    monitor = Monitor(checkpoints.folder.parent, world, start=start, steps=cfg.steps, images_per_step=images)
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
                named = {} if shares is None else dict(zip(batches, shares.unbind(), strict=True))
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


def open_streams(
    cfg: Config,
    indexes: dict[str, Index],
    world: World,
    states: dict[str, Any],
    seed: int | None = None,
    skip: int = 0,
) -> dict[str, Stream]:
    """One stream per teacher; `states` are what the streams of an earlier run returned from state().

    seed: of the first stream, the others count on from it, and no step is accumulated; None: from cfg.seed, for
    training. skip: batches to pass over.
    """
    place = {"rank": world.rank, "world_size": world.size, "device": world.device, "skip": skip}
    place["step_batches"] = world.size * (cfg.gradient_accumulation_steps if seed is None else 1)
    first = cfg.seed * len(cfg.teachers) if seed is None else seed
    streams = {}
    for i, (name, teacher) in enumerate(cfg.teachers.items()):
        # Teachers on the same source see it in different orders.
        streams[name] = Stream(teacher.data, indexes[name], seed=first + i, state=states.get(name), **place)
    return streams


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT while steps run, instead of dying in the middle of one.

    Launchers send both, and more than once; only a Ctrl-C seconds after the first one means "now".
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

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
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


def _announce(cfg: Config, world: World, parts: Parts) -> None:
    module = parts.engine.module
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    frozen = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if not p.requires_grad)
    print(
        f"{cfg.name}: {world.size} x {world.device.type}, {cfg.precision}, attention: {describe(cfg.student.attention)}"
    )
    print(f"trainable {trainable / 1e6:.1f} M parameters (student and heads), frozen {frozen / 1e6:.1f} M")
    for key in unknown_deepspeed_keys(cfg):
        log.warning("deepspeed.%s: no key that kpu_fast knows, and DeepSpeed passes over what it does not know", key)
    for name, index in parts.indexes.items():
        data = cfg.teachers[name].data
        first, *more = [data.source] if isinstance(data.source, str) else data.source
        source = first + (f" and {len(more)} more" if more else "")
        times = cfg.gradient_accumulation_steps
        each = times * data.batch_size
        all_ranks = f" ({world.size * each} on all)" if world.size > 1 else ""
        in_turns = f", {data.batch_size} at once" if times > 1 else ""
        epochs = cfg.steps * world.size * each / len(index)
        print(f"{name}: {each} images of {data.size[0]}x{data.size[1]} per rank and step{all_ranks}{in_turns}")
        print(f"  {epochs:,.2f} epochs in {cfg.steps:,} steps, from {source}")
        print(f"  {index.summary()}")
        shapes = canvases_of(data)
        suits = choose_canvas(np.stack([index.height, index.width], axis=1), shapes)
        if suits.any():
            for (height, width), count in zip(shapes, np.bincount(suits, minlength=len(shapes)), strict=True):
                if count:
                    print(f"  {count:,} of them come in batches of {height}x{width}")
