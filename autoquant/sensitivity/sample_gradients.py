"""What stands at a site while gradients are taken, and multiplies them with what choices change.

``WholeGradients`` takes the gradient of the weight itself, which is right for whatever the user's
code does with it, one sample at a time. ``UsesOfWeight`` takes that of each output of the layer
instead: layers are linear in their weight, so a change Δ of it changes an output by what the layer
gives with Δ for a weight, and samples that are run together stay apart. It is many times faster,
and right where every use of the weight is a layer's own and samples come first in what it is given.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoquant.kernels.cpu.native import change_products
from autoquant.methods.applier import Applier
from autoquant.nn.runtime import Rows
from autoquant.nn.slots import SiteSlot, StandIn
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.techniques import Correction

TOGETHER = 8
"""Whole gradients of a weight that are multiplied with its changes at a time."""
MOST_GRADIENTS = 1 << 24
"""Numbers of all samples' gradients of one weight that are held at a time."""

Array = NDArray[np.float64]


TILED, NESTED, LATER = "tiled", "nested", "later"
"""How rows of several samples lie where each has more than one: all first ones first, as
``torch.cat`` of two batches gives; all of the first sample first, as ``flatten(0, 1)`` does; or
along the second axis, as recurrent layers have them, where they come one after the other."""


ROWS = ("linear", "rnn", "attention")
"""Kinds of sites that multiply the last axis and take all others for rows."""


class Mixed(Exception):
    """Samples can't be told apart in what the model returned."""


@dataclass(frozen=True)
class Candidates:
    """What is to be scored at one site."""

    weights: tuple[WeightScheme, ...]
    activations: tuple[ActivationScheme, ...]
    correction: Correction


class Changes:
    """What each candidate of a site changes: its weight, its bias, and how its input is rounded."""

    def __init__(self, slot: SiteSlot, candidates: Candidates, applier: Applier) -> None:
        name = slot.site.name
        self.slot = slot
        self.candidates = candidates
        self.schemes = [applier.activation(name, a) for a in candidates.activations]
        parameter = slot.parameter.detach()
        self.nothing = torch.zeros(
            slot.site.matrix[0], dtype=torch.float32, device=parameter.device
        )
        changes, shifts = [], []
        for scheme in candidates.weights:
            held = applier.held(name, SiteRecipe(scheme, None, candidates.correction))
            assert held is not None
            made = held.quantized.dequantize(torch.float32)
            made = made if held.transform is None else held.transform.weight_back(made)
            changes.append(made - parameter)
            shifts.append(self.nothing if held.shift is None else held.shift)
        self.weights = torch.stack(changes) if changes else None
        """[candidates, *parameter], None without any."""
        self.shifts = torch.stack(shifts) if shifts else None
        """[candidates, channels]."""


class Probe(Protocol):
    """Stands at one site: one row a sample of g·Δ, [candidates], for weights and activations."""

    weight_rows: list[Array]
    activation_rows: list[Array]

    def install(self) -> None:
        """Begin to listen."""

    def close(self, *, last: bool) -> None:
        """End a run: note its rows."""


Some = TypeVar("Some", bound=Probe)


class _Listener:
    """Hears of the gradient at the input of a layer: the same for both kinds.

    ``orders`` are those in which rows may belong to samples: the products of each are noted, one
    after the other. ``mixed`` says that they can't be told apart here.
    """

    orders: tuple[str, ...] = (TILED,)

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.slot = changes.slot
        self.weight_rows: list[Array] = []
        self.activation_rows: list[Array] = []
        self.mixed = False
        self.begin(1)

    def begin(self, samples: int) -> None:
        """Expect a run of ``samples`` samples."""
        self.samples = samples
        self._products = np.zeros((len(self.orders), samples, len(self.changes.schemes)))

    def probe(self, x: Tensor) -> Tensor:
        """Return the input, so that its gradient through this layer alone is heard of."""
        if not torch.is_grad_enabled() or not x.is_floating_point():
            return x
        # A copy: the user's code may write into its own later.
        mine = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        seen = mine.detach()
        mine.register_hook(lambda gradient: self._hear(seen, gradient))
        return mine

    @torch.no_grad()
    def _hear(self, x: Tensor, gradient: Tensor) -> None:
        schemes, alone = self.changes.schemes, self.samples == 1
        if alone:
            x, gradient = x[None], gradient[None]
        else:
            x, gradient = self._samples_first(x), self._samples_first(gradient)
        found = change_products(x, gradient, schemes)
        if found is None:
            engine, kind = self.slot.engine, self.slot.site.kind
            inner, back = (x[0], gradient[0]) if alone else (x, gradient)
            products = [(engine.fake_quantize(inner, s, kind) - inner) * back for s in schemes]
            found = torch.stack([p.reshape(len(x), -1).sum(1) for p in products], 1)
        self._add(self._products, found)

    def _samples_first(self, x: Tensor) -> Tensor:
        """Return a view whose first axis has the samples."""
        later = self.orders == (LATER,) and self.slot.site.kind in ROWS and x.dim() > 2
        return x.transpose(0, 1) if later else x

    def _add(self, total: Array, found: Tensor) -> None:
        """Add products [rows, candidates] to those of the samples [orders, samples, candidates]."""
        rows = found.double().cpu().numpy()
        each, rest = divmod(len(rows), self.samples)
        if rest or not each:
            self.mixed = True
            return
        for i, order in enumerate(self.orders):
            shape = (self.samples, each, -1) if order == NESTED else (each, self.samples, -1)
            total[i] += rows.reshape(shape).sum(1 if order == NESTED else 0)

    def _note_inputs(self) -> None:
        if self.changes.schemes:
            self.activation_rows.extend(self._products.reshape(-1, self._products.shape[-1]))


