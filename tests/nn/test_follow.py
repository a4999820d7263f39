"""ReLUs that follow a layer become part of it, and only those that nothing else depends on.

So do layers that alone read one: they are handed the integers that they would have made.
"""

from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from autoquant.kernels.engine import make_engine
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import deploy, prepare
from autoquant.nn.converted import converted_of
from autoquant.nn.layer_output import LayerOutput
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.kernels.cases import MOST_BITS

CPU = torch.device("cpu")
INT8 = SiteRecipe(WeightScheme(MOST_BITS), ActivationScheme(8))
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


def after(prepared):
    return {n: converted_of(getattr(prepared.model, n)).after for n in ("a", "b")}


RELU, RELU6 = (0.0, inf), (0.0, 6.0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", [plain, functional])
def test_relus_are_computed_with_their_layers_and_the_numbers_stay(case, inplace):
    prepared, expected = made(case, inplace)
    assert after(prepared) == {"a": RELU, "b": RELU6 if case is plain else RELU}
    model = prepared.model
    with torch.no_grad():
        assert torch.equal(model(X), expected)
        applier = Applier(prepared, calibrate(prepared, [X], lambda m, x: m(x)))
        applier.apply({"a": INT8, "b": INT8})
        given = []
        model.b.register_forward_hook(lambda *call: given.append(call[2]))
        fast = model(X)
        assert set(prepared.engine.shares()) >= {"int8"}
        assert type(given[0]) is LayerOutput
        assert not given[0].seen or inplace
        with prepared.engine.reference():
            torch.testing.assert_close(model(X), fast, rtol=1e-4, atol=1e-2)


def test_a_relu_stays_alone_where_something_else_sees_what_lies_between():
    prepared, expected = made(residual_before)
    assert after(prepared) == {"a": None, "b": None}
    assert torch.equal(prepared.model(X), expected)


def test_a_layer_that_is_not_always_followed_is_left_alone():
    prepared, expected = made(twice)
    assert after(prepared) == {"a": RELU, "b": None}
    assert torch.equal(prepared.model(X), expected)


def test_reading_the_shape_is_no_use_of_the_numbers():
    prepared, expected = made(shape_read)
    assert after(prepared)["a"] == RELU
    assert torch.equal(prepared.model(X), expected)


def test_layers_with_hooks_and_the_reference_engine_are_left_alone():
    model = Net(plain).eval()
    model.a.register_forward_hook(lambda *_: None)
    prepared = prepare(model, lambda m: m(X), engine=make_engine(CPU))
    assert after(prepared) == {"a": None, "b": RELU6}
    prepared = prepare(Net(plain).eval(), lambda m: m(X))
    assert after(prepared) == {"a": None, "b": None}


class Twice(nn.Module):
    """One layer at two places: one is a module with a ReLU behind, one a function without."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.last = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.fc.forward(self.relu(self.fc(x))))


class Switched(nn.Module):
    """What follows the layer, and whether anything does, is said by an argument."""

    def __init__(self, inplace=False):
        super().__init__()
        self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.acts = nn.ModuleDict({"relu": nn.ReLU(inplace), "relu6": nn.ReLU6(inplace)})
        self.acts["gelu"], self.acts["none"] = nn.GELU(), nn.Identity()
        self.acts["tanh"], self.acts["leaky"] = nn.Tanh(), nn.LeakyReLU(0.1, inplace)

    def forward(self, x, act="relu", raw=False):
        y = self.fc(x)
        z = self.acts[act](y)
        return (self.last(z), y) if raw else self.last(z)


class Hooked(nn.Module):
    """A hook that comes after the preparation sees, or changes, what a layer gives."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.last = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.relu(self.fc(x)))


def exact_and_fast(model, recipes=INT8, x=None, watch=lambda m: m(DATA), then=None):
    """Return what ``then`` gives of the fast candidate, and of the reference one."""
    prepared = prepare(model.eval(), watch, engine=make_engine(CPU))
    applier = Applier(prepared, calibrate(prepared, [DATA], lambda m, _: watch(m)))
    applier.apply({s.name: recipes for s in prepared.sites})
    with torch.no_grad():
        fast = then(model)
        with prepared.engine.reference():
            return then(model), fast


DATA = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))


def close(exact, fast):
    """Numbers next to the middle between two integers may go to either, and few are."""
    for a, b in zip(pytree.tree_leaves(exact), pytree.tree_leaves(fast), strict=True):
        far = (a - b).abs() > 1e-4 * a.abs().max()
        assert far.float().mean() < 0.02
        assert (a - b).abs().max() < 0.05 * a.abs().max()


def test_a_layer_that_is_called_and_whose_forward_is_called_has_the_relu_once():
    torch.manual_seed(0)
    close(*exact_and_fast(Twice(), then=lambda m: m(DATA)))


