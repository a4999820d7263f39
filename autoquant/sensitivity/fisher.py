"""What each choice of each layer does to the model's output, from gradients: no trial is needed.

For a small change Δ of a weight or an activation, the Kullback-Leibler divergence of the outputs is
½ E[(g·Δ)²], with g the gradient of the negative log-likelihood of a label that is drawn from the
model's own output: the Fisher information, sample by sample, so that what a change does in one
sample may cancel, and signs and sizes count together. Where outputs are no class scores, g is that
of a random projection of them, and E[(g·Δ)²] the squared change of the outputs. Sources: Amari
1998; Martens 2020, arXiv 1412.1193, section 5; Kunstner et al. 2019, arXiv 1905.12558, for why
labels are drawn and not given.

What a model decodes, words say, has no gradient. There the scores that its last layer gave on the
way, all taken for scores of classes, stand for the outputs: what was decoded is taken as given, and
what was scored after its end is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.errors import AutoquantError, TrialError
from autoquant.measure.decoding import decoded, scoring
from autoquant.methods.applier import Applier
from autoquant.models.trees import batch_size, take
from autoquant.models.usercode import guarded
from autoquant.nn.leaves import leaves
from autoquant.nn.slots import SiteSlot
from autoquant.sensitivity.sample_gradients import (
    LATER,
    NESTED,
    TILED,
    Array,
    Candidates,
    Changes,
    Mixed,
    Probe,
    UsesOfWeight,
    WholeGradients,
    listening,
)
from autoquant.spec.recipe import ActivationScheme, WeightScheme

SAMPLES = 96
"""Samples whose gradients are taken, at most: an entry is then known to some 15%."""
TRIED = 3
"""Samples on which the fast way is held against the one that is always right."""
TOGETHER = 32
"""Samples that are run at a time, at most."""
SINGLES = 24
"""Samples that are run alone for the sake of a few layers in which they can't be told apart."""
CHANGED_BYTES = 2 << 30
"""Bytes of the changes of weights that are held at a time."""
IGNORED = -100
"""The label of what does not count."""
RUN_BYTES = 400 << 20
"""Inputs and outputs of layers in one run, at most: what autograd keeps is about as much again."""
PASSING = (Mixed, RuntimeError, IndexError)
"""Errors of a run back that are torch's own or ours; any other is of code that the user wrote."""


@dataclass(frozen=True)
class Score:
    """An estimated loss and the standard error of that estimate.

    ``loss`` is the mean of the squares of ``changes`` [samples], the first of all samples: what two
    choices do together to one sample is the sum of theirs.
    """

    loss: float
    error: float
    changes: Array = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)


@dataclass(frozen=True)
class Sensitivity:
    """Estimated loss of each choice of each site, in the unit of a trial's loss."""

    weights: Mapping[str, Mapping[WeightScheme, Score]]
    activations: Mapping[str, Mapping[ActivationScheme, Score]]
    samples: int
    layer: str = ""
    """The last layer, where its outputs stand for those of the model."""


