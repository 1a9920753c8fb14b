"""Each loss of examples/swap, as published and as ours: values, gradients, and what the swap saves."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "swap"


def load(name):
    spec = importlib.util.spec_from_file_location(f"swap_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


radio, tao, unic, theia, sak = (load(name) for name in ("radio", "tao", "unic", "theia", "sak"))


def features(seed):
    """make(*shape): random features whose channels differ in mean and size, as a network's do."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, axis=-1):
        widths = [1] * len(shape)
        widths[axis] = shape[axis]
        scale, offset = (torch.randn(widths, generator=generator) for _ in range(2))
        return torch.randn(shape, generator=generator) * scale.exp() + offset

    return make


def radio_case(batch, grid, teacher_grid, channels, summary):
    make = features(0)
    student = make(batch, summary), make(batch, channels, *grid, axis=1)
    return radio, student, (make(batch, summary), make(batch, channels, *teacher_grid, axis=1))


def tao_case(batch, grid, teacher_grid, channels, projected=None):
    make = features(1)
    teacher = make(batch, projected or channels, *teacher_grid, axis=1)
    torch.manual_seed(1)
    projector = projected and torch.nn.Linear(channels, projected)
    return tao, (make(batch, channels, *grid, axis=1),), (teacher, *([projector] if projector else []))


def unic_case(batch, tokens, channels):
    make = features(2)

    def one():
        return {
            name: {"cls": make(batch, width), "patch": make(batch, tokens, width)} for name, width in channels.items()
        }

    student, teacher = one(), one()
    statistics = {
        name: {kind: unic.published_statistics(x) for kind, x in kinds.items()} for name, kinds in teacher.items()
    }
    return unic, (student,), (teacher, statistics)


def theia_case(batch, tokens, channels):
    make = features(3)
    student, teacher = ({name: make(batch, tokens, c) for name, c in channels.items()} for _ in range(2))
    statistics = {name: unic.published_statistics(x) for name, x in teacher.items()}
    return theia, (student,), (teacher, statistics)


def sak_case(batch, channels, grid, teacher_grids, levels=1):
    make = features(4)
    student, teacher = (
        {name: [make(batch, channels, *grids[name], axis=1) for _ in range(levels)] for name in teacher_grids}
        for grids in (dict.fromkeys(teacher_grids, grid), teacher_grids)
    )
    return sak, (student,), (teacher,)


SAK_GRIDS = {"dinov2": (27, 27), "clip": (24, 24), "sam": (64, 64)}
CASES = {
    "radio, 16² → CLIP's 14²": lambda: radio_case(2, (16, 16), (14, 14), 768, 512),
    "radio, 14² → SAM's 64²": lambda: radio_case(1, (14, 14), (64, 64), 256, 401),
    "radio, one grid": lambda: radio_case(2, (14, 14), (14, 14), 768, 512),
    "radio, one grid, odd": lambda: radio_case(3, (5, 7), (5, 7), 41, 41),
    "tao, student larger": lambda: tao_case(2, (16, 16), (14, 14), 384),
    "tao, teacher larger, odd": lambda: tao_case(3, (5, 7), (11, 9), 41),
    "tao, one higher, the other wider": lambda: tao_case(2, (9, 5), (6, 8), 33),
    "tao, one grid": lambda: tao_case(2, (7, 7), (7, 7), 768),
    "tao, projector, student larger": lambda: tao_case(2, (14, 14), (7, 7), 64, 96),
    "tao, projector, teacher larger": lambda: tao_case(2, (7, 7), (16, 16), 64, 96),
    "tao, projector, one higher": lambda: tao_case(2, (9, 5), (6, 8), 33, 24),
    "tao, projector, one grid": lambda: tao_case(2, (7, 7), (7, 7), 64, 96),
    "tao, down to a single line": lambda: tao_case(2, (1, 7), (4, 9), 24),
    "unic, four ViT-B of 14²": lambda: unic_case(3, 196, {"dino": 768, "deit": 768, "ibot": 768, "dbot": 768}),
    "unic, odd": lambda: unic_case(7, 13, {"a": 41, "b": 1024, "c": 24}),
    "theia, CLIP-L, DINOv2-L, ViT-H": lambda: theia_case(2, 196, {"clip": 1024, "dino": 1024, "vit": 1280}),
    "theia, odd": lambda: theia_case(5, 13, {"a": 41, "b": 3}),
    "sak, its grids for 384²": lambda: sak_case(1, 64, (24, 24), SAK_GRIDS, levels=4),
    "sak, one grid": lambda: sak_case(1, 768, (14, 14), {"a": (14, 14)}),
    "sak, student larger, odd": lambda: sak_case(2, 41, (9, 7), {"a": (6, 5), "b": (3, 9)}),
    "sak, equal heights": lambda: sak_case(2, 24, (6, 9), {"a": (6, 5)}),
}


