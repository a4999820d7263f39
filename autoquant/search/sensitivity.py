"""What each choice of each layer does to the model's output, from gradients: no trial is needed.

For a small change Δ of a weight or an activation, the Kullback-Leibler divergence of the outputs is
½ E[(g·Δ)²], with g the gradient of the negative log-likelihood of a label that is drawn from the
model's own output: the Fisher information, sample by sample, so that what a change does in one
sample may cancel, and signs and sizes count together. Where outputs are no class scores, g is that
of a random projection of them, and E[(g·Δ)²] the squared change of the outputs. Sources: Amari
1998; Martens 2020, arXiv 1412.1193, section 5; Kunstner et al. 2019, arXiv 1905.12558, for why
labels are drawn and not given.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoquant.errors import AutoquantError
from autoquant.methods.realize import Realizer
from autoquant.models.trees import batch_size, take
from autoquant.nn.slots import SiteSlot
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

SAMPLES = 96
"""Samples whose gradients are taken, at most: an entry is then known to some 15%."""
TOGETHER = 8
"""Gradients of a weight that are multiplied with its changes at a time."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """What is to be scored at one site."""

    weights: tuple[WeightScheme, ...]
    activations: tuple[ActivationScheme, ...]
    corrected: bool


@dataclass(frozen=True)
class Score:
    """An estimated loss and the standard error of that estimate."""

    loss: float
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """Estimated loss of each choice of each site, in the unit of a trial's loss."""

    weights: Mapping[str, Mapping[WeightScheme, Score]]
    activations: Mapping[str, Mapping[ActivationScheme, Score]]
    samples: int


