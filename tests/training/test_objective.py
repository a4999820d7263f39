"""The loss of training, against torch's own and against the loss that trials have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.errors import TrialError
from autoquant.measure.decoding import Steps, divergences, steps_of
from autoquant.training.objective import Seen, divergence, loss_of, noise_to_signal, seeing


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_is_that_of_torch() -> None:
    x, y = numbers(7, 5), numbers(7, 5, seed=1)
    wanted = F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, reduction="batchmean")
    assert float(divergence(x, y)) == pytest.approx(float(wanted), rel=1e-5)


def test_classes_that_are_masked_by_infinity_do_not_count() -> None:
    x, y = numbers(7, 5).requires_grad_(), numbers(7, 5, seed=1)
    y[:, 2] = -torch.inf
    found = divergence(x, y)
    found.backward()
    assert bool(found.isfinite())
    assert bool(x.grad.isfinite().all())


def test_noise_over_signal() -> None:
    x, y = numbers(4, 3), numbers(4, 3, seed=1)
    wanted = np.square((x - y).numpy()).sum() / np.square(y.numpy()).sum()
    assert float(noise_to_signal([(x, y)])) == pytest.approx(float(wanted), rel=1e-5)


def test_scores_of_steps_are_what_trials_measure() -> None:
    ours = [numbers(6, 1, 5, seed=i) for i in range(4)]
    theirs = [x + 0.5 * numbers(6, 1, 5, seed=9 + i) for i, x in enumerate(ours)]
    steps = Steps(steps_of(theirs, 6), torch.full((6,), 4))
    rows = divergences(steps, ours)
    parts = [x.clone().requires_grad_() for x in ours]
    seen = Seen(outputs=[[0]] * 6, scores=parts)
    found = loss_of(seen, Seen(outputs=[[0]] * 6, scores=theirs), classes=False, features=0.0)
    assert float(found.detach()) == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum(), rel=1e-5)


def test_layers_count_by_their_weight_and_where_shapes_agree() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = numbers(5, 3)
    modules = {"a": model[0], "b": model[1]}
    with seeing(modules, None) as theirs, torch.no_grad():
        theirs.outputs = model(x) + 1.0
    with seeing(modules, None) as ours:
        ours.outputs = model(2 * x)
    alone = loss_of(ours, theirs, classes=False, features=0.0)
    both = loss_of(ours, theirs, classes=False, features=3.0)
    part = [noise_to_signal([(ours.features[n][0], theirs.features[n][0])]) for n in modules]
    torch.testing.assert_close(both, alone + 3.0 * sum(part) / 2)
    ours.features["b"] = [numbers(2, 2)]
    fewer = loss_of(ours, theirs, classes=False, features=3.0)
    torch.testing.assert_close(fewer, alone + 3.0 * part[0])


def test_outputs_without_a_gradient_are_one_line() -> None:
    seen = Seen(outputs=torch.zeros(3))
    with pytest.raises(TrialError, match="no gradient"):
        loss_of(seen, seen, classes=False, features=0.0)
