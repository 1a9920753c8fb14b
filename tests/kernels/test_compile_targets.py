"""Every Triton kernel, at every tile of the launch table, compiled for real GPUs without one."""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# The fixture compiles some 300 kernels: three minutes of one idle core, on some servers six, so two work on it; it
# comes late, when most other tests are done.
pytestmark = pytest.mark.timeout(900)
PROCESSES = 2

SPILL_FREE, COMPILED_ONLY = 90, (80, 100)  # H100, whose machine code is looked into; A100 and B200
POINTERS = {  # what is not in the dtype of the maps
    "rows_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "share_ptr": "*fp32",
    "mean_ptr": "*fp32",
    "std_ptr": "*fp32",
    "factor_ptr": "*fp32",
    "count_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "loss_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "parts_ptr": "*fp64",
    "sums_ptr": "*fp64",
    "loc_ptr": "*fp32",
    "weight_ptr": "*fp32",  # a softmax under autocast
    "gl_ptr": "*fp32",
    "gw_ptr": "*fp32",
    "gv_ptr": "*fp32",  # "*i64" where FIXED
    "shapes_ptr": "*i64",
    "grad_max_ptr": "*fp32",
    "weight_max_ptr": "*fp32",
    "fixed_ptr": "*i64",
    "u_ptr": "*fp32",
    "valid_ptr": "*i1",
}


