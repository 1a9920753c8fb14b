import functools
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from kpu_fast.models import attention as module
from kpu_fast.models.attention import BACKENDS, BackendError, activate_backend, attention, check_backend, describe


@pytest.fixture(autouse=True)
def _forget_what_was_activated():
    yield
    module.activate_backend.cache_clear()
    module._flash_attn_func = None


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with a GPU of some compute capability and some packages."""

    def pretend(capability, packages=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended GPU")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)  # a CUDA build would look at every GPU
        monkeypatch.setattr(module, "_importable", lambda name: name in packages)

    return pretend


def softmax_attention(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def qkv(dtype, *, n=7, m=19):
    """Strided views as the modules make them, with more keys than queries."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, n, 3, 8, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, m, 2, 3, 8, generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    return 3 * q, k, v


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_softmax_in_float64(backend, dtype, tolerance):
    q, k, v = qkv(dtype)
    out = attention(q, k, v, backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), softmax_attention(q, k, v), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_bf16_gradients_equal_those_of_softmax_in_float64(backend):
    tensors = [x.requires_grad_() for x in qkv(torch.bfloat16)]
    upstream = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(1))
    out = attention(*tensors, backend=backend)
    found = torch.autograd.grad(out, tensors, upstream.bfloat16())
    torch.testing.assert_close(out.double(), softmax_attention(*tensors), rtol=2e-2, atol=2e-2)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(softmax_attention(*exact), exact, upstream.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize(
    ("backend", "gradient", "compiled", "plain"),
    [
        ("auto", True, False, True),
        ("auto", False, False, False),
        ("sdpa", True, False, False),
        ("auto", True, True, False),
    ],
)
def test_who_takes_plain_products(backend, gradient, compiled, plain, monkeypatch):
    taken, products = [], module._products
    monkeypatch.setattr(module, "_products", lambda *tensors: taken.append(1) or products(*tensors))
    activate_backend(backend)
    call = functools.partial(attention, backend=backend)
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="eager")
    call(*[x.requires_grad_(gradient) for x in qkv(torch.bfloat16)])
    assert bool(taken) == plain


def test_plain_products_only_where_they_were_measured_to_be_faster(monkeypatch):
    q, k, v = qkv(torch.bfloat16)
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    choose = module._products_are_faster
    assert choose(q, wanted[1], v)
    assert choose(q, k, wanted[2])
    assert not choose(q, k, v)  # forward alone
    with torch.no_grad():
        assert not choose(*wanted)
    assert not choose(*[x.detach().float().requires_grad_() for x in wanted])
    assert not choose(*[x.detach().to("meta").requires_grad_() for x in wanted])
    monkeypatch.setattr(module, "_SCORES", q.shape[:-1].numel() * k.shape[-2] - 1)
    assert not choose(*wanted)  # they would not fit


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'flash' is unknown; choose one of auto, sdpa, cudnn, fa2, fa3, fa4"):
        check_backend("flash")
    with pytest.raises(ValueError, match="unknown"):
        attention(*qkv(torch.float32), backend="flash")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "sdpa")])