def measure_sensitivity(
    applier: Applier,
    run: Callable[[nn.Module, Any], Any],
    batches: Sequence[Any],
    candidates: Mapping[str, Candidates],
    *,
    classes: bool,
    samples: int = SAMPLES,
    seed: int = 0,
    seconds: float = math.inf,
) -> Sensitivity | str:
    """Return the sensitivity on ``samples`` of ``batches``, or in one line why there is none.

    ``run`` (model, inputs) → outputs is the user's forward; ``classes`` says that outputs are
    scores of classes. The model is left in float, as it was. Samples are run together where that
    is seen to give what each gives alone, on the first few. Where what all candidates change does
    not fit CHANGED_BYTES, sites take turns. Where ``seconds`` are over, fewer samples have to do.
    """
    began = time.monotonic()
    chosen = _Samples(batches, samples)
    if not chosen.count:
        return "there are no calibration data to take gradients on"
    applier.to_float()
    prepared = applier.prepared
    work = _Work(applier, run, _Objective(classes, seed))
    found: list[Mapping[str, Probe]] = []
    try:
        with prepared.engine.reference():
            turns = list(_turns(candidates, prepared.slots))
            for turn, names in enumerate(turns, 1):
                work.until = began + seconds * turn / len(turns)
                part = {n: Changes(prepared.slots[n], candidates[n], applier) for n in names}
                probes = work.take(part, chosen)
                if probes is None:
                    return "the model's outputs have no gradient"
                found += probes
    except AutoquantError as error:
        return f"gradients can't be taken: {error}"
    except RuntimeError as error:  # torch's own: an operator without a gradient, memory
        return f"gradients can't be taken: {str(error).splitlines()[0]}"
    unit = 0.5 if classes or work.tapped else 1.0 / max(work.objective.power, 1e-30)
    weights, activations = {}, {}
    for name, c in candidates.items():
        rows = [probes[name] for probes in found if name in probes]
        weights[name] = _scores(c.weights, [r for p in rows for r in p.weight_rows], unit)
        inputs = [r for p in rows for r in p.activation_rows]
        activations[name] = _scores(c.activations, inputs, unit)
    return Sensitivity(weights, activations, int(min(work.seen, chosen.count)), work.tapped)


def _turns(
    candidates: Mapping[str, Candidates], slots: Mapping[str, SiteSlot]
) -> Iterator[list[str]]:
    """Yield groups of sites whose candidates' changes fit the memory, at least one a group."""
    group: list[str] = []
    used = 0
    for name, mine in candidates.items():
        size = 4 * slots[name].parameter.numel() * len(mine.weights)
        if group and used + size > CHANGED_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