def cases():
    """(kernel, constants, num_warps, targets) of the whole table; everything switched on that costs registers."""
    from kpu_fast.kernels import (
        align_across_triton,
        align_group_triton,
        align_triton,
        deform_attn_triton,
        launch,
        moments_triton,
        resize_triton,
    )
    from kpu_fast.kernels.launch import DEFORM_TILES, MOMENTS_TILE, SCALE_TILE, TOKEN_TILES

    everywhere = (SPILL_FREE, *COMPILED_ONLY)
    flags = {"HAS_MEAN": True, "HAS_STD": True, "HAS_VALID": True, "BY_MAP": False, "GRAD_S": True, "GRAD_T": True}
    flags |= {"CORNERS": False, "ACROSS": False, "HAS_SHARE": True, "SUM": True}
    for tile in TOKEN_TILES.values():
        block = {"TOKENS": tile.tokens, "CHUNK": tile.chunk, "PIECES": tile.pieces}
        forward = {**flags, **block, "FORWARD": True, "FLAT": True, "RESIZE": 0, "STATS": False}
        resized = {"FLAT": False, "RESIZE": 1}
        kept = {"STATS": True, "SUM": False, "GRAD_S": False, "GRAD_T": False}
        along = align_triton.align_along_kernel
        yield along, forward, tile.num_warps, everywhere
        yield along, forward | resized, tile.num_warps, (SPILL_FREE,)
        yield along, forward | resized | kept, tile.num_warps, (SPILL_FREE,)
        yield along, forward | kept | {"SUM": True}, tile.num_warps, (SPILL_FREE,)
        yield along, forward | resized | {"FORWARD": False}, tile.num_warps, (SPILL_FREE,)
        yield along, forward | {"FORWARD": False}, tile.num_warps, (SPILL_FREE,)
        group = forward | {"COUNT": launch.MAX_SLOTS}
        yield align_group_triton.align_group_kernel, group, tile.num_warps, everywhere
    tile = TOKEN_TILES[768]
    block = {
        "TOKENS": tile.tokens,
        "CHUNK": tile.chunk,
        "PIECES": tile.pieces,
        "STATS": False,
        "SUM": True,
        "BY_MAP": False,
    }
    for case in ({"RESIZE": 0}, {"RESIZE": 1}, {"RESIZE": 0, "FORWARD": False}):
        off = {name: False for name in ("HAS_SHARE", "HAS_MEAN", "HAS_STD", "HAS_VALID", "GRAD_T", "CORNERS")}
        plain = {**off, **block, "FORWARD": True, "FLAT": case["RESIZE"] == 0, "GRAD_S": True, **case}
        yield align_triton.align_along_kernel, plain, tile.num_warps, (SPILL_FREE,)
    for tile, (forward, stats) in itertools.product(
        launch.ALIGN_TILES_ACROSS.values(), ((True, False), (True, True), (False, False))
    ):
        across = {**flags, "TOKENS": tile.tokens, "CHUNK": tile.chunk, "FORWARD": forward, "STATS": stats, "WIDE": 1}
        across |= {"GRAD_S": not stats, "GRAD_T": not stats, "SUM": not stats}
        yield align_across_triton.align_across_kernel, across, tile.num_warps, everywhere
        yield align_across_triton.align_across_kernel, across | {"WIDE": 4}, tile.num_warps, (SPILL_FREE,)  # 14² tokens
    tile = launch.FINISH_TILE
    finish = {"COUNT": tile.rows, "BLOCK": tile.channels}
    yield align_triton.align_finish_kernel, finish, tile.num_warps, everywhere
    scale = {"COUNT": launch.MAX_SLOTS, "BLOCK": SCALE_TILE.channels}
    yield align_group_triton.align_group_scale_kernel, scale, SCALE_TILE.num_warps, everywhere
    resizes = resize_triton.resize_forward_kernel, resize_triton.resize_backward_kernel
    for tile in {launch.resize_tile(width) for width in TOKEN_TILES}:
        block = {"TOKENS": tile.tokens, "CHUNK": tile.chunk, "PIECES": tile.pieces, "HAS_SCALE": True}
        for kernel in resizes:
            yield kernel, block | {"CORNERS": False, "ACROSS": False}, tile.num_warps, everywhere
    across = launch.RESIZE_TILE_ACROSS
    for corners in (False, True):
        block = {"TOKENS": across.tokens, "CHUNK": across.chunk, "PIECES": across.pieces, "HAS_SCALE": True}
        for kernel in resizes:
            yield kernel, block | {"CORNERS": corners, "ACROSS": True}, across.num_warps, everywhere
    # A side of 1 reaches a kernel as a constant.
    tile = launch.resize_tile(256)
    block = {"TOKENS": tile.tokens, "CHUNK": tile.chunk, "PIECES": tile.pieces, "HAS_SCALE": True, "ACROSS": False}
    to_one_token = block | {"CORNERS": True, "out_height": 1, "out_width": 1}
    yield resize_triton.resize_forward_kernel, to_one_token, tile.num_warps, (SPILL_FREE,)
    yield resize_triton.resize_backward_kernel, to_one_token | {"height": 1}, tile.num_warps, (SPILL_FREE,)
    for adjacent in ({"height": 1}, {"x_sw": 1}):  # the one line of a dense map, or an NCHW view
        block = {"ROWS": MOMENTS_TILE.rows, "BLOCK_C": MOMENTS_TILE.channels, "HAS_VALID": True, **adjacent}
        yield moments_triton.moments_kernel, block, MOMENTS_TILE.num_warps, everywhere
    tile = launch.MOMENTS_FINISH_TILE
    finish = {"ROWS": tile.rows, "BLOCK_C": tile.channels}
    yield moments_triton.moments_finish_kernel, finish, tile.num_warps, everywhere
    for what, tiles in DEFORM_TILES.items():
        wanted = {"GRAD_V": True, "GRAD_L": True, "GRAD_W": True, "FIXED": what == "fixed", "UNROLL": 4}
        kernel = deform_attn_triton.deform_forward_kernel
        kernel = kernel if what == "forward" else deform_attn_triton.deform_backward_kernel
        for tile in tiles.values():
            block = {**wanted, "ON_DEVICE": False, "ROWS": tile.rows, "BLOCK_D": tile.channels}
            yield kernel, block, tile.num_warps, everywhere
        tile = tiles[32]
        block = {**wanted, "ON_DEVICE": True, "UNROLL": 1, "ROWS": tile.rows, "BLOCK_D": 32}
        yield kernel, block, tile.num_warps, (SPILL_FREE,)
    block = {"BLOCK": SCALE_TILE.channels}
    yield deform_attn_triton.deform_unfix_kernel, block, SCALE_TILE.num_warps, everywhere
    yield align_triton.align_scale_kernel, {"BLOCK": SCALE_TILE.channels}, SCALE_TILE.num_warps, everywhere


