"""Searches that ask for latency or bit operations, with a clock that is not one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.measure import layers
from autoquant.models.task import Task
from autoquant.nn.converted import converted_of
from autoquant.optimize.callbacks import Silent
from autoquant.optimize.result import SearchResult
from autoquant.optimize.resume import resume
from autoquant.optimize.run import search
from autoquant.report.tables import latency_lines, preflight_lines, trials_table
from autoquant.session import costs
from autoquant.session.costs import LatencyCheck
from autoquant.session.preflight import Preflight
from autoquant.spec.recipe_file import load
from autoquant.spec.space import SearchSpace
from autoquant.study.extract import extract
from autoquant.study.ledger import Ledger
from autoquant.study.trials import measured

SPACE = """\
autoquant_space: 1
rules:
  - weight_bits: [8, 6, 4, 16]
    activation_bits: [8, 16]
"""
FLOAT, HALF, FAST = 4e-3, 3e-3, 1e-3
"""Seconds of a layer in float, with a quantized weight, and with both quantized."""
REST = 2e-3
LAYERS = 3


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
        )


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(360, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net()(x).argmax(1)
    return list(zip(x.split(60), y.split(60), strict=True))


def task_of(**parts: Any) -> Task:
    return Task(**({"evaluation_data": batches, "metric": "accuracy"} | parts))


def layer_seconds(module: nn.Module) -> float:
    slot: Any = module.forward.sites["weight"]  # type: ignore[union-attr]
    if slot.held is None:
        return FLOAT
    return HALF if slot.activation is None else FAST


def clock(call: Any) -> float:
    call()
    owner = getattr(call.func, "__self__", None)
    if isinstance(owner, nn.Module):
        return layer_seconds(owner)
    return REST + sum(layer_seconds(m) for m in call.args[0] if converted_of(m))


@pytest.fixture(autouse=True)
def _setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(layers, "clock_of", lambda device: clock)


def searched(task: Task | None = None, space: str = SPACE, **words: Any) -> SearchResult:
    given = {"trials": 12, "study": "s"} | words
    return search(net(), task or task_of(), space=SearchSpace.parse(space, "mine"), **given)


def trials(study: str = "s") -> list[FrozenTrial]:
    return Ledger.open(study, None).trials()


def quantized(result: SearchResult) -> int:
    return sum(
        s.weight is not None and s.activation is not None for s in result.recipe.sites.values()
    )


@pytest.mark.parametrize("sampler", ["knapsack", "random", "tpe"])
@pytest.mark.parametrize("more", [{}, {"bits": 6.0}, {"size": "60%"}, {"objective": "bits"}])
def test_no_trial_that_is_measured_is_over_the_limit(sampler, more):
    limit = REST + 2 * FAST + FLOAT
    result = searched(max_latency="8ms", sampler=sampler, trials=20, **more)
    assert result.max_latency == pytest.approx(8e-3)
    for trial in trials():
        m = measured(trial)
        if m is not None:
            assert m["latency"] <= limit + 1e-9
            assert m["feasible"] or "drop" in trial.constraints
            assert trial.constraints["latency"] <= 1e-9
        elif trial.state == TrialState.PRUNED and "measured" not in trial.user_attrs:
            assert "by arithmetic" in trial.user_attrs["reason"]
            assert max(trial.constraints.values()) > 0
            assert "drop" not in trial.constraints
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.latency is not None
    assert evidence.latency.predicted <= limit + 1e-9
    assert evidence.latency.measured == pytest.approx(evidence.latency.predicted)
    if sampler == "knapsack":
        assert result.trials["pruned"] == 0


def test_what_is_over_the_limit_is_never_run():
    seen: list[float] = []

    class Begin(Silent):
        on = False

        def begin(self, *args: Any) -> None:
            self.on = True

    begin = Begin()

    def forward(model: nn.Sequential, x: Tensor) -> Tensor:
        if begin.on:
            seen.append(REST + sum(layer_seconds(m) for m in model if hasattr(m, "sites")))
        return model(x)

    task = task_of(forward=forward)
    result = searched(task, max_latency="9ms", sampler="random", trials=30, reporter=begin)
    assert result.trials["pruned"] > 0
    float_model = REST + LAYERS * FLOAT  # measured once more, to confirm
    assert not [s for s in seen if s > 9e-3 + 1e-9 and s != float_model]


def test_a_share_of_the_float_models_time():
    result = searched(max_latency="50%")
    assert result.max_latency == pytest.approx((REST + LAYERS * FLOAT) / 2)


@pytest.mark.parametrize("words", [{}, {"bits": 6.0}, {"size": "50%"}])
def test_what_nothing_meets_is_found_before_the_search(words):
    with pytest.raises(UserError) as raised:
        searched(max_latency="4.99ms", **words)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("--max-latency 4.99ms: the space's fastest recipe")
    assert "takes 5.00 ms for a batch of 60, 35.7% of the float model's 14.0 ms" in message
    assert not list(Path().glob(".autoquant/*.journal"))
    assert searched(max_latency="5.00ms", **words).recipe.evidence is not None


def test_a_limit_and_a_budget_that_exclude_each_other(monkeypatch):
    """What is small is slow here, so the limit alone can be met and the budget alone, too."""
    monkeypatch.setitem(globals(), "FAST", 9e-3)
    monkeypatch.setitem(globals(), "HALF", 8e-3)
    with pytest.raises(UserError, match=r"recipe within --size 40% takes 22\.0 ms for a batch"):
        searched(max_latency="20ms", size="40%")
    searched(max_latency="20ms", study="slow")
    searched(size="40%", study="large")


def test_latency_as_the_objective():
    result = searched(objective="latency", max_drop=0.99)
    assert quantized(result) == LAYERS
    assert result.max_latency is None
    best = min(t.value for t in trials() if t.value is not None)
    assert best == pytest.approx((REST + LAYERS * FAST) / (REST + LAYERS * FLOAT), rel=1e-3)
    # Bits cost no time here, so there is no reason to lose any.
    m = min((m for t in trials() if (m := measured(t))), key=lambda m: m["objective"])
    assert m["average_weight_bits"] == 8


def test_bit_operations_as_the_objective():
    result = searched(objective="bitops", max_drop=0.99)
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.latency is None
    macs = 60 * (16 * 24 + 24 * 24 + 24 * 4)
    assert evidence.float_bit_operations == macs * 256
    assert evidence.bit_operations == macs * 4 * 8
    plain = result.plain()
    assert plain["bit_operations"] == macs * 32
    assert plain["float_bit_operations"] == macs * 256
    assert "latency" not in plain
    assert load(result.recipe_path).evidence == evidence
    assert extract(Ledger.open("s", None), trial=0)[0].evidence.float_bit_operations == macs * 256  # type: ignore[union-attr]


def test_bits_as_the_objective_beside_a_budget():
    result = searched(objective="bits", max_drop=0.99, size="60%")
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.average_weight_bits == 4


def test_what_was_not_asked_for_is_not_there():
    result = searched()
    assert not {"latency", "bit_operations"} & set(result.plain())
    assert not {"latency", "bit_operations"} & set(measured(trials()[0]) or {})
    assert not {"latency", "macs", "latency_checks"} & set(Ledger.open("s", None).header)
    text = result.recipe_path.read_text()
    assert "latency" not in text
    assert "bit_operations" not in text
    assert not Path("cache").exists()


def test_the_result_and_the_recipe_say_what_was_measured():
    result = searched(max_latency="12ms")
    plain = json.loads(json.dumps(result.plain()))["latency"]
    assert set(plain) == {
        "seconds",
        "predicted_seconds",
        "float_seconds",
        "samples",
        "device",
        "max_seconds",
        "checks",
    }
    assert plain["samples"] == 60
    assert plain["max_seconds"] == pytest.approx(0.012)
    names = [check["recipe"] for check in plain["checks"]]
    assert names == ["uniform 8 bits", "uniform 4 bits", "result"]
    assert all(abs(check["error"]) < 1e-9 for check in plain["checks"])
    saved = load(result.recipe_path)
    assert saved == result.recipe
    assert saved.evidence == result.recipe.evidence
    found, number = extract(Ledger.open("s", None), trial=len(trials()) - 1)
    assert number == len(trials()) - 1
    assert found.evidence is not None
    assert found.evidence.latency is not None
    assert found.evidence.latency.measured is None


def test_the_tables_show_it():
    flights: list[Preflight] = []

    class Keep(Silent):
        def preflight(self, found: Preflight) -> None:
            flights.append(found)

    result = searched(max_latency="12ms", reporter=Keep())
    lines = list(preflight_lines(flights[0]))
    assert any("float 14.0 ms, fastest recipe 5.00 ms" in line for line in lines)
    assert any("uniform 8 bits: predicted 5.00 ms, measured 5.00 ms (+0.0%)" in x for x in lines)
    headers = [column.header for column in trials_table(trials(), "t").columns]
    assert "latency" in headers
    assert "bit operations" not in headers
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.latency is not None
    shown = list(latency_lines(evidence.latency, result.latency_checks, 1e-6))
    assert "for a batch of 60 (measured; predicted" in shown[0]
    assert shown[-1] == "note: that is more than the 1.00 us asked for"


@pytest.mark.parametrize("sampler", ["knapsack", "tpe"])
def test_a_resumed_study_keeps_its_table(sampler, monkeypatch):
    words = {"max_latency": "60%", "bits": 6.0, "sampler": sampler, "tune": "none"}
    whole = searched(trials=14, study="whole", **words)
    searched(trials=7, study="pieces", **words)
    # Another speed of the machine would be another limit, and other trials.
    monkeypatch.setattr(layers, "clock_of", lambda device: lambda call: (call(), 9.0)[1])
    result = resume("pieces", model=net(), task=task_of(), trials=14)
    assert [t.params for t in trials("pieces")] == [t.params for t in trials("whole")]
    assert [t.value for t in trials("pieces")] == [t.value for t in trials("whole")]
    assert result.max_latency == whole.max_latency
    assert dict(result.recipe.sites) == dict(whole.recipe.sites)
    assert [c.recipe for c in result.latency_checks] == [
        "uniform 8 bits",
        "uniform 4 bits",
        "result",
    ]


def test_a_task_that_only_has_evaluate():
    def evaluate(model: nn.Module) -> float:
        right = [(model(x).argmax(1) == y).float().mean() for x, y in batches()]
        return float(sum(right)) / len(right)

    result = searched(Task(evaluate=evaluate), objective="latency", max_drop=0.99)
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.latency is not None
    assert evidence.latency.samples == 0
    assert "evaluate(model)" in next(latency_lines(evidence.latency, (), None))


def test_a_model_that_fails_while_it_is_timed(monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("GPU")

    monkeypatch.setattr(costs, "measure_latency", fail)
    with pytest.raises(UserError, match="while layers are timed: GPU"):
        searched(objective="latency")


def test_the_users_code_is_named_where_it_fails():
    calls: list[int] = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if calls:
            raise ValueError("no more")
        return model(x)

    class Say(Silent):
        def say(self, text: str) -> None:
            if text == "timing the layers":
                calls.append(1)

    with pytest.raises(UserError, match="while layers are timed: forward failed: ValueError"):
        searched(task_of(forward=forward), objective="latency", reporter=Say())


def test_a_check_survives_json():
    check = LatencyCheck("result", 0.011, 0.01)
    assert check.error == pytest.approx(0.1)
    assert LatencyCheck.read(json.loads(json.dumps(check.plain()))) == check
    assert LatencyCheck("x", 1.0, 0.0).error == 0


OBJECTIVES: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
    ("size", lambda m: m["size_bytes"]),
    ("bits", lambda m: m["average_weight_bits"]),
    ("latency", lambda m: m["latency"]),
    ("bitops", lambda m: m["bit_operations"]),
]


@pytest.mark.parametrize(("objective", "cost"), OBJECTIVES)
def test_each_objective_is_made_small(objective, cost):
    searched(objective=objective, max_drop=0.99, trials=14)
    rows = [m for t in trials() if (m := measured(t)) is not None]
    best = min(rows, key=lambda m: m["objective"])
    assert cost(best) == min(map(cost, rows))
