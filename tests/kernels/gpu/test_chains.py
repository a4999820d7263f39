"""Models whose layers hand int8 to one another, and how many kernels that takes."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.kernels.engine import Engine
from autoquant.kernels.gpu.doubt import collecting
from autoquant.kernels.gpu.launch import observing
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.layer_output import LayerOutput, as_real
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

pytestmark = pytest.mark.usefixtures("poisoned")
INT8 = SiteRecipe(WeightScheme(8), ActivationScheme(8))
MIXED = SiteRecipe(
    WeightScheme(4, "per_channel", "asymmetric"), ActivationScheme(7, scheme="symmetric")
)


class Feed(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, act, width=32):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(width, 48), act, nn.Linear(48, width)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Bottleneck(nn.Module):
    """The block of MobileNetV2: out to more channels, by each channel, back, and x is added."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(8, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU6(inplace=True)),
            nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=False),
            *(nn.BatchNorm2d(20), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(20, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )

    def forward(self, x):
        return x + self.body(x)


class Residual(nn.Module):
    """The block of ResNet-18, and what follows it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.b, self.norm_b = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.aside, self.last = nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 5)

    def forward(self, x):
        y = F.relu(self.norm_a(self.a(x)), inplace=True)
        y = F.relu(self.norm_b(self.b(y)) + self.aside(x))
        return self.last(y.mean((2, 3)))


class Block(nn.Module):
    """The block of BERT: six linear layers."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.feed, self.heads = Feed(nn.GELU(), width), heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x):
        parts = (
            y.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        y = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
        x = self.norms[0](x + self.o(y))
        return self.norms[1](x + self.feed(x))


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def made(model, x, backend, device, recipe=INT8):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    x = x.to(device)
    prepared = prepare(model.eval().to(device), lambda m: m(x), engine=Engine((backend,)))
    applier = Applier(prepared, calibrate(prepared, [x], lambda m, x: m(x)))
    applier.apply({site.name: recipe for site in prepared.sites})
    return prepared, x


@contextlib.contextmanager
def chained(device, tuning=lambda: None):
    """Collect doubts and launches, once ``tuning`` has had block sizes chosen on a GPU."""
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    names = []
    with torch.no_grad(), collecting(flag):
        tuning()
        with observing(lambda name, _: names.append(name)):
            yield flag, names


def close(y, expected):
    """Numbers next to the middle between two integers may go to either, and few are."""
    y, expected = as_real(y), as_real(expected)
    far = (y - expected).abs() > 1e-5 * expected.abs().max()
    assert far.float().mean() < 0.05
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


TWO = ["quantize_flat", "int8_matmul", "int8_matmul"]
MODELS = {
    "gelu": (
        lambda: Feed(nn.GELU()),
        (3, 5, 32),
        TWO,
    ),
    "tanh": (
        lambda: Feed(nn.GELU(approximate="tanh")),
        (3, 5, 32),
        TWO,
    ),
    "relu": (
        lambda: Feed(nn.ReLU()),
        (7, 32),
        TWO,
    ),
    "none": (
        lambda: Feed(nn.Identity()),
        (7, 32),
        TWO,
    ),
    "relus": (
        lambda: nn.Sequential(
            *(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 12, 3, groups=2)),
            *(nn.ReLU(), nn.Conv1d(12, 4, 1, stride=2)),
        ),
        (2, 4, 11),
        ["quantize_images", *3 * ["int8_convolution"]],
    ),
    "mobilenet": (
        Bottleneck,
        (2, 8, 6, 5),
        ["quantize_images", "int8_convolution", "int8_convolution", "int8_convolution"],
    ),
    "resnet": (
        Residual,
        (2, 8, 9, 8),
        [
            *(2 * ["quantize_images", "int8_convolution"]),
            *("int8_convolution", "quantize_flat", "int8_matmul"),
        ],
    ),
    "stem": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        ),
        (2, 3, 9, 8),
        ["quantize_images", "int8_convolution", "int8_convolution"],
    ),
    "bert": (
        Block,
        (2, 5, 32),
        [
            *(4 * ["quantize_flat", "int8_matmul"]),
            *("normalize_rows", "int8_matmul", "int8_matmul", "normalize_rows"),
        ],
    ),
}


