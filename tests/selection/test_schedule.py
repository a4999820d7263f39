"""--timeout covers the whole of a search: profile, trials and confirmation."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import autoquant
from autoquant.models.task import Task
from autoquant.selection.schedule import Schedule
from autoquant.spec.verdict import NOT_PROVEN

SAMPLES = 480


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))


def batches() -> list:
    x = torch.randn(SAMPLES, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net()(x).argmax(1)
    return list(zip(x.split(48), y.split(48), strict=True))


def slow_task(a_sample: float, a_score: float = 0.0) -> Task:
    """Return a task whose forward takes so many seconds a sample, and its metric so many."""

    def forward(model, x):
        time.sleep(a_sample * len(x))
        return model(x)

    def metric(outputs, targets):
        time.sleep(a_score)
        return float((outputs.argmax(1) == targets).float().mean())

    return Task(evaluation_data=batches, forward=forward, metric=metric if a_score else "accuracy")


def timed(task: Task, **words):
    began = time.monotonic()
    result = autoquant.search(net(), task, study="s", **words)
    return result, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [9, 16])
def test_a_slow_model(timeout):
    """A pass over the search split takes 0.4 s, the profile alone some 8 s without a limit."""
    result, took = timed(slow_task(0.002), trials=500, timeout=timeout)
    assert 0.5 * timeout < took < 1.25 * timeout
    done = sum(result.trials.values())
    assert done >= 1
    assert f"{500 - done} of 500 trials" in result.skipped
    assert result.plain()["skipped"] == list(result.skipped)
    assert result.recipe.evidence.confirm is not None
    assert result.recipe.evidence.confirm.interval is not None


@pytest.mark.slow
def test_a_slow_metric():
    """One interval scores 400 resamples: 20 s, which are more than there is."""
    result, took = timed(slow_task(0.0, 0.05), timeout=8)
    assert took < 12
    assert any("how sure the drop on the confirm data is" in what for what in result.skipped)
    evidence = result.recipe.evidence
    assert evidence.confirm.interval is None
    assert evidence.verdict.outcome == NOT_PROVEN


def test_with_time_enough_nothing_is_skipped():
    result, _ = timed(slow_task(0.0), trials=12, timeout=600)
    assert result.skipped == ()
    assert "skipped" not in result.plain()
    Path(".autoquant/s.journal").unlink()
    free, _ = timed(slow_task(0.0), trials=12)
    assert dict(free.recipe.sites) == dict(result.recipe.sites)
    assert free.recipe.evidence == result.recipe.evidence


def test_a_profile_that_there_is_no_time_for(monkeypatch):
    monkeypatch.setattr(Schedule, "for_profile", 0.0)
    result, _ = timed(slow_task(0.0), trials=14, timeout=600)
    assert "the profile: recipes after the uniform ones are drawn at random" in result.skipped
    assert sum(result.trials.values()) == 14


def test_a_resumed_search_keeps_its_own_timeout():
    timed(slow_task(0.0), trials=3)
    began = time.monotonic()
    result = autoquant.resume("s", model=net(), task=slow_task(0.0), trials=100_000, timeout=5)
    assert time.monotonic() - began < 9
    assert 3 <= sum(result.trials.values()) < 100_000
    assert any("of 100000 trials" in what for what in result.skipped)


def test_the_clock_of_the_command_line_starts_with_the_process():
    script = (
        "import time; time.sleep(1)\n"
        "from autoquant.cli.started import process_start\n"
        "print(time.monotonic() - process_start())\n"
    )
    began = time.monotonic()
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 0.9 < float(child.stdout) <= time.monotonic() - began + 0.1


def test_what_costs_nothing_is_not_left_out_however_late_it_is(monkeypatch):
    monkeypatch.setattr(Schedule, "left", -1.0)
    monkeypatch.setattr(Schedule, "least", -2.0)
    result, _ = timed(slow_task(0.0), trials=14, timeout=600)
    assert "13 of 14 trials" in result.skipped
    assert result.recipe.evidence.confirm.interval is not None
