"""What is chosen where nothing was measured."""

import json
from importlib import resources

import pytest

from autoquant.kernels.gpu import convolution, linear, weight_only
from autoquant.kernels.gpu.defaults import (
    TOLERANCE,
    Gpu,
    Problem,
    estimate,
    family_of,
    preferred,
    problem_of,
    table,
)
from autoquant.kernels.gpu.launch import config
from autoquant.kernels.gpu.shared_memory import shared_bytes

H200 = table().architecture(90).gpu
SMALL_GPU = 64 * 1024
OFFERED = {
    "int8 matmul": linear.SMALL + linear.LARGE,
    "int8 convolution": convolution.DENSE + convolution.GROUPED,
    "depthwise convolution": convolution.DEPTHWISE,
    "packed vector": weight_only.VECTOR,
    "packed matmul": weight_only.MATRIX,
}
SHAPES = {
    "int8 matmul": (4096, 768, 768, True, False, False),
    "int8 convolution": (32768, 64, 64, 1, 3, 3, 1, 1),
    "depthwise convolution": (32768, 96, 1, 96, 3, 3, 1, 1),
    "packed vector": (1, 4096, 4096, 4, 128, 2),
    "packed matmul": (64, 4096, 4096, 4, 128, 2),
}
GPUS = [a.gpu for a in table().architectures]


def tile(c):
    return c.block("BLOCK_M"), c.block("BLOCK_N"), c.block("BLOCK_K")


def test_the_file_says_nothing_else_than_what_is_read():
    text = resources.files("autoquant.kernels.gpu").joinpath("configs.json").read_text("utf-8")
    document = json.loads(text)
    assert set(document) == {"version", "sources", "architectures", "tiles"}
    named = [s for t in table().tiles for s in t.source.split(", ")]
    named += [a.source for a in table().architectures]
    assert set(named) == set(table().sources)
    assert [a.capability for a in table().architectures] == [80, 86, 89, 90, 100, 120]


@pytest.mark.parametrize("family", OFFERED)
@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.capability)
def test_every_entry_is_one_that_a_kernel_offers_and_fits_the_gpu(family, gpu):
    listed = table().listed(family, gpu.capability)
    assert listed
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(OFFERED[family])
    for c in listed:
        bits = 8 if family.startswith("packed") else 0
        names = dict(c.blocks)
        if "BLOCK_K" in names:  # a stage holds a tile of each operand, a byte a number
            m, n, k = tile(c)
            assert c.stages * (m + n) * k <= gpu.shared_memory
            assert shared_bytes(c, bits, 1, gpu.capability) >= c.stages * (m + n) * k
        if family != "packed matmul":  # which depends on the dtype, and is sorted by it
            assert shared_bytes(c, bits, 1, gpu.capability) <= gpu.shared_memory


@pytest.mark.parametrize(
    ("family", "offered"),
    [
        ("int8 matmul", linear.SMALL),
        ("int8 matmul", linear.LARGE),
        ("int8 convolution", convolution.DENSE),
        ("int8 convolution", convolution.GROUPED),
        ("depthwise convolution", convolution.DEPTHWISE),
        ("packed vector", weight_only.VECTOR),
        ("packed matmul", weight_only.MATRIX),
    ],
)
def test_some_config_fits_a_small_gpu(family, offered):
    best = preferred(family, SHAPES[family], offered, Gpu(80, 16, SMALL_GPU))[0]
    p = problem_of(family, SHAPES[family])
    assert shared_bytes(best, p.bits, p.itemsize, 80) <= SMALL_GPU


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gpu", [*GPUS, Gpu(75, 16, SMALL_GPU)], ids=lambda g: g.capability)
def test_packed_products_fit_whatever_the_dtype(gpu, itemsize):
    for rows in (8, 64, 512, 4096):
        shape = (rows, 4096, 4096, 8, 128, itemsize)
        best = preferred("packed matmul", shape, weight_only.MATRIX, gpu)[0]
        assert shared_bytes(best, 8, itemsize, gpu.capability) <= gpu.shared_memory


