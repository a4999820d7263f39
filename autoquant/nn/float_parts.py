"""What stays in float: the parts of a model that are no sites, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autoquant.nn.layouts import layout_type


@dataclass(frozen=True, slots=True)
class FloatPart:
    """What stays in float: the module (or the tensors), why, and how many numbers that are.

    ``weights`` of them lie in tensors of two dimensions or more, which is what an average width
    counts: biases and norms have one.
    """

    name: str
    reason: str
    parameters: int
    weights: int = 0


def part_of(name: str, reason: str, tensors: Iterable[Tensor]) -> FloatPart:
    """Return the part that ``tensors`` are."""
    sizes = [(tensor.numel(), tensor.dim()) for tensor in tensors]
    return FloatPart(name, reason, sum(n for n, _ in sizes), sum(n for n, d in sizes if d > 1))


def left_over(model: nn.Module, taken: set[int]) -> Iterator[FloatPart]:
    """Yield all that a model holds besides ``taken``, ids of its weights, by its module.

    Those are its parameters, and the buffers that are matrices of real numbers and are saved.
    """
    seen, buffered = set(taken), set(taken)
    scripted: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in scripted:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.update(module.modules())
            mine = {n: p for n, p in module.named_parameters() if _new(p, seen)}
            if mine:
                yield part_of(path, "TorchScript, whose layers can't be switched", mine.values())
            continue
        if isinstance(module, parametrize.ParametrizationList):
            continue  # a part of the layer whose weight it computes
        owned = dict(module.named_parameters(recurse=False))
        if parametrize.is_parametrized(module):
            owned |= dict(module.parametrizations.named_parameters())
        mine = {name: p for name, p in owned.items() if _new(p, seen)}
        if mine:
            yield part_of(path or ", ".join(mine), _reason(path, module, mine), mine.values())
        kept = {name: b for name, b in _matrices(module) if _new(b, buffered)}
        if kept:
            where = ", ".join(f"{path}.{name}" if path else name for name in kept)
            yield part_of(where, "a buffer, not a parameter", kept.values())


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the saved buffers of a module that are matrices of real or complex numbers.

    Those that a weight is computed from, such as the masks of pruned ones, are no weights.
    """
    if computed_weight(module) is not None:
        return
    for name, buffer in module.named_buffers(recurse=False):
        numbers = buffer.is_floating_point() or buffer.is_complex()
        if numbers and buffer.dim() > 1 and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _new(tensor: Tensor, seen: set[int]) -> bool:
    """Return whether a tensor was not seen yet; from now on it was."""
    if id(tensor) in seen:
        return False
    seen.add(id(tensor))
    return True


def _reason(path: str, module: nn.Module, mine: Iterable[str]) -> str:
    """Return why the parameters ``mine`` of a module stay in float."""
    kind = type(module).__name__
    computed = computed_weight(module)
    if layout_type(module) is not None:
        if all("bias" in name for name in mine):
            return "biases are added in float"
        return computed or "its weight is computed from others"
    if computed is not None:
        return computed
    if not path:
        return f"parameters of {kind} itself: no layer type that is supported owns them"
    return f"{kind} is not a layer type that is quantized"


_HOOKS: dict[type, str] = {
    WeightNorm: "its weight is computed by weight_norm: nn.utils.remove_weight_norm(layer) first",
    SpectralNorm: (
        "its weight is computed by spectral_norm: nn.utils.remove_spectral_norm(layer) first"
    ),
    BasePruningMethod: (
        "masked by nn.utils.prune: prune.remove(layer, 'weight') or 'bias' makes the mask permanent"
    ),
}


def computed_weight(module: nn.Module) -> str | None:
    """Return what computes a weight of ``module`` at each call and what undoes that, or None."""
    if parametrize.is_parametrized(module):
        return (
            "parametrized: its weight is computed from others: "
            "nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
        )
    for hook in module._forward_pre_hooks.values():
        for kind, reason in _HOOKS.items():
            if isinstance(hook, kind):
                return reason
    return None
