"""Blocks: parts of a model that run by themselves, each small enough to be trained at once.

They are read off the module tree: the largest modules with few quantized layers below them that
are called, and give numbers that a gradient can reach. What is in none is a block by itself, so of
a flat graph each layer is one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.models.task import outputs_of
from autoquant.models.trees import batch_size
from autoquant.nn.layer_output import as_real, version_of
from autoquant.nn.leaves import leaves
from autoquant.nn.sites import Site

NOT_CALLED = "no module that holds it is called and gives real numbers"
SHARED = "its weight is used in several blocks"

Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Block:
    """One module that is trained at once.

    ``sites`` are the quantized layers below ``path``, in their order; ``calls`` says how often the
    float model calls it on each batch; ``numbers`` are those of its input and output, for each
    sample of a batch; ``head`` says that what it gives is what the model gives.
    """

    path: str
    sites: tuple[str, ...]
    calls: tuple[int, ...]
    numbers: float
    head: bool


@dataclass
class _Watched:
    """What is known of one module after the float model ran."""

    calls: list[int]
    first: int | None = None
    numbers: float = 0.0
    real: bool = False
    last: Tensor | None = field(default=None, repr=False)
    version: int = 0


@dataclass
class _Place:
    """Where a run over the data is: the batch, and its samples."""

    number: int = 0
    samples: int = 1


def find_blocks(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], run: Run, most: int
) -> tuple[list[Block], dict[str, str]]:
    """Return the blocks in the order of their first call, and why which sites are in none.

    ``sites`` are those to train; ``run`` runs the model, in float, on each of ``batches``. A block
    has ``most`` of the sites, or as many as can't be told apart by calls.
    """
    owners = {site.name: [path for path, _ in site.users] for site in sites}
    seen, head = _watch(model, _above(owners), batches, run)
    found = _split("", owners, seen, most, dict(model.named_modules()))
    left = {name: NOT_CALLED for name in owners if not any(name in n for n in found.values())}
    counts = {name: sum(name in names for names in found.values()) for name in owners}
    left |= {name: SHARED for name, count in counts.items() if count > 1}
    blocks = []
    for path in sorted(found, key=lambda p: seen[p].first or 0):
        names = tuple(name for name in owners if name in found[path] and name not in left)
        if names:
            known = seen[path]
            blocks.append(Block(path, names, tuple(known.calls), known.numbers, path == head))
    return blocks, left


def usual_numbers(blocks: Sequence[Block]) -> float:
    """Return how many numbers of input and output a sample is in the median block."""
    return median(block.numbers for block in blocks) if blocks else 0.0


def samples_of(block: Block, batch: int, usual: float) -> int:
    """Return how many samples a step has: of a block larger than usual fewer than ``batch``."""
    share = min(1.0, usual / block.numbers) if block.numbers else 1.0
    return max(1, round(batch * share))


def _above(owners: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the paths of all modules that hold a site, but for the model's own."""
    found = set()
    for path in itertools.chain.from_iterable(owners.values()):
        parts = path.split(".") if path else []
        found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return found or {""}


def _is_below(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


def _split(
    path: str,
    owners: Mapping[str, Sequence[str]],
    seen: Mapping[str, _Watched],
    most: int,
    modules: Mapping[str, nn.Module],
) -> dict[str, list[str]]:
    """Return path → sites of the blocks at or below ``path``."""
    inside = [n for n, users in owners.items() if any(_is_below(user, path) for user in users)]
    if not inside:
        return {}
    known = seen.get(path)
    usable = known is not None and known.first is not None and known.real
    if usable and len(inside) <= most:
        return {path: inside}
    found: dict[str, list[str]] = {}
    for name, child in modules[path].named_children():
        full = f"{path}.{name}" if path else name
        if modules.get(full) is child:  # a module that has two places is known at its first
            found |= _split(full, owners, seen, most, modules)
    covered = set(itertools.chain.from_iterable(found.values()))
    if usable and not set(inside) <= covered:
        return {path: inside}
    return found


def _watch(
    model: nn.Module, paths: set[str], batches: Sequence[Any], run: Run
) -> tuple[dict[str, _Watched], str | None]:
    """Run the float model; return what its modules do, and which one gives the model's output."""
    seen = {path: _Watched([0] * len(batches)) for path in sorted(paths)}
    ticks, place = itertools.count(), _Place()
    head = None

    def before(known: _Watched) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if known.first is None:
                known.first = next(ticks)
            known.calls[place.number] += 1

        return hook

    def after(known: _Watched) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            real = list(floating(output))
            known.real = bool(real)
            known.last = real[0] if real else None
            known.version = version_of(real[0]) if real else 0
            if not known.numbers:
                parts = (*real, *floating((args, kwargs)))
                known.numbers = sum(part.numel() for part in parts) / max(place.samples, 1)

        return hook

    with contextlib.ExitStack() as stack:
        for path, known in seen.items():
            module = model.get_submodule(path)
            for handle in (
                module.register_forward_pre_hook(before(known)),
                module.register_forward_hook(after(known), with_kwargs=True),
            ):
                stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        for number, batch in enumerate(batches):
            place.number, place.samples = number, batch_size(batch)
            outputs = next(iter(floating(outputs_of(run(model, batch)))), None)
            # Of several modules that give it the innermost is called last.
            given = [p for p, known in seen.items() if _gives(known, outputs)]
            head = max(given, key=len, default=None)
            for known in seen.values():
                known.last = None
    return seen, head


def _gives(known: _Watched, outputs: Tensor | None) -> bool:
    """Return whether a module's last output is the model's, not written into since."""
    last = known.last
    if last is None or outputs is None or last.shape != outputs.shape:
        return False
    return last.data_ptr() == outputs.data_ptr() and version_of(last) == known.version


def floating(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of real numbers in ``value``, in order."""
    for _, leaf in leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield as_real(leaf)
