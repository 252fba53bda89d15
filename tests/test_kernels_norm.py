"""kernels.norm in Triton (on the GPU, or in the interpreter) against float64 PyTorch, alone and in a
network."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from model import UNet, normed

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too slow in the interpreter")
# a rounding, which Triton's interpreter cuts off
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    kernels.use("triton")
    monkeypatch.setattr(kernels, "norm_mode", "off")
    yield
    kernels.use("auto")


def given(shape, dtype=torch.float32, seed=0, last=True):
    """x, weight, bias and y's gradient."""
    g = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=g).to(DEVICE, dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=g).to(DEVICE) for _ in range(2))
    return x.contiguous(memory_format=torch.channels_last) if last else x, weight, bias, grad


def with_gradients(f, x, weight, bias, grad):
    """y, and the gradients of x, weight and bias."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias)]
    y = f(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def float64(groups, silu, x, weight, bias, grad):
    def plain(*leaves):
        y = F.group_norm(leaves[0], groups, *leaves[1:])
        return F.silu(y) if silu else y

    return with_gradients(plain, *(v.double() for v in (x, weight, bias, grad)))


def check(shape, groups, silu, dtype, last=True, tolerance=1.0, shift=0.0):
    x, *rest = given(shape, dtype, last=last)
    x = x + shift
    found = with_gradients(lambda *a: kernels.norm(*a, groups, silu=silu), x, *rest)
    for name, one, true in zip(("y", "x", "weight", "bias"), found, float64(groups, silu, x, *rest)):
        eps = tolerance * (ROUNDING[dtype] if name in "yx" else 1e-5)
        torch.testing.assert_close(one.double(), true, rtol=eps, atol=eps * float(true.abs().max()), msg=name)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32


@pytest.mark.parametrize("shape, groups", [  # a tile has 8,192 elements, and a power of two of channels
    ((2, 6, 7, 13), 3), ((1, 12, 31, 37), 4), ((2, 64, 12, 11), 4), ((1, 24, 1, 1), 2), ((2, 5, 4, 4), 5),
    ((1, 600, 3, 5), 2), ((1, 7, 129, 1), 1),
    *[pytest.param(shape, groups, marks=gpu) for shape, groups in (((8, 64, 128, 128), 32),
                                                                   ((3, 192, 64, 64), 32),
                                                                   ((2, 48, 1000, 1000), 8))]])
@pytest.mark.parametrize("silu", [True, False])
def test_norm_and_gradients(shape, groups, silu):
    check(shape, groups, silu, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("silu", [True, False])
def test_norm_of_16_bits_rounds_once(dtype, silu):
    check((2, 24, 7, 13), 4, silu, dtype)


def test_norm_of_another_layout_is_the_same():
    check((2, 6, 7, 13), 3, True, torch.float32, last=False)
    assert kernels.norm(*given((2, 6, 4, 5), last=False)[:3], 3).is_contiguous(
        memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_mean_far_from_zero():
    """1,000 standard deviations away, where float32 numbers round to 6e-5; E[x^2] - E[x]^2 would be off by a
    tenth."""
    check((2, 8, 40, 40), 2, True, torch.float32, tolerance=100, shift=1000.0)


def test_one_number_that_outweighs_all_others():
    """The first, about which a variance would cancel to 4 digits. The interpreter adds in a row: 1e-5."""
    x, weight, bias, _ = given((1, 8, 40, 40))
    x[0, 0, 0, 0] = 1e6
    y = kernels.norm(x, weight, bias, 2, silu=False)
    true = F.group_norm(x.double(), 2, weight.double(), bias.double())
    torch.testing.assert_close(y.double(), true, rtol=5e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes_of_silu():
    """Where e^-z overflows float32, and a group that is constant."""
    x, weight, bias, grad = given((2, 4, 6, 6))
    x[1] = 3.0
    for scale in 1e3, 1e30:
        found = with_gradients(lambda *a: kernels.norm(*a, 2), x, scale * weight, bias, grad)
        true = float64(2, True, x, scale * weight, bias, grad)
        assert all(v.isfinite().all() for v in found[:1])
        torch.testing.assert_close(found[0].double(), true[0], rtol=1e-5, atol=1e-5 * scale)


def test_norm_gives_the_same_bits_twice_and_for_every_batch():
    x, weight, bias, grad = given((3, 6, 40, 40))
    first, second = (with_gradients(lambda *a: kernels.norm(*a, 3), x, weight, bias, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = with_gradients(lambda *a: kernels.norm(*a, 3), x[2:], weight, bias, grad[2:])
    assert torch.equal(first[0][2:], alone[0]) and torch.equal(first[1][2:], alone[1])


def test_weights_in_16_bits_get_gradients_in_16_bits():
    x, weight, bias, grad = given((2, 6, 7, 13), torch.float16)
    found = with_gradients(lambda *a: kernels.norm(*a, 3), x, weight.half(), bias.half(), grad)
    assert {v.dtype for v in found} == {torch.float16}
    for one, true in zip(found, float64(3, True, x, weight.half(), bias.half(), grad)):
        torch.testing.assert_close(one.double(), true, rtol=2e-3, atol=2e-3 * float(true.abs().max()))


@pytest.mark.parametrize("change, message", [
    (dict(groups=4), "groups must divide the 6 channels, not be 4"),
    (dict(groups=0), "groups must divide the 6 channels, not be 0"),
    (dict(x=torch.zeros(2, 6, 4)), r"x must be \(B, C, H, W\), not empty.*; not \(2, 6, 4\) in float32"),
    (dict(x=torch.zeros(2, 6, 4, 4).double()), "float16 or bfloat16; not .* in float64"),
    (dict(weight=torch.ones(5)), r"weight must have shape \(6,\), not \(5,\)"),
    (dict(weight=None), r"weight and bias must be \(6,\)"),
    (dict(bias=torch.ones(6).long()), "bias must be float32 or float16 or bfloat16, not int64")])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.norm(**dict(x=torch.zeros(2, 6, 4, 4), weight=torch.ones(6), bias=torch.ones(6), groups=3)
                     | change)


def test_operators_are_registered_properly():
    x, weight, bias, _ = given((2, 6, 4, 5), torch.float16)
    stats = torch.rand(2, 2, 3, device=DEVICE)
    check = lambda op, *args: torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    check(kernels._norm.norm_forward, x, weight, bias, 3, 1e-5, True)
    check(kernels._norm.norm_backward, torch.rand_like(x), x, stats, weight, bias, True)


# ------------------------------------------------------------------------------------------------------------
# In a network


def test_a_network_is_the_same_with_it(monkeypatch):
    """Every kind of layer, none of them zero; and every GroupNorm goes through the kernel."""
    torch.manual_seed(0)
    net = UNet(12 + 4, 4, 8, (1,), 1, 1, 2, patch=2, groups=2, position=1, detail=2, finer=4).to(DEVICE)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, t = torch.randn(1, 16, 4, 6, device=DEVICE), torch.rand(1, device=DEVICE)
    calls, real = [], kernels.norm

    def run():
        out = net(x, t)
        return out.detach(), *torch.autograd.grad(out.square().mean(), list(net.parameters()))

    plain = run()
    monkeypatch.setattr(kernels, "norm_mode", "on")
    monkeypatch.setattr(kernels, "norm", lambda *a: calls.append(id(a[1])) or real(*a))
    for one, other in zip(run(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    assert sorted(calls) == sorted(id(m.weight) for m in net.modules() if isinstance(m, torch.nn.GroupNorm))


def test_compiled_it_is_one_graph_that_obeys_the_switch(monkeypatch):
    norm, launched, real = torch.nn.GroupNorm(2, 4).to(DEVICE), [], kernels._norm.tiles
    monkeypatch.setattr(kernels._norm, "tiles", lambda x: launched.append(1) or real(x))
    x = given((2, 4, 3, 5))[0].requires_grad_()
    fast = torch.compile(lambda x: normed(norm, x), fullgraph=True,
                         backend="aot_eager" if DEVICE == "cpu" else "inductor")
    for mode, count in ("off", 0), ("on", 2), ("off", 2):
        monkeypatch.setattr(kernels, "norm_mode", mode)
        y, plain = fast(x), F.silu(F.group_norm(x, 2))
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (y, plain)),
                                   rtol=1e-4, atol=1e-4)
        assert len(launched) == count


def test_the_switch_is_on_or_off_and_needs_triton(monkeypatch):
    for mode, live, expected in (("off", "triton", False), ("on", "triton", True), ("on", "torch", False)):
        monkeypatch.setattr(kernels, "norm_mode", mode)
        kernels.use(live)
        assert kernels.norms(DEVICE) == expected
    monkeypatch.setattr(kernels, "norm_mode", "1")  # as read from the environment
    with pytest.raises(ValueError, match="BITSEG_NORM is on or off, not '1'"):
        kernels.live(DEVICE)


@gpu
def test_offsets_beyond_2_to_the_31():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    B = 2**31 // (64 * 512 * 512) + 2  # the last sample lies beyond 2^31
    x = torch.empty(B, 64, 512, 512, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last)
    x.normal_()
    _, weight, bias, _ = given((1, 64, 1, 1))
    y, dx, _, _ = with_gradients(lambda *a: kernels.norm(*a, 32), x, weight, bias, x)
    last = with_gradients(lambda *a: kernels.norm(*a, 32), x[-1:], weight, bias, x[-1:])
    assert torch.equal(y[-1:], last[0]) and torch.equal(dx[-1:], last[1])