def test_without_a_gpu_nothing_else_is_taken_instead(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (check_backend, activate_backend, describe):
        with pytest.raises(BackendError, match=f"'{backend}' needs a CUDA device"):
            call(backend)
    with pytest.raises(BackendError, match="needs a CUDA device"):
        attention(*qkv(torch.bfloat16), backend=backend)


@pytest.mark.parametrize(
    ("backend", "capability", "packages", "message"),
    [
        ("cudnn", (7, 5), (), "compute capability 8.0"),
        ("fa2", (7, 5), (), "compute capability 8.0"),
        ("fa3", (8, 0), (), r"compute capability 9.x; found 8.0"),
        ("fa3", (10, 0), ("flash_attn_interface",), r"compute capability 9.x; found 10.0"),
        ("fa3", (9, 0), (), "needs the module flash_attn_interface"),
        ("fa4", (8, 9), ("flash_attn.cute.interface",), r"compute capability 9.x or 10.x; found 8.9"),
        ("fa4", (9, 0), ("flash_attn_interface",), r"pip install --pre 'flash-attn-4\[cu13\]<4"),
    ],
)
def test_the_error_says_what_is_missing(machine, backend, capability, packages, message):
    machine(capability, packages)
    with pytest.raises(BackendError, match=message):
        check_backend(backend)


def test_an_old_cudnn_is_refused(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for version, usable in ((91500, False), (91501, True)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        with nullcontext() if usable else pytest.raises(BackendError, match=r"needs cuDNN 91501.* cuDNN 91500"):
            assert "cuDNN 91501" in describe("cudnn")


def test_fa3_and_fa4_are_activated_once_and_never_both(machine, monkeypatch):
    machine((9, 0), ("flash_attn_interface", "flash_attn.cute.interface"))
    activated = []
    monkeypatch.setattr(module, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(module, "current_flash_attention_impl", lambda: activated[-1] if activated else None)
    tried = []
    monkeypatch.setattr(module, "_try_out", lambda *what: tried.append(what))
    check_backend("fa4")
    assert activated == []  # a check changes nothing
    activate_backend("fa4")
    module.activate_backend.cache_clear()
    activate_backend("fa4")
    assert activated == ["FA4"]
    assert tried == [("fa4", "cuda")]
    with pytest.raises(BackendError, match="FA4 is already active"):
        activate_backend("fa3")
    assert "FlashAttention 4" in describe("fa4")
    assert "with FA4 as its flash kernel" in describe("auto")


def test_a_package_that_does_not_fit_torch_is_told(monkeypatch):
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            module._try_out("fa4", "cpu")
    returned = (1, 2, 3, 4, 5)  # as newer ones do

    def call(*_):
        out, lse = returned
        return out, lse

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", call)
    with pytest.raises(BackendError, match=r"'fa4' fails here \(ValueError: too many values.*\[cu13\]<4\.0\.0b19'"):
        module._try_out("fa4", "cpu")


def test_a_package_that_does_not_fit_is_refused_each_time(machine, monkeypatch):
    machine((9, 0), ("flash_attn.cute.interface",))
    active = []
    monkeypatch.setattr(module, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(module, "restore_flash_attention_impl", active.clear)
    monkeypatch.setattr(module, "current_flash_attention_impl", lambda: active[-1] if active else None)
    for _ in range(2):  # there is no GPU to try it on
        with monkeypatch.context() as patch:
            patch.setattr(module.F, "scaled_dot_product_attention", lambda *_: 1 / 0)
            with pytest.raises(BackendError, match="'fa4' fails here"):
                activate_backend("fa4")
        assert active == []


def test_fa2_gets_its_own_layout_and_gives_ours_back(machine, monkeypatch):
    machine((8, 0))

    def flash_attn_func(q, k, v):  # (B, N, heads, d), as the package documents
        out = softmax_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).to(q.dtype)

    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    with pytest.raises(
        BackendError, match=r"flash_attn\.flash_attn_func, absent"
    ):  # flash-attn-4 alone looks like this
        check_backend("fa2")
    package.flash_attn_func = flash_attn_func
    q, k, v = qkv(torch.bfloat16)
    out = attention(q, k, v, backend="fa2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch.compile would go and look
    call = torch.compile(functools.partial(attention, backend="fa2"), backend="eager", fullgraph=True)
    assert torch.equal(call(q, k, v), out)
    torch.testing.assert_close(out.double(), softmax_attention(q, k, v), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match=r"float16 or bfloat16, got torch\.float32"):
        attention(*qkv(torch.float32), backend="fa2")


def test_fa2_names_the_missing_package(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(BackendError, match="'fa2' needs the package flash_attn"):
        check_backend("fa2")


def test_describe_names_the_torch_in_use():
    assert describe("auto").startswith("auto: F.scaled_dot_product_attention")
    assert torch.__version__ in describe("sdpa")


def test_a_missing_parent_package_is_not_importable():
    assert not module._importable("no_such_package_at_all.cute.interface")
    assert module._importable("torch.nn.attention")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["cudnn", "fa2", "fa3", "fa4"])
def test_kernels_on_the_gpu_equal_softmax(backend):
    try:
        check_backend(backend)
    except BackendError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    # 401 keys: not a multiple of any tile.
    q, k, v = (torch.randn(2, 6, n, 64, generator=generator).bfloat16().cuda() for n in (130, 401, 401))
    out = attention(q, k, v, backend=backend)
    torch.testing.assert_close(out.double(), softmax_attention(q, k, v), rtol=2e-2, atol=2e-2)
