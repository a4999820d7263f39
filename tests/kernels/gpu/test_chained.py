"""Products that are handed int8 and hand int8 on, against the reference."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from autoquant.kernels.gpu.device.handing import activated
from autoquant.kernels.gpu.doubt import collecting, current_flag
from autoquant.kernels.gpu.launch import launch, observing
from autoquant.kernels.operation import LINEAR, Operation, Reader, SchemeReader, is_chainable
from autoquant.kernels.reference import reference
from autoquant.quant.affine import quantize
from autoquant.spec.recipe import ActivationScheme
from tests.kernels.gpu.handed import AFTER, check_handed, covering, done, numbers, qparams

SCHEMES = ("symmetric", "asymmetric")
PER_TOKEN = ActivationScheme(8, "per_token")
EIGHT = ActivationScheme(8, scale=0.03, zero_point=-20)
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy's
]


@triton.jit
def apply(x, y, count, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    real = tl.load(x + at, mask=at < count, other=0.0)
    tl.store(y + at, activated(real, 0.0, 0.0, AFTER), mask=at < count)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("w_scheme", SCHEMES)
def test_linear(backend, device, make_weight, agree, flag, bits, w_scheme):
    x, bias = numbers((2, 5, 48), device), numbers((37,), device)
    weight = make_weight((37, 48), 8, "per_channel", w_scheme, dead=[3])
    for scheme, own in itertools.product(SCHEMES, (bias, None)):
        a = covering(x, bits, scheme)
        product = backend.prepare(LINEAR, weight, a, device)
        assert is_chainable(product)
        q = product.stored(x)
        assert product.takes(q)
        assert torch.equal(q, quantize(x, qparams(a, device)))
        expected = reference(LINEAR, x, weight, a, own)
        agree(product.real(q, own, None, False), expected)
        agree(product(x, own), expected)
        for clamp, gelu in AFTER:
            y = done(expected, clamp, gelu)
            if gelu is None:
                agree(product.real(q, own, clamp, False), y)
            read = covering(y, bits, scheme)
            reader = backend.prepare(LINEAR, make_weight((3, 48)), read, device).reads
            check_handed(product.handed(q, own, clamp, reader, gelu), y, read)
    assert flag.item() == 0


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 16, 1), (70, 144, 65), (33, 32, 16)])
def test_linear_shapes(backend, device, make_weight, agree, flag, rows, columns, outputs):
    x, weight = numbers((rows, columns), device), make_weight((outputs, columns), 8)
    product = backend.prepare(LINEAR, weight, EIGHT, device)
    expected = reference(LINEAR, x, weight, EIGHT, None)
    agree(product.real(product.stored(x), None, None, False), expected)
    read = covering(expected, 8, "symmetric")
    reader = backend.prepare(LINEAR, weight, read, device).reads
    y = product.handed(product.stored(x), None, None, reader)
    exact = (expected.double() / read.scale).clamp(-128, 127)
    assert (y.double() - exact).abs().max() <= 0.5 + 1e-4


def test_rows_of_any_strides_are_stored(backend, device, make_weight, flag):
    product = backend.prepare(LINEAR, make_weight((3, 16)), EIGHT, device)
    base = numbers((16, 6, 4), device)
    for x in (
        base.movedim(0, -1),
        base[:, ::2, 1].T,
        base[:, 0, 0],
        base.movedim(0, -1)[:, 1],
        base.movedim(0, -1).contiguous()[::2],
        numbers((5, 32), device)[:, ::2],
        numbers((2, 1, 16), device).expand(2, 3, 16),
    ):
        q = product.stored(x)
        assert q.is_contiguous()
        assert torch.equal(q, quantize(x, qparams(EIGHT, device)))
    assert flag.item() == 0


def test_gelus_are_as_exact_as_they_say(device):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -1e4, 1e4, 1e-30])])
    x = x.to(device)
    for after, gelu in ((2, "none"), (3, "tanh")):
        y = torch.empty_like(x)
        launch(apply, (1,), x, y, len(x), AFTER=after, BLOCK=4096)
        error = (y.double() - F.gelu(x.double(), approximate=gelu)).abs()
        assert (error <= 3e-7 * x.abs()).all()


def test_doubt_is_raised(backend, device, make_weight):
    weight = make_weight((7, 16))
    product = backend.prepare(LINEAR, weight, EIGHT, device)
    reader = product.reads
    x, bias = numbers((3, 16), device), numbers((7,), device)
    for layout in (x, x.T.contiguous().T):
        with collecting(torch.zeros(1, dtype=torch.int32, device=device)):
            product.stored(layout)
            assert current_flag().item() == 0
            bad = layout.clone()
            bad[1, 3] = math.nan
            product.stored(bad)
            assert current_flag().item() == 1
    for value in (math.nan, math.inf, -math.inf):
        with collecting(torch.zeros(1, dtype=torch.int32, device=device)):
            q = product.stored(x)
            product.handed(q, bias, None, reader)
            assert current_flag().item() == 0
            bad = bias.clone()
            bad[6] = value
            product.handed(q, bad, (0.0, 6.0), reader)
            assert current_flag().item() == 1
            y = product.real(q, bad, (0.0, 6.0), False)
            assert torch.equal(y[:, 6].isnan(), bad[6].isnan().expand(3))
    huge = ActivationScheme(8, scale=1e36, zero_point=0)
    with collecting(torch.zeros(1, dtype=torch.int32, device=device)):
        product = backend.prepare(LINEAR, weight, huge, device)
        product.handed(q, None, None, reader)
        assert current_flag().item() == 1


def test_what_is_not_handed(backend, device, make_weight):
    x, bias = numbers((3, 16), device), numbers((7,), device)
    product = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    assert product.stored(x) is None  # nobody collects doubts
    assert current_flag() is None
    with collecting(torch.zeros(1, dtype=torch.int32, device=device)):
        q = product.stored(x)
        assert product.handed(q, bias, None, product.reads) is not None
        assert product.handed(q, bias, (0.0, 6.0), product.reads, "none") is None
        assert product.handed(q, bias, None, SchemeReader(EIGHT)) is None
        assert product.handed(q, bias, None, Reader()) is None
        odd = backend.prepare(LINEAR, make_weight((7, 12)), EIGHT, device)
        assert odd.reads is None
        assert odd.stored(numbers((3, 12), device)) is None
        token = backend.prepare(LINEAR, make_weight((7, 16)), PER_TOKEN, device)
        assert token.reads is None
        assert token.stored(x) is None
        assert not token.takes(q)
        for refused in (x.double(), x[:0], x[:, :8], x.clone().requires_grad_()):
            assert product.stored(refused) is None
        for refused in (x, q[:0], q[:, :8], q.T.contiguous().T):
            assert not product.takes(refused)
    assert product.handed(q, bias, None, product.reads) is None


def test_readers_are_told_apart_by_their_tensor(backend, device, make_weight):
    product = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    same = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    assert product.reads == product.reads
    assert hash(product.reads) == hash(product.reads)
    assert product.reads != same.reads
    assert product.reads != SchemeReader(EIGHT)


def test_infinity_goes_to_the_ends_of_the_grid(backend, device, make_weight, agree, flag):
    weight = make_weight((7, 16))
    product = backend.prepare(LINEAR, weight, EIGHT, device)
    x = numbers((3, 16), device)
    x[0, 3], x[1, 5], x[2, 0] = math.inf, -math.inf, 1e30
    q = product.stored(x)
    assert torch.equal(q, quantize(x, qparams(EIGHT, device)))
    agree(product.real(q, None, None, False), reference(LINEAR, x, weight, EIGHT, None))
    assert flag.item() == 0


def form(value):
    """Return what is not data of a product: two of one form differ in numbers alone."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.stride()
    if is_dataclass(value):
        return type(value), *(form(getattr(value, f.name)) for f in fields(value))
    return value


