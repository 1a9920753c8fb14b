"""One call for every softmax attention of the student, and the choice of the kernel behind it."""

import contextlib
import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)

BACKENDS = ("auto", "sdpa", "cudnn", "fa2", "fa3", "fa4")

# name: (module that torch loads the kernels from, compute capability majors they run on, how to get them)
_FLASH = {
    "fa3": ("flash_attn_interface", (9,), "build the hopper/ folder of Dao-AILab/flash-attention"),
    "fa4": ("flash_attn.cute.interface", (9, 10), "pip install --pre 'flash-attn-4[cu13]<4.0.0b19'"),
}


class BackendError(RuntimeError):
    """The attention backend asked for cannot run on this machine."""


# Older ones touch memory beyond sequences that are no multiple of 128 (github.com/pytorch/pytorch/issues/169849), as
# ours are. From here on torch 2.11 prefers cuDNN by itself on compute capability 9.0 and 10.0.
_CUDNN = 91501
_HALF = (torch.float16, torch.bfloat16)
_flash_attn_func = None  # flash-attn's, once "fa2" is activated: torch.compile cannot look for it itself
_SCORES = 2**24  # elements of q·kᵀ that `_products` may keep for backward: 32 MiB in bf16


def check_backend(name: str) -> None:
    """Raise unless attention backend `name` can run on this machine; changes nothing.

    Raises ValueError for a name outside BACKENDS and BackendError saying what is missing: a CUDA device, a compute
    capability or a package. Another backend is never taken instead.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    if name in ("auto", "sdpa"):
        return
    if not torch.cuda.is_available():
        raise BackendError(f"attention backend {name!r} needs a CUDA device and torch sees none; use 'auto' here.")
    major, minor = torch.cuda.get_device_capability()
    if name == "cudnn":
        if major < 8 or not torch.backends.cudnn.is_available() or torch.backends.cudnn.version() < _CUDNN:
            raise BackendError(
                f"attention backend 'cudnn' needs cuDNN {_CUDNN} (9.15.1) or newer and compute capability 8.0 or "
                f"higher; found {major}.{minor}, cuDNN {torch.backends.cudnn.version()}; use 'auto' here."
            )
    elif name == "fa2":
        if major < 8:
            raise BackendError(
                f"attention backend 'fa2' needs compute capability 8.0 or higher; found {major}.{minor}."
            )
        _flash_attn_2()
    else:
        module, majors, how = _FLASH[name]
        if major not in majors:
            wanted = " or ".join(f"{m}.x" for m in majors)
            raise BackendError(
                f"attention backend {name!r} needs compute capability {wanted}; found {major}.{minor}; use 'auto' here."
            )
        if not _importable(module):
            raise BackendError(f"attention backend {name!r} needs the module {module}, not found; to get it: {how}.")
        if name.upper() not in list_flash_attention_impls():
            raise BackendError(f"attention backend {name!r} is not known to torch {torch.__version__}; upgrade torch.")


@functools.cache
def activate_backend(name: str) -> None:
    """Check `name` and get it ready; models call it once when they are built.

    "fa3" and "fa4" replace the flash kernel behind F.scaled_dot_product_attention for the whole process, so only one of
    the two can be in use: asking for the other raises BackendError, and so does one that fails when it is tried out.
    Otherwise raises as `check_backend` does.
    """
    check_backend(name)
    if name == "fa2":
        global _flash_attn_func
        _flash_attn_func = _flash_attn_2()
    if name in _FLASH:
        active = current_flash_attention_impl()
        if active not in (None, name.upper()):
            raise BackendError(
                f"attention backend {name!r} cannot be used: {active} is already active in this process, and torch "
                "holds one of them at a time; give every model the same attention backend."
            )
        if active is None:
            activate_flash_attention_impl(name.upper())
            try:
                _try_out(name, "cuda")
            except BackendError:
                restore_flash_attention_impl()  # or "auto" would take it, and a second call would find it in use
                raise


def _try_out(name: str, device: str) -> None:
    """torch calls another package's functions, which change: flash-attn-4 4.0.0b19 returns more than torch 2.13 takes.

    Raises BackendError.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
            F.scaled_dot_product_attention(q, q, q).sum().backward()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BackendError(
            f"attention backend {name!r} fails here ({type(error).__name__}: {reason}): its package and torch "
            f"{torch.__version__} may not fit; to get one that does: {_FLASH[name][2]}."
        ) from error


