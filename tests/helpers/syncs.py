"""Code in which nothing waits for a GPU: seen by CUDA where there is one, and on a CPU by the operators that run.

`.tolist()` and `.numpy()` of a CPU tensor are no operators: only a GPU shows those.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READ = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique")


class _Watch(TorchDispatchMode):
    def __init__(self, host):
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (by_mask or name.startswith(_READ)) and not any(args[0] is tensor for tensor in self.host):
            raise RuntimeError(f"{name}: values were read by the host, or made the shape of a tensor")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_syncs(host=()):
    """Raises RuntimeError where something within would wait for a GPU. host: tensors on the CPU wherever it runs."""
    if not torch.cuda.is_available():
        with _Watch(tuple(host)):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
