"""What the commands ask of the machine they run on, and files that are whole or not there.

Imports torch only where it is needed.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import subprocess
import time
import timeit
from collections.abc import Iterable, Iterator
from pathlib import Path

_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
_LIBRARIES = ("torch", "triton", "deepspeed", *_DALI, "transformers", "numpy", "kpu_fast")


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """The path of a file beside `path` to write to; afterwards the file is gone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """`beside`, but where nothing went wrong the file takes the place of `path`, in one step."""
    with beside(path) as partial:
        yield partial
        os.replace(partial, path)


def missing(packages: str) -> str | None:
    """What to tell the user if any of `packages` (names that are imported, with spaces) is not installed, else None."""
    absent = [name for name in packages.split() if not _installed(name)]
    return f"not installed: {', '.join(absent)}; pip install -c constraints.txt -e '.[train]'" if absent else None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the memory of the machine or of a device did not suffice."""
    import torch

    # What torch has no class of its own for: a CPU's memory, and the allocations of CUDA, cuBLAS and DALI themselves.
    texts = (
        "an't allocate ", "CUDA error: out of memory", "CUDA allocation failed", "cudaErrorMemoryAllocation",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )  # fmt: skip
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def memory_advice(error: BaseException, advice: str) -> str:
    """What to tell the user of an error that `is_out_of_memory`, in one line that ends with what to do."""
    return f"out of memory: {(str(error) or type(error).__name__).splitlines()[0].rstrip('.')}. {advice}"


def unusable_gpu() -> str | None:
    """What to tell the user where there is an NVIDIA GPU and torch cannot use it, else None."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or not torch.version.cuda or not Path("/dev/nvidiactl").exists():
        return None
    return (
        f"there is an NVIDIA GPU here that torch {torch.__version__} cannot use, so this runs on the CPU. CUDA "
        f"{torch.version.cuda} needs a newer driver, or another torch (README.md, Install)"
    )


def usable_device(name: str):
    """The torch.device `name`; "auto": a GPU if there is one. Raises ValueError where it cannot be used."""
    import torch

    if name == "auto":
        if problem := unusable_gpu():
            logging.getLogger(__name__).warning(problem)
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def device_name(device) -> str:
    """The GPU's name, or the processor's with the number of threads that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model, cpuinfo = "", Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() + ", " if lines else ""
    threads = torch.get_num_threads()
    return f"{model}{threads} thread{'s' if threads > 1 else ''} (CPU)"


@functools.cache
def slow_bf16() -> float | None:
    """How many times as long this CPU takes for a product of matrices in bf16 as in fp32, where that is above 4.

    Without AVX-512 (or AMX, or ARM's bf16) it is some 50; with it about 1, or less. Measured in the time of one thread:
    several would wait for each other where other work runs beside them.
    """
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: x @ x, timer=time.thread_time, number=1, repeat=5))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = seconds(torch.bfloat16) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)
    return times if times > 4 else None


def circumstances(further: Iterable[str] = ()) -> dict[str, object]:
    """Commit, versions, of `further` libraries too, and machine: what a result has to carry to mean anything."""
    import torch

    versions = {}
    for library in (*_LIBRARIES, *further):
        try:
            # torch's own word says which CUDA it is of.
            versions[library] = torch.__version__ if library == "torch" else importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "commit": _commit(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.platform(),
    }


def _commit() -> str | None:
    """None where git does not track this file: an installed copy may lie in the folder of another repository."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40")


def _git(folder: Path, *command: str) -> str | None:
    """What git says in the folder; None where it fails or is not here."""
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
