"""Sites: the weights of a model that can be quantized, and what stays in float and why.

A site is one weight parameter together with the activation that meets it. It is named after the
parameter, without a trailing ``.weight``: ``features.0.0``, ``encoder.weight_ih_l0``,
``attention.in_proj_weight``. Modules that share a parameter share its site.
"""

from __future__ import annotations

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


def _recurrent(module: nn.Module) -> tuple[str, ...]:
    return tuple(n for n, _ in module.named_parameters(recurse=False) if n.startswith("weight_"))


def _attention(module: nn.Module) -> tuple[str, ...]:
    return tuple(n for n, _ in module.named_parameters(recurse=False) if "proj_weight" in n)


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

    A subclass counts as its base as long as it has the base's ``forward``: it computes the same.
    """
    for layout in LAYOUTS:
        if isinstance(module, layout.base) and type(module).forward is layout.base.forward:
            return layout
    return None


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
            refused.setdefault(id(parameter), FloatPart(full, reason or "", parameter.numel()))
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
            reason = "biases are added in float"
        elif not path:
            reason = f"parameters of {kind} itself: no layer type that is supported owns them"
        else:
            reason = f"{kind} is not a layer type that is quantized"
        yield FloatPart(path or ", ".join(mine), reason, sum(mine.values()))
