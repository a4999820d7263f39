"""Products that add a residual connection, and norm it, against the reference."""

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from autoquant.kernels.gpu import convolution, linear
from autoquant.kernels.gpu.adding import NORM_READERS, SUM_READERS, WIDEST, cut
from autoquant.kernels.gpu.doubt import collecting
from autoquant.kernels.gpu.launch import observing
from autoquant.kernels.operation import LINEAR, Norm, Reader, SchemeReader, is_adding
from autoquant.kernels.reference import reference
from autoquant.spec.recipe import ActivationScheme
from tests.kernels.gpu.handed import check_handed, covering, done, numbers
from tests.kernels.gpu.test_convolution import BLOCKS, CASES

SCHEMES = ("symmetric", "asymmetric")
CLAMPS = (None, (0.0, math.inf), (0.0, 6.0), (-1.0, 2.0))
EIGHT = ActivationScheme(8, scale=0.03, zero_point=-20)
WIDTHS = ((8, "asymmetric"), (4, "symmetric"), (6, "asymmetric"), (8, "symmetric"))
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


@pytest.fixture
def read_by(backend, device, make_weight):
    """Return a function that makes readers of an output, one for each width of its integers."""

    def make(y, count, case=None):
        operation = LINEAR if case is None else case.operation
        weight = make_weight((3, 16) if case is None else case.weight)
        schemes = [covering(y, *width) for width in WIDTHS[:count]]
        return schemes, [backend.prepare(operation, weight, s, device).reads for s in schemes]

    return make


def check(made, total, expected, schemes, agree):
    """Check an ``Added``: float32 as ``expected``, and integers of its own ``real``."""
    if total is None:
        assert made.total is None
    else:
        agree(made.total, total)
        assert made.total.is_contiguous()
    agree(made.real, expected)
    assert len(made.integers) == len(schemes)
    for q, scheme in zip(made.integers, schemes, strict=True):
        check_handed(q, made.real, scheme)


@contextlib.contextmanager
def launched():
    """Give a list of the kernels that are launched inside."""
    names = []
    with observing(lambda name, _: names.append(name)):
        yield names


@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("w_scheme", SCHEMES)
def test_linear(backend, device, make_weight, agree, flag, read_by, w_scheme, count):
    x, bias, other = (numbers(s, device, i) for i, s in enumerate(((2, 5, 48), (37,), (2, 5, 37))))
    weight, before = make_weight((37, 48), 8, "per_channel", w_scheme, dead=[3]), other.clone()
    product = backend.prepare(LINEAR, weight, covering(x, 8, w_scheme), device)
    assert is_adding(product)
    q = product.stored(x)
    for clamp, own in itertools.product(CLAMPS, (bias, None)):
        y = reference(LINEAR, x, weight, covering(x, 8, w_scheme), own) + other
        y = done(y, clamp, None)
        schemes, readers = read_by(y, count)
        with launched() as names:
            made = product.added(q, own, other, clamp, readers, False)
        check(made, None, y, schemes, agree)
        assert made.real.is_contiguous()
        assert product.shape(q) == made.real.shape
        assert names == ["int8_matmul"]
    assert torch.equal(other, before)
    assert flag.item() == 0


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 16, 1), (70, 144, 65), (33, 32, 16)])
def test_linear_shapes(backend, device, make_weight, agree, flag, read_by, rows, columns, outputs):
    x, weight = numbers((rows, columns), device), make_weight((outputs, columns), 8)
    other = numbers((rows, outputs), device, 5)
    product = backend.prepare(LINEAR, weight, EIGHT, device)
    y = reference(LINEAR, x, weight, EIGHT, None) + other
    schemes, readers = read_by(y, 1 if outputs == 1 else 2)
    made = product.added(product.stored(x), None, other, None, readers, True)
    agree(made.real, y)
    for q, s in zip(made.integers, schemes, strict=True):
        exact = (made.real.double() / s.scale + s.zero_point).clamp(
            -(2 ** (s.bits - 1)), 2 ** (s.bits - 1) - 1
        )
        assert (q.double() - exact).abs().max() <= 0.5 + 1e-4


