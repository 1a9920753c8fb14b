"""bench/step.py: the batches it makes, and what it counts, also where torch's own counter would see nothing."""

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture
def step(monkeypatch):
    for library in ("deepspeed", "pydantic", "nvidia.dali", "transformers"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    file = Path(__file__).resolve().parents[2] / "bench/step.py"
    monkeypatch.syspath_prepend(file.parent)
    spec = importlib.util.spec_from_file_location("bench_step", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
