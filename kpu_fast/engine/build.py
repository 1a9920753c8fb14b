"""What a run is made of: images, teachers, student with heads, DeepSpeed's engine, streams."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from kpu_fast.config import Config
from kpu_fast.config_deepspeed import unknown_deepspeed_keys
from kpu_fast.data.pipeline import Stream
from kpu_fast.data.sampler import canvases_of, choose_canvas
from kpu_fast.data.scan import Index, load_or_scan, load_same
from kpu_fast.engine.checkpoint import CheckpointError
from kpu_fast.engine.distributed import World, first_problem, from_rank0, shared
from kpu_fast.engine.optimizer import build_optimizer, build_scheduler, restore_settings
from kpu_fast.engine.zero import quicken
from kpu_fast.machine import is_out_of_memory, slow_bf16
from kpu_fast.models.attention import BackendError, describe
from kpu_fast.models.student import Student
from kpu_fast.models.teachers import Teacher, build_teacher
from kpu_fast.objectives.balance import FAMO, TeacherDrop, build_balance
from kpu_fast.objectives.objective import Objective
from kpu_fast.objectives.recipe import build_objective

log = logging.getLogger(__name__)


class RunError(ValueError):
    """Data, a model, the output folder or the optimiser cannot be used. The message says which and what to do."""


class Parts(NamedTuple):
    """What a run is made of."""

    indexes: dict[str, Index]  # by stream, as `streams`
    streams: dict[str, list[str]]  # Config.streams(): of each teacher with images of its own, all that teach on them
    teachers: dict[str, Teacher]
    engine: Any  # deepspeed.DeepSpeedEngine around the objective
    balance: TeacherDrop | FAMO | None  # None: equal teachers


def build(cfg: Config, world: World, indexes: dict[str, Index] | None = None) -> Parts:
    """Data indexes, teachers and the DeepSpeed engine around the trainable module. Raises RunError on every rank.

    indexes: of the teachers' sources where they are known, or {} for a run without images; None looks for them.
    """
    import deepspeed

    indexes = find_images(cfg, world) if indexes is None else indexes
    with together(world):
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
    balance = build_balance(cfg.objective.balance, len(teachers), world.device)
    return Parts(indexes, cfg.streams(), teachers, engine, balance)


def build_models(cfg: Config, device: torch.device) -> tuple[dict[str, Teacher], Objective]:
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
    weights = {name: teacher.weight for name, teacher in cfg.teachers.items()}

    def new_student(heads):
        return Student.from_config(cfg.student, heads, activation_checkpointing=cfg.activation_checkpointing)

    return teachers, build_objective(cfg.objective, specs, new_student, weights).to(device)


def open_streams(
    cfg: Config,
    indexes: dict[str, Index],
    world: World,
    states: dict[str, Any],
    seed: int | None = None,
    skip: int = 0,
) -> dict[str, Stream]:
    """One stream per teacher with images of its own; `states` are what those of an earlier run returned from state().

    seed: of the first stream, the others count on from it, and no step is accumulated; None: from cfg.seed, for
    training. skip: batches to pass over.
    """
    place = {"rank": world.rank, "world_size": world.size, "device": world.device, "skip": skip}
    place["step_batches"] = world.size * (cfg.gradient_accumulation_steps if seed is None else 1)
    first = cfg.seed * len(cfg.teachers) if seed is None else seed
    streams = {}
    for i, (name, teacher) in enumerate(cfg.teachers.items()):
        if teacher.images_of is None:
            # Teachers on the same source see it in different orders.
            streams[name] = Stream(teacher.data, indexes[name], seed=first + i, state=states.get(name), **place)
    return streams


def find_images(cfg: Config, world: World) -> dict[str, Index]:
    """The index of every stream's source; each source is looked through once, however many of them share it."""
    sources = {str(source): source for source in (cfg.teachers[name].data.source for name in cfg.streams())}
    found: dict[str, Index] = {}
    with together(world):
        if world.rank == 0:
            found = {key: load_or_scan(source) for key, source in sources.items()}
    digests = from_rank0(world, {key: index.digest() for key, index in found.items()})
    # Of a node that has images or a cache of its own one rank looks at them; the others take what it found.
    for turn in (world.local_rank == 0, True):
        with together(world):
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
    return {name: found[str(cfg.teachers[name].data.source)] for name in cfg.streams()}


def networks(cfg: Config, student: Student) -> dict[str, Any]:
    """What the networks compute, as JSON has it: of another one the same weights would mean something else."""
    own = {key: value for key, value in student.config.items() if key != "heads"}  # they follow the teachers and images
    fields = ("kind", "arch", "levels")
    teachers = {name: {key: getattr(teacher, key) for key in fields} for name, teacher in cfg.teachers.items()}
    return json.loads(json.dumps({"networks": {"student": own, "teachers": teachers}}))


def announce(cfg: Config, world: World, parts: Parts) -> None:
    """Print what a run starts with: ranks, parameters, images and how often they come; of rank 0."""
    module = parts.engine.module
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    frozen = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if not p.requires_grad)
    print(
        f"{cfg.name}: {world.size} x {world.device.type}, {cfg.precision}, attention: {describe(cfg.student.attention)}"
    )
    if world.device.type == "cpu" and cfg.precision == "bf16" and (times := slow_bf16()):
        log.warning("precision: this CPU multiplies in bf16 %.0f times as slowly as in fp32; set precision=fp32", times)
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
        if len(parts.streams[name]) > 1:
            print(f"  {' and '.join(parts.streams[name][1:])} on the same images")
        print(f"  {epochs:,.2f} epochs in {cfg.steps:,} steps, from {source}")
        print(f"  {index.summary()}")
        shapes = canvases_of(data)
        suits = choose_canvas(np.stack([index.height, index.width], axis=1), shapes)
        if suits.any():
            for (height, width), count in zip(shapes, np.bincount(suits, minlength=len(shapes)), strict=True):
                if count:
                    print(f"  {count:,} of them come in batches of {height}x{width}")


@contextmanager
def together(world: World) -> Iterator[None]:
    """What one rank cannot do, no rank goes on without: raises the same RunError on all of them."""
    problem = None
    try:
        yield
    except (ValueError, OSError, ImportError, BackendError, CheckpointError) as error:
        problem = str(error)
    problem = first_problem(world, problem)
    if problem is not None:
        raise shared(RunError(problem))
