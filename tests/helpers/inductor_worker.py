"""What inductor writes for a GPU, compiled for one without having one. Run by tests/objectives/test_compile_gpu.py.

Prints JSON: {"kernels": how many, "refused": {name: why Triton does not take it}}. On a CPU inductor writes Triton too
if it is told to; nothing of it is run, so the numbers that come out are of no use.
"""

import json
from types import SimpleNamespace

import torch
import triton
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from kpu_fast.config_objective import GKDConfig, KPUConfig
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.student import Student
from kpu_fast.objectives.gkd import GKD
from kpu_fast.objectives.kpu import KPU

TARGET = GPUTarget("cuda", 90, 32)
KINDS = ("pointwise", "reduction", "persistent_reduction", "cooperative_reduction", "foreach", "mix_order_reduction")
BLOCKS = {"XBLOCK": 32, "YBLOCK": 32, "R0_BLOCK": 128, "R0_BLOCK_": 128, "RSPLIT": 2}


def intercept() -> list[tuple]:
    """Let inductor write Triton, and keep (function, signature and constants) of every kernel instead of running it."""
    kept: list[tuple] = []
    device = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}
    gpu = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda _: device),
        get_current_target=lambda: TARGET,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        get_device_interface=lambda: torch.cpu,
    )
    driver.set_active(gpu)
    triton_helpers.set_driver_to_cpu = lambda: None
    config.cpu_backend, config.compile_threads, config.force_disable_caches = "triton", 1, True

    def keep(*_, triton_meta, **__):
        def decorate(function):
            kept.append((function, triton_meta))
            return SimpleNamespace(run=lambda *_, **__: None)

        return decorate

    for kind in KINDS:
        setattr(triton_heuristics, kind, keep)
    AsyncCompile.triton = lambda self, name, source, device_str="cpu": getattr(PyCodeCache.load(source), name)
    return kept


def compile_for_gpu(function, meta: dict) -> None:
    """Raises where Triton refuses."""
    signature = dict(meta["signature"])
    constants = {name: BLOCKS.get(name, 64) for name, kind in signature.items() if kind == "constexpr"}
    constants |= meta.get("constants", {})
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(function, signature, places), target=TARGET, options={"num_warps": 4})


def main() -> None:
    kept = intercept()
    specs = {"gdino": FeatureSpec(None, (32,), (8.0,))}
    vit = {"dim": 32, "depth": 1, "heads": 2, "patch_size": 14, "image_size": 56}
    target = Features(None, (torch.randn(2, 8, 12, 32, dtype=torch.bfloat16),))
    valid = torch.ones(2, 64, 96, dtype=torch.bool)
    images = torch.rand(2, 3, 64, 96)
    for recipe, cfg, heads, cells in ((KPU, KPUConfig(), specs, valid), (GKD, GKDConfig(recipe="gkd"), {}, None)):
        student = Student(vit=vit, adapter=None, heads=heads, head_hidden=32, freeze_vit=False)
        module = recipe(student, specs, cfg).bfloat16()
        terms = torch.compile(module, dynamic=False, fullgraph=True)(images, {"gdino": target}, cells)
        module.total(terms).backward()
    refused = {}
    for function, meta in kept:
        try:
            compile_for_gpu(function, meta)
        except Exception as error:
            refused[function.__name__] = str(error)[-300:]
    print(json.dumps({"kernels": len(kept), "refused": refused}))


if __name__ == "__main__":
    main()
