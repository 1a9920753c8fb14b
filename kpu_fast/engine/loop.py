"""The training loop: one forward per teacher, losses weighed and summed, one backward, one step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from kpu_fast.config import Config
from kpu_fast.data.pipeline import Stream
from kpu_fast.data.scan import Index, load_or_scan
from kpu_fast.engine.checkpoint import CheckpointError, Checkpoints, resolve_resume
from kpu_fast.engine.distributed import World, init_distributed, on_rank0
from kpu_fast.engine.monitor import Diverged, Monitor
from kpu_fast.engine.optimizer import build_optimizer, build_scheduler
from kpu_fast.engine.result import write_result
from kpu_fast.engine.run_folder import OutputError, prepare_run_folder
from kpu_fast.models.attention import BackendError, describe
from kpu_fast.models.student import Student
from kpu_fast.models.teachers import Teacher, build_teacher
from kpu_fast.objectives.kpu import KPU


class RunError(ValueError):
    """The run cannot start: data, model, output or optimiser do not fit. The message says which and what to do."""


class Parts(NamedTuple):
    """What a run is made of."""

    indexes: dict[str, Index]
    teachers: dict[str, Teacher]
    engine: Any  # deepspeed.DeepSpeedEngine around KPU


def train(cfg: Config, resume: str | None = None) -> None:
    """Train `cfg` to its last step and write the result; every rank calls it.

    resume: None (a new run), "auto" (the run's newest checkpoint, or a new run) or a checkpoint's folder.
    Raises RunError before the first step, Diverged on a NaN or Inf loss, CheckpointError or OutputError when a
    checkpoint or another file cannot be written.
    """
    world = init_distributed()
    folder = Path(cfg.output) / cfg.name
    checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, world)
    try:
        checkpoint = on_rank0(world, lambda: resolve_resume(resume, checkpoints.folder), errors=(CheckpointError,))
        on_rank0(world, lambda: prepare_run_folder(folder, cfg))
        parts = build(cfg, world)
        state = checkpoints.load(parts.engine, checkpoint) if checkpoint else {"step": 0, "streams": {}}
        streams = open_streams(cfg, parts.indexes, world, state["streams"])
    except (ValueError, OSError, ImportError, BackendError, CheckpointError) as error:
        raise RunError(str(error)) from error
    if "rng" in state:
        _set_rng(state["rng"], world.device)
    _announce(cfg, world, parts, state["step"], checkpoint)
    try:
        finished = _run_steps(cfg, world, parts, streams, checkpoints, state["step"])
    except (Diverged, OutputError) as error:
        newest = checkpoints.newest() or "none: no step was saved"
        raise type(error)(f"{error}. The last good checkpoint is {newest}") from error
    if finished:
        try:
            write_result(cfg, folder, world, parts.engine.module.student, parts.teachers, parts.indexes)
        except OSError as error:
            raise OutputError(f"{folder}: the result cannot be written ({error}); go on with --resume auto") from error
    dist.barrier()


def build(cfg: Config, world: World) -> Parts:
    """Data indexes, teachers and the DeepSpeed engine around the trainable module."""
    import deepspeed

    indexes = {}
    for name, teacher in cfg.teachers.items():
        # Rank 0 scans once; the others find its index.
        on_rank0(world, lambda source=teacher.data.source: load_or_scan(source) and None)
        indexes[name] = load_or_scan(teacher.data.source)
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    teachers = {
        name: build_teacher(name, teacher, device=world.device, dtype=dtype, image_size=teacher.data.size)
        for name, teacher in cfg.teachers.items()
    }
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    torch.manual_seed(cfg.seed)  # all ranks start from the same weights
    student = Student.from_config(cfg.student, specs, activation_checkpointing=cfg.activation_checkpointing)
    module = KPU(student, specs, cfg.objective).to(world.device)
    optimizer = build_optimizer(cfg.optimizer, module, world.device)
    if cfg.compile:
        for compiled in (student, *teachers.values()):
            compiled.compile()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=build_scheduler(cfg.optimizer, optimizer, cfg.steps),
        config=cfg.deepspeed_config(),
    )
    return Parts(indexes, teachers, engine)


def forward(engine, teachers: dict[str, Teacher], batches: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One forward per teacher over its own batch; all loss terms, not yet weighed."""
    terms = {}
    for name, batch in batches.items():
        terms |= engine(name, batch.images, teachers[name](batch.images), batch.valid)
    return terms


def _run_steps(cfg, world, parts: Parts, streams: dict[str, Stream], checkpoints: Checkpoints, start: int) -> bool:
    """Steps start+1 ... cfg.steps; True if it got there, False if a signal ended it after a checkpoint."""
    engine = parts.engine
    images = world.size * sum(teacher.data.batch_size for teacher in cfg.teachers.values())
    monitor = Monitor(checkpoints.folder.parent, world, start=start, steps=cfg.steps, images_per_step=images)
    with _stop_signals() as asked:
        try:
            began = time.perf_counter()
            for step in range(start + 1, cfg.steps + 1):
                batches = {name: next(stream) for name, stream in streams.items()}
                waited = time.perf_counter() - began
                terms = forward(engine, parts.teachers, batches)
                total = engine.module.total(terms)
                lr = engine.get_lr()[0]
                engine.backward(total)
                engine.step()
                now = time.perf_counter()
                facts = {"lr": lr, "step_seconds": now - began, "data_wait_percent": 100.0 * waited / (now - began)}
                began = now
                monitor.push(step, terms, total, bool(asked), facts)
                if step % cfg.checkpoint.every == 0 or step == cfg.steps or monitor.stop:
                    monitor.flush()
                    states = {name: stream.state() for name, stream in streams.items()}
                    checkpoints.save(engine, step, {"streams": states, "rng": _get_rng(world.device)})
                if monitor.stop and step < cfg.steps:
                    monitor.say(f"stopped after step {step}; go on with --resume auto")
                    return False
        finally:
            monitor.close()
    return True


def open_streams(cfg: Config, indexes: dict[str, Index], world: World, states: dict[str, Any]) -> dict[str, Stream]:
    """One stream per teacher; `states` are what the streams of an earlier run returned from state()."""
    place = {"rank": world.rank, "world_size": world.size, "device": world.device}
    streams = {}
    for i, (name, teacher) in enumerate(cfg.teachers.items()):
        seed = cfg.seed * len(cfg.teachers) + i  # teachers on the same source see it in different orders
        streams[name] = Stream(teacher.data, indexes[name], seed=seed, state=states.get(name), **place)
    return streams


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT while steps run, instead of dying in the middle of one."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
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
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _announce(cfg: Config, world: World, parts: Parts, start: int, checkpoint: Path | None) -> None:
    if world.rank != 0:
        return
    module = parts.engine.module
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    frozen = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if not p.requires_grad)
    print(
        f"{cfg.name}: {world.size} x {world.device.type}, {cfg.precision}, attention: {describe(cfg.student.attention)}"
    )
    print(f"trainable {trainable / 1e6:.1f} M parameters (student and heads), frozen {frozen / 1e6:.1f} M")
    for name, index in parts.indexes.items():
        data = cfg.teachers[name].data
        print(f"{name}: {data.batch_size} images of {data.size[0]}x{data.size[1]} per rank and step. {index.summary()}")
    print(f"from step {start} of {checkpoint}" if checkpoint else "from the beginning", flush=True)
