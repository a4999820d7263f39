"""Fake quantization with trained scales: the numbers of the affine quantizer, and its gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.quant.affine import (
    TINY,
    QParams,
    choose_qparams,
    fake_quantize,
    fake_quantize_scalar,
)
from autoquant.quant.blocks import to_blocks, to_matrix
from autoquant.quant.estimators.clipped import Clipped
from autoquant.quant.estimators.dsq import DSQ
from autoquant.quant.estimators.lsq import LSQ
from autoquant.quant.estimators.stochastic import Stochastic
from autoquant.quant.estimators.straight_through import StraightThrough
from autoquant.quant.trained import fake_quantize_trained, scale_of
from autoquant.spec.formats import FORMATS
from autoquant.spec.techniques import ESTIMATORS

EXACT = [name for name in ESTIMATORS.names() if not ESTIMATORS.get(name).draws]
exact = pytest.mark.parametrize("name", EXACT)
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])
NUMBERS = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=24
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(x: torch.Tensor, bits: int, symmetric: bool, share: float = 0.6):
    """Return log scale and parameters, a block a row, of grids that clip some of the numbers."""
    lo, hi = (end * share for end in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    p = choose_qparams(lo, hi, bits, symmetric=symmetric)
    log_scale = p.scale.log()
    return log_scale, QParams(scale_of(log_scale), p.zero_point, bits, symmetric)


def trained(x, log_scale, p, estimator, generator=None):
    zero_point = 0 if p.symmetric else p.zero_point
    return fake_quantize_trained(x, log_scale, zero_point, p.qmin, p.qmax, estimator, generator)


@exact
@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group_16"])
def test_weights_are_those_of_fake_quantize_bit_for_bit(name, symmetric, bits, granularity):
    blocks = to_blocks(to_matrix(normal(12, 8, 2, 2), 0), granularity)
    log_scale, p = parameters(blocks, bits, symmetric)
    given = blocks.requires_grad_(), log_scale.requires_grad_()
    found = trained(*given, p, ESTIMATORS.get(name)())
    assert torch.equal(found, fake_quantize(blocks, p))
    assert torch.equal(trained(blocks.detach(), log_scale.detach(), p, Clipped()), found)


@exact
@SYMMETRIC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_activations_are_those_of_fake_quantize_scalar_bit_for_bit(name, symmetric, dtype):
    x = normal(3, 5, 7).to(dtype)
    log_scale, p = parameters(x.flatten().float(), 8, symmetric)
    log_scale, zero_point = log_scale.reshape(()).requires_grad_(), int(p.zero_point)
    expected = fake_quantize_scalar(x, float(p.scale), zero_point, 8)
    for zero in (zero_point, torch.tensor(float(zero_point))):
        y = fake_quantize_trained(
            x.requires_grad_(), log_scale, zero, p.qmin, p.qmax, ESTIMATORS.get(name)()
        )
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        y.sum().backward()
        assert x.grad.dtype == dtype
        assert log_scale.grad.dtype == torch.float32


@settings(deadline=None)
@given(NUMBERS, st.integers(2, 8), st.booleans())
def test_any_numbers_are_those_of_fake_quantize(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    log_scale, p = parameters(x, bits, symmetric, 1.0)
    assert torch.equal(trained(x, log_scale, p, Clipped()), fake_quantize(x, p))


@exact
def test_tokens_and_channels_of_an_activation_have_scales_of_their_own(name):
    x = normal(2, 6, 5, 4)
    log_scale = normal(6, 1, 1, seed=1) - 1
    p = QParams(log_scale.exp(), torch.arange(6.0).reshape(6, 1, 1) - 3, 4)
    given = x.requires_grad_(), log_scale.requires_grad_()
    y = trained(*given, p, ESTIMATORS.get(name)())
    assert torch.equal(y, fake_quantize(x, p))
    y.square().sum().backward()
    assert log_scale.grad.shape == (6, 1, 1)
    for channel in range(6):
        part = x.detach()[:, channel].clone().requires_grad_()
        log = log_scale.detach()[channel].reshape(()).clone().requires_grad_()
        zero_point = float(p.zero_point[channel])
        one = fake_quantize_trained(part, log, zero_point, -8, 7, ESTIMATORS.get(name)())
        one.square().sum().backward()
        torch.testing.assert_close(part.grad, x.grad[:, channel])
        torch.testing.assert_close(log.grad, log_scale.grad[channel].reshape(()))


def test_nan_stays_and_infinity_saturates():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3])
    for name in ESTIMATORS.names():
        for generator in (None, torch.Generator().manual_seed(0)):
            y = fake_quantize_trained(
                x, torch.tensor(0.0), 0, -8, 7, ESTIMATORS.get(name)(), generator
            )
            assert y[0].isnan()
            assert y[1:3].tolist() == [7, -8]


def test_scales_never_vanish():
    assert scale_of(torch.tensor([-200.0, -math.inf, 0.0])).tolist() == [TINY, TINY, 1.0]
    x = torch.tensor([0.0, 1e-38, 1.0])
    y = fake_quantize_trained(x, torch.tensor(-1e4), 0, -8, 7, Clipped())
    assert y.isfinite().all()
    assert y[0] == 0


@SYMMETRIC
def test_the_gradient_of_numbers_is_torchs_own(symmetric):
    x = normal(6, 50)
    log_scale, p = parameters(x, 4, symmetric)
    theirs = torch.fake_quantize_per_channel_affine(
        x.requires_grad_(), p.scale.flatten(), p.zero_point.flatten().int(), 0, p.qmin, p.qmax
    )
    weight = normal(6, 50, seed=1)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), x)
    (found,) = torch.autograd.grad((trained(x, log_scale, p, Clipped()) * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@SYMMETRIC
def test_the_gradient_of_scales_is_torchs_own_learnable_one(symmetric):
    """torch._fake_quantize_learnable_per_channel_affine is LSQ+, by the scale, without a factor."""
    x = normal(6, 50)
    log_scale, p = parameters(x, 4, symmetric)
    scale = p.scale.flatten().requires_grad_()
    zero_point = p.zero_point.flatten().requires_grad_()
    theirs = torch._fake_quantize_learnable_per_channel_affine(
        x, scale, zero_point, 0, p.qmin, p.qmax, 1.0
    )
    weight = normal(6, 50, seed=1)
    (by_scale,) = torch.autograd.grad((theirs * weight).sum(), scale)
    y = trained(x, log_scale.requires_grad_(), p, Clipped())
    (found,) = torch.autograd.grad((y * weight).sum(), log_scale)
    expected = (by_scale * scale).detach()[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lsq_scales_the_gradient_of_scales_by_how_many_share_one():
    # None between an end and half a step beyond, where LSQ clips and the other does not.
    r = torch.tensor([-12.3, -8.6, -7.9, -3.2, 0.4, 6.6, 7.7, 15.1])
    log_scale = torch.tensor([[-1.0], [0.5]], requires_grad=True)
    x = r * log_scale.detach().exp()
    plain, less = (
        torch.autograd.grad(
            fake_quantize_trained(x, log_scale, 0, -8, 7, e).pow(3).sum(), log_scale
        )[0]
        for e in (Clipped(), LSQ())
    )
    torch.testing.assert_close(less, plain / math.sqrt(8 * 7))


def test_training_the_scale_makes_the_error_less():
    x = normal(4, 256)
    log_scale = torch.full((4, 1), math.log(3.0), requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=0.05)
    errors = []
    for _ in range(150):
        error = (fake_quantize_trained(x, log_scale, 0, -8, 7, Clipped()) - x).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.05 * errors[0]
    p = QParams(torch.linspace(0.1, 1, 60)[:, None, None], torch.zeros(()), 4, symmetric=True)
    best = float((fake_quantize(x.expand(60, 4, 256), p) - x).square().mean((1, 2)).min())
    assert errors[-1] < 1.1 * best


# ---- what is kept, and what is not computed


def saved(x, log_scale, zero_point, estimator, generator=None):
    """Return the tensors that wait for backward and are not the memory of ``x``."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize_trained(x, log_scale, zero_point, -8, 7, estimator, generator)
    return [t for t in kept if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_numbers_is_kept_but_themselves(dtype):
    x = normal(6, 50).to(dtype).requires_grad_()
    log_scale, zero_point = torch.zeros(6, 1, requires_grad=True), torch.ones(6, 1)
    for name in EXACT:
        assert {t.numel() for t in saved(x, log_scale, 0, ESTIMATORS.get(name)())} == {6}
        others = saved(x, log_scale, zero_point, ESTIMATORS.get(name)())
        assert [t.numel() for t in others] == [6, 6]
    assert [t.numel() for t in saved(x, log_scale, 0, Stochastic())] == [6]
    drawn = saved(x, log_scale, 0, Stochastic(), torch.Generator())
    assert [(t.numel(), t.itemsize) for t in drawn] == [(6, 4), (300, 2)]


class Counted(Clipped):
    """Counts what it is asked for."""

    calls: dict[str, int]

    def position(self, *args):
        self.calls["position"] += 1
        return super().position(*args)

    def step(self, *args):
        self.calls["step"] += 1
        return super().step(*args)


@pytest.mark.parametrize(
    ("wants", "calls"), [((True, False), (1, 0)), ((False, True), (1, 1)), ((True, True), (1, 1))]
)
def test_gradients_that_nobody_wants_are_not_computed(wants, calls):
    estimator = Counted()
    object.__setattr__(estimator, "calls", {"position": 0, "step": 0})
    x = normal(6, 50).requires_grad_(wants[0])
    log_scale = torch.zeros(6, 1, requires_grad=wants[1])
    fake_quantize_trained(x, log_scale, 0, -8, 7, estimator).sum().backward()
    assert tuple(estimator.calls.values()) == calls
    assert [t.grad is not None for t in (x, log_scale)] == list(wants)


def test_backward_is_of_the_integers_that_were_drawn():
    x, log_scale = normal(400).requires_grad_(), torch.tensor(-1.0, requires_grad=True)
    generator = torch.Generator().manual_seed(5)
    y = fake_quantize_trained(x, log_scale, 2, -8, 7, Stochastic(), generator)
    state = generator.get_state()
    y.backward(torch.ones(400))
    assert torch.equal(generator.get_state(), state)
    r = (x / log_scale.exp()).detach()
    inside = (r >= -10) & (r <= 5)
    assert torch.equal(x.grad, inside.float())
    expected = y.detach() - torch.where(inside, x.detach(), 0.0)
    torch.testing.assert_close(log_scale.grad, expected.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_the_gradient_can_be_differentiated_by_what_comes_in(name):
    """As forces are, which are gradients themselves: twice as much in is twice as much out."""
    x, log_scale = normal(6, 50).requires_grad_(), torch.full((6, 1), -1.0, requires_grad=True)
    g = normal(6, 50, seed=1).requires_grad_()
    y = fake_quantize_trained(x, log_scale, 0, -8, 7, ESTIMATORS.get(name)())
    firsts = torch.autograd.grad(y, (x, log_scale), g, create_graph=True)
    weights = normal(6, 50, seed=2), normal(6, 1, seed=3)
    total = sum((f * w).sum() for f, w in zip(firsts, weights, strict=True))
    second, *constants = torch.autograd.grad(total, (g, x, log_scale), allow_unused=True)
    assert constants == [None, None]
    # Euler: of what is homogeneous of degree 1, the derivative along g is the thing itself.
    torch.testing.assert_close((second * g).sum(), total, rtol=1e-4, atol=1e-4)
    assert second.isfinite().all()


def test_double_backward_through_a_model_of_forces_trains_it():
    w = normal(8, 3).requires_grad_()
    log_scale = torch.full((8, 1), -1.5, requires_grad=True)
    x = normal(5, 3, seed=1).requires_grad_()
    weight = fake_quantize_trained(w, log_scale, 0, -8, 7, DSQ())
    energy = torch.tanh(x @ weight.T).sum()
    (forces,) = torch.autograd.grad(energy, x, create_graph=True)
    forces.square().sum().backward()
    assert w.grad.isfinite().all()
    assert w.grad.abs().sum() > 0
    assert log_scale.grad.abs().sum() > 0


# ---- shapes and errors


@pytest.mark.parametrize("name", ESTIMATORS.names())
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_is_quantized_to_nothing(name, shape):
    x, log_scale = torch.zeros(shape).requires_grad_(), torch.zeros((), requires_grad=True)
    y = fake_quantize_trained(
        x, log_scale, 0, -8, 7, ESTIMATORS.get(name)(), torch.Generator().manual_seed(0)
    )
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert log_scale.grad == 0


def test_what_does_not_fit_is_refused():
    x, one = torch.zeros(3, 4), StraightThrough()
    with pytest.raises(ValueError, match=r"^log_scale is torch.float64, not torch.float32$"):
        fake_quantize_trained(x, torch.zeros(3, 1).double(), 0, -8, 7, one)
    for shape in [(4, 1), (1, 3, 4), (3,), (2, 3, 1)]:
        with pytest.raises(ValueError, match="do not broadcast to"):
            fake_quantize_trained(x, torch.zeros(shape), 0, -8, 7, one)
    with pytest.raises(ValueError, match=r"^zero points of \[1, 4\], scales of \[3, 1\]$"):
        fake_quantize_trained(x, torch.zeros(3, 1), torch.zeros(1, 4), -8, 7, one)


@pytest.mark.parametrize("bits", FORMATS)
def test_a_zero_point_for_all_goes_with_scales_of_each(bits):
    grid = FORMATS[bits]
    x, log_scale = normal(3, 40), torch.full((3, 1), -2.0, requires_grad=True)
    found = [
        fake_quantize_trained(x, log_scale, z, grid.qmin, grid.qmax, LSQ())
        for z in (1, torch.tensor(1.0), torch.ones(3, 1))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    grads = [torch.autograd.grad(y.square().sum(), log_scale)[0] for y in found]
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])
