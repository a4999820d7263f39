"""What an exporter is: a file of one kind, written from a quantized model and run where it belongs.

An exporter is a row of EXPORTERS. What it can't express it names before it starts; what it wrote is
loaded again by the runtime itself, behind the model's own call (``Runtime``), so that a task can
measure it as it measures the model.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoquant.errors import UserError
from autoquant.registry import Registry

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a model, by position and by name."""


@dataclass(frozen=True)
class Example:
    """How a model with a ``signature`` is called, and what it gave."""

    signature: inspect.Signature
    call: Call
    output: Any

    @classmethod
    def of(cls, module: nn.Module, call: Call) -> Example:
        """Return what a module gives on one call."""
        with torch.no_grad():
            output = module(*call[0], **call[1])
        return cls(inspect.signature(module.forward), call, output)

    def bound(self, call: Call) -> inspect.BoundArguments:
        """Return the arguments of a call by the names of the parameters, in their order."""
        return self.signature.bind(*call[0], **call[1])

    def tensors(self, call: Call) -> list[Tensor]:
        """Return the tensors that a call gives the model, in the order of its parameters."""
        leaves = pytree.tree_leaves(dict(self.bound(call).arguments))
        return [x for x in leaves if isinstance(x, Tensor)]

    @property
    def names(self) -> list[str]:
        """What the tensors of a call are called, and where they lie in it: "batch.0.mask"."""
        return _paths(dict(self.bound(self.call).arguments), "input")

    @property
    def outputs(self) -> list[str]:
        """What the tensors of the output are called."""
        return _paths(self.output, "output")


def _paths(tree: Any, alone: str) -> list[str]:
    """Return where each tensor of a tree lies in it, ``alone`` for a tensor by itself."""
    return [
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) or alone
        for path, leaf in pytree.tree_leaves_with_path(tree)
        if isinstance(leaf, Tensor)
    ]


class Flat(nn.Module):
    """A model between tensors alone: what else its arguments hold is as in an example."""

    def __init__(self, module: nn.Module, example: Example) -> None:
        super().__init__()
        self.module = module
        self._bound = example.bound(example.call)
        leaves, self._form = pytree.tree_flatten(dict(self._bound.arguments))
        self._leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the outputs."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        bound = inspect.BoundArguments(
            self._bound.signature, OrderedDict(pytree.tree_unflatten(leaves, self._form))
        )
        found = self.module(*bound.args, **bound.kwargs)
        return tuple(x for x in pytree.tree_leaves(found) if isinstance(x, Tensor))


class Exporter(Protocol):
    """Writes files of one kind, and runs them."""

    @property
    def suffix(self) -> str:
        """What the names of its files end in."""
        ...

    @property
    def runtime(self) -> str:
        """What runs them."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The modules that it imports."""
        ...

    def unfit(self, module: nn.Module) -> list[str]:
        """Return what of a deployed model it can't express, a line each."""
        ...

    def write(self, module: nn.Module, example: Example, path: Path) -> None:
        """Write a deployed model; NotExportable where its own code can't be followed."""
        ...

    def ours(self, path: Path) -> bool:
        """Return whether it wrote the file, so that it may be replaced."""
        ...

    def open(self, path: Path, example: Example, threads: int) -> Runtime:
        """Return the file's model, run by its runtime."""
        ...


EXPORTERS: Registry[Exporter] = Registry("export", "autoquant.export.formats")


def check_installed(name: str, exporter: Exporter) -> None:
    """Raise UserError where an exporter's libraries are not installed, with what installs them.

    Modules are called as the distributions that they come in.
    """
    missing = [m for m in exporter.needs if importlib.util.find_spec(m) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"--to {name} needs what is not installed: pip install {names}")


class Runtime(nn.Module):
    """A file's model behind the call of the model that it was made of.

    ``integers`` are the layers that really are computed in integers, of all that multiply, by what
    the runtime says of its own program; None where it doesn't.
    """

    def __init__(self, example: Example) -> None:
        super().__init__()
        self._example = example
        leaves, self._form = pytree.tree_flatten(example.output)
        self._constants = [None if isinstance(x, Tensor) else x for x in leaves]
        self._tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    @property
    def integers(self) -> tuple[int, int] | None:
        """Layers computed in integers, and all of them."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model gives, in its own form."""
        given = self._example.tensors((args, kwargs))
        found = self.compute([x.detach().cpu() for x in given])
        leaves = list(self._constants)
        for place, tensor in zip(self._tensors, found, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self._form)

    def compute(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors of the outputs."""
        raise NotImplementedError


def difference(expected: Any, found: Any) -> float:
    """Return the root of noise over signal of outputs, NaN where they don't pair off."""
    noise = signal = 0.0
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    for a, b in pairs:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            if isinstance(a, Tensor) or isinstance(b, Tensor):
                return float("nan")
            continue
        known = a.isfinite() & b.isfinite() if a.is_floating_point() else torch.ones_like(a).bool()
        a, b = a[known].double(), b[known].double()
        noise += float((a - b).square().sum())
        signal += float(a.square().sum())
    return float((noise / signal) ** 0.5) if signal else float("nan")
