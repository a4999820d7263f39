"""ReLUs that follow a layer become part of it, and only those that nothing else depends on."""

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.kernels.engine import make_engine
from autoquant.methods.realize import Realizer
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import deploy, prepare
from autoquant.nn.follow import FollowingReLU, FollowingReLU6
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

CPU = torch.device("cpu")
INT8 = SiteRecipe(WeightScheme(8), ActivationScheme(8))
torch.manual_seed(0)
X = torch.randn(4, 3, 9, 9)


class Net(nn.Module):
    """Convolutions with and without ReLUs behind them; ``forward`` is the case."""

    def __init__(self, case, inplace=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.relu, self.relu6 = nn.ReLU(inplace), nn.ReLU6(inplace)
        self.case = case

    def forward(self, x):
        return self.case(self, x)


def plain(m, x):
    return m.relu6(m.b(m.relu(m.a(x))))


def residual_before(m, x):
    y = m.a(x)
    return m.relu(y) + m.b(y)


def functional(m, x):
    return F.relu(m.b(F.relu(m.a(x))))


def twice(m, x):
    y = m.relu(m.a(x))
    return m.b(m.b(y)).sum() + m.relu6(m.b(y))


def shape_read(m, x):
    y = m.a(x)
    return m.relu(y).view(y.shape[0], -1)


def made(case, inplace=False):
    torch.manual_seed(1)
    model = Net(case, inplace).eval()
    expected = model(X)
    prepared = prepare(model, lambda m: m(X), engine=make_engine(CPU))
    return prepared, expected


def clamps(prepared):
    return {n: vars(m).get("clamp") for n, m in prepared.model.named_modules() if n in ("a", "b")}


def test_relus_are_computed_with_their_layers_and_the_numbers_stay():
    for inplace in (False, True):
        prepared, expected = made(plain, inplace)
        assert clamps(prepared) == {"a": (0.0, float("inf")), "b": (0.0, 6.0)}
        assert isinstance(prepared.model.relu, FollowingReLU)
        assert isinstance(prepared.model.relu6, FollowingReLU6)
        with torch.no_grad():
            assert torch.equal(prepared.model(X), expected)
            realizer = Realizer(prepared, calibrate(prepared, [X], lambda m, x: m(x)))
            realizer.apply({"a": INT8, "b": INT8})
            fast = prepared.model(X)
            assert set(prepared.engine.shares()) >= {"int8"}
            with prepared.engine.reference():
                torch.testing.assert_close(prepared.model(X), fast, rtol=1e-4, atol=1e-2)
            # A relu that gets what no layer has clamped still clamps it.
            assert torch.equal(prepared.model.relu(X), X.relu())


def test_a_relu_stays_alone_where_something_else_sees_what_lies_between():
    for case in (residual_before, functional):
        prepared, expected = made(case)
        assert clamps(prepared) == {"a": None, "b": None}
        assert torch.equal(prepared.model(X), expected)


def test_a_layer_that_is_not_always_followed_is_left_alone():
    prepared, expected = made(twice)
    assert clamps(prepared) == {"a": (0.0, float("inf")), "b": None}
    assert torch.equal(prepared.model(X), expected)


def test_reading_the_shape_is_no_use_of_the_numbers():
    prepared, expected = made(shape_read)
    assert clamps(prepared)["a"] == (0.0, float("inf"))
    assert torch.equal(prepared.model(X), expected)


def test_a_relu_with_hooks_and_the_reference_engine_are_left_alone():
    model = Net(plain).eval()
    model.relu.register_forward_hook(lambda *_: None)
    prepared = prepare(model, lambda m: m(X), engine=make_engine(CPU))
    assert clamps(prepared) == {"a": None, "b": (0.0, 6.0)}
    prepared = prepare(Net(plain).eval(), lambda m: m(X))
    assert clamps(prepared) == {"a": None, "b": None}
    assert type(prepared.model.relu) is nn.ReLU


def test_a_saved_model_has_its_own_relus_again():
    prepared, expected = made(plain)
    model = deploy(prepared, {})
    assert type(model.relu) is nn.ReLU
    assert type(model.relu6) is nn.ReLU6
    assert "clamp" not in vars(model.a)
    assert torch.equal(model(X), expected)
    assert isinstance(prepared.model.relu, FollowingReLU)  # the prepared one goes on as it was