def compile_one(kernel, constants, num_warps, target):
    """bf16 maps, channels adjacent, everything aligned to 16: the case that has to be fast."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # Triton's own launcher turns a stride of 1 into a constant in the same way.
    across = constants.get("ACROSS") or "x_sw" in constants or ("TOKENS" in constants and "PIECES" not in constants)
    adjacent = "_sw" if across else "_sc"
    constants |= {name: 1 for name in kernel.arg_names if name.endswith((adjacent, "l_sx", "w_sp"))}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif "COUNT" in constants and name.endswith("s"):  # a tuple of that many
            one = POINTERS.get(name[:-1], "*bf16") if name.endswith("_ptrs") else "i32"
            one = "fp32" if name in ("cos_weights", "l1_weights", "betas", "inv_betas") else one
            signature[name] = (one,) * constants["COUNT"]
            if name.endswith(("_ptrs", "_samples", "_tokens")) or name in ("channels", "numels"):
                aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(constants["COUNT"])}
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*bf16")
            if name == "gv_ptr" and constants["FIXED"]:
                signature[name] = "*i64"
        elif name.startswith("size"):
            signature[name] = "i64"
        else:
            signature[name] = "fp32" if "beta" in name or "weight" in name or "unit" in name else "i32"
        multiple = name.endswith(("_ptr", "_sb", "_sh", "_sw", "_sc", "v_ss", "v_sm", "g_sq", "g_sm")) or name in (
            "channels",
            "numel",
        )
        multiple &= not kernel.params[place].do_not_specialize
        if constants.get("WIDE", 1) > 1:
            multiple = name.endswith("_ptr")
        multiple |= adjacent == "_sw" and name in ("width", "tokens") and constants.get("WIDE", 1) == 1
        if name not in constants and multiple:
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
        "wide_atomics": len(re.findall(r"RED\S*\.ADD\.F32x4", code)),
        "barriers": len(re.findall(r"BAR\.SYNC", code)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", code[: code.rindex(" EXIT ")])),
    }


def branches_before_reading(ttir: str) -> bool:
    """Whether the kernel decides something before it first loads more than one number."""
    first = re.search(r"tt\.load .*tensor<", ttir)
    return re.search(r"scf\.if|cf\.cond_br", ttir[: first.start()]) is not None


def print_part(number: int) -> None:
    """One JSON line per compilation, of every PROCESSES-th case."""
    for kernel, constants, num_warps, targets in itertools.islice(cases(), number, None, PROCESSES):
        for target in targets:
            compiled = compile_one(kernel, constants, num_warps, target)
            found = {"kernel": kernel.__name__, "target": target, "bytes": len(compiled.asm["cubin"]), **constants}
            if "scale" in kernel.__name__:
                found["branches"] = branches_before_reading(compiled.asm["ttir"])
            print(json.dumps(found | (look_inside(compiled.asm["cubin"]) if target == SPILL_FREE else {})), flush=True)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton", reason="triton is not installed")
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(lambda number: run_alone("part", str(number)), range(PROCESSES)))
    return [json.loads(line) for part in parts for line in part]


def run_alone(*arguments) -> list[str]:
    """This file's output in a process of its own: under TRITON_INTERPRET=1 a kernel cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_whole_table_compiles_for_every_target(compiled):
    from kpu_fast.kernels.launch import DEFORM_TILES, MOMENTS_TILE, TOKEN_TILES, resize_tile

    for target in (SPILL_FREE, *COMPILED_ONLY):
        there = [c for c in compiled if c["target"] == target and c["bytes"] > 0]
        for kernel in ("align_along_kernel", "align_group_kernel"):
            widths = {c["CHUNK"] * c["PIECES"] for c in there if c["kernel"] == kernel}
            assert widths == set(TOKEN_TILES)
        seen = {(c["kernel"], c.get("BLOCK_C")) for c in there}
        for kernel in ("resize_forward_kernel", "resize_backward_kernel"):
            tiles = {(c["CHUNK"], c["PIECES"]) for c in there if c["kernel"] == kernel}
            assert tiles > {resize_tile(width)[1:3] for width in TOKEN_TILES}
        single = {"align_across_kernel", "align_scale_kernel", "align_finish_kernel", "align_group_scale_kernel"}
        assert single <= {name for name, _ in seen}
        assert ("moments_kernel", MOMENTS_TILE.channels) in seen
        wide = {(c["kernel"], c.get("BLOCK_D"), c.get("FIXED")) for c in compiled if c["target"] == target}
        for what, tiles in DEFORM_TILES.items():
            name = "deform_forward_kernel" if what == "forward" else "deform_backward_kernel"
            assert {(name, width, what == "fixed") for width in tiles} <= wide
        assert ("deform_unfix_kernel", None) in seen


