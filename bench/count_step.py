"""What a step asks of a GPU, counted without one:  python bench/count_step.py --config configs/h100_random.json

Runs teachers, student, losses and backward once on tensors without values, in the sizes and dtype of the config, and
counts for every operator the launches, the bytes of its inputs and outputs and the operations of its products. The
floor of an operator is the larger of bytes / bandwidth and operations / rate, as if nothing stayed in a cache. Nothing
is measured: occupancy, several kernels in one call and the host are left out, and so are the optimiser, the data and
torch.compile.
"""

import argparse
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import kpu_fast.kernels
import torch
from flop import RULES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from kpu_fast.config import Config, ConfigError, load_config
from kpu_fast.engine.build import build_models
from kpu_fast.models.hub import WeightsError

META = torch.device("meta")
# These make or rename a tensor; every other operator that writes is at least one kernel.
NO_KERNEL = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
WRITE_ONLY = {"copy_", "fill_", "zero_"}  # of the operators that write to an input, those that do not read it
FLOP = flop_registry | {operator: shape_wrapper(rule) for operator, rule in RULES.items()}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
ROOT = str(Path(kpu_fast.__file__).parent)


@dataclass
class Count:
    """Of some operators together: kernels (one for each call), bytes, operations, seconds of their floors."""

    launches: int = 0
    bytes: int = 0
    flop: int = 0
    seconds: float = 0.0


class Counting(TorchDispatchMode):
    """Counts what is dispatched, by (part, kind, line): set `part` from outside; rates in bytes/s and operations/s."""

    def __init__(self, bandwidth: float, rate: float):
        super().__init__()
        self.bandwidth, self.rate = bandwidth, rate
        self.part = ""
        self.counts: dict[tuple[str, str, str], Count] = defaultdict(Count)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in known]
        in_place = function._schema.is_mutable
        if name in NO_KERNEL or not (fresh or in_place):
            return out  # a view, or memory that nothing was written to yet
        read = inputs[1:] if name in WRITE_ONLY else inputs
        moved = sum(map(_bytes, read)) + sum(map(_bytes, outputs if in_place else fresh))
        rule = FLOP.get(function.overloadpacket)
        flop = int(rule(*args, **kwargs, out_val=out)) if rule else 0
        count = self.counts[self.part, _kind(function, name), _line()]
        count.launches += 1
        count.bytes += moved
        count.flop += flop
        count.seconds += max(moved / self.bandwidth, flop / self.rate)
        return out

    def by(self, *places: int) -> dict[tuple[str, ...], Count]:
        """Sums over the keys' other places: 0 part, 1 kind, 2 line."""
        sums: dict[tuple[str, ...], Count] = defaultdict(Count)
        for key, count in self.counts.items():
            into = sums[tuple(key[place] for place in places)]
            for field in vars(count):
                setattr(into, field, getattr(into, field) + getattr(count, field))
        return sums


