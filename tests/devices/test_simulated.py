"""The simulated GPU takes what a GPU takes, and refuses what one refuses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from autoquant.kernels.cpu import native
from autoquant.kernels.cpu.library import library
from tests.devices.simulated import SimulatedGPU

THERE: dict[str, Callable[[], Tensor]] = {
    "a factory": lambda: torch.zeros(3, device="cuda"),
    "a factory by index": lambda: torch.arange(3, device=torch.device("cuda", 0)),
    "to": lambda: torch.ones(3).to("cuda"),
    "to, with a dtype": lambda: torch.ones(3).to("cuda", torch.float64),
    "to another's": lambda: torch.ones(3).to(torch.ones(1, device="cuda")),
    "cuda": lambda: torch.ones(3).cuda(),
    "tensor": lambda: torch.tensor([1.0], device="cuda"),
    "as_tensor": lambda: torch.as_tensor(torch.ones(3), device="cuda"),
    "new": lambda: torch.ones(3).cuda().new_zeros(2),
    "new_tensor": lambda: torch.ones(3).cuda().new_tensor([1.0]),
    "like": lambda: torch.zeros_like(torch.ones(3), device="cuda"),
    "a sum": lambda: torch.ones(3).cuda().sum(),
    "a view": lambda: torch.ones(4).cuda().view(2, 2)[1:],
    "a context": lambda: torch.zeros(2),
    "a copy": lambda: copy.deepcopy(torch.ones(3).cuda()),
    "a parameter": lambda: nn.Linear(2, 2, device="cuda").weight,
    "a module that was moved": lambda: nn.Linear(2, 2).to("cuda")(torch.ones(1, 2).cuda()),
    "a module that was copied": lambda: copy.deepcopy(nn.Linear(2, 2).cuda()).bias,
    "a state that was loaded": lambda: _loaded().weight,
    "a gradient": lambda: _gradient(),
    "made inside of an operator": lambda: F.one_hot(torch.arange(3).cuda(), 4),
    "attention": lambda: _attention(),
    "recurrent": lambda: nn.LSTM(2, 3).cuda()(torch.ones(4, 1, 2).cuda())[0],
}


def _loaded() -> nn.Linear:
    layer = nn.Linear(2, 2).cuda()
    layer.load_state_dict(nn.Linear(2, 2).state_dict())
    return layer


def _gradient() -> Tensor:
    layer = nn.Linear(2, 2).cuda()
    layer(torch.ones(1, 2).cuda()).square().sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


def _attention() -> Tensor:
    x = torch.ones(1, 3, 4).cuda()
    y: Tensor = nn.MultiheadAttention(4, 2, batch_first=True).cuda()(x, x, x)[0]
    return y


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@pytest.mark.parametrize("name", THERE)
def test_what_is_on_the_gpu(name):
    with SimulatedGPU():
        if name == "a context":
            with torch.device("cuda"):
                x = THERE[name]()
        else:
            x = THERE[name]()
        assert x.device == torch.device("cuda", 0)
        assert x.device != torch.device("cuda")  # as on a GPU
        assert x.is_cuda
        assert x.get_device() == 0
        assert not x.cpu().is_cuda
        assert (x + 1).is_cuda
    assert not x.is_cuda


def test_what_is_not():
    with SimulatedGPU():
        there = torch.ones(3).cuda()
        for x in (torch.zeros(3), there.cpu(), there.to("cpu"), torch.zeros_like(there).cpu()):
            assert x.device == torch.device("cpu")
        assert there.cpu().cuda().is_cuda
        assert there.to("cuda") is there
        x = torch.ones(3)
        assert x.to("cpu") is x
        assert x.cpu() is x
        assert torch.from_numpy(np.zeros(2)).device.type == "cpu"
        assert there.cpu().data_ptr() != there.data_ptr()


def cpu(*shape: int) -> Tensor:
    return torch.ones(shape)


def gpu(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


ALLOWED = {
    "a number": lambda: gpu(3) * 2.0,
    "a number as a tensor": lambda: gpu(3) * cpu(),
    "a number as a tensor, first": lambda: cpu() - gpu(3),
    "two numbers": lambda: gpu() + cpu(),
    "clamped by a number": lambda: gpu(3).clamp(max=cpu()),
    "a number in where": lambda: torch.where(gpu(3) > 0, gpu(3), cpu()),
    "filled": lambda: gpu(3).fill_(cpu()),
    "masked": lambda: gpu(3).masked_fill(gpu(3) > 0, cpu()),
    "copied to the CPU": lambda: cpu(3).copy_(gpu(3)),
    "copied from the CPU": lambda: gpu(3).copy_(cpu(3)),
    "an index on the CPU": lambda: gpu(3)[torch.tensor([0, 1])],
    "written to an index on the CPU": lambda: gpu(3).index_put_((torch.tensor([0]),), cpu()),
    "a list of each": lambda: torch._foreach_add([gpu(3), cpu(3)], [gpu(3), cpu(3)]),
    "Adam's steps": lambda: _step(),
    "lengths of sequences": lambda: _packed(torch.tensor([2, 1])),
    "what a number is": lambda: gpu().item() + gpu(2).tolist()[0],
    "a CPU's generator for the CPU": lambda: torch.randn(2, generator=torch.Generator()).cuda(),
}

REFUSED = {
    "a sum": lambda: gpu(3) + cpu(3),
    "a sum of rows": lambda: gpu(1) + cpu(3),
    "a number of the GPU": lambda: cpu(3) * gpu(),
    "in place": lambda: cpu(3).mul_(gpu(3)),
    "in place, numbers": lambda: cpu().add_(gpu()),
    "a product": lambda: gpu(2, 2) @ cpu(2, 2),
    "a layer": lambda: nn.Linear(2, 2)(gpu(1, 2)),
    "a bias": lambda: F.linear(gpu(1, 2), gpu(2, 2), cpu(2)),
    "an embedding": lambda: nn.Embedding(3, 2).cuda()(torch.tensor([1])),
    "a concatenation": lambda: torch.cat([gpu(2), cpu(2)]),
    "a stack": lambda: torch.stack([gpu(), cpu()]),
    "where": lambda: torch.where(cpu(3) > 0, gpu(3), gpu(3)),
    "a mask": lambda: gpu(3).masked_fill(cpu(3) > 0, 0.0),
    "an index on the GPU": lambda: cpu(3)[torch.tensor([0, 1], device="cuda")],
    "rows by number": lambda: gpu(3).index_select(0, torch.tensor([0])),
    "gathered": lambda: gpu(3).gather(0, torch.tensor([0])),
    "compared": lambda: torch.equal(gpu(3), cpu(3)),
    "a loss": lambda: F.cross_entropy(gpu(2, 3), torch.tensor([0, 1])),
    "lengths of sequences": lambda: _packed(torch.tensor([2, 1], device="cuda")),
    "a list": lambda: torch._foreach_add([gpu(3), cpu(3)], [cpu(3), gpu(3)]),
    "a CPU's generator": lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
    "drawn by a CPU's generator": lambda: gpu(3).multinomial(1, generator=torch.Generator()),
    "NumPy": lambda: gpu(3).numpy(),
    "NumPy, asked": lambda: np.asarray(gpu(3)),
    "an operator called by its name": lambda: torch.ops.aten.add.Tensor(gpu(3), cpu(3)),
    "in a hook": lambda: _hooked(),
}


def _packed(lengths: Tensor) -> None:
    packed = pack_padded_sequence(gpu(2, 3, 4), lengths, batch_first=True)
    assert packed.data.is_cuda
    assert not packed.batch_sizes.is_cuda
    assert pad_packed_sequence(nn.GRU(4, 2).cuda()(packed)[0])[0].is_cuda


def _step() -> None:
    parameter = nn.Parameter(gpu(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.square().sum().backward()
    optimizer.step()


def _hooked() -> None:
    x = gpu(3).requires_grad_()
    x.register_hook(lambda gradient: gradient + cpu(3))
    x.sum().backward()


def _scheme():
    from autoquant.spec.recipe import ActivationScheme

    return ActivationScheme(8, "per_token")


SCHEME = _scheme()


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_gpu_allows(name):
    with SimulatedGPU():
        ALLOWED[name]()


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses(name):
    simulated = SimulatedGPU()
    refused = pytest.raises((RuntimeError, TypeError))
    with pytest.raises(AssertionError, match="1 times"), simulated, refused:
        REFUSED[name]()
    assert "test_simulated.py" in simulated.mixed[0]


@pytest.mark.skipif(library() is None, reason="the C library was not built")
def test_c_code_refuses_the_memory_of_a_gpu_itself():
    with SimulatedGPU(), pytest.raises(TypeError, match="x is on cuda"):
        native.quantize_rows(gpu(2, 2), SCHEME, "linear")


def test_what_was_caught_is_not_forgotten():
    def swallow() -> None:
        with contextlib.suppress(RuntimeError):
            gpu(3) + cpu(3)

    with pytest.raises(AssertionError, match="in swallow"), SimulatedGPU():
        swallow()


def test_an_error_of_ones_own_stays_what_it_is():
    with pytest.raises(KeyError), SimulatedGPU():
        raise KeyError
