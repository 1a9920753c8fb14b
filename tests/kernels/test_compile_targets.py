"""Every Triton kernel, at every tile of the launch table, compiled for real GPUs without one."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SPILL_FREE, COMPILED_ONLY = 90, (80, 100)  # H100, whose machine code is looked into; A100 and B200
POINTERS = {  # what is not in the dtype of the maps
    "rows_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "share_ptr": "*fp32",
    "mean_ptr": "*fp32",
    "std_ptr": "*fp32",
    "factor_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "u_ptr": "*fp32",
    "valid_ptr": "*i1",
}


def cases():
    """(kernel, constants, num_warps, targets) of the whole table; everything switched on that costs registers."""
    from kpu_fast.kernels import align_triton, resize_triton
    from kpu_fast.kernels.launch import ALIGN_TILES, RESIZE_TILES, SCALE_TILE

    everywhere = (SPILL_FREE, *COMPILED_ONLY)
    flags = {"HAS_MEAN": True, "HAS_STD": True, "HAS_VALID": True, "BY_MAP": False, "GRAD_S": True, "GRAD_T": True}
    for tile in ALIGN_TILES.values():
        plain = {**flags, "RESIZE": 0, "STATS": False, "ROWS": tile.rows, "BLOCK_C": tile.channels}
        yield align_triton.align_forward_kernel, plain, tile.num_warps, everywhere
        yield align_triton.align_forward_kernel, plain | {"RESIZE": 1, "STATS": True}, tile.num_warps, (SPILL_FREE,)
        yield align_triton.align_backward_kernel, plain, tile.num_warps, everywhere
    for tile in RESIZE_TILES.values():
        block = {"ROWS": tile.rows, "BLOCK_C": tile.channels, "HAS_SCALE": True}
        yield resize_triton.resize_forward_kernel, block, tile.num_warps, everywhere
        yield resize_triton.resize_backward_kernel, block, tile.num_warps, everywhere
    yield align_triton.align_scale_kernel, {"BLOCK": SCALE_TILE.channels}, SCALE_TILE.num_warps, everywhere


def compile_one(kernel, constants, num_warps, target):
    """bf16 maps, channels adjacent, everything aligned to 16: the case that has to be fast."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # Triton's own launcher turns a stride of 1 into a constant in the same way.
    constants |= {name: 1 for name in kernel.arg_names if name.endswith("_sc")}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*bf16")
        else:
            signature[name] = "fp32" if "beta" in name or "weight" in name else "i32"
        if name not in constants and (name.endswith(("_ptr", "_sb", "_sh", "_sw")) or name in ("channels", "numel")):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": num_warps})


def look_inside(cubin: bytes) -> dict:
    """Bytes of stack and local memory (spills), and how many global loads and stores move 128 bits."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(used["REG"]),
        "spilled": int(used["STACK"]) + int(used["LOCAL"]),
        "wide_loads": len(re.findall(r"LDG\.E\.\S*128", code)),
        "narrow_map_loads": len(re.findall(r"LDG\.E\.\S*U16", code)),
        "wide_stores": len(re.findall(r"STG\.E\.\S*128", code)),
    }


def main() -> None:
    """One JSON line per compilation."""
    for kernel, constants, num_warps, targets in cases():
        for target in targets:
            compiled = compile_one(kernel, constants, num_warps, target)
            found = {"kernel": kernel.__name__, "target": target, "bytes": len(compiled.asm["cubin"]), **constants}
            print(json.dumps(found | (look_inside(compiled.asm["cubin"]) if target == SPILL_FREE else {})), flush=True)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton", reason="triton is not installed")
    # A process of its own: under TRITON_INTERPRET=1 a kernel is not an object that can be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_whole_table_compiles_for_every_target(compiled):
    from kpu_fast.kernels.launch import ALIGN_TILES, RESIZE_TILES

    for target in (SPILL_FREE, *COMPILED_ONLY):
        seen = {(c["kernel"], c.get("BLOCK_C")) for c in compiled if c["target"] == target and c["bytes"] > 0}
        for kernel in ("align_forward_kernel", "align_backward_kernel"):
            assert {width for name, width in seen if name == kernel} == set(ALIGN_TILES)
        for kernel in ("resize_forward_kernel", "resize_backward_kernel"):
            assert {width for name, width in seen if name == kernel} == set(RESIZE_TILES)
        assert ("align_scale_kernel", None) in seen


def test_no_spills_and_128_bit_accesses_on_sm_90(compiled):
    for found in compiled:
        if found["target"] != SPILL_FREE:
            continue
        assert found["spilled"] == 0, found
        # Loads that move a map: each side once, or its four neighbours; a gradient is stored once per side.
        sides = {"align_forward_kernel": 2, "align_backward_kernel": 2}.get(found["kernel"], 1)
        loads = 5 if found.get("RESIZE") else 4 if found["kernel"] == "resize_forward_kernel" else sides
        assert found["wide_loads"] >= loads, found
        assert found["wide_stores"] >= sides, found
        assert found["narrow_map_loads"] == 0, found


if __name__ == "__main__":
    main()
