"""How far a model that decodes greedily is from the float model: by its scores, step by step.

Two models that decode see the same until they first decide differently. So far, and at that step,
their scores answer the same question, and the divergence of the scores says far more than whether
the decision is the same: a few hundred words have thousands of scores of which few flip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Steps:
    """What the float model scored on one batch, and what of it counts.

    ``scores`` are log-probabilities [samples, steps, classes], ``lengths`` [samples] the steps of
    each sample that lead to what it decoded.
    """

    scores: Tensor
    lengths: Tensor

    @property
    def bytes(self) -> int:
        """The memory that it takes."""
        return self.scores.numel() * self.scores.element_size()


@contextmanager
def scoring(module: nn.Module | None) -> Iterator[list[Any]]:
    """Gather what ``module`` returns, call by call; nothing for None."""
    given: list[Any] = []
    if module is None:
        yield given
        return
    hook = module.register_forward_hook(lambda *call: given.append(call[2]))
    try:
        yield given
    finally:
        hook.remove()


def steps_of(given: Sequence[Any], samples: int) -> Tensor | None:
    """Return the log-probabilities [samples, steps, classes] of all calls, in their order.

    None where calls do not each score all samples, [samples, …, classes].
    """
    parts = []
    for scores in given:
        if not isinstance(scores, Tensor) or scores.dim() < 2 or not scores.is_floating_point():
            return None
        if len(scores) != samples or not samples:
            return None
        parts.append(scores.detach().float().cpu().reshape(samples, -1, scores.shape[-1]))
    if not parts or len({p.shape[2] for p in parts}) > 1 or parts[0].shape[2] < 2:
        return None
    found = torch.cat(parts, 1).log_softmax(-1)
    return None if bool(found.isnan().any()) else found  # −∞ is what was masked


def decoded(given: Sequence[Any], outputs: Any) -> Steps | None:
    """Return the steps that led to ``outputs``, None where those are not the likeliest classes.

    ``outputs`` are integers [samples] or [samples, steps], or lists of them, each ended by a class
    that is left out: the step that chose it counts as well.
    """
    samples = len(outputs) if isinstance(outputs, list | Tensor) and _has_length(outputs) else 0
    scores = steps_of(given, samples)
    if scores is None:
        return None
    chosen = scores.argmax(-1)
    most = chosen.shape[1]
    if isinstance(outputs, Tensor):
        rows = outputs.cpu().reshape(samples, -1)
        if rows.shape[1] > most or not torch.equal(rows.long(), chosen[:, : rows.shape[1]]):
            return None
        return Steps(scores, torch.full((samples,), rows.shape[1], dtype=torch.int64))
    lengths = []
    for row, own in zip(outputs, chosen.tolist(), strict=True):
        tokens = [row] if isinstance(row, int) else row
        if not isinstance(tokens, list | tuple) or list(tokens) != own[: len(tokens)]:
            return None
        lengths.append(1 if isinstance(row, int) else min(len(tokens) + 1, most))
    return Steps(scores, torch.tensor(lengths, dtype=torch.int64))


def divergences(steps: Steps, given: Sequence[Any]) -> np.ndarray | None:
    """Return [samples, 2]: Σ KL(float ‖ quantized) in nats over steps that compare, their number.

    Steps compare up to the first one at which the two models decide differently, with it. None
    where the quantized model's calls, ``given``, are not like the float model's.
    """
    scores = steps_of(given, len(steps.scores))
    if scores is None or scores.shape[2] != steps.scores.shape[2]:
        return None
    common = min(scores.shape[1], steps.scores.shape[1])
    p, q = steps.scores[:, :common].double(), scores[:, :common].double()
    differs = p.argmax(-1) != q.argmax(-1)
    before = differs.cumsum(1) - differs.long()  # how often they differed before a step
    counts = (before == 0) & (torch.arange(common) < steps.lengths[:, None])
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
    terms = torch.where(counts, terms, 0.0)
    return torch.stack([terms.sum(1), counts.sum(1).double()], 1).numpy()


def _has_length(outputs: Any) -> bool:
    return not isinstance(outputs, Tensor) or (
        outputs.dim() > 0 and not outputs.is_floating_point()
    )
