"""Layer types whose weights can be quantized, and how each holds them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


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


CONV1D = frozenset({"transformers.pytorch_utils", "transformers.modeling_utils"})
"""Modules that define ``Conv1D``, the linear layer of GPT-2; the second one before version 4.16."""


def transposed_linear(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that makes ``module`` a linear layer with a weight [in, out], or None.

    That is transformers' ``Conv1D``, which is known by its name and its attributes, so that
    transformers need not be there.
    """
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__ in CONV1D:
            weight = module._parameters.get("weight")
            fits = weight is None or (
                weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]
            )
            return base if fits else None
    return None


def layout_type(module: nn.Module) -> Layout | None:
    """Return the layout of the supported layer type that ``module`` is one of."""
    for layout in LAYOUTS:
        if isinstance(module, layout.base):
            return layout
    base = transposed_linear(module)
    return None if base is None else Layout(base, "linear", _single, channel_axis=1)


def layout_of(module: nn.Module) -> Layout | None:
    """Return how ``module`` holds its weights, or None where its type is not supported.

    A subclass counts as its base as long as it computes as that does.
    """
    layout = layout_type(module)
    return layout if layout is not None and _computes_as(module, layout.base) else None


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    kind = type(module)
    return "forward" not in vars(module) and all(
        getattr(kind, name, None) is getattr(base, name, None)
        for name in ("forward", "_conv_forward", "__call__")
    )
