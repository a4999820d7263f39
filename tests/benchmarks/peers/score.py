"""The one evaluation that every recipe is scored by: the same code, on the same test data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoquant.measure.decoding import decoded, scoring
from autoquant.measure.decoding import divergences as divergences_of_steps
from autoquant.models.metrics import METRICS
from autoquant.models.task import outputs_of
from tests.benchmarks.peers.cases import Case, logits_path

Run = Callable[[Any], Any]


def divergences(reference: Tensor, quantized: Tensor) -> Tensor:
    """Return KL(reference ‖ quantized) of the softmax of logits [n, classes], a sample [n]."""
    p, q = (x.double().log_softmax(-1) for x in (reference, quantized))
    return (p.exp() * (p - q)).sum(-1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of ``values`` and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@torch.no_grad()
def logits(run: Run, batches: Sequence[tuple[Any, Any]]) -> Tensor:
    """Return a classifier's outputs on all ``batches``."""
    return torch.cat([outputs_of(run(inputs)).float() for inputs, _ in batches])


def float_logits(case: Case, folder: Path) -> Tensor:
    """Return the float model's outputs on the test data, from ``folder`` where they are known."""
    path = logits_path(case.name, folder)
    if path.exists():
        return torch.from_numpy(np.load(path))
    found = logits(lambda x: case.run(case.model, x), case.test)
    part = path.with_name(f"{os.getpid()}-{path.name}")  # another run may write it as well
    np.save(part, found.numpy())
    part.replace(path)
    return found


def score(case: Case, quantized: nn.Module, folder: Path) -> dict[str, Any]:
    """Return the metric of ``quantized`` on the test data and how far its outputs are."""

    def run(inputs: Any) -> Any:
        return case.run(quantized, inputs)

    with torch.no_grad():
        pairs = [(outputs_of(run(inputs)), targets) for inputs, targets in case.test]
    found: dict[str, Any] = {"metric_name": metric_name(case.metric)}
    if isinstance(case.metric, str):
        found["metric"] = METRICS.get(case.metric).evidence(pairs).score()
    else:
        found["metric"] = float(case.metric([o for o, _ in pairs], [t for _, t in pairs]))
    found["kl"], found["kl_error"] = mean_and_error(distances(case, quantized, pairs, folder))
    return found


@torch.no_grad()
def distances(
    case: Case, quantized: nn.Module, pairs: Sequence[tuple[Any, Any]], folder: Path
) -> Tensor:
    """Return how far the outputs in ``pairs`` are from the float model's, a test sample [n].

    For classes and for what is decoded the divergence (of a decoding step; the samples' mean is
    weighted by steps), for other numbers noise over signal.
    """
    if case.scores:
        stats = torch.cat([_steps(case, quantized, inputs) for inputs, _ in case.test])
        return stats[:, 0] / stats[:, 1].mean()
    reference = float_logits(case, folder)
    given = torch.cat([o for o, _ in pairs]).float()
    if case.search_metric == "kl":
        return divergences(reference, given)
    noise, signal = (
        x.double().square().reshape(len(x), -1).sum(1) for x in (given - reference, reference)
    )
    return noise / signal.mean()


def _steps(case: Case, quantized: nn.Module, inputs: Any) -> Tensor:
    """Return [n, 2]: the divergence over all steps that compare, and their number."""
    with scoring(case.model.get_submodule(case.scores)) as given:
        steps = decoded(given, case.run(case.model, inputs))
    with scoring(quantized.get_submodule(case.scores)) as given:
        case.run(quantized, inputs)
    assert steps is not None
    found = divergences_of_steps(steps, given)
    assert found is not None
    return torch.from_numpy(found)


def metric_name(metric: Any) -> str:
    """Return what a metric is called."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def average_bits(widths: dict[str, int], sizes: dict[str, int]) -> float:
    """Return the mean bits of all weights; a layer without a width is float and counts as 16."""
    return sum(widths.get(n, 16) * size for n, size in sizes.items()) / sum(sizes.values())


def weight_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of every convolution, linear layer and embedding."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)
    return {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, kinds)}