def measure_sensitivity(
    realizer: Realizer,
    run: Callable[[nn.Module, Any], Any],
    batches: Sequence[Any],
    candidates: Mapping[str, Candidates],
    *,
    classes: bool,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Sensitivity | str:
    """Return the sensitivity on ``samples`` of ``batches``, or in one line why there is none.

    ``run`` (model, inputs) → outputs is the user's forward; ``classes`` says that outputs are
    scores of classes. The model is left in float, as it was.
    """
    singles = list(_singles(batches, samples))
    if not singles:
        return "there are no calibration data to take gradients on"
    realizer.to_float()
    prepared = realizer.prepared
    probes = {n: _Probe(prepared.slots[n], c, realizer, n) for n, c in candidates.items()}
    draw = torch.Generator().manual_seed(seed)
    power = 0.0
    try:
        with _gradients(prepared.model, probes), prepared.engine.reference():
            for i, inputs in enumerate(singles):
                outputs = run(prepared.model, inputs)
                found = _objective(outputs, classes, draw)
                if found is None:
                    return "the model's outputs have no gradient"
                loss, square = found
                power += square / len(singles)
                loss.backward()
                for probe in probes.values():
                    probe.close(last=i + 1 == len(singles))
    except AutoquantError as error:
        return f"gradients can't be taken: {error}"
    except RuntimeError as error:  # torch's own: an operator without a gradient, memory
        return f"gradients can't be taken: {str(error).splitlines()[0]}"
    unit = 0.5 if classes else 1.0 / max(power, 1e-30)
    weights, activations = {}, {}
    for name, probe in probes.items():
        weights[name] = _scores(probe.candidates.weights, probe.weight_scores, unit)
        activations[name] = _scores(probe.candidates.activations, probe.activation_scores, unit)
    return Sensitivity(weights, activations, len(singles))


def _singles(batches: Sequence[Any], samples: int) -> Iterator[Any]:
    """Yield at most ``samples`` samples, as batches of one, evenly spread over ``batches``."""
    sizes = [batch_size(batch) for batch in batches if batch is not None]
    total = sum(sizes)
    count = min(samples, total)
    chosen = [i * total // count for i in range(count)]
    start = 0
    for batch, size in zip((b for b in batches if b is not None), sizes, strict=True):
        for i in chosen:
            if start <= i < start + size:
                yield take(batch, [i - start])
        start += size


def _objective(outputs: Any, classes: bool, draw: torch.Generator) -> tuple[Tensor, float] | None:
    """Return what to differentiate, and the squared size of the outputs; None without gradient."""
    leaves = [
        leaf
        for leaf in pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]
    if not leaves:
        return None
    if classes:
        logits = leaves[0].float()
        chances = logits.detach().cpu().softmax(-1)
        if not bool(chances.isfinite().all()):
            return None
        labels = torch.multinomial(chances, 1, generator=draw)[:, 0].to(logits.device)
        return F.cross_entropy(logits, labels, reduction="sum"), 0.0
    total, square = leaves[0].new_zeros((), dtype=torch.float32), 0.0
    for leaf in leaves:
        signs = torch.randint(0, 2, leaf.shape, generator=draw).to(leaf.device) * 2.0 - 1.0
        total = total + (leaf.float() * signs).sum()
        square += float(leaf.detach().double().square().sum())
    return (total, square) if math.isfinite(square) else None


def _scores(choices: Sequence[Any], rows: list[Array], unit: float) -> dict[Any, Score]:
    """Return the score of each choice; ``rows`` are g·Δ, [choices] for each sample."""
    if not choices or not rows:
        return {}
    losses = unit * np.square(np.stack(rows))
    errors = losses.std(0, ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else losses[0]
    return {
        choice: Score(float(loss), float(error))
        for choice, loss, error in zip(choices, losses.mean(0), errors, strict=True)
    }


class _Probe:
    """Takes the gradients at one site, and multiplies them with what each choice would change."""

    def __init__(
        self, slot: SiteSlot, candidates: Candidates, realizer: Realizer, name: str
    ) -> None:
        self.slot = slot
        self.candidates = candidates
        self.schemes = [realizer.activation(name, a) for a in candidates.activations]
        parameter = slot.parameter.detach()
        self.offset = torch.zeros(slot.site.matrix[0], device=parameter.device)
        changes, shifts = [], []
        for scheme in candidates.weights:
            held = realizer.held(name, SiteRecipe(scheme, None, None, candidates.corrected))
            assert held is not None
            changes.append((held.quantized.dequantize(torch.float32) - parameter).flatten())
            shifts.append(self.offset if held.shift is None else held.shift)
        self.changes = torch.stack(changes) if changes else None
        self.shifts = torch.stack(shifts) if shifts else None
        self.weight_scores: list[Array] = []
        self.activation_scores: list[Array] = []
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._products = np.zeros(len(self.schemes))

    def probe(self, x: Tensor) -> Tensor:
        """Return the input, so that its gradient through this layer alone is heard of."""
        if not torch.is_grad_enabled() or not x.is_floating_point():
            return x
        # A copy: the user's code may write into its own later.
        mine = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        seen = mine.detach()
        mine.register_hook(lambda gradient: self._hear(seen, gradient))
        return mine

    def _hear(self, x: Tensor, gradient: Tensor) -> None:
        engine, kind = self.slot.engine, self.slot.site.kind
        with torch.no_grad():
            for i, scheme in enumerate(self.schemes):
                change = engine.fake_quantize(x, scheme, kind) - x
                self._products[i] += float((change * gradient).sum())

    def close(self, *, last: bool) -> None:
        """End a sample: note its products, and forget its gradients."""
        if self.schemes:
            self.activation_scores.append(self._products)
            self._products = np.zeros(len(self.schemes))
        parameter = self.slot.parameter
        if self.changes is not None:
            nothing = parameter.grad is None
            gradient = torch.zeros_like(parameter) if nothing else parameter.grad
            assert gradient is not None
            moved = self.offset.grad
            zeros = torch.zeros_like(self.offset)
            self._waiting.append(
                (gradient.detach().float().flatten(), zeros if moved is None else moved.detach())
            )
            if last or len(self._waiting) == TOGETHER:
                self._multiply()
        parameter.grad = self.offset.grad = None

    def _multiply(self) -> None:
        assert self.changes is not None
        assert self.shifts is not None
        gradients = torch.stack([g for g, _ in self._waiting])
        moved = torch.stack([m for _, m in self._waiting])
        products = gradients @ self.changes.T + moved @ self.shifts.T
        self.weight_scores.extend(products.double().cpu().numpy())
        self._waiting.clear()


@contextlib.contextmanager
def _gradients(model: nn.Module, probes: Mapping[str, _Probe]) -> Iterator[None]:
    """Let gradients reach the probed weights, biases and inputs, and nothing else, for a while."""
    parameters = list(model.parameters())
    before = [(p.requires_grad, p.grad) for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    for probe in probes.values():
        slot = probe.slot
        if probe.candidates.weights:
            slot.parameter.requires_grad_(True)
            if probe.candidates.corrected:
                slot.offset = probe.offset.requires_grad_(True)
        if probe.candidates.activations:
            slot.probe = probe.probe
    try:
        with torch.enable_grad():
            yield
    finally:
        for probe in probes.values():
            probe.slot.probe = probe.slot.offset = None
        for parameter, (wanted, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
