"""What training makes small: how far the student is from the float model, its teacher.

Of outputs that are scores of classes it is the Kullback-Leibler divergence, of other tensors noise
over signal; of a model that decodes, the divergence of the scores that it decoded by, up to the
first step at which the two decide differently: the loss that trials have (``measure.divergence``).
To it comes noise over signal of the outputs of layers, for a model whose outputs say little about
them. Sources: Hinton et al. 2015, arXiv 1503.02531; Romero et al. 2015, arXiv 1412.6550, and Jiao
et al. 2020, arXiv 1909.10351, for features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import TrialError
from autoquant.measure.decoding import scoring
from autoquant.nn.layer_output import as_real
from autoquant.nn.leaves import leaves

NO_GRADIENT = "no gradient reaches the model's outputs"


@dataclass
class Seen:
    """What one run of the model gave: its outputs, the scores it decoded by, layers' outputs."""

    outputs: Any = None
    scores: list[Any] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=dict)


@contextlib.contextmanager
def seeing(modules: Mapping[str, nn.Module], scorer: nn.Module | None) -> Iterator[Seen]:
    """Gather what ``modules`` and the ``scorer`` give inside, call by call."""
    seen = Seen()
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            calls = seen.features.setdefault(name, [])
            hook = module.register_forward_hook(
                lambda *call, calls=calls: calls.extend(_first(call[2]))
            )
            stack.callback(hook.remove)
        seen.scores = stack.enter_context(scoring(scorer))
        yield seen


def _first(output: Any) -> Iterator[Tensor]:
    """Yield the first tensor of what a module gave: the states of an RNN, say."""
    for _, leaf in leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield as_real(leaf)
            return


def loss_of(student: Seen, teacher: Seen, *, classes: bool, features: float) -> Tensor:
    """Return the loss of one batch, a scalar; ``features`` is the weight of layers' outputs.

    Raises TrialError where nothing in the outputs, and no scores, has a gradient.
    """
    found = _outputs_loss(student.outputs, teacher.outputs, classes)
    if found is None:
        found = _scores_loss(student.scores, teacher.scores)
    parts = _features_loss(student.features, teacher.features) if features else []
    if found is None and not parts:
        raise TrialError(NO_GRADIENT)
    none = torch.zeros((), dtype=torch.float32)
    total = sum(parts, start=none) * (features / max(len(parts), 1))
    return total if found is None else found + total.to(found.device)


def _outputs_loss(ours: Any, theirs: Any, classes: bool) -> Tensor | None:
    """Return the loss of outputs, None where they have no gradient or don't pair off."""
    pairs = [
        (x, y)
        for (_, x), (_, y) in zip(leaves(ours), leaves(theirs), strict=False)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()
    ]
    return distance([(x, y) for x, y in pairs if x.requires_grad and x.shape == y.shape], classes)


def distance(pairs: Sequence[tuple[Tensor, Tensor]], classes: bool) -> Tensor | None:
    """Return how far outputs are from those of the teacher, None where there are none.

    Where they are scores of ``classes`` that is their divergence, else noise over signal.
    """
    if not pairs:
        return None
    if classes and pairs[0][0].dim() == 2:
        return divergence(*pairs[0])
    return noise_to_signal(pairs)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean KL(teacher ‖ student) in nats of scores [..., classes]."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).mean()


def noise_to_signal(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ(x − y)² / Σy² over pairs of tensors; what is infinite in y doesn't count."""
    noise = signal = torch.zeros((), dtype=torch.float32)
    for x, y in pairs:
        known = y.isfinite()
        y = torch.where(known, y, 0.0).float()
        x = torch.where(known, x, 0.0).float()
        noise = noise.to(x.device) + (x - y).square().sum()
        signal = signal.to(x.device) + y.square().sum()
    return noise / signal.clamp(min=1e-12)


def _scores_loss(ours: Sequence[Any], theirs: Sequence[Any]) -> Tensor | None:
    """Return the loss of scores [samples, …, classes], call by call, while both decide alike."""
    rows: list[tuple[Tensor, Tensor]] = []
    for x, y in zip(ours, theirs, strict=False):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() < 2:
            return None
        if not x.requires_grad or x.shape[0] != y.shape[0] or x.shape[-1] != y.shape[-1]:
            return None
        rows.append((x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])))
    if not rows:
        return None
    common = min(sum(part.shape[1] for part in parts) for parts in zip(*rows, strict=True))
    x, y = (torch.cat(parts, 1)[:, :common] for parts in zip(*rows, strict=True))
    p, q = y.float().log_softmax(-1), x.float().log_softmax(-1)
    differs = (p.argmax(-1) != q.argmax(-1)).long()
    counts = (differs.cumsum(1) - differs) == 0
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
    return torch.where(counts, terms, 0.0).sum() / counts.sum().clamp(min=1)


def _features_loss(
    ours: Mapping[str, Sequence[Tensor]], theirs: Mapping[str, Sequence[Tensor]]
) -> list[Tensor]:
    """Return noise over signal of each layer that gave the same shapes in both runs."""
    found = []
    for name, mine in ours.items():
        other = theirs.get(name, ())
        same = len(mine) == len(other) and all(
            x.shape == y.shape for x, y in zip(mine, other, strict=True)
        )
        if mine and same and any(x.requires_grad for x in mine):
            found.append(noise_to_signal(list(zip(mine, other, strict=True))))
    return found