class WholeGradients(_Listener):
    """Multiplies the gradient of a weight, and of its bias, with changes: one sample a run."""

    def __init__(self, changes: Changes) -> None:
        super().__init__(changes)
        self.offset = torch.zeros_like(changes.nothing)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def install(self) -> None:
        """Begin to listen."""
        if self.changes.weights is not None:
            self.slot.parameter.requires_grad_(True)
            if self.changes.candidates.correction.centers:
                self.slot.offset = self.offset.requires_grad_(True)
        if self.changes.schemes:
            self.slot.probe = self.probe

    def close(self, *, last: bool) -> None:
        """End a sample: note its products, and forget its gradients."""
        self._note_inputs()
        self.begin(1)
        parameter = self.slot.parameter
        if self.changes.weights is not None:
            found = parameter.grad
            gradient = torch.zeros_like(parameter) if found is None else found
            moved = self.offset.grad
            zeros = torch.zeros_like(self.offset)
            self._waiting.append(
                (gradient.detach().float().flatten(), zeros if moved is None else moved.detach())
            )
            if last or len(self._waiting) == TOGETHER:
                self._multiply()
        parameter.grad = self.offset.grad = None

    def _multiply(self) -> None:
        changes, shifts = self.changes.weights, self.changes.shifts
        assert changes is not None
        assert shifts is not None
        gradients = torch.stack([g for g, _ in self._waiting])
        moved = torch.stack([m for _, m in self._waiting])
        products = gradients @ changes.flatten(1).T + moved @ shifts.T
        self.weight_rows.extend(products.double().cpu().numpy())
        self._waiting.clear()


