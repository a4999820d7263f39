"""Runs the Triton kernels on the CPU, where ``tests/conftest.py`` has chosen the interpreter."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=not INTERPRETED)
def on_a_gpu(monkeypatch, tmp_path_factory):
    """Keep the oracle in full float32, and choices of block sizes out of the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    # cuDNN multiplies in TF32, or by transforms that are as inexact.
    with torch.backends.cudnn.flags(enabled=False):
        yield


@pytest.fixture(scope="session")
def device():
    """The device that kernels run on: the GPU, or the CPU where they are interpreted."""
    from autoquant.kernels.gpu.device.matmul import int8_matmul

    # What was imported before the interpreter was chosen would be compiled.
    assert (type(int8_matmul).__name__ == "InterpretedFunction") == INTERPRETED
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def backend():
    from autoquant.kernels.gpu import TritonBackend

    return TritonBackend(interpret=INTERPRETED)


@pytest.fixture(scope="session")
def make_weight(device):
    """Return a function that quantizes a random weight."""
    from autoquant.quant.affine import choose_qparams, quantize
    from autoquant.quant.blocks import from_blocks, to_blocks, to_matrix
    from autoquant.quant.weight import QuantizedWeight
    from autoquant.spec.recipe import WeightScheme

    def make(shape, bits=8, granularity="per_channel", scheme="symmetric", seed=0, dead=()):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
        weight[list(dead)] = 0.0
        matrix = to_matrix(weight, 0)
        spec = WeightScheme(bits, granularity, scheme)
        blocks = to_blocks(matrix, granularity)
        lo, hi = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        p = choose_qparams(lo.to(device), hi.to(device), bits, symmetric=scheme == "symmetric")
        q = from_blocks(quantize(blocks.to(device), p), tuple(matrix.shape))
        return QuantizedWeight(q, p, spec, tuple(shape), 0)

    return make


@pytest.fixture(scope="session")
def agree():
    """Return a function that asserts that a result is the reference's."""

    def check(y, expected, tolerance=1e-5):
        assert y is not None
        assert y.shape == expected.shape
        assert y.dtype == expected.dtype
        y, expected = y.float(), expected.float()
        assert torch.equal(y.isnan(), expected.isnan())
        y, expected = y.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
        largest = expected.abs().max().item()
        assert (y - expected).abs().max().item() <= tolerance * max(largest, 1e-30)

    return check


@pytest.fixture
def poisoned(monkeypatch, device):
    """Fill every new buffer: what a kernel does not write shows as NaN or as a wild integer."""
    empty = torch.empty

    def fill(*shape, **options):
        made = empty(*shape, **options)
        if made.dtype.is_floating_point:
            return made.fill_(float("nan"))
        return made.fill_(torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", fill)


@pytest.fixture
def flag(device):
    """Doubts that are being collected: int32 [1], 0 at first."""
    from autoquant.kernels.gpu.doubt import collecting

    made = torch.zeros(1, dtype=torch.int32, device=device)
    with collecting(made):
        yield made


@pytest.fixture
def choose(monkeypatch):
    """Return a function that makes kernels take one config, where it can be launched at all."""
    from autoquant.kernels.gpu import tuning

    def patch(c):
        def tuned(kernel, shape, configs, run, device):
            try:
                run(c)
            except Exception as error:  # a GPU with less shared memory than this one needs
                if device.type == "cpu":
                    raise
                pytest.skip(str(error))
            return c

        monkeypatch.setattr(tuning, "tuned", tuned)

    return patch