def copy(into, value):
    """Copy the numbers of one product into those of another."""
    if isinstance(value, torch.Tensor):
        into.copy_(value)
    elif is_dataclass(value):
        for f in fields(value):
            copy(getattr(into, f.name), getattr(value, f.name))


@pytest.mark.parametrize("shape", [(16, 32), (8, 4, 3, 3), (8, 1, 3, 3)])
def test_recipes_of_one_form_differ_in_numbers_alone(backend, device, make_weight, flag, shape):
    """Whoever captured the kernels of one recipe computes another by copying its numbers."""
    operation, x = LINEAR, numbers((5, 32), device)
    if len(shape) == 4:
        groups = 8 if shape[1] == 1 else 1
        operation = Operation("conv2d", (1, 1), (1, 1), (1, 1), groups)
        x = numbers((2, groups * shape[1], 4, 5), device)
    bias = numbers(shape[:1], device, 2)
    schemes = [covering(x, bits, scheme) for bits, scheme in ((8, "asymmetric"), (3, "symmetric"))]
    products = [
        backend.prepare(operation, make_weight(shape, bits, "per_channel", kind, n), a, device)
        for n, (bits, kind, a) in enumerate(
            (bits, kind, a) for a in schemes for bits, kind in ((8, "symmetric"), (4, "asymmetric"))
        )
    ]
    assert len({form(p) for p in products}) == 1
    first = products[0]
    reader = replace(first.reads, static=first.activation.static.clone())
    launches = []
    with observing(lambda _, again: launches.append(again)):
        made = [first.stored(x)]
        made.append(first.real(made[0], bias, (0.0, 6.0), True))
        made.append(first.handed(made[0], bias, None, reader))
    for other in products[1:]:
        expected = [other.stored(x)]
        expected.append(other.real(expected[0], bias, (0.0, 6.0), True))
        expected.append(other.handed(expected[0], bias, None, reader))
        copy(first, other)
        for again in launches:
            again()
        for found, right in zip(made, expected, strict=True):
            assert torch.equal(found, right)


def test_another_thread_has_doubts_of_its_own(device):
    flags = [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)]
    with collecting(flags[0]):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(current_flag).result() is None
        with collecting(flags[1]):
            assert current_flag() is flags[1]
        assert current_flag() is flags[0]
    assert current_flag() is None
