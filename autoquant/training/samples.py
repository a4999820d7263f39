"""What a block learns from: its inputs X̂ in the quantized model, and X and its outputs Z in float.

All are kept in memory while the block is trained: of as many samples as there is room for, evenly
taken from all. A block that treats samples alike, one by one, is trained on any of them together;
one that doesn't (an RNN whose states come with its outputs, say) on whole calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoquant.errors import AutoquantError, TrialError
from autoquant.models.trees import CONSTANTS, batch_size
from autoquant.nn.layer_output import as_real
from autoquant.training.blocks import Block, Run, floating
from autoquant.training.schedule import Lessons, Order

ROOM = 1 << 30
"""Bytes of inputs and outputs that are kept of one block."""
HELD, MOST_HELD = 8, 512
"""One of so many samples is held back to choose by, and no more than so many in all."""
ALIKE = 1e-3
"""How far outputs of some samples may be off from those of all: kernels sum in other orders."""

Compute = Callable[[nn.Module, Any, Any], Any]
"""Calls (module, args, kwargs) as the user's code would."""


GIVEN = (Tensor, *CONSTANTS)
"""What an input may hold, to be given again."""


class _Enough(AutoquantError):
    """Everything that was asked of a run has been seen."""


@dataclass(frozen=True, eq=False)
class Call:
    """Samples of one call of a block: X̂ as ``inputs`` (args, kwargs), X as ``clean``, and Z.

    ``size`` is how many samples, of a call that can't be divided 1.
    """

    inputs: Any
    clean: Any
    targets: tuple[Tensor, ...]
    size: int

    def rows(self, rows: Sequence[int]) -> Call:
        """Return some of the samples, copied."""
        index = torch.tensor(rows, dtype=torch.int64)
        parts = (self.inputs, self.clean, self.targets)
        inputs, clean, targets = _some(parts, index, len(self.targets[0]))
        return Call(inputs, clean, targets, len(rows))

    def copied(self) -> Call:
        """Return all of it, copied: a block may write into its inputs."""
        parts = (self.inputs, self.clean, self.targets)
        inputs, clean, targets = pytree.tree_map(_clone, parts)
        return Call(inputs, clean, targets, self.size)


@dataclass(frozen=True)
class Samples(Lessons):
    """Calls to learn from; whether they can be divided."""

    divisible: bool = True

    def order(self, size: int, seed: int) -> Order:
        """Return the order of samples, ``size`` at a time, or of whole calls."""
        return Order(tuple(c.size for c in self.batches), size if self.divisible else 1, seed)

    def at(self, places: tuple[int, tuple[int, ...]]) -> Call:
        """Return the samples at ``places``."""
        number, rows = places
        call: Call = self.batches[number]
        return call.rows(rows) if self.divisible else call.copied()

    @property
    def count(self) -> int:
        """How many samples, or calls, there are."""
        return sum(call.size for call in self.batches)


@dataclass(frozen=True)
class Gathered:
    """What is known of one block: samples to learn from, and those that are held back.

    ``kept`` of all ``samples`` had room.
    """

    learn: Samples
    held: Samples
    kept: int
    samples: int


def gather(
    model: nn.Module,
    block: Block,
    batches: Sequence[Any],
    run: Run,
    compute: Compute,
    to_float: Callable[[], None],
    to_quantized: Callable[[], Any],
    room: int = ROOM,
) -> Gathered:
    """Run the model up to a block, in float and quantized, and return what the block saw.

    ``run`` runs the model on a batch, ``to_float`` and ``to_quantized`` switch it. Raises
    TrialError where the block's inputs can't be given to it once more, or none are left.
    """
    module = model.get_submodule(block.path)
    to_float()
    first = next((i for i, count in enumerate(block.calls) if count), 0)
    example = _listen(module, block.calls[first], lambda: run(model, batches[first]))
    inputs, targets = example[0]
    odd = next((x for x in pytree.tree_leaves(inputs) if not isinstance(x, GIVEN)), None)
    if odd is not None:
        raise TrialError(f"its input holds a {type(odd).__name__}, which can't be given again")
    divisible = _is_divisible(module, inputs, targets, batch_size(batches[first]), compute)
    share = min(1.0, room / max(_bytes(example, block), 1))
    clean = []
    for number, batch in enumerate(batches):
        given = _listen(module, block.calls[number], functools.partial(run, model, batch))
        size = batch_size(batch) if divisible else None
        clean.append(_thinned(given, share, size, number))
    to_quantized()
    calls: list[Call] = []
    samples = 0
    for number, (batch, theirs) in enumerate(zip(batches, clean, strict=True)):
        size = batch_size(batch) if divisible else None
        samples += block.calls[number] * (size or 1)
        if not theirs:
            continue
        given = _listen(module, block.calls[number], functools.partial(run, model, batch), False)
        ours = _thinned(given, share, size, number)
        for (x_hat, _), (x, z) in zip(ours, theirs, strict=False):
            if _shapes(x_hat) == _shapes(x):  # else a decoder went another way
                calls.append(Call(x_hat, x, z, len(z[0]) if divisible else 1))
        clean[number] = []  # its tensors are the calls' own from here on
    kept = sum(call.size for call in calls)
    if not kept:
        raise TrialError("the quantized model never calls it as the float model does")
    learn, held = _divide(calls, divisible)
    return Gathered(
        Samples(learn, divisible=divisible), Samples(held, divisible=divisible), kept, samples
    )