def convolution_adds(backend, device, make_weight, agree, read_by, case, w_scheme="symmetric"):
    x, bias = numbers(case.x, device), numbers(case.weight[:1], device, 2)
    weight = make_weight(case.weight, 8, "per_channel", w_scheme, dead=[0])
    product = backend.prepare(case.operation, weight, EIGHT, device)
    q, y = product.stored(x), reference(case.operation, x, weight, EIGHT, bias)
    other = numbers(tuple(y.shape), device, 3)
    for last, clamp, count in ((False, (0.0, 6.0), 3), (True, None, 2), (True, (0.0, math.inf), 1)):
        if last and y.dim() == 4:
            other = other.contiguous(memory_format=torch.channels_last)
        expected = done(y + other, clamp, None)
        schemes, readers = read_by(expected, count, CASES["pointwise"])
        with launched() as names:
            made = product.added(q, bias, other, clamp, readers, last)
        check(made, None, expected, schemes, agree)
        real = made.real.movedim(1, -1) if last and y.dim() == 4 else made.real
        assert real.is_contiguous()
        assert product.shape(q) == made.real.shape
        assert all(q.movedim(1, -1).is_contiguous() for q in made.integers)
        assert set(names) == {"int8_convolution"}


@pytest.mark.parametrize("name", CASES)
def test_convolutions(backend, device, make_weight, agree, flag, read_by, name):
    for w_scheme in SCHEMES[: 1 if "filled" in name else 2]:  # the other isn't chained there
        convolution_adds(backend, device, make_weight, agree, read_by, CASES[name], w_scheme)
    assert flag.item() == 0


@pytest.mark.parametrize("c", convolution.SUM_DENSE + convolution.GROUPED)
def test_block_sizes(backend, device, make_weight, agree, choose, flag, read_by, c):
    choose(c)
    convolution_adds(backend, device, make_weight, agree, read_by, BLOCKS)


@pytest.mark.parametrize("c", linear.SMALL + linear.SUM_LARGE)
def test_block_sizes_of_linear_ones(backend, device, make_weight, agree, choose, flag, read_by, c):
    choose(c)
    x, other = numbers((77, 48), device), numbers((77, 139), device, 4)
    weight = make_weight((139, 48), 8, scheme="asymmetric")
    product = backend.prepare(LINEAR, weight, EIGHT, device)
    y = (reference(LINEAR, x, weight, EIGHT, None) + other).clamp(min=0.0)
    schemes, readers = read_by(y, 2)
    made = product.added(product.stored(x), None, other, (0.0, math.inf), readers, False)
    check(made, None, y, schemes, agree)


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("keeps", [False, True])
def test_norms(backend, device, make_weight, agree, flag, read_by, keeps, count):
    x, bias, other = (numbers(s, device, i) for i, s in enumerate(((3, 7, 16), (37,), (3, 7, 37))))
    weight, before = make_weight((37, 16)), other.clone()
    product = backend.prepare(LINEAR, weight, EIGHT, device)
    q, s = product.stored(x), reference(LINEAR, x, weight, EIGHT, bias) + other
    for scale, shift, eps in itertools.product(
        (numbers((37,), device, 5), None), (numbers((37,), device, 6), None), (1e-12, 0.1)
    ):
        h = F.layer_norm(s, (37,), scale, shift, eps)
        schemes, readers = read_by(h, count)
        norm = Norm(scale, shift, eps)
        with launched() as names:
            made = product.normalized(q, bias, other, norm, readers, keeps)
        check(made, s if keeps else None, h, schemes, agree)
        assert names == ["int8_matmul", "normalize_rows"]
    assert torch.equal(other, before)
    assert flag.item() == 0


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 16), (70, 24), (3, 300), (2, 2050)])
def test_norms_of_shapes(backend, device, make_weight, agree, flag, rows, columns):
    x, weight = numbers((rows, 16), device), make_weight((columns, 16))
    other = numbers((rows, columns), device, 5) + 50.0  # far from 0, next to its spread
    product = backend.prepare(LINEAR, weight, EIGHT, device)
    s = reference(LINEAR, x, weight, EIGHT, None) + other
    readers = [product.reads]
    made = product.normalized(product.stored(x), None, other, Norm(None, None, 1e-5), readers, True)
    agree(made.total, s)
    h = F.layer_norm(made.total.double(), (columns,), None, None, 1e-5).float()
    agree(made.real, h)
    exact = (made.real.double() / EIGHT.scale + EIGHT.zero_point).clamp(-128, 127)
    assert (made.integers[0].double() - exact).abs().max() <= 0.5 + 1e-4


