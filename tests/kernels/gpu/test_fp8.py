import pytest
import torch

from autoquant.kernels.gpu.fp8 import LARGEST, fp8_linear, has_fp8, to_fp8


def test_numbers_of_fp8_survive_and_the_rest_is_close():
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    q, scale = to_fp8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert q.float().abs().max() == LARGEST
    again = q.float() * scale
    assert ((again - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    assert torch.equal(to_fp8(again)[0].float(), q.float())


def test_zeros():
    q, scale = to_fp8(torch.zeros(3, 4))
    assert scale == 1
    assert (q.float() == 0).all()


def test_a_cpu_has_no_fp8():
    assert not has_fp8(torch.device("cpu"))


def test_product():
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda and not has_fp8(device):
        pytest.skip("the GPU has no fp8")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 64, generator=generator).to(device)
    w = torch.randn(32, 64, generator=generator).to(device)
    q, scale = to_fp8(w)
    xq, x_scale = to_fp8(x)
    try:
        y = fp8_linear(x, q, scale)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch has no fp8 product here: {str(error).splitlines()[0]}")
    expected = (xq.float() * x_scale) @ (q.float() * scale).T
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=0.1)