def _listen(
    module: nn.Module, calls: int, go: Callable[[], Any], ends: bool = True
) -> list[tuple[Any, tuple[Tensor, ...]]]:
    """Return (inputs, outputs) of the first ``calls`` of a module, of a run that ends with them.

    Without ``ends`` it ends when the last one begins, and outputs are left out.
    """
    inputs: list[Any] = []
    outputs: list[tuple[Tensor, ...]] = []
    if not calls:
        return []

    @torch.inference_mode(False)
    @torch.no_grad()
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if len(inputs) >= calls:
            raise _Enough
        inputs.append(pytree.tree_map(_clone, (args, kwargs)))
        if not ends and len(inputs) >= calls:
            raise _Enough

    @torch.inference_mode(False)
    @torch.no_grad()
    def after(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(tuple(_clone(x) for x in floating(output)) if ends else ())
        if ends and len(outputs) >= calls:
            raise _Enough

    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    )
    try:
        with torch.no_grad():
            go()
    except Exception:  # ours, or what the user's code made of it
        if len(outputs if ends else inputs) < calls:
            raise
    finally:
        for handle in handles:
            handle.remove()
    if not ends:
        return [(x, ()) for x in inputs]
    return list(zip(inputs, outputs, strict=False))


def _clone(x: Any) -> Any:
    return as_real(x).detach().clone() if isinstance(x, Tensor) else x


def _some(tree: Any, index: Tensor, size: int) -> Any:
    """Return samples of a tree: what has another first dimension belongs to all of them."""

    def part(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() and len(x) == size:
            return x[index.to(x.device)]
        return _clone(x)

    return pytree.tree_map(part, tree)


def _is_divisible(
    module: nn.Module, inputs: Any, targets: tuple[Tensor, ...], samples: int, compute: Compute
) -> bool:
    """Return whether a block, called on some samples, gives what it gives them among all."""
    if samples < 2 or not all(z.dim() and len(z) == samples for z in targets):
        return False
    index = torch.arange(0, samples, 2, dtype=torch.int64)
    with torch.no_grad():
        try:
            args, kwargs = _some(inputs, index, samples)
            found = tuple(floating(compute(module, args, kwargs)))
        except (TrialError, RuntimeError):
            return False
    return len(found) == len(targets) and all(
        x.shape == z[index].shape
        and bool((x - z[index]).abs().max() <= ALIKE * z.abs().max().clamp(min=1e-12))
        for x, z in zip(found, targets, strict=True)
    )


def _bytes(example: Any, block: Block) -> int:
    """Return the bytes of X̂, X and Z of all batches, by what one batch has."""
    inputs = sum(_size((x, x)) for x, _ in example)
    outputs = sum(_size(z) for _, z in example)
    return (inputs + outputs) * sum(block.calls) // max(len(example), 1)


def _size(tree: Any) -> int:
    return sum(x.nbytes for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def _thinned(given: Any, share: float, size: int | None, number: int) -> list[Any]:
    """Return a share of the ``size`` samples of one batch's calls, evenly taken.

    Without a size calls can't be divided, and all or none of a batch are returned.
    """
    if share >= 1.0:
        return list(given)
    if size is None:
        return list(given) if math.ceil((number + 1) * share) > math.ceil(number * share) else []
    count = max(1, math.floor(size * share))
    index = torch.arange(count, dtype=torch.int64) * size // count
    return [_some(row, index, size) for row in given]


def _shapes(tree: Any) -> list[Any]:
    return [tuple(x.shape) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(tree)]


def _divide(calls: list[Call], divisible: bool) -> tuple[list[Call], list[Call]]:
    """Return the calls to learn from, and those held back: one of HELD samples, or of calls.

    Where there are too few to hold any back, all are both. Else ``calls`` are emptied on the way,
    as there may be no room for all of them twice.
    """
    total = sum(call.size for call in calls)
    every = max(HELD, -(-total // MOST_HELD))
    if total < every:
        return list(calls), list(calls)
    learn: list[Call] = []
    held: list[Call] = []
    place = 0
    while calls:
        call = calls.pop(0)
        out = [i for i in range(call.size) if (place + i) % every == every - 1]
        kept = [i for i in range(call.size) if (place + i) % every != every - 1]
        place += call.size
        if not divisible:
            (held if out else learn).append(call)
            continue
        if out:
            held.append(call.rows(out))
        if kept:
            learn.append(call.rows(kept))
    return learn, held


def mixed(share: float, call: Call) -> Call:
    """Return a call in whose inputs a share of the numbers are as in the float model."""

    def part(x_hat: Any, x: Any) -> Any:
        if not isinstance(x_hat, Tensor) or not x_hat.is_floating_point():
            return x_hat
        drawn = torch.rand(x_hat.shape, dtype=torch.float32, device=x_hat.device)
        return torch.where(drawn < share, x, x_hat)

    return Call(pytree.tree_map(part, call.inputs, call.clean), call.clean, call.targets, call.size)