class UsesOfWeight(_Listener):
    """Multiplies the gradient of each output of a layer with what changes of its weight make of it.

    ``bytes`` are those of the inputs and outputs of the run so far.
    """

    def __init__(self, changes: Changes, anchor: Tensor, orders: tuple[str, ...]) -> None:
        self.orders = orders
        super().__init__(changes)
        self.anchor = anchor

    def begin(self, samples: int) -> None:
        """Expect a run of ``samples`` samples."""
        super().begin(samples)
        count = len(self.changes.candidates.weights)
        self._weights = np.zeros((len(self.orders), samples, count))
        self.bytes = 0

    def install(self) -> None:
        """Begin to listen."""
        if self.changes.weights is not None:
            self.slot.listen = self.listen
        if self.changes.schemes:
            self.slot.probe = self.probe

    def listen(
        self, x: Tensor, y: Tensor, compute: Callable[[Tensor], Tensor], rows: Rows
    ) -> Tensor:
        """Return the output, so that its gradient is heard of."""
        if not torch.is_grad_enabled() or not y.is_floating_point():
            return y
        seen = x.detach() if self.changes.schemes else x.detach().clone()  # ``probe`` copied it
        self.bytes += seen.nbytes + y.nbytes
        if not y.requires_grad:
            y = y + self.anchor.to(y.dtype)
        y.register_hook(lambda gradient: self._multiply(seen, gradient, compute, rows))
        return y

    @torch.no_grad()
    def _multiply(
        self, x: Tensor, gradient: Tensor, compute: Callable[[Tensor], Tensor], rows: Rows
    ) -> None:
        changes, shifts = self.changes.weights, self.changes.shifts
        assert changes is not None
        assert shifts is not None
        x, gradient = self._samples_first(x), self._samples_first(gradient)
        if len(x) != len(gradient) or len(x) % self.samples:
            self.mixed = True  # and not worth the work
            return
        if self.slot.site.kind in ROWS:  # a linear layer's weight may lie [in, out]
            changes = changes.movedim(self.slot.site.channel_axis + 1, 1)
        if rows is not None:
            changes, shifts = changes[:, slice(*rows)], shifts[:, slice(*rows)]
        vectors = _vectors(self.slot.site.kind, x, gradient, changes)
        if vectors is not None:
            inputs, outputs = vectors
            found = torch.bmm(outputs.mT, inputs).flatten(1) @ changes.flatten(1).T
            found += outputs.sum(1) @ shifts.T
        else:
            found = gradient.new_empty(len(x), len(changes), dtype=torch.float32)
            dims = tuple(range(1, gradient.dim()))
            corrected = self.changes.candidates.correction.centers
            try:
                for i, whole in enumerate(self.changes.weights):  # type: ignore[arg-type]
                    shift = self.changes.shifts[i].to(x.dtype) if corrected else None  # type: ignore[index]
                    weight = whole.to(self.slot.parameter.dtype)
                    self.slot.stand_in = StandIn(weight, functools.partial(_shifted, shift))
                    found[:, i] = (compute(x) * gradient).sum(dims)
            finally:
                self.slot.stand_in = None
        self._add(self._weights, found)

    def close(self, *, last: bool) -> None:
        """End a run: note its products."""
        self._note_inputs()
        if self.changes.weights is not None:
            self.weight_rows.extend(self._weights.reshape(-1, self._weights.shape[-1]))

    def agreed(self, alone: Probe) -> str | None:
        """Return the order in which the rows so far are those of ``alone``, None where in none."""
        if self.mixed:
            return None
        for i, order in enumerate(self.orders):
            if all(
                _agree(ours[i * len(theirs) : (i + 1) * len(theirs)], theirs)
                for ours, theirs in (
                    (self.weight_rows, alone.weight_rows),
                    (self.activation_rows, alone.activation_rows),
                )
            ):
                return order
        return None


def _vectors(
    kind: str, x: Tensor, gradient: Tensor, changes: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return inputs [samples, positions, in] and gradients of outputs [samples, positions, out].

    None where no matrix product gives the gradient of the weight, or where that does not pay.
    """
    count, out, columns = changes.shape[0], changes.shape[1], changes[0, 0].numel()
    if kind == "conv":
        pointwise = changes.dim() == 5 and changes.shape[3:] == (1, 1) and x.dim() == 4
        if not pointwise or x.shape[1] != columns or x.shape[2:] != gradient.shape[2:]:
            return None
        inputs, outputs = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    elif kind in ROWS:
        inputs, outputs = x, gradient
    else:
        return None
    inputs = inputs.reshape(len(x), -1, columns).float()
    outputs = outputs.reshape(len(x), -1, out).float()
    if inputs.shape[1] != outputs.shape[1]:
        return None
    if inputs.shape[1] < count or len(x) * out * columns > MOST_GRADIENTS:
        return None
    return inputs, outputs


@contextlib.contextmanager
def listening(model: nn.Module, probes: Mapping[str, Some]) -> Iterator[None]:
    """Let gradients reach what the probes listen to, and nothing else, for a while."""
    parameters = list(model.parameters())
    before = [(p.requires_grad, p.grad) for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    for probe in probes.values():
        probe.install()
    try:
        with torch.enable_grad():
            yield
    finally:
        for probe in probes.values():
            slot = probe.slot  # type: ignore[attr-defined]
            slot.probe = slot.offset = slot.listen = slot.stand_in = None
        for parameter, (wanted, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _shifted(shift: Tensor | None, own: Tensor | None) -> Tensor | None:
    """Return the bias of what a change alone gives, whatever the layer's ``own`` one is."""
    return shift


def _agree(ours: Sequence[Array], theirs: Sequence[Array], tolerance: float = 0.05) -> bool:
    """Return whether two ways to take the products of the same samples found the same.

    On the whole: single numbers that lie on the edge of two integers may be rounded either way.
    """
    if len(ours) != len(theirs):
        return False
    if not len(ours):
        return True
    a, b = np.stack(ours), np.stack(theirs)
    return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-7)