class _Samples:
    """Samples evenly spread over batches, to be run alone or, those of one batch, together."""

    def __init__(self, batches: Sequence[Any], most: int) -> None:
        self._batches = [batch for batch in batches if batch is not None]
        sizes = [batch_size(batch) for batch in self._batches]
        total = sum(sizes)
        self.count = min(most, total)
        places = [i * total // self.count for i in range(self.count)]
        self._runs: list[list[int]] = []
        start = 0
        for size in sizes:
            self._runs.append([i - start for i in places if start <= i < start + size])
            start += size

    def runs(self, together: int, skip: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Yield (number of the first, how many, inputs) of the samples from ``skip`` on."""
        number = 0
        for batch, places in zip(self._batches, self._runs, strict=True):
            mine = places[max(skip - number, 0) :]
            first = number + len(places) - len(mine)
            for i in range(0, len(mine), together):
                part = mine[i : i + together]
                yield first + i, len(part), take(batch, part)
            number += len(places)


class _Work:
    """Runs samples forward and back past the probes.

    ``tapped`` is the layer whose outputs stand for those of the model, "" for none. At ``until``,
    on the clock of ``time.monotonic``, a turn ends with the samples that it has by then, at least
    one; ``seen`` are the fewest samples of any turn.
    """

    def __init__(
        self,
        applier: Applier,
        run: Callable[[nn.Module, Any], Any],
        objective: _Objective,
    ) -> None:
        self.model = applier.prepared.model
        self.last = applier.prepared.sites[-1]
        self.tapped = ""
        self.until = math.inf
        self.seen = math.inf
        self._count = 0
        self.run = run
        self.objective = objective

    def take(
        self, changes: Mapping[str, Changes], samples: _Samples
    ) -> list[Mapping[str, Probe]] | None:
        """Return probes with the rows of all samples; None where outputs have no gradient."""
        alone = {n: WholeGradients(c) for n, c in changes.items()}
        self._count = 0
        tried = next((size for _, size, _ in samples.runs(TRIED)), 0)
        if not self._singly(alone, samples, 0, tried):
            if self.tapped:
                return None
            self.tapped = self.last.name
            return self.take(changes, samples)
        if self.late():
            self.seen = min(self.seen, self._count)
            return [alone, {}]
        fine, most = self._tried(changes, samples, alone) if tried > 1 else ({}, 1)
        rest = {n: probe for n, probe in alone.items() if n not in fine}
        if 2 * len(rest) > len(alone):
            fine, rest = {}, alone
        if rest:
            self._singly(rest, samples, tried, min(SINGLES, samples.count) if fine else None)
        with listening(self.model, fine):
            for first, size, inputs in samples.runs(most, tried) if fine else ():
                if self.late():
                    break
                self._back(fine, first, size, inputs)
        self.seen = min(self.seen, self._count)
        return [alone, fine]

    def late(self) -> bool:
        """Return whether the time of this turn is over."""
        return time.monotonic() >= self.until

    def _singly(
        self, probes: Mapping[str, WholeGradients], samples: _Samples, skip: int, stop: int | None
    ) -> bool:
        """Run samples ``skip`` to ``stop`` alone; return whether they have gradients."""
        stop = samples.count if stop is None else stop
        with listening(self.model, probes):
            for first, size, inputs in samples.runs(1, skip):
                if first >= stop:
                    break
                last = first + 1 == stop or self.late()
                if not self._back(probes, first, size, inputs, last=last):
                    return False
                if last:
                    break
        return True

    def _tried(
        self, changes: Mapping[str, Changes], samples: _Samples, alone: Mapping[str, Probe]
    ) -> tuple[Mapping[str, UsesOfWeight], int]:
        """Return fresh probes for many samples a run, for the sites that allow it; and how many."""
        anchor = torch.zeros_like(next(iter(changes.values())).nothing[0])
        anchor.requires_grad_(True)
        first, size, inputs = next(samples.runs(TRIED))
        found: dict[str, UsesOfWeight] = {}
        used = 0
        try:
            for orders in ((TILED, NESTED), (LATER,)):
                rest = {
                    n: UsesOfWeight(c, anchor, orders) for n, c in changes.items() if n not in found
                }
                if not rest:
                    break
                with listening(self.model, rest):
                    self._back(rest, first, size, inputs)
                used += sum(probe.bytes for probe in rest.values())
                for name, probe in rest.items():
                    order = probe.agreed(alone[name])
                    if order is not None:
                        found[name] = UsesOfWeight(changes[name], anchor, (order,))
        except (Mixed, RuntimeError, IndexError):
            pass  # what was found so far holds
        most = int(min(max(RUN_BYTES * size / max(used, 1), 1.0), TOGETHER))
        return found, most

    def _back(
        self, probes: Mapping[str, Any], first: int, size: int, inputs: Any, *, last: bool = False
    ) -> bool:
        """Run samples forward and back; return whether their outputs have a gradient."""
        for probe in probes.values():
            probe.begin(size)
        loss = self._loss(inputs, first, size)
        if loss is None:
            return False
        with guarded(lambda reason: TrialError(f"backward failed: {reason}"), None, PASSING):
            loss.backward()
        for probe in probes.values():
            probe.close(last=last)
        self._count = max(self._count, first + size)
        return True

    def _loss(self, inputs: Any, first: int, size: int) -> Tensor | None:
        """Run samples and return what to differentiate, None without gradient."""
        if not self.tapped:
            return self.objective.of(self.run(self.model, inputs), first, size)
        with scoring(self.model.get_submodule(self.last.users[0][0])) as given:
            outputs = self.run(self.model, inputs)
        steps = decoded(given, outputs)
        return self.objective.of_steps(given, first, size, None if steps is None else steps.lengths)


class _Objective:
    """What is differentiated: drawn for each sample by its number, whatever it is run with.

    ``power`` is the mean squared size of the outputs so far, where they are no class scores.
    """

    def __init__(self, classes: bool, seed: int) -> None:
        self.classes = classes
        self.seed = seed
        self._powers: dict[int, float] = {}

    @property
    def power(self) -> float:
        """The mean over samples, each counted once."""
        return sum(self._powers.values()) / max(len(self._powers), 1)

    def of(self, outputs: Any, first: int, size: int) -> Tensor | None:
        """Return what to differentiate, None without gradient; Mixed where samples are."""
        found = [
            leaf
            for _, leaf in leaves(outputs)
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
        ]
        if not found:
            return None
        if size > 1 and any(not leaf.dim() or len(leaf) != size for leaf in found):
            raise Mixed
        return self._label(found[0], first) if self.classes else self._project(found, first, size)

    def of_steps(
        self, given: Sequence[Any], first: int, size: int, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return the same for scores [samples, …, classes] of several steps.

        Of each sample the first ``lengths`` [samples] count: what follows is not what it decodes.
        """
        draws = [self._draw(first + i) for i in range(size)]
        total: Tensor | None = None
        done = 0
        for scores in given:
            if not isinstance(scores, Tensor) or not scores.requires_grad or scores.dim() < 2:
                return None
            if len(scores) != size and size > 1:
                raise Mixed
            rows = scores.float().reshape(size, -1, scores.shape[-1])
            chances = rows.detach().cpu().softmax(-1)
            if not bool(chances.isfinite().all()):
                return None
            labels = [
                torch.multinomial(p, 1, generator=draw)[:, 0]
                for p, draw in zip(chances, draws, strict=True)
            ]
            wanted = torch.cat(labels)
            if lengths is not None:
                steps = torch.arange(done, done + rows.shape[1])
                wanted[(steps >= lengths[:, None]).flatten()] = IGNORED
                done += rows.shape[1]
            loss = F.cross_entropy(
                rows.flatten(0, 1), wanted.to(scores.device), ignore_index=IGNORED, reduction="sum"
            )
            total = loss if total is None else total + loss
        return total

    def _label(self, outputs: Tensor, first: int) -> Tensor | None:
        logits = outputs.float()
        chances = logits.detach().cpu().softmax(-1)
        if not bool(chances.isfinite().all()):
            return None
        labels = torch.cat(
            [
                torch.multinomial(row[None], 1, generator=self._draw(first + i))[:, 0]
                for i, row in enumerate(chances)
            ]
        )
        return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")

    def _project(self, leaves: Sequence[Tensor], first: int, size: int) -> Tensor | None:
        total = leaves[0].new_zeros((), dtype=torch.float32)
        draws = [self._draw(first + i) for i in range(size)]
        powers = torch.zeros(size, dtype=torch.float64)
        for leaf in leaves:
            shape = leaf.shape[1:] if size > 1 else leaf.shape
            signs = [torch.randint(0, 2, shape, generator=draw) * 2.0 - 1.0 for draw in draws]
            # Scores that are masked by −∞ are no part of what changes.
            leaf = torch.where(leaf.isfinite(), leaf, torch.zeros_like(leaf))
            total = total + (leaf.float() * torch.stack(signs).reshape(leaf.shape).to(leaf)).sum()
            powers += leaf.detach().double().square().reshape(size, -1).sum(1).cpu()
        if not bool(powers.isfinite().all()):
            return None
        self._powers.update(zip(range(first, first + size), powers.tolist(), strict=True))
        return total

    def _draw(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 32) + number)


def _scores(choices: Sequence[Any], rows: list[Array], unit: float) -> dict[Any, Score]:
    """Return the score of each choice; ``rows`` are g·Δ, [choices] for each sample."""
    if not choices or not rows:
        return {}
    changes = math.sqrt(unit) * np.stack(rows)
    losses = np.square(changes)
    errors = losses.std(0, ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else losses[0]
    return {
        choice: Score(float(loss), float(error), own)
        for choice, loss, error, own in zip(choices, losses.mean(0), errors, changes.T, strict=True)
    }