def test_rows_are_cut_by_their_length():
    for columns, rows in itertools.product((1, 16, 100, 768, 1024, 4096, WIDEST), (1, 3, 5000)):
        per_program, block, warps = cut(rows, columns)
        assert block >= columns
        assert per_program * block <= max(1024, block)
        assert per_program * block <= 512 * warps or per_program * block < 512
        assert warps in (1, 2, 4, 8, 16)


def test_equal_readers_share_their_integers(backend, device, make_weight, flag, read_by):
    x, other = numbers((5, 16), device), numbers((5, 7), device, 2)
    product = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    q, norm = product.stored(x), Norm(None, None, 1e-5)
    _, (a, b, c, d) = read_by(other, 4)
    e = product.reads
    conv = CASES["pointwise"]
    pixels = backend.prepare(conv.operation, make_weight(conv.weight), EIGHT, device).reads
    readers = [a, pixels, b, a, SchemeReader(EIGHT), c, b, d, Reader(), e, d, a]
    places = [0, None, 1, 0, None, 2, 1, 3, None, None, 3, 0]
    for most, made in (
        (SUM_READERS, product.added(q, None, other, None, readers, False)),
        (NORM_READERS, product.normalized(q, None, other, norm, readers, False)),
    ):
        firsts = {}
        for place, integers in zip(places, made.integers, strict=True):
            if place is None or place >= most:
                assert integers is None
            else:
                assert integers is firsts.setdefault(place, integers)
        assert len(firsts) == most
        assert len({id(q) for q in firsts.values()}) == most


def test_what_is_not_added(backend, device, make_weight, flag):
    x, other = numbers((4, 3, 16), device), numbers((4, 3, 7), device, 2)
    product = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    q, bias, norm = product.stored(x), numbers((7,), device), Norm(None, None, 1e-5)

    def both(bias, other):
        yield product.added(q, bias, other, None, [product.reads], False)
        yield product.normalized(q, bias, other, norm, [product.reads], False)

    assert all(made is not None for made in both(bias, other))
    learned = other.clone().requires_grad_()
    strided = other.transpose(0, 1).contiguous().transpose(0, 1)
    wide = numbers((4, 3, 14), device)[..., ::2]
    for refused in (other.double(), other[:1], other[:1].expand(4, 3, 7), strided, wide, learned):
        assert all(made is None for made in both(bias, refused))
    for refused in (bias.double(), bias[:3], bias.clone().requires_grad_()):
        assert all(made is None for made in both(refused, other))
        for bad in (Norm(refused, None, 1e-5), Norm(None, refused, 1e-5)):
            assert product.normalized(q, None, other, bad, [], False) is None
    gaps = Norm(numbers((14,), device)[::2], None, 1e-5)
    assert product.normalized(q, None, other, gaps, [], False) is None
    with torch.no_grad():
        assert all(made is not None for made in both(bias.requires_grad_(), learned))
    with collecting(torch.zeros(1, dtype=torch.int32, device="meta")):
        assert all(made is None for made in both(None, other))


def test_rows_wider_than_a_program_are_not_normed(backend, device, make_weight, flag):
    wide = backend.prepare(LINEAR, make_weight((WIDEST + 1, 16)), EIGHT, device)
    q, other = wide.stored(numbers((1, 16), device)), numbers((1, WIDEST + 1), device)
    assert wide.normalized(q, None, other, Norm(None, None, 1e-5), [], False) is None