def evaluate(function, student, rest, dtype=torch.float32, **options):
    """(loss, gradients to everything of the student) in `dtype`."""
    student = tree_map(lambda x: x.to(dtype).requires_grad_(), student)
    loss = function(*student, *tree_map(lambda x: x.to(dtype), rest), **options)
    return loss.detach(), torch.autograd.grad(loss, tree_leaves(student))


def same_draws(module, losses=None):
    """The same random numbers for both sides of a loss that draws some: (options of published, options of ours)."""
    if module is not unic:
        return {}, {}
    numbers = torch.rand(losses, generator=torch.Generator().manual_seed(5)).tolist()
    return {"draw": lambda teacher, sample: numbers[teacher][sample]}, {"generator": torch.Generator().manual_seed(5)}


def shape_of_losses(module, student):
    if module is not unic:
        return None
    return len(student[0]), len(next(iter(student[0].values()))["cls"])


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_published_ones(case):
    module, student, rest = CASES[case]()
    losses = shape_of_losses(module, student)
    exact = evaluate(module.published, student, rest, torch.float64, **same_draws(module, losses)[0])
    published = evaluate(module.published, student, rest, **same_draws(module, losses)[0])
    ours = evaluate(module.ours, student, rest, **same_draws(module, losses)[1])
    doubles = evaluate(module.ours, student, rest, torch.float64, **same_draws(module, losses)[1])
    torch.testing.assert_close(ours[0], published[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(doubles[0], exact[0], rtol=1e-12, atol=0)
    for mine, theirs, truth, double in zip(ours[1], published[1], exact[1], doubles[1], strict=True):
        size = truth.abs().max()
        assert size > 0
        assert (mine - theirs).abs().max() <= 1e-6 * size
        assert (double - truth).abs().max() <= 1e-11 * size
        # Where the two differ, ours is not the worse one.
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-7 * size


def test_dropping_is_seen_in_the_gradients():
    """The case above would pass with p = 0 on both sides; here some teachers of some samples get no gradient."""
    module, student, rest = CASES["unic, odd"]()
    losses = shape_of_losses(module, student)
    _, gradients = evaluate(module.ours, student, rest, **same_draws(module, losses)[1])
    silent = [(g.flatten(1).abs().amax(1) == 0).sum().item() for g in gradients]
    assert 0 < sum(silent) < sum(len(g) for g in gradients)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("tao")])
def test_tao_at_the_loss_alone(case):
    _, student, rest = CASES[case]()

    def ours(student, teacher, projector=None):
        return tao.published(student, teacher, projector, balanced=tao.our_balanced)

    for dtype, allowed in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
        (expected, *theirs), (found, *mine) = (evaluate(f, student, rest, dtype) for f in (tao.published, ours))
        torch.testing.assert_close(found, expected, rtol=allowed, atol=0)
        for a, b in zip(mine[0], theirs[0], strict=True):
            assert (a - b).abs().max() <= allowed * b.abs().max()


def test_tao_summary():
    s, t = (features(seed)(5, 41) for seed in (7, 8))
    expected, theirs = evaluate(tao.published_balanced, (s,), (t,))
    found, mine = evaluate(tao.our_balanced, (s,), (t,))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 24), (3, 49, 41)])
def test_running_statistics_are_those_from_before_the_batch(shape):
    buffers = [
        [torch.zeros(1, *[1] * (len(shape) - 2), shape[-1]), torch.ones(1, *[1] * (len(shape) - 2), shape[-1])]
        for _ in range(2)
    ]
    for step, momentum in enumerate((1.0, 0.3, 0.0)):
        x = features(step)(*shape)
        expected = unic.published_standardise(x, *buffers[0], momentum)
        mean, std = unic.our_running_statistics(x, *buffers[1], momentum)
        torch.testing.assert_close((x - mean) / std, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffers[1], buffers[0], rtol=2e-6, atol=1e-6)
        if step == 0:  # which is not standardised: the buffers begin with 0 and 1
            torch.testing.assert_close(expected, x, rtol=2e-6, atol=0)