@pytest.mark.parametrize("recipe", [INT8, MIXED], ids=["int8", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_the_reference_does(backend, device, name, recipe):
    make, shape, launches = MODELS[name]
    torch.manual_seed(1)
    prepared, x = made(make(), numbers(*shape), backend, device, recipe)
    model = prepared.model
    with torch.no_grad(), prepared.engine.reference():
        expected = model(x)
    with torch.no_grad():
        close(model(x), expected)
    with chained(device, lambda: model(x)) as (flag, names):
        y = model(x)
        assert names == launches
        close(y, expected)
        assert as_real(y).stride() == expected.stride()
        assert flag.item() == 0


@pytest.mark.parametrize("name", ["mobilenet", "resnet"])
def test_channels_last_models(backend, device, name):
    make, shape, launches = MODELS[name]
    last = numbers(*shape).to(memory_format=torch.channels_last)
    prepared, x = made(make(), last, backend, device)
    with torch.no_grad(), prepared.engine.reference():
        expected = prepared.model(x)
    with chained(device, lambda: prepared.model(x)) as (_, names):
        y = prepared.model(x)
        if device.type == "cpu":  # on a GPU cuDNN, which is off here, has the reference's so
            assert as_real(y).stride() == as_real(expected).stride()
        assert names == [n.replace("quantize_images", "quantize_flat") for n in launches]
    close(y, expected)


@pytest.mark.parametrize("index", [0, 2, 3, 5])
def test_whoever_touches_an_output_gets_the_real_numbers(backend, device, index):
    prepared, x = made(Bottleneck(), numbers(2, 8, 6, 5), backend, device)
    seen = []
    layer = prepared.model.body[index]
    layer.register_forward_hook(lambda _, __, y: seen.append((type(y), y + 0)))
    with chained(device):
        y = prepared.model(x)
    with torch.no_grad(), prepared.engine.reference():
        close(y, prepared.model(x))
    (kind, fast), (_, expected) = seen
    assert kind is LayerOutput
    close(fast, expected)
    assert fast.stride() == expected.stride()


@pytest.mark.parametrize("name", ["gelu", "mobilenet", "bert"])
def test_nan_raises_doubt_and_the_plain_path_has_it_where_the_reference_does(backend, device, name):
    make, shape, _ = MODELS[name]
    prepared, x = made(make(), numbers(*shape), backend, device)
    x[1, 2] = float("nan")
    with chained(device) as (flag, _):
        prepared.model(x)
        assert flag.item() == 1
    with torch.no_grad():
        y = prepared.model(x)
        with prepared.engine.reference():
            expected = prepared.model(x)
    assert torch.equal(as_real(y).isnan(), as_real(expected).isnan())
    assert expected.isnan().any()


def test_nothing_is_chained_while_nobody_collects_doubts(backend, device):
    prepared, x = made(Feed(nn.GELU()), numbers(7, 32), backend, device)
    names = []
    with torch.no_grad():
        prepared.model(x)
        with observing(lambda name, _: names.append(name)):
            prepared.model(x)
    assert names == 2 * ["quantize_rows", "int8_matmul"]


@pytest.mark.parametrize("name", ["gelu", "mobilenet"])
def test_launches_can_be_repeated(backend, device, name):
    """A recorder replays them on the same memory: other numbers in, other numbers out."""
    make, shape, _ = MODELS[name]
    prepared, x = made(make(), numbers(*shape), backend, device)
    chain = prepared.model.body if name == "mobilenet" else prepared.model
    launches = []
    with chained(device) as (_, _), observing(lambda _, again: launches.append(again)):
        y = as_real(chain(x))
        first = y.clone()
        x.mul_(-0.5)
        for again in launches:
            again()
        assert not torch.equal(y, first)
        assert torch.equal(y, as_real(chain(x)))
