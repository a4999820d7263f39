"""Everything that is put on a user's module, in one place.

A converted module keeps its class, its attributes, its hooks and its parameters, so code that holds
on to it, asks for its type or reads ``layer.weight`` goes on working. What is added:

- one ``Converted``, under the one name NAME, which also stands in the module's ``forward``;
- the dictionary that torch looks the module's weights up in becomes a ``Lent`` one, so that
  whoever reads ``layer.weight`` gets the weight that the layer computes with.

In a saved model there are packed integers instead of parameters: those are submodules, under NAME.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.kernels.operation import Operation, Reader
from autoquant.nn.layer_output import After
from autoquant.nn.runtime import SiteRuntime
from autoquant.nn.sums import Plan

NAME = "_autoquant"
"""The one name in a user's module that is ours."""


class Telling(Protocol):
    """Is told what a layer gives."""

    def made(self, y: Tensor) -> None:
        """Note an output."""
        ...


Compute = Callable[["Converted"], Callable[..., Any]]
"""Makes of a converted module what one call of it is computed by."""


class Converted:
    """What a converted module computes by: stands in the place of its ``forward``.

    ``path`` is the module's in the model. ``operation`` says what the layer does, None where no
    kernel can stand in for it; ``channels_last`` makes a 2-d convolution compute in that memory
    format. ``after`` is the ReLU or GELU that is expected to follow, and ``reader`` the layer that
    alone is expected to read what comes out then; ``plan`` says so of an output that something is
    added to. All that was seen, and nothing but speed depends on it. ``fold`` is told of every
    output, where a BatchNorm went into the layer. ``rest`` is the lower format of the model around,
    None where that is float32 (``nn.rest``).
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        sites: dict[str, SiteRuntime],
        compute: Compute,
        operation: Operation | None = None,
    ) -> None:
        self.module = module
        self.path = path
        self.sites = sites
        self.compute = compute
        self.operation = operation
        self.channels_last = False
        self.after: After = None
        self.reader: Converted | None = None
        self.plan: Plan | None = None
        self.fold: Telling | None = None
        self.rest: torch.dtype | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns, computed with its sites."""
        if not torch.compiler.is_compiling():
            for name, site in self.sites.items():
                if _held(self.module, name) is not site.parameter:
                    return self._given(name, args, kwargs)
        y = self.compute(self)(*args, **kwargs)
        if self.fold is not None:
            self.fold.made(y)
        return y

    @property
    def __self__(self) -> nn.Module:
        """The module, as of any method of one."""
        return self.module

    @property
    def __code__(self) -> CodeType:
        """The code of the module's own ``forward``, for tools that name it."""
        code: CodeType = type(self.module).forward.__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        """What the module's ``forward`` takes, for code that asks."""
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own ``forward`` returns, with the weights that are lent."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def reads(self) -> Reader | None:
        """Return the scheme whose integers the layer takes as its input, None for real numbers."""
        return self.sites["weight"].reads(self.operation)

    def _given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute with weights that were put in from outside, where nothing is quantized."""
        if all(
            site.is_float("its weight is replaced while the model runs")
            for site in self.sites.values()
        ):
            return self.own(*args, **kwargs)
        where = f"{self.path}.{name}" if self.path else name
        raise UserError(
            f"{where} is quantized, so no other weight can be put in its place "
            "(torch.func.functional_call); leave it out of what is given, or the layer in float"
        )


class Lent(dict[str, Any]):
    """The parameters (or buffers) of a module; the weights that have a site come from there.

    What is kept under a name is what ``named_parameters`` and ``state_dict`` list. Whoever looks a
    name up gets the weight to compute with, unless another tensor was put in its place.
    """

    def __init__(self, own: Mapping[str, Any], sites: Any) -> None:
        super().__init__(own)
        self.sites = sites
        self._lent: dict[str, weakref.ref[Tensor]] = {}

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.sites

    def __getitem__(self, name: str) -> Any:
        if name in self.sites:
            site = self.sites[name]
            own = super().get(name)
            if own is not site.parameter:
                return own
            value = site.weight
        else:
            own = super().__getitem__(name)
            if name != "bias" or "weight" not in self.sites:
                return own
            value = self.sites["weight"].bias(own)
        if value is not own and value is not None and not torch.compiler.is_compiling():
            self._lent[name] = weakref.ref(value)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        # Whoever swaps a tensor for a while puts back what was lent: what was held stays.
        lent = self._lent.get(name)
        if lent is None or value is None or lent() is not value:
            super().__setitem__(name, value)
        elif name in self.sites and self.sites[name].parameter is None:
            super().pop(name, None)
        elif name in self.sites:
            super().__setitem__(name, self.sites[name].parameter)

    def __reduce__(self) -> Any:
        return type(self), (dict(self), self.sites)


def _held(module: nn.Module, name: str) -> Any:
    """Return what a module itself holds under the name of a weight, None where it holds nothing."""
    for held in (module._parameters, module._buffers):
        if dict.__contains__(held, name):
            return dict.get(held, name)
    return None


def install(
    module: nn.Module,
    path: str,
    sites: dict[str, SiteRuntime],
    compute: Compute,
    operation: Operation | None,
) -> Converted:
    """Make a module compute with ``sites``; its parameters stay where they are."""
    converted = Converted(module, path, sites, compute, operation)
    held = vars(module)
    held[NAME] = held["forward"] = converted
    held["_parameters"] = Lent(held["_parameters"], sites)
    return converted


def remove(module: nn.Module) -> None:
    """Make a module again what it was before ``install``."""
    held = vars(module)
    del held[NAME], held["forward"]
    held["_parameters"] = dict(held["_parameters"].items())
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def carry(
    module: nn.Module,
    path: str,
    packed: Mapping[str, nn.Module],
    compute: Compute,
    rest: torch.dtype | None = None,
) -> Converted:
    """Put packed sites in the place of a module's parameters of these names, as submodules."""
    sites: Any = {}
    held = vars(module)
    if packed:
        for name in packed:
            del module._parameters[name]
        sites = nn.ModuleDict(packed)
        module.add_module(NAME, sites)
        held["_buffers"] = Lent(held["_buffers"], sites)
        if rest is not None:  # the bias that is computed with is not the one that is kept, either
            held["_parameters"] = Lent(held["_parameters"], sites)
    held["forward"] = converted = Converted(module, path, sites, compute)
    converted.rest = rest
    if packed and isinstance(module, nn.RNNBase):
        # The list of weights for the fused kernel would keep real ones alive; by this name there
        # is none.
        module._flat_weights, module._flat_weights_names = [None], [""]
        module._flat_weight_refs = [None]
    return converted


def is_carrying(module: nn.Module) -> bool:
    """Return whether a module carries packed sites."""
    return NAME in module._modules


def converted_of(module: nn.Module) -> Converted | None:
    """Return what a module that takes recipes computes by, None for any other."""
    found = vars(module).get(NAME)
    return found if isinstance(found, Converted) else None


def computed_modules(model: nn.Module) -> Iterator[Converted]:
    """Yield what every module computes by that takes recipes, or carries packed sites."""
    for module in model.modules():
        found = vars(module).get("forward")
        if isinstance(found, Converted):
            yield found


def converted_modules(model: nn.Module) -> Iterator[Converted]:
    """Yield what every module of ``model`` that takes recipes computes by."""
    for module in model.modules():
        found = converted_of(module)
        if found is not None:
            yield found