def test_a_teacher_run_under_inference_mode():
    """DUNE's get_teacher_outputs."""
    _, student, (teacher, statistics) = CASES["unic, odd"]()
    with torch.inference_mode():
        inferred = tree_map(torch.clone, teacher)
    found, expected = (
        evaluate(lambda s, t, f: unic.ours(s, t, f, p=0.0), student, (x, statistics)) for x in (inferred, teacher)
    )
    assert tree_leaves(inferred)[0].is_inference()
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("shape", [(5, 24), (3, 49, 41)])
def test_statistics_are_the_published_ones(shape):
    x = features(6)(*shape)
    for mine, theirs in zip(unic.our_statistics(x), unic.published_statistics(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)


def test_statistics_over_two_ranks(tmp_path):
    worker = """
import os, sys, importlib.util, torch
from torch import distributed
rank, folder, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
spec = importlib.util.spec_from_file_location("unic", folder + "/unic.py")
unic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unic)
distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
x = torch.randn(4, 9, 17, generator=torch.Generator().manual_seed(rank)) + 10 * rank
for mine, theirs in zip(unic.our_statistics(x), unic.published_statistics(x)):
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)
assert unic.our_statistics(x)[1].min() > 4  # of both ranks: alone, a rank has a std of 1
distributed.destroy_process_group()
os._exit(0)  # as train.py ends, for the same reason
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(rank), str(FOLDER), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-3000:]


def test_unic_reads_no_value_on_the_host():
    module, student, rest = CASES["unic, odd"]()
    with FakeTensorMode() as fake:  # tensors without values: reading one is an error
        student, rest = tree_map(fake.from_tensor, (student, rest))
        student = tree_map(lambda x: x.requires_grad_(), student)
        torch.autograd.grad(module.ours(*student, *rest), tree_leaves(student))
        with pytest.raises(DataDependentOutputException):
            module.published(*student, *rest)
    if torch.cuda.is_available():
        _, student, rest = CASES["unic, odd"]()
        student, rest = tree_map(lambda x: x.cuda(), (student, rest))
        student = tree_map(lambda x: x.requires_grad_(), student)
        module.ours(*student, *rest).backward()  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            module.ours(*student, *rest).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("side", [14, 72])  # 72²: more numbers in a channel than the kernels take for a token
def test_sak_stays_in_the_kernels_at_any_size(side, monkeypatch):
    align = importlib.import_module("kpu_fast.kernels.align")
    chosen, choose_impl = [], align.choose_impl

    def watched(impl, source, target, supported):
        chosen.append((source.shape[-1], supported()))
        return choose_impl(impl, source, target, supported=supported)

    monkeypatch.setattr(align, "choose_impl", watched)
    sak.ours(*({"a": [torch.ones(2, 24, side, side)]} for _ in range(2)))
    assert chosen == [(24, True)]


class Count(TorchDispatchMode):
    """Operators that compute something, and the numbers that they read and write."""

    def __init__(self):
        super().__init__()
        self.operators = self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace != "prim" and not function.is_view and "empty" not in function.name():
            self.operators += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            # What was expanded lies in memory once.
            self.numbers += sum(min(x.numel(), x.untyped_storage().nbytes() // x.itemsize) for x in tensors)
        return out


def count(function, student, rest, **options):
    """(operators, numbers read and written per number of the student's features), forward and backward."""
    student = tree_map(lambda x: x.requires_grad_(), student)
    with Count() as counted:
        torch.autograd.grad(function(*student, *rest, **options), tree_leaves(student))
    return counted.operators, counted.numbers / sum(x.numel() for x in tree_leaves(student))


COUNTED = [name for name in CASES if not re.search("odd|single line|projector", name)]


@pytest.mark.parametrize("case", COUNTED)
def test_ours_moves_a_quarter_or_less(case):
    module, student, rest = CASES[case]()
    theirs, ours = count(module.published, student, rest), count(module.ours, student, rest)
    print(f"{case}: {theirs[0]} operators, {theirs[1]:.1f} passes; ours {ours[0]}, {ours[1]:.1f}")
    assert ours[0] < theirs[0]
    assert 4 * ours[1] < theirs[1]


ROWS = {
    "AM-RADIO, summary and map, one grid": "radio, one grid",
    "AM-RADIO, 16² → 14²": "radio, 16² → CLIP's 14²",
    "TAO, one grid": "tao, one grid",
    "TAO, 16² → 14²": "tao, student larger",
    "UNIC, 4 teachers, cls and patches, 3 samples": "unic, four ViT-B of 14²",
    "theia, 3 teachers": "theia, CLIP-L, DINOv2-L, ViT-H",
    "SAK, 3 teachers × 4 levels, 24² → 27², 24² and 64²": "sak, its grids for 384²",
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_counts(row):
    module, student, rest = CASES[ROWS[row]]()
    options = same_draws(module, shape_of_losses(module, student))
    cells = [row]
    for function, chosen in zip((module.published, module.ours), options, strict=True):
        operators, passes = count(function, student, rest, **chosen)
        cells += [str(operators), f"{passes:.0f}" if passes >= 10 else f"{passes:.1f}".removesuffix(".0")]
    lines = (ROOT / "docs" / "swap.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(f"| {row} |")] == [f"| {' | '.join(cells)} |"]