@pytest.mark.parametrize("first", ["relu", "relu6", "gelu", "none"])
@pytest.mark.parametrize("later", ["relu", "relu6", "gelu", "none", "tanh", "leaky"])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_follows_may_differ_from_batch_to_batch(first, later, raw, inplace):
    torch.manual_seed(0)
    close(
        *exact_and_fast(
            Switched(inplace),
            watch=lambda m: m(DATA, first),
            then=lambda m: (m(DATA, later, raw), m(DATA, first), m(DATA, first, raw)),
        )
    )


@pytest.mark.parametrize("place", ["fc", "relu", "last"])
def test_hooks_see_and_change_what_the_module_gives(place):
    seen = []

    def then(model):
        module = getattr(model, place)
        handles = [
            module.register_forward_hook(lambda *call: seen.append(call[2] * 1)),
            module.register_forward_hook(lambda *call: call[2] * 3 - 1),
            module.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,)),
        ]
        found = model(DATA)
        for handle in handles:
            handle.remove()
        return found, seen[-1]

    torch.manual_seed(0)
    close(*exact_and_fast(Hooked(), then=then))
    assert (seen[0] < 0).any() == (place != "relu")


def readers(prepared):
    found = {n: converted_of(getattr(prepared.model, n)).reader for n in ("a", "b")}
    return {n: None if reader is None else reader.path for n, reader in found.items()}


def integers(x):
    return isinstance(x, LayerOutput) and x.integers(x.reader) is not None


def straight(m, x):
    return m.b(m.a(x))


def added(m, x):
    y = m.relu(m.a(x))
    return m.b(y) + y


def added_before(m, x):
    y = m.relu(m.a(x))
    return y + m.b(y)


def padded(m, x):
    return m.b(F.pad(m.relu(m.a(x)), (1, 1)))


def both(m, x):
    y = m.relu(m.a(x))
    return m.b(y) + m.b(y)


def before_and_after(m, x):
    y = m.a(x)
    return m.b(m.relu(y)) + y.mean()


def shape_asked(m, x):
    y = m.relu(m.a(x))
    return m.b(y).view(y.shape[0], -1)


def changing(m, x):
    """Another reader than in the run that was watched."""
    y = m.relu(m.a(x))
    return m.b(y) if len(x) == len(X) else m.b(y) + y


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("case", "reader"),
    [
        (plain, "b"),
        (straight, "b"),
        (shape_asked, "b"),
        (changing, "b"),
        (added, None),
        (added_before, None),
        (padded, None),
        (both, None),
        (twice, None),
        (residual_before, None),
        (before_and_after, None),
    ],
)
def test_a_layer_that_alone_reads_another_is_handed_integers(case, reader, inplace):
    if inplace and case is before_and_after:
        return  # what is read after the ReLU wrote into it is what the ReLU gave
    prepared, expected = made(case, inplace)
    assert readers(prepared) == {"a": reader, "b": None}
    model = prepared.model
    with torch.no_grad():
        assert torch.equal(model(X), expected)
        applier = Applier(prepared, calibrate(prepared, [X], lambda m, x: m(x)))
        applier.apply({"a": INT8, "b": INT8})
        handed = []
        hook = model.b.register_forward_pre_hook(lambda _, args: handed.append(integers(args[0])))
        for x in (X, X[:2]):
            fast = model(x)
            with prepared.engine.reference():
                exact = model(x)
            # A number next to the middle between two integers may go to either.
            far = (fast - exact).abs() > 1e-4 * exact.abs().max()
            assert far.float().mean() < 0.01
        hook.remove()
    assert any(handed) == (reader is not None)


def test_integers_are_handed_on_only_to_who_takes_them():
    prepared, _ = made(plain)
    model = prepared.model
    handed = []
    model.b.register_forward_pre_hook(lambda _, args: handed.append(args[0]))
    applier = Applier(prepared, calibrate(prepared, [X], lambda m, x: m(x)))
    wide, per_token = ActivationScheme(8), ActivationScheme(8, "per_token")
    with torch.no_grad():
        for site in (
            SiteRecipe(),
            SiteRecipe(WeightScheme(4)),
            SiteRecipe(None, wide),
            SiteRecipe(WeightScheme(MOST_BITS), per_token),
        ):
            applier.apply({"a": INT8, "b": site})
            model(X)
            applier.apply({"a": site, "b": INT8})
            model(X)
        assert LayerOutput not in set(map(type, handed[::2]))
        with prepared.engine.reference():
            applier.apply({"a": INT8, "b": INT8})
            model(X)
    # A layer whose scales follow from each token hands on nothing, nor does one of float.
    assert LayerOutput not in set(map(type, handed))