def describe(name: str) -> str:
    """One line for the log: what attention backend `name` runs on this machine. Raises as `check_backend` does."""
    check_backend(name)
    device = "CPU"
    if torch.cuda.is_available():  # a system's cuDNN, on LD_LIBRARY_PATH, may hide torch's
        device = f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    where = f"torch {torch.__version__} on {device}"
    if name in ("auto", "sdpa"):
        flash = current_flash_attention_impl()
        note = f", with {flash} as its flash kernel" if flash else ""
        plain = "" if name == "sdpa" or torch.cuda.is_available() else "; plain products for bf16 gradients"
        return f"{name}: F.scaled_dot_product_attention, the kernel chosen per call by {where}{note}{plain}"
    what = {
        "cudnn": "F.scaled_dot_product_attention held to cuDNN",
        "fa2": "flash_attn.flash_attn_func",
        "fa3": "F.scaled_dot_product_attention held to FlashAttention 3",
        "fa4": "F.scaled_dot_product_attention held to FlashAttention 4",
    }
    return f"{name}: {what[name]}, {where}"


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """softmax(q·kᵀ / √d)·v over all keys.

    q: (B, heads, N, d); k, v: (B, heads, M, d), any strides. Returns (B, heads, N, d) in q's dtype.
    backend: one of BACKENDS. "sdpa" lets torch choose among its kernels, and so does "auto", but for bf16 gradients on
    a CPU; the others run that kernel or raise.
    Raises ValueError for an unknown backend or a dtype it cannot take, BackendError where it cannot run.
    """
    if not torch.compiler.is_compiling():  # under torch.compile the model has activated it when it was built
        activate_backend(backend)
    if backend == "auto" and _products_are_faster(q, k, v):
        return _products(q, k, v)
    if backend in ("auto", "sdpa"):
        return F.scaled_dot_product_attention(q, k, v)
    if q.dtype not in _HALF:
        raise ValueError(
            f"attention backend {backend!r} takes float16 or bfloat16, got {q.dtype}; "
            "run the model in bf16 or use 'auto'."
        )
    if backend == "fa2":
        out = _flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, N, heads, d)
        return out.transpose(1, 2)
    # Held to one kernel: torch raises where it cannot take the input, instead of running another.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _products_are_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """bf16 on a CPU with a gradient to come, and scores that fit into memory.

    Forward and backward by two plain products, against torch 2.13's fused kernel on one CPU thread: 6.1 times as fast
    for 4 heads of 67 × 67, B = 32; 1.9 times for 12 of 201 × 201, B = 8; 1.7 times for 12 of 2205 × 441; 1.1 times for
    12 of 1024 × 4000. Forward alone, and float32, gain little or lose. Its rounding error is twice the fused kernel's.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return wanted and q.shape[:-1].numel() * k.shape[-2] <= _SCORES


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v


def _importable(module: str) -> bool:
    # find_spec imports the parent packages, and raises where one is missing or broken.
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(module) is not None
    return False


def _flash_attn_2():
    # flash-attn-4 installs under the same package name without this function, hence the look inside.
    how = "it has no wheel on PyPI: pip install flash-attn --no-build-isolation builds it with nvcc"
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        raise BackendError(f"attention backend 'fa2' needs the package flash_attn ({error}); {how}.") from error
    if not hasattr(package, "flash_attn_func"):
        raise BackendError(f"attention backend 'fa2' needs flash_attn.flash_attn_func, absent here; {how}.")
    return package.flash_attn_func