def test_scaling_by_one_reads_no_gradient(compiled):
    """The factor is compared before the first load of the gradient, on the device."""
    found = {c["kernel"]: c["branches"] for c in compiled if "branches" in c}
    assert found == {"align_scale_kernel": True, "align_group_scale_kernel": True}


def signatures(*calls, of: str = "groups") -> list[str]:
    """Per group of shapes, or per pyramid, what Triton's launcher sees of its launches.

    It compiles anew where that differs.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    return run_alone(of, json.dumps(calls))


def record(module) -> list:
    """A list to which `module`'s launches add their kernels' names and signatures, and launch nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    backend = CUDABackend(GPUTarget("cuda", SPILL_FREE, 32))
    seen = []

    def recorded(kernel, programs, *arguments, num_warps, **constants):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen.append((kernel.__name__, str(bind(*arguments, **constants)[1])))

    module.run_kernel = recorded
    return seen


def print_pyramids(calls) -> None:
    """One line per (batch, queries, heads, channels, sizes): the signatures of deform_attn's launches."""
    import torch
    from kpu_fast.kernels import deform_attn_triton as launch

    seen = record(launch)
    for batch, queries, heads, channels, sizes in calls:
        value = torch.zeros(batch, sum(h * w for h, w in sizes), heads, channels)
        locations = torch.zeros(batch, queries, heads, len(sizes), 3, 2)
        weights, out = locations[..., 0].contiguous(), torch.zeros(batch, queries, heads, channels)
        launch.launch_forward(value, None, sizes, locations, weights, out)
        launch.launch_backward(
            out, value, None, sizes, locations, weights, None, 1.0, value.float(), locations, weights
        )
        print(seen)
        seen.clear()


def print_groups(calls) -> None:
    """One line per call of launch_group: the signatures of its launches."""
    import torch
    from kpu_fast.kernels import align_group_launch as launch

    seen = record(launch)
    for shapes in calls:
        sides = [torch.zeros(shape) for shape in shapes]
        terms, nothing = len(sides), [None] * len(sides)
        weights = [0.5] * terms
        grads = [torch.zeros(shape) for shape in shapes]
        empty = [torch.empty(0)] * terms
        losses = torch.zeros(terms)
        launch.launch_group(sides, sides, nothing, nothing, nothing, weights, weights, weights, grads, empty, losses)
        launch.launch_group_scale(tuple(grads), tuple(range(terms)), losses)
        print(seen)
        seen.clear()


def test_groups_of_one_class_compile_once():
    """Whatever the tokens: 1 program or 16, first or second place, a multiple of 16 or not."""
    groups = [[(1, 48), (16, 48)], [(7, 48), (33, 48)], [(2, 64, 48), (4, 5, 4, 48)], [(160, 48), (1, 1, 48)]]
    alone, *others = signatures(*groups)
    assert "align_group_kernel" in alone
    assert all(other == alone for other in others)
    assert signatures([(7, 40), (33, 40)]) != [alone]  # rows of 40: nothing lets loads be wide


