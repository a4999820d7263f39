"""The arithmetic of the benchmark of seeds."""

import numpy as np
import pytest
import torch

from autoquant.models.evidence import function_evidence
from autoquant.models.metrics import METRICS
from tests.benchmarks.seeds import part_of, report
from tests.benchmarks.zoo import TITLES


def test_a_part_of_the_evidence_is_that_of_those_samples():
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(30, 4, generator=draw), torch.randint(0, 4, (30,), generator=draw))
        for _ in range(2)
    ]
    outputs, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
    indices = np.random.default_rng(0).permutation(60)[:17]

    def right(o, t):
        return float((o.argmax(1) == t).float().mean())

    expected = right(outputs[indices], targets[indices])
    for evidence in (METRICS.get("accuracy").evidence(pairs), function_evidence("r", right, pairs)):
        part = part_of(evidence, indices)
        assert part.n == 17
        assert part.score() == pytest.approx(expected)
        assert evidence.score_at(indices) == pytest.approx(expected)


def test_the_report_has_every_model_that_is_known():
    row = {
        "stop": ["x", "1", "2", "3"],
        "beside": ["x", "1", "2", "3", "4"],
        "sure": list("xabcde"),
    }
    text = report({"g2p": row, "minilm": row})
    assert text.count("\n| x |") == 3 * 2
    assert set(TITLES) >= {"g2p", "minilm"}