def test_what_is_written_into_a_handed_output_reaches_its_reader():
    def case(m, x):
        y = m.a(x)
        if m.writes:
            y.mul_(2.0)
        return m.b(y)

    torch.manual_seed(1)
    model = Net(case).eval()
    model.writes = False
    prepared = prepare(model, lambda m: m(X), engine=make_engine(CPU))
    assert readers(prepared)["a"] == "b"
    model.writes = True
    applier = Applier(prepared, calibrate(prepared, [X], lambda m, x: m(x)))
    with torch.no_grad():
        applier.apply({"a": INT8, "b": INT8})
        fast = model(X)
        with prepared.engine.reference():
            exact = model(X)
    far = (fast - exact).abs() > 1e-4 * exact.abs().max()
    assert far.float().mean() < 0.01


def test_a_saved_model_hands_on_nothing():
    prepared, _ = made(plain)
    assert "_autoquant" not in vars(deploy(prepared, {}).a)
    assert readers(prepared)["a"] == "b"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_code_may_take_the_views_that_the_float_model_allows(memory_format):
    def case(m, x):
        y = m.relu(m.a(x))
        m.strides = [y.stride(), y.is_contiguous(), y.is_contiguous(memory_format=memory_format)]
        return m.b(y).permute(0, 2, 3, 1).view(-1) if last else m.b(y).view(len(x), -1)

    last = memory_format is torch.channels_last
    torch.manual_seed(1)
    model = Net(case).eval()
    x = X.to(memory_format=memory_format)
    shape, strides = model(x).shape, model.strides
    prepared = prepare(model, lambda m: m(x), engine=make_engine(CPU))
    applier = Applier(prepared, calibrate(prepared, [x], lambda m, x: m(x)))
    applier.apply({"a": INT8, "b": INT8})
    with torch.no_grad():
        assert model(x).shape == shape
    assert model.strides == strides
    assert "int8" in prepared.engine.shares()


class Perceptron(nn.Module):
    """Two linear layers, and what is between them."""

    def __init__(self, case):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.gelu, self.tanh_gelu = nn.GELU(), nn.GELU("tanh")
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.1)
        self.case = case

    def forward(self, x):
        return self.case(self, x)


def gelu_twice(m, x):
    y = m.gelu(m.a(x))
    return m.b(m.gelu(y))


def gelu_and_sum(m, x):
    y = m.a(x)
    return m.b(m.gelu(y)) + y.mean()


def gelu_beside(m, x):
    y = m.a(x)
    return m.b(m.gelu(y)) + m.gelu(y).mean()


def before_gelu(m, x):
    y = m.a(x)
    m.gelu(y)
    return m.b(y)


def other_gelu_later(m, x):
    """Another approximation than in the run that was watched."""
    gelu = m.gelu if len(x) == 4 else m.tanh_gelu
    return m.b(gelu(m.a(x)))


@pytest.mark.parametrize(
    ("case", "handed"),
    [
        (lambda m, x: m.b(m.gelu(m.a(x))), ("b", "none")),
        (lambda m, x: m.b(m.dropout(m.gelu(m.a(x)))), ("b", "none")),
        (lambda m, x: m.b(m.tanh_gelu(m.a(x))), ("b", "tanh")),
        (lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh")), ("b", "tanh")),
        (lambda m, x: m.b(m.relu(m.a(x))), ("b", RELU)),
        (lambda m, x: m.b(m.a(x)), ("b", None)),
        (other_gelu_later, ("b", "none")),
        (gelu_twice, (None, "none")),
        (gelu_and_sum, (None, None)),
        (gelu_beside, (None, None)),
        (before_gelu, None),  # whatever is concluded from it, the numbers must be right
    ],
)
@pytest.mark.parametrize("bits", [8, 5])
def test_what_is_between_linear_layers_is_part_of_the_first(case, handed, bits):
    torch.manual_seed(0)
    model = Perceptron(case).eval()
    data = torch.randn(4, 7, 8)
    with torch.no_grad():
        expected = model(data)
        prepared = prepare(model, lambda m: m(data), engine=make_engine(CPU))
        model = prepared.model
        if handed is not None:
            found = converted_of(model.a)
            assert (None if found.reader is None else "b", found.after) == handed
        assert torch.equal(model(data), expected)
        applier = Applier(prepared, calibrate(prepared, [data], lambda m, x: m(x)))
        site = SiteRecipe(WeightScheme(MOST_BITS), ActivationScheme(bits, scheme="asymmetric"))
        applier.apply({"a": site, "b": site})
        given = []
        model.b.register_forward_pre_hook(lambda _, args: given.append(type(args[0])))
        for x in (data, data[:2]):
            fast = model(x)
            if handed is not None and x is data:
                assert (given[-1] is LayerOutput) == (handed[0] is not None)
            with prepared.engine.reference():
                exact = model(x)
            far = (fast - exact).abs() > 1e-4 * exact.abs().max()
            assert far.float().mean() < 0.01
        assert prepared.engine.shares()["int8"].seconds > 0