def test_every_pyramid_runs_the_same_code():
    """Whatever its sizes and the queries: 1, odd, or a multiple of 16."""
    pyramids = [
        (1, 5, 3, 32, [(5, 7), (3, 3)]),
        (1, 16, 3, 32, [(4, 4), (2, 8)]),
        (4, 1, 3, 32, [(1, 1), (1, 1)]),
        (2, 4201, 3, 32, [(50, 84), (1, 1)]),
    ]
    first, *others = signatures(*pyramids, of="pyramids")
    assert "deform_backward_kernel" in first
    assert all(other == first for other in others)
    assert signatures((1, 5, 3, 24, [(5, 7), (3, 3)]), of="pyramids") != [first]  # the channels do count


def test_no_spills_and_128_bit_accesses_on_sm_90(compiled):
    for found in compiled:
        if found["target"] != SPILL_FREE:
            continue
        assert found["spilled"] == 0, found
        assert found["registers"] <= 168, found  # three programs of four warps on a multiprocessor, at the least
        if found["kernel"] == "deform_backward_kernel":
            continue  # its loads are as wide as its atomic adds: see below
        mask = found["kernel"] == "moments_kernel"  # two tokens' bools at once
        assert found["narrow_map_loads"] <= mask or found.get("ACROSS") or found.get("FLAT") is False, found
        if found.get("WIDE") == 4:
            continue  # four tokens of 14², 8 bytes
        if found.get("ACROSS") or found.get("FLAT") is False or "finish" in found["kernel"]:
            continue  # tokens found by a division, neighbours only to the eye; a finish reads few numbers per program
        # Loads that move a map: each side once, or its four neighbours; a gradient is stored once per side.
        sides = 2 if found["kernel"].startswith("align_") and "scale" not in found["kernel"] else 1
        loads = 5 if found.get("RESIZE") else 4 if found["kernel"] == "resize_forward_kernel" else sides
        assert found["wide_loads"] >= loads, found
        if found["kernel"] != "moments_kernel" and not found.get("STATS"):  # which store a few numbers per token
            assert found["wide_stores"] >= sides, found


def test_few_instructions_per_number(compiled):
    """Of 768 bf16 channels. An H100 can issue some 51 while its memory moves the 6 bytes of a forward with gradient."""
    found = {}
    for c in compiled:
        if c["kernel"] == "align_along_kernel" and c["CHUNK"] * c["PIECES"] == 768 and not c["GRAD_T"] and c["GRAD_S"]:
            assert c["registers"] <= 80, c  # six programs of four warps on a multiprocessor
            # No loop: every instruction of the code runs once, in each of four warps.
            found[c["RESIZE"], c["FORWARD"]] = c["instructions"] * 4 * 32 / (c["TOKENS"] * 768)
        elif (
            c["kernel"] == "resize_forward_kernel"
            and c["target"] == SPILL_FREE
            and (c["CHUNK"], c["PIECES"]) == (256, 3)
        ):
            found["resize"] = c["instructions"] * 4 * 32 / (c["TOKENS"] * 768)
    assert found.keys() == {(0, True), (1, True), (0, False), "resize"}
    assert found["resize"] <= 23, found
    assert found[0, True] <= 27, found
    assert found[0, False] <= 19, found
    assert found[1, True] <= 43, found


def test_deform_attn_moves_16_bytes_per_thread_and_nothing_through_shared_memory(compiled):
    """Four corners per sample. At the widths of real heads no sample waits for another warp (int64: at 32)."""
    ours = [c for c in compiled if c["target"] == SPILL_FREE and c["kernel"].startswith("deform_") and "UNROLL" in c]
    assert {c["BLOCK_D"] for c in ours} == {16, 32, 64, 128, 256}
    for found in ours:
        corners = 4 * found["UNROLL"]
        if found["kernel"] == "deform_forward_kernel":
            assert found["wide_loads"] >= corners, found
            assert found["barriers"] == 0, found
        elif not found["FIXED"]:
            assert found["wide_atomics"] == corners, found
        if found["BLOCK_D"] in ((32,) if found["FIXED"] else (32, 64)) and found["UNROLL"] == 4:
            assert found["barriers"] == 0, found


if __name__ == "__main__":
    {"part": print_part, "groups": print_groups, "pyramids": print_pyramids}[sys.argv[1]](json.loads(sys.argv[2]))
