import pytest
import torch

from autoquant.kernels.gpu.graphs import Replayed


def test_without_a_gpu_the_function_is_called():
    calls = []

    def double(x):
        calls.append(x)
        return 2 * x

    replayed = Replayed(double)
    for n in range(3):
        assert torch.equal(replayed(torch.full((2,), n)), torch.full((2,), 2 * n))
    assert len(calls) == 3


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
@needs_gpu
def test_a_replay_returns_what_the_function_does():
    calls = []
    weight = torch.randn(16, 16, device="cuda")

    def function(x):
        calls.append(1)
        return (x @ weight).relu()

    replayed = Replayed(function)
    results = []
    for shape in ((4, 16), (7, 16)):
        for _ in range(4):
            x = torch.randn(shape, device="cuda")
            results.append((replayed(x), (x @ weight).relu()))
    for result, expected in results:  # an output is not overwritten by a later replay
        torch.testing.assert_close(result, expected)
    made = len(calls)
    replayed(torch.randn(4, 16, device="cuda"))
    assert len(calls) == made


@gpu
@needs_gpu
def test_what_cannot_be_captured_is_called():
    def function(x):
        return x * float(x.sum().cpu())

    replayed = Replayed(function)
    for _ in range(4):
        x = torch.rand(8, device="cuda")
        torch.testing.assert_close(replayed(x), function(x))


@gpu
@needs_gpu
def test_products_can_be_replayed(backend, device, make_weight, agree):
    from autoquant.kernels.operation import LINEAR
    from autoquant.kernels.reference import reference
    from autoquant.spec.recipe import ActivationScheme

    weight, scheme = make_weight((48, 64)), ActivationScheme(8, "per_token")
    product = backend.prepare(LINEAR, weight, scheme, device)
    replayed = Replayed(lambda x: product(x, None))
    for _ in range(4):
        x = torch.randn(33, 64, device=device)
        agree(replayed(x), reference(LINEAR, x, weight, scheme, None))
