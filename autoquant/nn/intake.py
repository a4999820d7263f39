"""What happens to a model before anything else: it is unwrapped, looked over, and copied.

A search folds and converts in place, so it works on a copy of its own. What can't be searched or
copied is refused here, by the name of the part that is at fault.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.errors import ModelFileError


def take(model: nn.Module) -> nn.Module:
    """Return the model that is to be searched: ``model``, or what a compiled one stands for.

    Of a model with compiled parts it is a model of the same modules without the compilers'
    wrappers; ``model`` itself is left as it is. Raises ModelFileError, in one line, for a model
    that can't be searched: TorchScript, a parallel wrapper, a parameter without numbers, layers
    that were quantized before.
    """
    model = _uncompiled(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelFileError(
            "the model is TorchScript, whose layers can't be switched: give the nn.Module that it "
            "was made from"
        )
    for path, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel):
            kind = type(module).__name__
            where = f"{path}: " if path else "the model is "
            raise ModelFileError(
                f"{where}a {kind}, which runs copies of what it wraps: give its .module instead"
            )
    _check_numbers(model)
    return model


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return ``model`` without the wrappers of torch.compile: compiled code would not be switched.

    A module with compiled parts is copied, shallowly, so that the user's own keeps them.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # importing it takes seconds; nothing can have been compiled without
        return model
    return _without(model, dynamo.OptimizedModule, {})


def _without(module: nn.Module, wrapper: type, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    if isinstance(module, wrapper):
        done[id(module)] = found = _without(module.get_submodule("_orig_mod"), wrapper, done)
        return found
    done[id(module)] = module
    children = {
        name: None if child is None else _without(child, wrapper, done)
        for name, child in module._modules.items()
    }
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    done[id(module)] = mine = copy.copy(module)
    vars(mine)["_modules"] = children
    return mine


def _check_numbers(model: nn.Module) -> None:
    """Raise ModelFileError for the first tensor that does not hold plain numbers."""
    for path, module in model.named_modules():
        package = type(module).__module__
        if package.startswith("torch.ao.nn.") and ".quantized" in package:
            raise ModelFileError(
                f"{path or 'the model'}: quantized already, by torch.ao: give the float model"
            )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            full = f"{path}.{name}" if path else name
            if is_lazy(tensor):
                raise ModelFileError(
                    f"{full}: lazy and not initialized: run the model on one batch first"
                )
            if tensor is not None and tensor.is_meta:
                raise ModelFileError(
                    f"{full}: on the meta device, so it has no numbers: give the model memory "
                    "(model.to_empty(device='cpu')) and load its weights first"
                )
            if tensor is not None and is_traceable_wrapper_subclass(tensor):
                raise ModelFileError(
                    f"{full}: a {type(tensor).__name__}, quantized already or sharded: give the "
                    "model with plain float tensors"
                )


class _Detached(TorchFunctionMode):
    """Copies tensors that torch refuses to: those with a graph, without it; compressed ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            x, memo = args
            if not x.is_leaf or x.layout not in (torch.strided, torch.sparse_coo):
                if id(x) not in memo:
                    memo[id(x)] = x.detach().clone()
                return memo[id(x)]
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy; tensors kept from training come without the graph that made them.

    Raises ModelFileError where a part can't be copied, and names it.
    """
    try:
        with _Detached():
            return copy.deepcopy(model)
    except Exception as error:
        path, why = _culprit(model, error)
        raise ModelFileError(
            f"{path or 'the model'}: can't be copied ({why}), and a search works on a copy of the "
            "model: take it off the model, or give its class a __deepcopy__"
        ) from error


def _culprit(model: nn.Module, error: Exception) -> tuple[str, str]:
    """Return the path of the innermost part of ``model`` that can't be copied, and why."""
    path, value, seen = "", model, {id(model)}
    while True:
        for name, part in _parts(value, path):
            if id(part) in seen:
                continue
            seen.add(id(part))
            try:
                with _Detached():
                    copy.deepcopy(part)
            except Exception as found:
                path, value, error = name, part, found
                break
        else:
            message = " ".join(str(error).split())
            return path, f"{type(error).__name__}: {message}" if message else type(error).__name__


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, part) of all that ``value`` holds, as a user would write it."""
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{path}[{i}]", part) for i, part in enumerate(value))
    elif not isinstance(value, type | Tensor) and hasattr(value, "__dict__"):
        dot = f"{path}." if path else ""
        for name, part in vars(value).items():
            if isinstance(value, nn.Module) and name in ("_modules", "_parameters", "_buffers"):
                yield from ((f"{dot}{key}", own) for key, own in part.items())
            else:
                yield f"{dot}{name}", part
