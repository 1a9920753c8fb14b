"""run_kernel against Triton's own launch: what reaches the compiled kernels, on a driver without a GPU."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


def install_driver(log: list) -> None:
    """Compile for an H100, and note launches in `log` instead of making them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Launcher:
        def __init__(self, source, metadata):
            self.name = source.fn.__name__

        def __call__(self, x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *arguments):
            seen = [("tensor", a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
            log.append(repr((self.name, x, y, z, stream, function, packed, seen)))

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        load_binary=lambda name, kernel, shared, device: (1, hash(kernel), 64, 0, 1024),
    )
    driver.set_active(
        SimpleNamespace(
            utils=utils,
            launcher_cls=Launcher,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 7,
        )
    )


def call_everything(kernels) -> None:
    """Forward and backward of every operator, in several forms."""
    bf16 = torch.bfloat16
    source = torch.randn(2, 5, 7, 48, dtype=bf16, requires_grad=True)
    target, wide = torch.randn(2, 4, 6, 48, dtype=bf16), torch.randn(2, 5, 7, 48)
    kernels.align_loss(source, target, resize="source").backward()
    kernels.align_loss(
        source, wide, target_mean=torch.zeros(48), target_std=torch.ones(48),
        valid=torch.ones(2, 5, 7, dtype=torch.bool), reduction="sample",
    ).sum().backward()  # fmt: skip
    nchw = torch.randn(2, 48, 5, 7, dtype=bf16).permute(0, 2, 3, 1).requires_grad_()
    kernels.align_loss(nchw, nchw.detach().clone(memory_format=torch.preserve_format)).backward()
    kernels.resize_bilinear(source, (9, 3)).sum().backward()
    kernels.moments(source)
    kernels.moments(nchw, valid=torch.ones(2, 5, 7, dtype=torch.bool))
    tokens = kernels.AlignTerm(source.flatten(1, 2), torch.randn(2, 35, 48, dtype=bf16), beta=0.5)
    rows = kernels.AlignTerm(torch.randn(3, 96, requires_grad=True), torch.randn(3, 96))
    kernels.align_losses([tokens, rows]).sum().backward()
    value = torch.randn(2, 35, 4, 32, dtype=bf16, requires_grad=True)
    locations = torch.rand(2, 9, 4, 1, 4, 2, requires_grad=True)
    weights = torch.rand(2, 9, 4, 1, 4, dtype=bf16, requires_grad=True)
    for deterministic in (False, True):
        kernels.deform_attn(value, [(5, 7)], locations, weights, deterministic=deterministic).sum().backward()


def main() -> None:
    """One JSON: per launch whether the three ways agree, and how often Triton's own way was taken for a few changes."""
    log: list[str] = []
    install_driver(log)
    from kpu_fast.kernels import (
        align,
        align_group,
        align_group_launch,
        align_launch,
        deform_attn_triton,
        launch,
        moments_triton,
        resize_triton,
    )

    from kpu_fast import kernels

    names = "align", "align_group", "deform_attn", "moments", "resize"
    for module in [sys.modules[f"kpu_fast.kernels.{name}"] for name in names]:
        module.choose_impl = lambda *args, **kwargs: "triton"
    align_group.takes_triton = align.takes_triton = lambda *args, **kwargs: True

    agree = []

    def three_ways(kernel, programs, *arguments, num_warps, **constants):
        log.clear()
        kernel[programs](*arguments, num_warps=num_warps, **constants)
        launch.run_kernel(kernel, programs, *arguments, num_warps=num_warps, **constants)
        launch.run_kernel(kernel, programs, *arguments, num_warps=num_warps, **constants)
        agree.append((kernel.__name__, len(log) == 3 and len(set(log)) == 1))

    modules = align_group_launch, align_launch, deform_attn_triton, moments_triton, resize_triton
    for module in modules:
        module.run_kernel = three_ways
    call_everything(kernels)

    class Counted:
        """A kernel that counts the calls of Triton's own launch."""

        def __init__(self, kernel):
            self.kernel, self.calls = kernel, 0
            self.fn, self.arg_names = kernel.fn, kernel.arg_names

        def __getitem__(self, programs):
            self.calls += 1
            return self.kernel[programs]

    from kpu_fast.kernels.align_triton import align_scale_kernel

    scale = Counted(align_scale_kernel)
    x, factor = torch.zeros(64), torch.ones(())
    calls = {}
    for what, changed in {
        "first": (x, factor, 64),
        "the same": (torch.zeros(64), torch.zeros(()), 64),
        "another multiple of 16": (x, factor, 48),
        "no multiple of 16": (x, factor, 60),
        "1": (x, factor, 1),
        "more than 32 bits": (x, factor, 60 + 2**40),
        "another dtype": (x.half(), factor, 64),
        "not a multiple of 16 bytes": (x[1:], factor, 64),
    }.items():
        before = scale.calls
        launch.run_kernel(scale, (1, 1), *changed, BLOCK=64, num_warps=4)
        calls[what] = scale.calls - before
    launch._MAX_COMPILED = len(launch._compiled)
    launch.run_kernel(scale, (1, 1), x.bfloat16(), factor, 64, BLOCK=64, num_warps=4)
    print(json.dumps({"agree": agree, "calls": calls, "kept": len(launch._compiled)}))


@pytest.fixture(scope="module")
def found():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_launch_reaches_the_kernel_as_by_tritons_own_way(found):
    assert all(same for _, same in found["agree"]), found["agree"]
    assert {name for name, _ in found["agree"]} == {
        "align_along_kernel",
        "align_across_kernel",
        "align_finish_kernel",
        "align_scale_kernel",
        "align_group_kernel",
        "align_group_scale_kernel",
        "resize_forward_kernel",
        "resize_backward_kernel",
        "moments_kernel",
        "moments_finish_kernel",
        "deform_forward_kernel",
        "deform_backward_kernel",
        "deform_unfix_kernel",
    }


def test_triton_looks_again_at_what_it_may_compile_anew_for(found):
    assert found["calls"] == {
        "first": 1,
        "the same": 0,
        "another multiple of 16": 0,
        "no multiple of 16": 1,
        "1": 1,
        "more than 32 bits": 1,
        "another dtype": 1,
        "not a multiple of 16 bytes": 1,
    }
    assert found["kept"] == 1  # a full table is begun anew


def test_what_no_kernel_takes_is_refused():
    import numpy as np
    from kpu_fast.kernels.launch import run_kernel

    with pytest.raises(TypeError, match="tensor, int, float or a tuple of them, found int64"):
        run_kernel(SimpleNamespace(fn=None), (1, 1), np.int64(3), num_warps=4)


if __name__ == "__main__":
    main()
