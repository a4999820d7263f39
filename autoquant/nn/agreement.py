"""Whether two runs of a model give the same outputs, but for rounding: number by number.

A number is compared with others of its kind, not with the largest of the whole output, beside
which a score could change unseen next to coordinates in pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.nn.leaves import leaves

TOLERANCE = 1e-3
"""Largest change of a number, relative to the largest of its kind, that rounding may explain."""
EPSILONS = 8
"""The same in units of a number format's precision, where that is coarser."""
AT_ONCE = 1 << 22
"""Numbers that are compared at a time."""


def tolerance_of(model: nn.Module) -> float:
    """Return the tolerance for a model, from the coarsest format that its weights have."""
    formats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max([TOLERANCE, *(EPSILONS * torch.finfo(dtype).eps for dtype in formats)])


class Scales:
    """The largest magnitudes of numbers of a kind, over all outputs that were added.

    Numbers are of a kind if they have the same place along an axis: along each but the first, which
    are samples. Of several such kinds the one with the smallest numbers counts.
    """

    def __init__(self, *outputs: Any) -> None:
        self._axes: dict[str, dict[int, Tensor | None]] = {}
        self._largest: dict[str, float] = {}
        for output in outputs:
            self.add(output)

    def add(self, outputs: Any) -> None:
        """Take the numbers of one more batch into account."""
        for path, leaf in _comparable(outputs).items():
            if not _is_real(leaf) or not leaf.numel():
                continue
            size = leaf.detach().abs().float().nan_to_num(0.0, 0.0, 0.0).cpu()
            self._largest[path] = max(self._largest.get(path, 0.0), float(size.max()))
            axes = self._axes.setdefault(path, {})
            for axis in range(1, size.dim()):
                most = size.amax([d for d in range(size.dim()) if d != axis])
                known = axes.get(axis, most)
                fits = known is not None and known.shape == most.shape
                axes[axis] = torch.maximum(known, most) if known is not None and fits else None

    def largest(self, path: str) -> float:
        """Return the largest magnitude of a whole output."""
        return self._largest.get(path, 0.0)

    def of(self, path: str, like: Tensor) -> Tensor:
        """Return the scale of each number of an output, in a shape that broadcasts to it."""
        found = torch.tensor(self.largest(path), dtype=torch.float32)
        for axis, most in self._axes.get(path, {}).items():
            if most is not None and axis < like.dim() and len(most) == like.shape[axis]:
                shape = [1] * like.dim()
                shape[axis] = -1
                found = torch.minimum(found, most.reshape(shape))
        return found


def disagreement(
    expected: Any,
    found: Any,
    scales: Scales | None = None,
    tolerance: float = TOLERANCE,
    *,
    rounding: float = 0.0,
) -> str | None:
    """Return, in a few words, what differs between two outputs, None where nothing does.

    ``scales`` are those of many outputs, else those of ``expected`` alone. ``rounding`` is a
    difference, relative to the largest number of a whole output, that is none either.
    """
    scales = Scales(expected) if scales is None else scales
    ours, theirs = _comparable(found), _comparable(expected)
    if ours.keys() != theirs.keys():
        odd = min(ours.keys() ^ theirs.keys())
        return f"{odd} is there {'only after' if odd in ours else 'only before'}"
    for path, leaf in theirs.items():
        other = ours[path]
        if not isinstance(leaf, Tensor) or not isinstance(other, Tensor):
            if leaf != other:
                return f"{path} is {_short(other)}, not {_short(leaf)}"
        elif leaf.shape != other.shape:
            return f"{path} has shape {tuple(other.shape)}, not {tuple(leaf.shape)}"
        else:
            said = _differ(
                path, leaf.detach().cpu(), other.detach().cpu(), scales, tolerance, rounding
            )
            if said is not None:
                return said
    return None


def _differ(
    path: str, a: Tensor, b: Tensor, scales: Scales, tolerance: float, rounding: float
) -> str | None:
    if not _is_real(a):
        if not torch.equal(a, b):
            return f"{path} differs in {int((a != b).sum())} of {a.numel()} numbers"
        return None
    scale = scales.of(path, a).double()
    slack = rounding * scales.largest(path)
    # Some samples at a time: scores of every word of a vocabulary are large enough by themselves.
    count = max(1, AT_ONCE * len(a) // a.numel()) if a.dim() and a.numel() else 1
    parts = zip(a.split(count), b.split(count), strict=True) if a.dim() else [(a, b)]
    found = [_worst(x.double(), y.double(), scale, tolerance, slack) for x, y in parts]
    _, off, size = max(found)
    if not off:
        return None
    return f"{path} differs by {off:.3g} where numbers are up to {size:.3g}"


def _worst(
    x: Tensor, y: Tensor, scale: Tensor, tolerance: float, slack: float
) -> tuple[float, float, float]:
    """Return the largest difference that counts: beside its scale, itself, the scale; 0 if none."""
    same = (x == y) | (x.isnan() & y.isnan())
    off = torch.where(same, torch.zeros_like(x), (x - y).abs())
    bad = ~(off <= tolerance * scale + slack)  # NaN is as bad
    if not bool(bad.any()):
        return 0.0, 0.0, 0.0
    share = torch.where(bad, off / scale.clamp(min=1e-30), 0.0).nan_to_num(math.inf)
    worst = int(share.argmax())
    size = float(scale.expand_as(off).flatten()[worst])
    return float(share.flatten()[worst]), float(off.flatten()[worst]), size


def _comparable(outputs: Any) -> dict[str, Any]:
    """Return what outputs hold, by its place; complex numbers as pairs of real ones."""
    found = {}
    for path, leaf in leaves(outputs):
        if isinstance(leaf, float):
            leaf = torch.tensor(leaf, dtype=torch.float64)
        if isinstance(leaf, Tensor):
            leaf = leaf.detach()
            if leaf.layout is not torch.strided:
                leaf = leaf.to_dense()
            if leaf.is_complex():
                leaf = torch.view_as_real(leaf.resolve_conj())
        found[f"output{path}"] = leaf
    return found


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
