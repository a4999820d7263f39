"""Sites: the weights of a model that can be quantized, and what stays in float and why.

A site is one weight parameter together with the activation that meets it. It is named after the
parameter, without a trailing ``.weight``: ``features.0.0``, ``encoder.weight_ih_l0``,
``attention.in_proj_weight``. Modules that share a parameter share its site.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from autoquant.quant.blocks import matrix_shape


@dataclass(frozen=True, slots=True)
class Site:
    """One weight that can be quantized.

    ``kind`` is linear, conv, conv_transpose, embedding, rnn or attention; ``layer`` is the class of
    the first module that owns it; ``users`` are (module path, parameter name) of all that do.
    ``groups`` are those of a convolution. ``activation`` says whether an activation meets the
    weight that can be quantized (an embedding looks rows up, so nothing meets it).
    """

    name: str
    kind: str
    layer: str
    shape: tuple[int, ...]
    channel_axis: int
    users: tuple[tuple[str, str], ...]
    groups: int = 1
    activation: bool = True

    @property
    def numel(self) -> int:
        """Number of weights."""
        rows, columns = self.matrix
        return rows * columns

    @property
    def corrects(self) -> bool:
        """Whether a bias can make up for the mean error of the quantized weight."""
        return self.activation and self.kind in ("linear", "conv")

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape [output channels, everything else] in which granularity is defined."""
        return matrix_shape(self.shape, self.channel_axis)


@dataclass(frozen=True, slots=True)
class FloatPart:
    """Parameters that stay in float: the module (or parameter), why, and how many."""

    name: str
    reason: str
    parameters: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How one layer type holds its weights: kind, parameter names, and the channel axis."""

    base: type[nn.Module]
    kind: str
    weights: Callable[[nn.Module], tuple[str, ...]]
    channel_axis: int = 0


def _single(_: nn.Module) -> tuple[str, ...]:
    return ("weight",)


_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
_ATTENTION = re.compile(r"(in|q|k|v)_proj_weight")


def _recurrent(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in module._parameters if _RECURRENT.fullmatch(name))


def _attention(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in module._parameters if _ATTENTION.fullmatch(name))


LAYOUTS: tuple[Layout, ...] = (
    Layout(nn.Linear, "linear", _single),
    Layout(nn.Conv1d, "conv", _single),
    Layout(nn.Conv2d, "conv", _single),
    Layout(nn.Conv3d, "conv", _single),
    Layout(nn.ConvTranspose1d, "conv_transpose", _single, channel_axis=1),
    Layout(nn.ConvTranspose2d, "conv_transpose", _single, channel_axis=1),
    Layout(nn.ConvTranspose3d, "conv_transpose", _single, channel_axis=1),
    Layout(nn.Embedding, "embedding", _single),
    Layout(nn.LSTM, "rnn", _recurrent),
    Layout(nn.GRU, "rnn", _recurrent),
    Layout(nn.RNN, "rnn", _recurrent),
    Layout(nn.LSTMCell, "rnn", _recurrent),
    Layout(nn.GRUCell, "rnn", _recurrent),
    Layout(nn.RNNCell, "rnn", _recurrent),
    Layout(nn.MultiheadAttention, "attention", _attention),
)


def layout_of(module: nn.Module) -> Layout | None:
    """Return how ``module`` holds its weights, or None where its type is not supported.

    A subclass counts as its base as long as it computes as that does.
    """
    for layout in LAYOUTS:
        if isinstance(module, layout.base) and _computes_as(module, layout.base):
            return layout
    return None


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    kind = type(module)
    return "forward" not in vars(module) and all(
        getattr(kind, name, None) is getattr(base, name, None)
        for name in ("forward", "_conv_forward", "__call__")
    )


def find_sites(model: nn.Module) -> tuple[tuple[Site, ...], tuple[FloatPart, ...]]:
    """Return the sites of ``model`` in the order of its modules, and what stays in float."""
    sites: dict[int, Site] = {}
    refused: dict[int, FloatPart] = {}
    for path, module, name, parameter in _weights(model):
        layout = layout_of(module)
        reason = _obstacle(module, parameter, layout)
        full = f"{path}.{name}" if path else name
        if layout is None or reason is not None:
            sites.pop(id(parameter), None)
            refused.setdefault(id(parameter), FloatPart(full, reason or "", _numel(parameter)))
            continue
        if id(parameter) in refused:
            continue
        known = sites.get(id(parameter))
        if known is not None:
            sites[id(parameter)] = replace(
                known,
                users=(*known.users, (path, name)),
                activation=known.activation or layout.kind != "embedding",
            )
            if known.channel_axis != layout.channel_axis:
                del sites[id(parameter)]
                reason = "shared by layers that lay it out differently"
                refused[id(parameter)] = FloatPart(full, reason, parameter.numel())
            continue
        sites[id(parameter)] = Site(
            name=full.removesuffix(".weight"),
            kind=layout.kind,
            layer=layout.base.__name__,
            shape=tuple(parameter.shape),
            channel_axis=layout.channel_axis,
            users=((path, name),),
            groups=getattr(module, "groups", 1) if layout.kind.startswith("conv") else 1,
            activation=layout.kind != "embedding",
        )
    for holder, parameter in _held_elsewhere(model):
        site = sites.pop(id(parameter), None)
        if site is not None:
            reason = f"also held by {holder}, which is no layer that is quantized"
            refused[id(parameter)] = FloatPart(site.name, reason, site.numel)
    return tuple(sites.values()), (*refused.values(), *_others(model, set(sites) | set(refused)))


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (path, module, name, parameter) of every weight of a layer type that is supported."""
    for path, module in model.named_modules():
        layout = next((y for y in LAYOUTS if isinstance(module, y.base)), None)
        if layout is None:
            continue
        for name in layout.weights(module):
            parameter = module._parameters.get(name)
            if parameter is not None:
                yield path, module, name, parameter


def _held_elsewhere(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, parameter) of every parameter as a module holds it that is no such weight."""
    weights = {(path, name) for path, _, name, _ in _weights(model)}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (path, name) not in weights:
                yield f"{path}.{name}" if path else name, parameter


def _numel(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()


def _obstacle(module: nn.Module, parameter: Tensor, layout: Layout | None) -> str | None:
    """Return why a weight of a supported layer type can't be quantized, or None."""
    if parametrize.is_parametrized(module):
        return "parametrized: remove the parametrization first"
    if layout is None:
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(parameter, UninitializedParameter):
        return "lazy and not initialized"
    if not parameter.is_floating_point():
        return f"holds {parameter.dtype} numbers"
    if parameter.numel() == 0:
        return "empty"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the weight at run time"
    return None


def _others(model: nn.Module, taken: set[int]) -> Iterator[FloatPart]:
    """Yield every parameter that is no weight of a supported layer, by its module."""
    seen = set(taken)
    for path, module in model.named_modules():
        mine = {}
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not isinstance(parameter, UninitializedParameter):
                seen.add(id(parameter))
                mine[name] = parameter.numel()
        if not mine:
            continue
        kind = type(module).__name__
        if any(isinstance(module, y.base) for y in LAYOUTS):
            plain = all("bias" in name for name in mine)
            reason = "biases are added in float" if plain else "its weight is computed from others"
        elif not path:
            reason = f"parameters of {kind} itself: no layer type that is supported owns them"
        else:
            reason = f"{kind} is not a layer type that is quantized"
        yield FloatPart(path or ", ".join(mine), reason, sum(mine.values()))