# The edges of the fastest of all tiles that were tried, at 256, 512, 1024, 2048 and 4096
# rows: gemlite's of four of its shapes (columns, depth), without selection.
WINNERS = {
    (90, 132): {
        (3072, 3072): ("64×128", "128×128", "128×256", "128×128", "128×256"),
        (4096, 4096): ("64×128", "128×128", "128×256", "128×256", "128×256"),
        (6144, 4096): ("128×128", "128×256", "128×128", "128×256", "128×256"),
        (28672, 4096): ("128×256", "128×256", "128×256", "128×256", "128×256"),
    },
    (80, 108): {
        (3072, 3072): ("64×128", "64×128", "128×128", "128×128", "128×128"),
        (4096, 4096): ("64×64", "64×128", "64×128", "128×128", "128×128"),
        (6144, 4096): ("256×64", "128×128", "128×128", "128×128", "128×128"),
        (28672, 4096): ("64×128", "128×128", "128×128", "128×128", "128×128"),
    },
    (86, 84): {
        (3072, 3072): ("128×64", "128×64", "128×128", "128×128", "128×128"),
        (4096, 4096): ("128×128", "128×128", "128×128", "128×128", "128×128"),
        (6144, 4096): ("128×64", "128×128", "128×128", "128×128", "128×128"),
        (28672, 4096): ("256×128", "128×128", "128×128", "128×128", "128×128"),
    },
}


@pytest.mark.parametrize(("which", "at_least"), [((90, 132), 19), ((80, 108), 16), ((86, 84), 18)])
def test_the_estimate_mostly_chooses_what_others_measured_to_win(which, at_least):
    capability, processors = which
    gpu = Gpu(capability, processors, table().architecture(capability).shared_memory)
    agree, single = 0, dict.fromkeys(linear.LARGE, 0)
    for shape, tiles in WINNERS[which].items():
        for rows, text in zip((256, 512, 1024, 2048, 4096), tiles, strict=True):
            winner = sorted(map(int, text.split("×")))
            best = preferred("int8 matmul", (rows, *shape), linear.LARGE, gpu)[0]
            agree += sorted(tile(best)[:2]) == winner
            for c in single:
                single[c] += sorted(tile(c)[:2]) == winner
    assert agree >= at_least
    assert agree > max(single.values())  # than one tile for all shapes


@pytest.mark.parametrize(
    ("capability", "processors", "rows", "columns", "depth", "winner"),
    [  # vLLM's on an A100, and SGLang's on an H20
        (80, 108, 4, 1536, 1536, (16, 32)),
        (80, 108, 16, 1536, 1536, (16, 32)),
        (80, 108, 4, 1536, 7168, (16, 32)),
        (80, 108, 16, 1536, 7168, (16, 32)),
        (90, 78, 4, 3072, 7168, (16, 64)),
        (90, 78, 16, 3072, 7168, (16, 64)),
    ],
)
def test_few_rows_take_what_others_measured(capability, processors, rows, columns, depth, winner):
    gpu = Gpu(capability, processors, table().architecture(capability).shared_memory)
    best = preferred("int8 matmul", (rows, columns, depth), linear.SMALL, gpu)[0]
    assert tile(best)[:2] == winner


def test_the_estimate_grows_with_the_work():
    for c in linear.LARGE:
        for name in ("rows", "columns", "depth"):
            sizes = [
                {"rows": 500, "columns": 500, "depth": 500, name: n} for n in range(1, 900, 37)
            ]
            times = [estimate(c, Problem(**s), 2, 128) for s in sizes]
            assert times == sorted(times)
            assert times[0] < times[-1]
        problem = Problem(4096, 4096, 4096)
        times = [estimate(c, problem, n, 128) for n in range(8, 200, 8)]
        assert times == sorted(times, reverse=True)  # more multiprocessors take no longer


def test_the_estimate_by_hand():
    c = config(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64)
    # 3 × 2 programs of 2 groups in 2 waves of 10; 100 deep is 128 in steps of 64.
    problem = Problem(300, 100, 100, groups=2)
    assert estimate(c, problem, 10, 7.0) == 2 * (128 * 64 + 7.0 * 192) * 128


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.capability)
def test_small_products_are_spread_over_the_multiprocessors(gpu):
    """No other tile that is offered has more of them at work for less in each."""

    def busy(c, rows, columns):
        m, n, _ = tile(c)
        return -(-rows // m) * -(-columns // n)

    for rows, columns in ((64, 768), (128, 768), (256, 512), (512, 768)):
        best = preferred("int8 matmul", (rows, columns, 768), linear.LARGE, gpu)[0]
        m, n, _ = tile(best)
        programs = busy(best, rows, columns)
        for c in table().listed("int8 matmul", gpu.capability):
            a, b, _ = tile(c)
            if c in linear.LARGE and busy(c, rows, columns) <= gpu.processors:
                assert a * b >= m * n or programs > gpu.processors


def test_large_products_take_large_tiles():
    for gpu in GPUS:
        m, n, _ = tile(preferred("int8 matmul", (32768, 8192, 8192), linear.LARGE, gpu)[0])
        assert m * n >= 128 * 128


def test_a_group_of_few_channels_gets_a_narrow_tile():
    for columns, widest in ((8, 16), (16, 16), (32, 32)):
        shape = (32768, 8 * columns, columns, 8, 3, 3, 1, 1)
        best = preferred("int8 convolution", shape, convolution.GROUPED, H200)[0]
        assert best.block("BLOCK_N") == widest


BERT = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
RESNET = [
    (side * side * 64, n, k, 1, t, t, 1, 1)
    for side, width in ((56, 64), (28, 128), (14, 256), (7, 512))
    for n, k, t in ((width, 4 * width, 1), (width, width, 3), (4 * width, width, 1))
]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.capability)
def test_a_model_needs_few_kernels(gpu):
    """Each one more takes its time to compile before the first batch."""
    linears = {preferred("int8 matmul", (4096, *s), linear.LARGE, gpu)[0] for s in BERT}
    convs = {preferred("int8 convolution", s, convolution.DENSE, gpu)[0] for s in RESNET}
    assert len(linears) <= 2
    assert len(convs) <= 4


