"""An output that stays integers is, to everybody but its reader, the tensor of real numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.nn.layer_output import After, LayerOutput, as_real
from autoquant.spec.recipe import ActivationScheme

SCHEME = ActivationScheme(8, scale=0.5, zero_point=0)
REAL = torch.tensor([[0.1, -1.0], [2.4, 60.0]])
Q = (REAL / 0.5).round().add(128).to(torch.uint8)


def made() -> tuple[LayerOutput, list[int]]:
    asked: list[int] = []

    def compute(source: Tensor, done: After) -> Tensor:
        asked.append(1)
        assert done is None
        return source.clone()

    return LayerOutput.of(Q, REAL, SCHEME, compute, REAL.stride()), asked


def test_its_form_is_known_without_its_numbers():
    y, asked = made()
    assert isinstance(y, Tensor)
    assert (y.shape, y.dtype, y.device, y.ndim, y.layout) == (
        *((2, 2), torch.float32, torch.device("cpu"), 2),
        torch.strided,
    )
    assert (y.dim(), y.size(0), y.numel(), len(y), y.stride()) == (2, 2, 4, 2, (2, 1))
    assert y.is_contiguous()
    assert y.is_floating_point()
    assert not y.requires_grad
    assert not asked
    assert not y.seen


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y + 1,
        lambda y: 1 - y,
        lambda y: y.flatten(),
        lambda y: y[0],
        lambda y: torch.cat([y, y]),
        lambda y: torch.stack((y, y.mean(0, keepdim=True).expand(2, 2))),
        lambda y: torch.nn.functional.relu(y),
        lambda y: y.sum().item(),
        lambda y: y.tolist(),
        lambda y: y.numpy(),
        lambda y: np.asarray(y),
        lambda y: y.clone(),
        lambda y: y.detach(),
        lambda y: y.to(torch.float64),
        lambda y: y.half(),
        lambda y: copy.deepcopy(y),
        lambda y: torch.nn.Linear(2, 3).requires_grad_(False).weight @ y,
        lambda y: y @ y.mT,
        lambda y: bool((y > 0).any()),
        lambda y: [float(v) for row in y for v in row],
        lambda y: repr(y),
        lambda y: torch.einsum("ij,jk->ik", y, y),
        lambda y: torch.empty(2, 2).copy_(y),
        lambda y: torch.zeros(2, 2).add_(y),
        lambda y: torch.ops.aten.mul.Tensor(y, 2.0),
    ],
)
def test_whoever_uses_it_has_the_real_numbers(use):
    torch.manual_seed(0)
    y, asked = made()
    found = use(y)
    torch.manual_seed(0)
    expected = use(REAL.clone())
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert np.array_equal(found, expected)
    assert asked == [1]
    assert y.seen
    assert not y.written


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.add_(1),
        lambda y: y.view(4).mul_(2),
        lambda y: torch.relu_(y),
        lambda y: y.__setitem__(0, 7.0),
        lambda y: torch.add(y, 1, out=y),
        lambda y: y.detach().zero_(),
    ],
)
def test_what_is_written_into_it_is_noticed_and_stays(write):
    y, asked = made()
    plain = REAL.clone()
    write(y)
    write(plain)
    assert y.written
    assert torch.equal(y + 0, plain)
    assert torch.equal(as_real(y), plain)
    assert asked == [1]


def test_numbers_that_torch_does_not_watch_count_as_written():
    y, _ = made()
    with torch.inference_mode():
        assert float(y.sum()) == pytest.approx(float(REAL.sum()))
    assert y.written


def test_no_name_of_a_tensors_own_means_something_else():
    ours = {*vars(LayerOutput), *LayerOutput.__annotations__}
    assert {name for name in ours if hasattr(Tensor, name)} <= {
        *("__module__", "__doc__", "__annotations__", "__torch_function__", "__torch_dispatch__"),
        *("__firstlineno__", "__static_attributes__"),
    }
    y, _ = made()
    assert torch.equal(y.real, REAL)


STEPS: dict[Any, Callable[[Tensor], Tensor]] = {
    "none": F.gelu,
    "tanh": nn.GELU("tanh"),
    (0.0, inf): F.relu,
    (0.0, 6.0): nn.ReLU6(),
}


def ahead(
    after: After, scheme: ActivationScheme | None = SCHEME
) -> tuple[LayerOutput, list[After]]:
    """Return an output whose ``after`` is computed, and what is asked of it."""
    asked: list[After] = []

    def compute(source: Tensor, done: After) -> Tensor:
        asked.append(done)
        return STEPS[done](source) if done is not None else source.clone()

    held = Q if scheme is not None else STEPS[after](REAL)
    return LayerOutput.of(held, REAL, scheme, compute, REAL.stride(), after), asked


@pytest.mark.parametrize("after", STEPS)
def test_integers_of_what_follows_are_its_own_and_nobody_elses(after):
    y, asked = ahead(after)
    assert y.integers(SCHEME) is None
    z = STEPS[after](nn.Dropout(0.5).eval()(y))
    assert type(z) is LayerOutput
    assert z.integers(SCHEME) is Q
    assert STEPS[after](y).integers(SCHEME) is Q  # as often as it is asked for
    assert not asked
    assert torch.equal(z + 0, STEPS[after](REAL))
    assert torch.equal(y + 0, REAL)
    assert asked == [after, None]
    # Anything else that follows, or what was written into, is computed from the real numbers.
    for other in set(STEPS) - {after}:
        found = STEPS[other](y)
        assert type(found) is Tensor
        assert torch.equal(found, STEPS[other](REAL))
    y.mul_(2)
    assert torch.equal(STEPS[after](y), STEPS[after](2 * REAL))


@pytest.mark.parametrize("after", [(0.0, inf), (0.0, 6.0)])
@pytest.mark.parametrize("seen", [False, True])
def test_a_relu_that_was_computed_ahead_is_given_once_and_the_raw_numbers_to_all_others(
    after, seen
):
    y, asked = ahead(after, None)
    if seen:
        assert torch.equal(y * 1, REAL)
    one = STEPS[after](y)
    assert type(one) is Tensor
    assert asked == [None] * seen
    one.add_(1)  # what its owner does with it reaches nobody else
    assert torch.equal(STEPS[after](y), STEPS[after](REAL))
    assert torch.equal(y + 0, REAL)


@pytest.mark.parametrize("scheme", [None, SCHEME])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(
    ("after", "write"),
    [
        ((0.0, inf), nn.ReLU(inplace=True)),
        ((0.0, inf), torch.relu_),
        ((0.0, inf), Tensor.relu_),
        ((0.0, 6.0), nn.ReLU6(inplace=True)),
        ((0.0, 6.0), lambda x: F.hardtanh(x, 0.0, 6.0, inplace=True)),
    ],
)
def test_a_relu_in_place_changes_the_output_for_all_who_hold_it(scheme, seen, after, write):
    y, _ = ahead(after, scheme)
    view = y.view(4) if seen else None
    before = y.changes + y.written
    z = write(y)
    assert y.changes + y.written > before
    assert torch.equal(z + 0, STEPS[after](REAL))
    assert torch.equal(y + 0, STEPS[after](REAL))
    z.mul_(2)
    assert torch.equal(y + 0, 2 * STEPS[after](REAL))
    if view is not None:
        assert torch.equal(view, 2 * STEPS[after](REAL).view(4))


def test_a_dropout_that_drops_has_the_real_numbers():
    y, asked = made()
    assert torch.nn.functional.dropout(y, 0.5, training=False) is y
    assert not asked
    torch.manual_seed(0)
    found = torch.nn.functional.dropout(y, 0.5)
    torch.manual_seed(0)
    assert torch.equal(found, torch.nn.functional.dropout(REAL, 0.5))
    assert asked
