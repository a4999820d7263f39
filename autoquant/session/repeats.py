"""Which module of a model is the first that gives other outputs when the model is run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoquant.nn.leaves import Leaf, frozen, leaves_differ


@dataclass(frozen=True)
class _Call:
    """One call of a module, as it ended: what it was given and what it returned."""

    name: str
    module: nn.Module
    inputs: list[Leaf]
    outputs: list[Leaf]


def first_to_differ(model: nn.Module, run: Callable[[], Any], tolerance: float) -> str:
    """Return in words where two runs of ``model`` part, each made by ``run``.

    Modules are compared in the order in which their calls end, so that of modules within each
    other the innermost is named. What ``run`` raises passes through.
    """
    first: list[_Call] = []
    with _watched(model, first.append):
        run()
    parted: list[str] = []
    count = 0

    def compare(call: _Call) -> None:
        nonlocal count
        before = first[count] if count < len(first) else None
        count += 1
        if parted:
            return
        if before is None or before.name != call.name:
            parted.append(f"the second run calls {_named(call)} where the first one did not")
        elif (what := leaves_differ(before.outputs, call.outputs, tolerance)) is not None:
            same = leaves_differ(before.inputs, call.inputs, tolerance) is None
            given = "given the same inputs" if same else "whose inputs differ too"
            parted.append(f"the first module that differs is {_named(call)}, {given}: {what}")

    with _watched(model, compare):
        run()
    if parted:
        return parted[0]
    return "its modules give the same, so it is the code around them that differs"


def _named(call: _Call) -> str:
    kind = type(call.module).__name__
    mode = ", in training mode" if call.module.training else ""
    return f"{call.name} ({kind}{mode})" if call.name else f"the model itself ({kind}{mode})"


@contextmanager
def _watched(model: nn.Module, hear: Callable[[_Call], None]) -> Iterator[None]:
    """Tell ``hear`` of every call of a module inside."""

    given: list[list[Leaf]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(frozen((args, kwargs)))

    def after(name: str) -> Callable[..., None]:
        return lambda module, _, outputs: hear(_Call(name, module, given.pop(), frozen(outputs)))

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