def test_near_estimates_take_the_first_listed():
    listed = table().listed("int8 matmul", 90)
    for rows in (256, 1024, 4096, 32768):
        shape = (rows, 4096, 4096)
        best = preferred("int8 matmul", shape, linear.LARGE, H200)[0]
        balance = table().architecture(90).balance
        times = {
            c: estimate(c, problem_of("int8 matmul", shape), H200.processors, balance)
            for c in listed
            if c in linear.LARGE
        }
        near = [c for c in times if times[c] <= TOLERANCE * min(times.values())]
        assert best == near[0]


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        *((name, name) for name in OFFERED),
        ("int8 matmul to int8", "int8 matmul"),
        ("int8 convolution to int8", "int8 convolution"),
        ("int8 matmul to sum", "int8 matmul"),
        ("int8 convolution to sum", "int8 convolution"),
        ("depthwise convolution to sum", "depthwise convolution"),
        ("depthwise to int8", "depthwise convolution"),
        ("packed anything", "packed vector"),
        ("attention", None),
    ],
)
def test_families(kernel, family):
    assert family_of(kernel, tuple(t.family for t in table().tiles)) == family


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.capability)
def test_sums_take_listed_tiles_that_leave_registers(gpu):
    for kernel, offered, shapes in (
        ("int8 matmul to sum", linear.SUM_LARGE, [(4096, *s) for s in BERT]),
        ("int8 convolution to sum", convolution.SUM_DENSE, RESNET),
    ):
        for shape in shapes:
            best = preferred(kernel, shape, offered, gpu)[0]
            m, n, _ = tile(best)
            assert best in table().listed(kernel, gpu.capability)
            assert m * n <= 64 * 32 * best.warps


def test_an_unknown_kernel_takes_the_first_that_fits():
    huge = config(BLOCK_M=256, BLOCK_N=256, BLOCK_K=256, stages=5)
    usual = config(BLOCK_M=32, BLOCK_N=32, BLOCK_K=64)
    assert preferred("attention", (64, 64, 64), (huge, usual), H200) == [usual, huge]
    odd = (config(ROWS=4), config(ROWS=8))
    assert preferred("attention", (), odd, H200) == list(odd)


def test_all_that_is_offered_is_tried():
    for family, offered in OFFERED.items():
        for gpu in GPUS:
            order = preferred(family, SHAPES[family], offered, gpu)
            assert sorted(map(str, order)) == sorted(map(str, offered))


def test_a_gpu_that_is_not_listed_is_like_the_next_older_one():
    known = {70: 80, 80: 80, 87: 86, 89: 89, 90: 90, 103: 100, 121: 120, 150: 120}
    for capability, like in known.items():
        assert table().architecture(capability).capability == like


def test_shapes():
    assert problem_of("int8 matmul", (64, 10, 20, True, False, True)) == Problem(64, 10, 20)
    assert problem_of("int8 convolution", (64, 30, 5, 3, 3, 2, 1, 1)) == Problem(64, 10, 30, 3)
    assert problem_of("depthwise to int8", (64, 32, 1, 32, 3, 3, 1, 1)) == Problem(64, 32, 1)
    assert problem_of("packed vector", (2, 8, 9, 3, 9, 4)) == Problem(2, 8, 9, bits=3, itemsize=4)
    assert problem_of("int8 convolution", (64, 8)) == Problem(64, 8, 1)
