"""Folding a BatchNorm into the convolution or linear layer before it.

Which BatchNorm follows which layer is seen in runs of the model as the user gave it (``pairs``); it
is folded where it alone ever reads the layer's output, and nothing else, and no other code uses its
numbers. The norm itself stays, with its weights, for code that asks for their form; what reaches it
passes. At run time every fold sees to
it that the layer's output does reach the norm, and the norm nothing else: a run that takes another
way ends in an error, not in other numbers.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoquant.errors import SpecError, TrialError
from autoquant.nn.converted import NAME, converted_of
from autoquant.nn.layer_output import version_of
from autoquant.nn.layouts import layout_of

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_fixed_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a BatchNorm with statistics, and nothing more."""
    return (
        isinstance(module, NORMS)
        and not module.training
        and module.running_mean is not None
        and "forward" not in vars(module)
        and type(module).forward is nn.modules.batchnorm._BatchNorm.forward
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def is_foldable(module: nn.Module) -> bool:
    """Return whether a BatchNorm can be folded into ``module``: nobody else looks at its output."""
    layout = layout_of(module)
    if layout is None or layout.kind not in ("linear", "conv", "conv_transpose"):
        return False
    if module._parameters.get("weight") is None or "bias" not in module._parameters:
        return False  # computed from others
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return layout.kind != "conv_transpose" or getattr(module, "groups", 1) == 1


class Fold:
    """One BatchNorm that is computed in the layer before it.

    While it is ``trusted``, the way that outputs take is not looked at: it was seen before.
    """

    def __init__(self, layer: str, norm: str) -> None:
        self.layer = layer
        self.norm = norm
        self.trusted = False
        self._made: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def made(self, y: Tensor) -> None:
        """Note an output of the layer, which the norm has to get before anything else happens."""
        if self.trusted or torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        if thread in self._made:
            raise self._astray(f"did not reach its BatchNorm {self.norm}")
        self._made[thread] = weakref.ref(y), version_of(y)

    def take(self, x: Tensor) -> Tensor:
        """Return what the norm makes of ``x``, the layer's output: nothing, any more."""
        if self.trusted or torch.compiler.is_compiling():
            return x
        made, version = self._made.pop(threading.get_ident(), (None, 0))
        if made is None or made() is not x or version != version_of(x):
            raise self._astray(f"is not what its BatchNorm {self.norm} got")
        return x

    def begin(self) -> None:
        """Forget what a run that failed may have left."""
        self._made.pop(threading.get_ident(), None)

    def end(self) -> None:
        """Raise TrialError where an output has not reached the norm."""
        if threading.get_ident() in self._made:
            raise self._astray(f"did not reach its BatchNorm {self.norm}")

    def _astray(self, what: str) -> TrialError:
        self.begin()
        return TrialError(
            f"{self.layer}: its output {what}, which was folded into it because on the data that "
            "the recipe was made with it always did: search again with data like these"
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": {}}


class FoldedNorm:
    """Stands in the ``forward`` of a BatchNorm that was folded."""

    def __init__(self, fold: Fold) -> None:
        self.fold = fold

    def __call__(self, input: Tensor) -> Tensor:
        """Return ``input``, which the layer before has normalized."""
        return self.fold.take(input)


class _Around:
    """A hook before, or behind, a whole model: every output has to reach its norm in between."""

    def __init__(self, folds: dict[str, Fold], *, end: bool) -> None:
        self.folds = folds
        self.ends = end

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for fold in self.folds.values():
            fold.end() if self.ends else fold.begin()


Weights = tuple[nn.Parameter, nn.Parameter | None]
"""A layer's weight and bias."""


class Folds:
    """The folds of one model, by the paths of norms; each can be taken back until ``settle``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._folds: dict[str, Fold] = {}
        self._off: dict[str, Fold] = {}
        self._before: dict[str, Weights] = {}
        self._after: dict[str, Weights] = {}
        self._biased: dict[str, bool] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def pairs(self) -> dict[str, str]:
        """Path of each norm → path of the layer that it was folded into."""
        return {norm: fold.layer for norm, fold in self._folds.items()}

    def biased(self, norm_path: str) -> bool:
        """Return whether the layer had a bias before."""
        return self._biased[norm_path]

    def layer_of(self, norm_path: str) -> str:
        """Return the path of the layer that a norm was folded into, or is to be again."""
        return (self._folds | self._off)[norm_path].layer

    def watch(self) -> None:
        """Have the layers, which are converted by now, tell what they give."""
        for fold in self._folds.values():
            self._tell(fold, fold)

    def trust(self, trusted: bool) -> None:
        """Say whether the way that outputs take was seen before: results are kept and given."""
        for fold in self._folds.values():
            fold.trusted = trusted

    def add(self, norm_path: str, layer_path: str) -> None:
        """Fold one BatchNorm into its layer, in place. Raises SpecError on an unknown path."""
        try:
            norm = self.model.get_submodule(norm_path)
            layer = self.model.get_submodule(layer_path)
        except AttributeError:
            raise SpecError(
                f"folded: {norm_path} → {layer_path} is not in the model; is it another model's?"
            ) from None
        if not isinstance(norm, NORMS) or not _fits(norm, layer):
            raise SpecError(f"folded: {norm_path} → {layer_path} is no BatchNorm after a layer")
        self._before[norm_path] = layer._parameters["weight"], layer._parameters["bias"]  # type: ignore[assignment]
        self._after[norm_path] = folded_weights(norm, layer)
        self._biased[norm_path] = layer._parameters["bias"] is not None
        self._off[norm_path] = Fold(layer_path, norm_path)
        self.turn(norm_path, on=True)

    def turn(self, norm_path: str, *, on: bool) -> nn.Parameter:
        """Take one fold back, or make it again; return the weight that the layer has now."""
        fold = (self._off if on else self._folds).pop(norm_path)
        (self._folds if on else self._off)[norm_path] = fold
        layer, norm = (self.model.get_submodule(p) for p in (fold.layer, norm_path))
        weight, bias = (self._after if on else self._before)[norm_path]
        dict.__setitem__(layer._parameters, "weight", weight)
        dict.__setitem__(layer._parameters, "bias", bias)
        self._tell(fold, fold if on else None)
        if on:
            vars(norm)[NAME] = vars(norm)["forward"] = FoldedNorm(fold)
        else:
            del vars(norm)[NAME], vars(norm)["forward"]
        if self._folds and not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(_Around(self._folds, end=False), prepend=True),
                self.model.register_forward_hook(_Around(self._folds, end=True), prepend=True),
            ]
        while self._handles and not self._folds:
            self._handles.pop().remove()
        return weight

    def settle(self) -> None:
        """Free the weights that layers had before: what is folded stays so."""
        for known in (self._before, self._after, self._off):
            known.clear()

    def _tell(self, fold: Fold, listener: Fold | None) -> None:
        converted = converted_of(self.model.get_submodule(fold.layer))
        if converted is not None:
            converted.fold = listener


def folded_norms(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorms that were folded: no code reads their numbers."""
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), FoldedNorm)]


