"""Sites: the weights of a model that can be quantized, and what stays in float and why.

A site is one weight parameter together with the activation that meets it. It is named after the
parameter, without a trailing ``.weight``: ``features.0.0``, ``encoder.weight_ih_l0``,
``attention.in_proj_weight``. Modules that share a parameter share its site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from autoquant.nn.float_parts import FloatPart, computed_weight, left_over, part_of
from autoquant.nn.hidden import hidden_parameters
from autoquant.nn.layouts import Layout, layout_of, layout_type
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


def find_sites(model: nn.Module) -> tuple[tuple[Site, ...], tuple[FloatPart, ...]]:
    """Return the sites of ``model`` in the order of its modules, and what stays in float."""
    sites: dict[int, Site] = {}
    refused: dict[int, FloatPart] = {}

    def refuse(name: str, parameter: Tensor, reason: str) -> None:
        sites.pop(id(parameter), None)
        refused.setdefault(id(parameter), part_of(name, reason, [parameter]))

    for path, module, name, parameter in _weights(model):
        layout = layout_of(module)
        reason = _obstacle(module, parameter, layout)
        full = _join(path, name)
        if layout is None or reason is not None:
            refuse(full, parameter, reason or "")
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
                reason = f"shared with {full}, which lays it out differently"
                refuse(_join(*known.users[0]), parameter, reason)
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
        site = sites.get(id(parameter))
        if site is not None:
            reason = f"also held by {holder}, which is no layer that is quantized"
            refuse(site.name, parameter, reason)
    for holder, parameter in hidden_parameters(model):
        site = sites.get(id(parameter))
        if site is not None:
            reason = f"also held by {holder}, which the model does not register"
            refuse(site.name, parameter, reason)
    return tuple(sites.values()), (*refused.values(), *left_over(model, set(sites) | set(refused)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (path, module, name, parameter) of every weight of a layer type that is supported."""
    for path, module in model.named_modules():
        layout = layout_type(module)
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
                yield _join(path, name), parameter


def _obstacle(module: nn.Module, parameter: Tensor, layout: Layout | None) -> str | None:
    """Return why a weight of a supported layer type can't be quantized, or None."""
    if parametrize.is_parametrized(module):
        return computed_weight(module)
    if layout is None:
        return f"{type(module).__name__} has a forward of its own"
    if not parameter.is_floating_point():
        return f"holds {parameter.dtype} numbers"
    if parameter.numel() == 0:
        return "empty"
    if layout.kind in ("linear", "conv", "conv_transpose") and "bias" not in module._parameters:
        # A quantized layer has its bias, which may be corrected, from its parameters.
        return computed_weight(module) or "its bias is not a parameter"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the weight at run time"
    return None
