"""Ranks, devices and the collectives the engine needs, the same under `deepspeed`, `torchrun` and `python`."""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device


def init_distributed() -> World:
    """Join the process group, or make one of a single process when no launcher set RANK."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile its shared-memory all-reduce at the first start on a CPU: over a minute, and only where a
    # C++ compiler and ninja are at hand. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(get_accelerator().device_name(local_rank))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def on_rank0(world: World, work: Callable[[], T], errors: tuple[type[Exception], ...] = (ValueError, OSError)) -> T:
    """Do `work` on rank 0 and hand its result to all; an error there is raised on every rank, so that none waits."""
    box: list = [None, None]
    if world.rank == 0:
        try:
            box[0] = work()
        except errors as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def all_succeeded(world: World, succeeded: bool) -> bool:
    """True on every rank if it was true on every rank."""
    flag = torch.tensor(int(succeeded), device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