def test_convolutions_add_only_what_lies_as_they_do(backend, device, make_weight, flag):
    case = CASES["any"]
    product = backend.prepare(case.operation, make_weight(case.weight), EIGHT, device)
    q = product.stored(numbers(case.x, device))
    first = numbers((2, 9, 6, 7), device)
    last = first.contiguous(memory_format=torch.channels_last)
    readers = [product.reads]
    assert product.added(q, None, first, None, readers, False) is not None
    assert product.added(q, None, last, None, readers, True) is not None
    assert product.added(q, None, first, None, readers, True) is None
    assert product.added(q, None, last, None, readers, False) is None
    assert product.added(q, None, first[:1], None, readers, False) is None
    assert product.added(q, None, first.transpose(2, 3), None, readers, False) is None
    assert product.added(q, numbers((3,), device), first, None, readers, False) is None
    assert product.normalized(q, None, first, Norm(None, None, 1e-5), readers, False) is None
    filled = CASES["filled"]  # nothing but its own quantizer fills its pixels up
    filled = backend.prepare(filled.operation, make_weight(filled.weight), EIGHT, device).reads
    assert product.added(q, None, first, None, [filled], False).integers == (None,)


def test_nothing_is_added_while_nobody_collects_doubts(backend, device, make_weight):
    x, other = numbers((5, 16), device), numbers((5, 7), device)
    product = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    with collecting(torch.zeros(1, dtype=torch.int32, device=device)):
        q = product.stored(x)
    assert product.added(q, None, other, None, [], False) is None
    assert product.normalized(q, None, other, Norm(None, None, 1e-5), [], False) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_doubt_is_raised(backend, device, make_weight, flag, value):
    x, other, bias = numbers((5, 16), device), numbers((5, 7), device), numbers((7,), device)
    product = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    q, readers, norm = product.stored(x), [product.reads], Norm(None, None, 1e-5)

    def doubts(made, bad=None):
        """Check whether numbers are as bad as they are said to be, and return the doubt."""
        assert bad is None or made.real.isfinite().all().item() != bad
        doubt = flag.item() == 1
        flag.zero_()
        return doubt

    bad_other, bad_bias = other.clone(), bias.clone()
    bad_other[4, 6] = bad_bias[2] = value
    for own, added, bad in (
        (bias, other, False),
        (bad_bias, other, True),
        (bias, bad_other, True),
    ):
        assert doubts(product.added(q, own, added, None, readers, False), bad) == bad
        assert doubts(product.normalized(q, own, added, norm, readers, True), bad) == bad
        assert not doubts(product.added(q, own, added, None, [], False), bad)  # no integer is
        # A clamp makes infinite numbers finite.
        made = product.added(q, own, added, (0.0, 6.0), readers, False)
        assert doubts(made) == (bad and math.isnan(value))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["any", "depthwise"])
def test_doubts_of_convolutions_are_raised(backend, device, make_weight, flag, name, last):
    case = CASES[name]
    product = backend.prepare(case.operation, make_weight(case.weight), EIGHT, device)
    q = product.stored(numbers(case.x, device))
    y = product.real(q, None, None, last)
    other = torch.ones_like(y)
    product.added(q, None, other, None, [product.reads], last)
    assert flag.item() == 0
    other[-1, -1, -1, -1] = math.nan
    made = product.added(q, None, other, None, [product.reads], last)
    assert flag.item() == 1
    assert made.real.isnan().sum() == 1


@pytest.mark.parametrize("keeps", [False, True])
def test_launches_can_be_repeated(backend, device, make_weight, flag, keeps):
    """A recorder replays them on the same memory, in their order: other numbers in, and out."""
    x, other = numbers((5, 16), device), numbers((5, 7), device)
    product = backend.prepare(LINEAR, make_weight((7, 16)), EIGHT, device)
    q, readers, norm = product.stored(x), [product.reads], Norm(None, None, 1e-5)

    def call():
        added = product.added(q, None, other, None, readers, False)
        normed = product.normalized(q, None, other, norm, readers, keeps)
        sums = [normed.total] if keeps else []
        return [added.real, *added.integers, normed.real, *normed.integers, *sums]

    again = []
    with observing(lambda _, repeat: again.append(repeat)):
        made = call()
    first = [t.clone() for t in made]
    other.mul_(-0.5)
    for repeat in again:
        repeat()
    for old, new, expected in zip(first, made, call(), strict=True):
        assert torch.equal(new, expected)
        assert not torch.equal(new, old)
