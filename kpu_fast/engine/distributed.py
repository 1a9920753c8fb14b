"""Ranks, devices and the agreement the engine needs, the same under `deepspeed`, `torchrun` and `python`."""

import logging
import os
import socket
import warnings
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from kpu_fast.machine import unusable_gpu

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
E = TypeVar("E", bound=Exception)


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    local_rank: int
    patient: dist.ProcessGroup  # for waiting while one rank does long work: the default group gives up after minutes


def init_distributed() -> World:
    """Join the process group, or make one of a single process when no launcher set RANK."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if problem := unusable_gpu():
            _LOG.warning(problem)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # DeepSpeed would compile its shared-memory all-reduce at the first start on a CPU: over a minute, and only
        # where a C++ compiler and ninja are at hand. gloo does the same work. (On a GPU nothing asks for it, and
        # reading this table would try every operator DeepSpeed has, with a warning for each.)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(get_accelerator().device_name(local_rank))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL picks one
    deepspeed.init_distributed(verbose=False)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    return World(dist.get_rank(), dist.get_world_size(), device, local_rank, patient)


def shared(error: E) -> E:
    """Mark an error that every rank raises alike, so that it is printed once and not by each of them."""
    error.shared = True
    return error


def from_rank0(world: World, value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.patient)
    return box[0]


def first_problem(world: World, problem: str | None) -> str | None:
    """What went wrong on the first rank where something did, told to every rank; None if all is well."""
    box: list[str | None] = [None] * world.size
    dist.all_gather_object(box, problem, group=world.patient)
    for rank, found in enumerate(box):
        if found is not None:
            return found if rank == 0 else f"{found} (rank {rank})"
    return None


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
