"""bench/step.py: the batches it makes, and what it counts, also where torch's own counter would see nothing."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kpu_fast.machine import device_name


@pytest.fixture
def step():
    for library in ("deepspeed", "pydantic", "nvidia.dali", "transformers"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    return importlib.import_module("step")


@pytest.fixture
def flop_counter(step):
    return step.flop_counter


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_whatever_computes_it(flop_counter, backend):
    q = torch.randn(2, 4, 64, 16, requires_grad=True)
    k = torch.randn(2, 4, 48, 16, requires_grad=True)
    product = 2 * (2 * 4 * 64 * 48 * 16)  # q·kᵀ, and as much for each of the others
    with sdpa_kernel(backend), flop_counter() as counter:
        out = F.scaled_dot_product_attention(q, k, k)
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        out.sum().backward()
    # two for each product of the forward; the fused kernel computes q·kᵀ once more
    assert counter.get_total_flops() == (4 if backend == SDPBackend.MATH else 5) * product


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_count_their_groups(flop_counter, groups):
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight = torch.randn(8, 8 // groups, 3, 3, requires_grad=True)
    product = 2 * (2 * 8 * 6 * 6) * (8 // groups * 9)
    with flop_counter() as counter:
        out = F.conv2d(x, weight, padding=1, groups=groups)
    assert counter.get_total_flops() == product
    with flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * product  # to the input and to the weight


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_random_batches_are_as_the_stream_gives_them(step, fit):
    """bench/step.py --images random: endless, two in turn, float32 in [0, 1], padded where images are."""
    data = SimpleNamespace(batch_size=3, size=(16, 32), fit=fit)
    first, second, third = itertools.islice(step._random_batches(data, torch.device("cpu")), 3)
    assert first.images.shape == (3, 3, 16, 32)
    assert first.images.dtype == torch.float32
    assert 0 <= first.images.min() < first.images.max() <= 1
    assert not torch.equal(first.images, second.images)
    assert third.images is first.images
    if fit == "crop":
        assert first.valid is None
    else:
        assert first.valid.shape == (3, 16, 32)
        assert first.valid[..., :28].all()
        assert not first.valid[..., 28:].any()


class Issued:
    """Whatever is called of it is noted in `done` under its dotted name."""

    def __init__(self, name, done):
        self.name, self.done = name, done

    def __getattr__(self, name):
        return Issued(f"{self.name}.{name}", self.done)

    def __call__(self, *_):
        self.done.append(self.name)
        return self


@pytest.mark.parametrize("famo", [False, True])
def test_each_part_is_marked_when_it_has_been_issued(step, monkeypatch, famo):
    from kpu_fast.engine import loop

    done = []
    engine, teacher, balance = (Issued(name, done) for name in ("engine", "teacher", "balance"))
    engine.gradient_accumulation_steps = lambda: 2
    monkeypatch.setattr(loop, "forward", lambda *_: done.append("forward") or {})
    monkeypatch.setattr(loop, "FAMO", Issued)
    parts = SimpleNamespace(engine=engine, teachers={"clip": teacher}, streams={"clip": ["clip"]})
    parts.balance = balance if famo else None
    stream = iter([SimpleNamespace(images=None)] * 2)
    step._step(parts, {"clip": stream}, lambda part: done.append([part]))
    expected = [
        ["data"], "teacher", ["teachers"], "forward", *["engine.module.losses", "balance.shares"] * famo,
        "engine.module.total", ["student and losses"], "engine.backward", ["backward"],
        "engine.is_gradient_accumulation_boundary", "engine.step",
        *["forward", "engine.module.losses", "balance.learn"] * famo, "engine.module.after_step", ["optimizer"],
        "engine.module.total.detach",
    ]  # fmt: skip
    assert done == 2 * expected
    assert [entry[0] for entry in expected if isinstance(entry, list)] == list(step.PARTS)


def test_the_time_of_each_part_is_the_median_over_steps_of_all_its_backwards(step, monkeypatch):
    clock, taken = [0.0], []

    def train_step(parts, batches, mark):
        taken.append(batches["clip"])
        for seconds, part in zip((1, 2, 4, 8), step.PARTS[1:], strict=True):
            clock[0] += seconds * (100 if taken[-1] >= 4 else 1)  # the third step is slow
            mark(part)

    def images():
        for number in itertools.count():
            clock[0] += 0.25
            yield number

    monkeypatch.setattr(step, "train_step", train_step)
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    parts = SimpleNamespace(engine=SimpleNamespace(gradient_accumulation_steps=lambda: 2))
    world = step.World(0, 1, torch.device("cpu"), 0, None)
    found = step._time_parts(world, parts, {"clip": images()}, 3)
    assert found == dict(zip(step.PARTS, (0.5, 2, 4, 8, 16), strict=True))
    assert taken == list(range(6))


def test_a_step_has_all_its_backwards(step, monkeypatch):
    seen = []
    monkeypatch.setattr(step, "train_step", lambda _, batches, mark: seen.append(batches))
    parts = SimpleNamespace(engine=SimpleNamespace(gradient_accumulation_steps=lambda: 3))
    step._step(parts, {"clip": iter(range(9))})
    assert seen == [{"clip": 0}, {"clip": 1}, {"clip": 2}]


def test_images_of_all_ranks_are_counted(step, monkeypatch, tmp_path):
    world = step.World(0, 4, torch.device("cpu"), 0, None)
    monkeypatch.setattr(step, "init_distributed", lambda: world)
    monkeypatch.setattr(step, "build", lambda *_, **__: None)
    seen = []
    monkeypatch.setattr(step, "_step", lambda _, streams: seen.append(list(streams)))
    monkeypatch.setattr(step, "_time_whole", lambda *_: 0.5)
    monkeypatch.setattr(step, "_time_parts", lambda *_: dict.fromkeys(step.PARTS, 1.0))
    monkeypatch.setattr(step, "_count_flop", lambda *_: 0)
    config = Path(__file__).resolve().parents[2] / "configs/random.json"
    command = ["step.py", "--config", str(config), "--images", "random", "--out", str(tmp_path)]
    monkeypatch.setattr(
        "sys.argv", [*command, "--set", "gradient_accumulation_steps=2", "teachers.dinov2.images_of=clip"]
    )
    assert step.main() == 0
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert seen[0] == ["clip", "gdino"]
    of_a_rank = sum(result["config"]["teachers"][name]["data"]["batch_size"] for name in seen[0])
    assert result["images_per_second"] == 4 * 2 * of_a_rank / 0.5
    assert (result["ranks"], result["images"], result["device"]) == (4, "random", device_name(world.device))