@contextlib.contextmanager
def without_norms(model: nn.Module) -> Iterator[None]:
    """Take the numbers of folded BatchNorms, which nothing needs, off a model inside."""
    norms = folded_norms(model)
    kept = [(m._parameters, m._buffers) for m in norms]
    for m in norms:
        vars(m)["_parameters"] = dict.fromkeys(m._parameters)
        vars(m)["_buffers"] = dict.fromkeys(m._buffers)
    try:
        yield
    finally:
        for m, (parameters, buffers) in zip(norms, kept, strict=True):
            vars(m)["_parameters"], vars(m)["_buffers"] = parameters, buffers


def unfold(norm: nn.Module) -> None:
    """Make a BatchNorm compute again, in a copy of a model with folds."""
    del vars(norm)[NAME], vars(norm)["forward"]


def drop_hooks(model: nn.Module) -> None:
    """Take the hooks of folds off a copy of a model."""
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Around)]:
            del hooks[key]


def fold(model: nn.Module, pairs: Mapping[str, str]) -> Folds:
    """Fold every BatchNorm of ``pairs``, by its path, into the layer of that path, in place.

    Raises SpecError on an unknown path.
    """
    folds = Folds(model)
    for norm, layer in pairs.items():
        folds.add(norm, layer)
    return folds


def _fits(norm: Norm, layer: nn.Module) -> bool:
    layout = layout_of(layer)
    if layout is None or not is_fixed_norm(norm) or not is_foldable(layer):
        return False
    return norm.num_features == layer.get_parameter("weight").shape[layout.channel_axis]


def folded_weights(norm: Norm, layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weight and bias of a layer with its BatchNorm in it."""
    layout = layout_of(layer)
    assert layout is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = torch.rsqrt(variance + norm.eps)
    offset = torch.zeros_like(mean)
    if norm.affine:
        gain = gain * norm.weight.detach().double()
        offset = norm.bias.detach().double()
    shape = [1] * weight.dim()
    shape[layout.channel_axis] = -1
    start = torch.zeros_like(mean) if bias is None else bias.detach().double()
    new_weight = weight.detach().double() * gain.reshape(shape)
    new_bias = (start - mean) * gain + offset
    keep = weight.requires_grad
    return (
        nn.Parameter(new_weight.to(weight.dtype), requires_grad=keep),
        nn.Parameter(new_bias.to(weight.dtype), requires_grad=keep),
    )
