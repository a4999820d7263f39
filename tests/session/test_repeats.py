from __future__ import annotations

import pytest
import torch
from torch import nn

from autoquant.session.repeats import first_to_differ

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = inner
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.inner(self.linear(x)))


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Now(nn.Module):
    """Calls a module at every other turn."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.ReLU()

    def forward(self, x):
        self.calls += 1
        return self.extra(x) if self.calls % 2 else x


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (
            nn.Dropout(0.5).train(),
            "inner (Dropout, in training mode), given the same inputs: the output differs by ",
        ),
        (Counts().eval(), "inner (Counts), given the same inputs: the output differs by 1, "),
        (nn.Sequential(nn.ReLU(), Counts()).eval(), "inner.1 (Counts), given the same inputs"),
    ],
)
def test_the_innermost_module_is_named(inner, said):
    model = Block(nn.Identity()).eval()
    model.inner = inner
    found = first_to_differ(model, lambda: model(X), 1e-4)
    assert found.startswith(f"the first module that differs is {said}")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_modules_are_called():
    model = Block(Now()).eval()
    found = first_to_differ(model, lambda: model(X), 1e-4)
    assert found == "the second run calls inner (Now) where the first one did not"


def test_the_code_around_the_modules():
    model = Block(nn.Identity()).eval()
    values = iter(range(9))
    assert "the code around" in first_to_differ(model, lambda: model(X) + next(values), 1e-4)