def main() -> int:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, help="as kpu_fast/train.py takes it")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="the same")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s that a copy reaches (an H100: 3.0)")
    parser.add_argument("--rate", type=float, help="TFLOP/s that a large product reaches (bf16: 790, fp32: no default)")
    parser.add_argument("--lines", type=int, default=12, help="how many of the costliest lines to print")
    args = parser.parse_args()
    try:
        cfg = load_config(args.config, args.set)
        if args.rate is None and cfg.precision != "bf16":
            raise ConfigError(f"--rate: none given, and 790 TFLOP/s are of bf16, not of {cfg.precision}")
        rate = args.rate or 790.0
        counting = count_step(cfg, 1e12 * args.bandwidth, 1e12 * rate)
    except (ConfigError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{cfg.name}: one step of one rank, {cfg.precision}. Floor: {args.bandwidth} TB/s, {rate:g} TFLOP/s")
    for title, places in (("part", (0,)), ("kind", (1,))):
        _print(title, counting.by(*places))
    _print("line", counting.by(0, 2, 1), args.lines)
    _print("", counting.by())
    return 0


def count_step(cfg: Config, bandwidth: float, rate: float) -> Counting:
    """One step of `cfg` on tensors without values, with the operators that a GPU would run."""
    teachers, module = build_models(cfg, META)
    if cfg.precision == "bf16":
        module.bfloat16()  # as DeepSpeed does
    counting, terms, seen = Counting(bandwidth, rate), {}, []
    equal = cfg.objective.balance == "equal"
    warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")  # it tells a node's line
    with _as_on_a_gpu(upstream_of_one=equal), counting, torch.autograd.detect_anomaly(check_nan=False):
        for stream, names in cfg.streams().items():
            data = cfg.teachers[stream].data
            images = torch.empty(data.batch_size, 3, *data.size, device=META)
            valid = torch.empty(data.batch_size, *data.size, dtype=torch.bool, device=META)
            targets = {}
            for name in names:
                counting.part = f"{name}: teacher"
                targets[name] = teachers[name](images)
            counting.part = f"{', '.join(names)}: student and losses"
            seen.append((images, targets, valid if data.fit == "pad" else None))
            terms |= module(*seen[-1])
        counting.part = "backward"
        shares = None if equal else torch.empty(len(teachers), device=META)
        module.total(terms, shares).backward()
        if cfg.objective.balance == "famo":
            counting.part = "famo: what the step did"
            with torch.no_grad():
                for batch in seen:
                    module(*batch)
    return counting


@contextmanager
def _as_on_a_gpu(upstream_of_one: bool):
    """Inside, tensors without values go where tensors on a GPU go: to our kernels, and to fused attention."""
    with ExitStack() as changes:

        def put(place, name: str, value: Callable) -> None:
            changes.enter_context(patch.object(place, name, value))

        for room in {sys.modules[f.__module__] for f in vars(kpu_fast.kernels).values() if isinstance(f, Callable)}:
            if hasattr(room, "choose_impl"):
                put(room, "choose_impl", lambda impl, *tensors, supported: "triton" if supported() else "torch")
        if upstream_of_one:  # leaves the losses' kept gradients as they are
            put(sys.modules["kpu_fast.kernels.align_group"], "scaled", lambda grad, factor: grad)
        put(kpu_fast.models.vit, "is_plain", lambda *_: True)
        put(torch.nn.functional, "scaled_dot_product_attention", _fused_attention)
        yield


def _fused_attention(query, key, value, attn_mask=None, **options):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _bytes(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1  # what is expanded lies in memory once
    return elements * x.element_size()


def _kind(function, name: str) -> str:
    if function.namespace.startswith("kpu_fast"):
        return "this project's kernels"
    if "attention" in name:
        return "attention"
    if "convolution" in name:
        return "convolutions"
    return "matrix products" if name in PRODUCTS else "all else"


def _line() -> str:
    """The innermost line of this package that runs, or that made what backward runs now."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT):
            return f"{frame.filename[len(ROOT) + 1 :]}:{frame.lineno}"
    node = torch._C._current_autograd_node()
    entries = [] if node is None else node.metadata.get("traceback_", [])
    frames = [line for entry in entries for line in entry.splitlines()]
    places = [line.split('"') for line in frames if f'File "{ROOT}' in line]
    if not places:
        return "elsewhere"
    _, file, rest = places[-1]
    return f"{file[len(ROOT) + 1 :]}:{rest.split('line ')[1].partition(',')[0]}"


def _print(title: str, counts: dict[tuple[str, ...], Count], most: int | None = None) -> None:
    print(f"\n{title:<64}{'launches':>9}{'GB':>9}{'TFLOP':>9}{'floor, ms':>11}")
    for key, count in sorted(counts.items(), key=lambda item: -item[1].seconds)[:most]:
        what = ", ".join(key) or "all"
        numbers = f"{count.launches:>9}{count.bytes / 1e9:>9.1f}{count.flop / 1e12:>9.2f}{1e3 * count.seconds:>11.1f}"
        print(f"{what:<64}{numbers}")


if __name__ == "__main__":
    sys.exit(main())
