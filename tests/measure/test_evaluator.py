"""One model on one split, against plain loops over the same data."""

from __future__ import annotations

import math
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.errors import TrialError
from autoquant.measure import divergence, evaluator, scored
from autoquant.measure.evaluator import Bar, Evaluator
from autoquant.models.data import make_splits
from autoquant.models.metrics import METRICS
from autoquant.models.task import Task

CPU = torch.device("cpu")


def data(n: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return x, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def task_of(n: int = 400, batch: int = 30, **parts: Any) -> Task:
    x, y = data(n)
    pairs = list(zip(x.split(batch), y.split(batch), strict=True))
    return Task(evaluation_data=lambda: pairs, **({"metric": "accuracy"} | parts))


def evaluator_of(task: Task) -> Evaluator:
    return Evaluator(task, make_splits(task), CPU)


class Linear(nn.Module):
    """Fitted to the data in closed form, then disturbed."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        x, y = data()
        weight = torch.linalg.lstsq(x, functional.one_hot(y, 3).float()).solution
        disturbance = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight + noise * disturbance)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Broken(nn.Module):
    """Raises what it was given."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def joined(found: Evaluator, split: str) -> tuple[Tensor, Tensor]:
    pairs = getattr(found.splits, split)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


@pytest.mark.parametrize("split", ["search", "confirm"])
def test_reading_is_the_plain_metric_of_the_split(split):
    found = evaluator_of(task_of())
    model, worse = Linear(), Linear(0.3)
    x, y = joined(found, split)
    base = found.baseline(model, split)
    reading = found.read(worse, split)
    with torch.no_grad():
        expected = [float((m(x).argmax(1) == y).double().mean()) for m in (model, worse)]
        divergence = functional.kl_div(
            worse(x).log_softmax(1), model(x).log_softmax(1), reduction="batchmean", log_target=True
        )
    assert base.value == pytest.approx(expected[0], abs=0)
    assert reading.value == pytest.approx(expected[1], abs=0)
    assert reading.samples == base.samples == len(x) == 150
    assert found.drop(split, reading.value) == expected[0] - expected[1]
    assert base.divergence is None
    assert reading.divergence == pytest.approx(float(divergence), rel=1e-5)
    assert not reading.stopped
    assert reading.seconds > 0


def test_baseline_is_measured_once():
    calls = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x)

    found = evaluator_of(task_of(forward=forward))
    first = found.baseline(Linear(), "search")
    assert first.metric is METRICS.get("accuracy")
    made = len(calls)
    assert found.baseline(Linear(9.0), "search") is first
    assert len(calls) == made
    assert sum(calls) == first.samples


def test_drop_of_a_metric_where_lower_is_better():
    x, y = data()
    targets = functional.one_hot(y, 3).float()
    pairs = list(zip(x.split(50), targets.split(50), strict=True))
    found = evaluator_of(Task(evaluation_data=lambda: pairs, metric="mse"))
    model, worse = Linear(), Linear(0.5)
    base, reading = found.baseline(model, "search"), found.read(worse, "search")
    x, y = joined(found, "search")
    with torch.no_grad():
        expected = [float(functional.mse_loss(m(x), y)) for m in (model, worse)]
        noise = ((worse(x) - model(x)) ** 2).sum() / (model(x) ** 2).sum()
    assert [base.value, reading.value] == pytest.approx(expected, rel=1e-5)
    assert found.drop("search", reading.value) == reading.value - base.value > 0
    assert reading.divergence == pytest.approx(float(noise), rel=1e-5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("two\nlines"), "forward failed: ValueError: two lines"),
        (RuntimeError(), "forward failed: RuntimeError"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA"), "out of memory on the accelerator"),
        (TrialError("as it is"), "as it is"),
    ],
)
def test_a_forward_that_raises_fails_the_trial(error, reason):
    found = evaluator_of(task_of())
    found.baseline(Linear(), "search")
    with pytest.raises(TrialError) as raised:
        found.read(Broken(error), "search")
    assert str(raised.value) == reason


def test_an_interrupt_is_no_failure(monkeypatch):
    # A test run in the background has SIGINT ignored: then it can only be the code's own.
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    found = evaluator_of(task_of())
    found.baseline(Linear(), "search")
    with pytest.raises(KeyboardInterrupt):
        found.read(Broken(KeyboardInterrupt()), "search")


@pytest.mark.parametrize("metric", ["accuracy", "top5", "f1", "mse", "perplexity", None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_numbers_fail_the_trial(metric, value):
    x = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    y = x.argmax(1)
    targets = x if metric == "mse" else y
    pairs = list(zip(x.split(30), targets.split(30), strict=True))
    found = evaluator_of(Task(evaluation_data=lambda: pairs, metric=metric))
    model = nn.Identity()
    found.baseline(model, "search")

    class Poisoned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[-1, 3] = value
            return x

    with pytest.raises(TrialError):
        found.read(Poisoned(), "search")


def test_limit_stops_a_hopeless_candidate_early():
    found = evaluator_of(task_of(2000))
    found.baseline(Linear(), "search")
    seen: list[tuple[int, int]] = []
    bad = Linear(3.0)
    whole = found.read(bad, "search")
    early = found.read(bad, "search", bar=Bar(0.01), watch=lambda *args: seen.append(args))
    assert whole.samples == 750
    assert found.drop("search", whole.value) > 0.2
    assert early.stopped
    assert scored.FEWEST_TO_STOP <= early.samples < whole.samples
    # The first moment at which the rule holds, by the rule's own words.
    x, y = joined(found, "search")
    with torch.no_grad():
        miss = (bad(x).argmax(1) != y).double() - (Linear()(x).argmax(1) != y).double()
    for done, total in seen:
        assert total == whole.samples
        part = miss[:done]
        certain = part.mean() - 3 * part.std() / math.sqrt(done) > 0.01
        assert bool(certain and done >= 64) == (done == early.samples)


def test_limit_leaves_a_good_candidate_alone():
    found = evaluator_of(task_of(2000))
    found.baseline(Linear(), "search")
    assert not found.read(Linear(0.001), "search", bar=Bar(0.01)).stopped
    assert not found.read(Linear(3.0), "search", bar=Bar(1.0)).stopped
    assert not found.read(Linear(3.0), "search").stopped


def test_a_rival_that_is_surely_better_stops_a_candidate():
    found = evaluator_of(task_of(2000))
    found.baseline(Linear(), "search")
    good, bad = found.read(Linear(0.001), "search"), found.read(Linear(3.0), "search")
    against_good, against_bad = (Bar(0.0, r.evidence, "rival") for r in (good, bad))
    assert found.read(Linear(3.0), "search", bar=against_good).stopped
    # Neither one that is better nor one that is as good is stopped.
    assert not found.read(Linear(0.001), "search", bar=against_bad).stopped
    assert not found.read(Linear(0.001), "search", bar=against_good).stopped


def test_limit_is_not_for_metrics_without_bounds():
    x, y = data(1000)
    pairs = list(zip(x.split(50), functional.one_hot(y, 3).float().split(50), strict=True))
    found = evaluator_of(Task(evaluation_data=lambda: pairs, metric="mse"))
    found.baseline(Linear(), "search")
    assert not found.read(Linear(3.0), "search", bar=Bar(0.01)).stopped


def test_no_batch_is_looked_at_twice(monkeypatch):
    metric, seen = METRICS.get("accuracy"), []

    def statistics(outputs: Tensor, targets: Tensor) -> Any:
        seen.append(outputs)
        return metric.statistics(outputs, targets)

    watched = replace(metric, statistics=statistics)
    monkeypatch.setattr(evaluator, "resolve_metric", lambda task, outputs: watched)
    found = evaluator_of(task_of())
    base = found.baseline(Linear(), "search")
    assert len(seen) == 5
    seen.clear()
    reading = found.read(Linear(0.1), "search", bar=Bar(0.5))
    assert not reading.stopped
    assert len(seen) == 5
    assert reading.value == found.read(Linear(0.1), "search").value
    assert base.samples == reading.samples == 150


def test_outputs_are_let_go_once_the_metric_has_seen_them(monkeypatch):
    monkeypatch.setattr(divergence, "KEEP_BYTES", 2 * 20 * 3 * 4)  # two batches
    given: list[weakref.ref[Tensor]] = []
    alive = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        alive.append(sum(held() is not None for held in given))
        given.append(weakref.ref(y := model(x)))
        return y

    found = evaluator_of(task_of(batch=20, forward=forward))
    found.baseline(Linear(), "search")
    found.read(Linear(0.1), "search")
    assert len(alive) == 2 * len(found.splits.search) > 6
    assert max(alive) <= 4 + 1  # the float model's, the candidate's, and what it returned last


def test_watch_hears_of_every_batch():
    found = evaluator_of(task_of())
    found.baseline(Linear(), "search")
    seen: list[tuple[int, int]] = []
    found.read(Linear(), "search", watch=lambda done, total: seen.append((done, total)))
    assert seen == [(30 * (i + 1), 150) for i in range(5)]


def test_no_targets_means_fidelity(monkeypatch):
    monkeypatch.setattr(divergence, "KEEP_BYTES", 0)  # the float outputs are needed all the same
    x, _ = data()
    for metric in (None, "kl"):
        task = Task(evaluation_data=lambda: list(x.split(50)), metric=metric)
        found = evaluator_of(task)
        base = found.baseline(Linear(), "search")
        assert base.value == 0
        reading = found.read(Linear(0.2), "search")
        assert base.metric is reading.metric is METRICS.get("kl")
        assert reading.value == reading.divergence > 0
        assert found.drop("search", reading.value) == reading.value


def test_float_outputs_are_not_kept_beyond_a_limit(monkeypatch):
    task = task_of(batch=50)
    whole = evaluator_of(task)
    whole.baseline(Linear(), "search")
    assert whole.read(Linear(0.2), "search").divergence is not None
    monkeypatch.setattr(divergence, "KEEP_BYTES", 0)
    none = evaluator_of(task)
    none.baseline(Linear(), "search")
    reading = none.read(Linear(0.2), "search")
    assert reading.divergence is None
    assert reading.value == whole.read(Linear(0.2), "search").value
    # Kept in part, the divergence is that of the first batches.
    monkeypatch.setattr(divergence, "KEEP_BYTES", 2 * 50 * 3 * 4)
    part = evaluator_of(task)
    part.baseline(Linear(), "search")
    x = torch.cat([x for x, _ in part.splits.search[:2]])
    with torch.no_grad():
        expected = functional.kl_div(
            Linear(0.2)(x).log_softmax(1),
            Linear()(x).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
    found = part.read(Linear(0.2), "search").divergence
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("forward", "metric"),
    [
        (lambda m, x: {"a": m(x).argmax(1), "b": 1}, lambda o, t: (o["a"] == t).float().mean()),
        (
            lambda m, x: [{"class": int(i)} for i in m(x).argmax(1)],
            lambda o, t: sum(a["class"] == b for a, b in zip(o, t.tolist(), strict=True)) / len(o),
        ),
    ],
    ids=["dict", "dicts"],
)
def test_outputs_that_cannot_be_compared_have_no_divergence(forward, metric):
    plain = evaluator_of(task_of())
    found = evaluator_of(task_of(forward=forward, metric=metric))
    plain.baseline(Linear(), "search")
    found.baseline(Linear(), "search")
    reading = found.read(Linear(0.5), "search")
    assert reading.divergence is None
    assert reading.value == pytest.approx(plain.read(Linear(0.5), "search").value, abs=1e-6)


def test_outputs_within_each_other_are_compared_by_their_tensors():
    def forward(model: nn.Module, x: Tensor) -> Any:
        return {"a": {"b": (model(x), None)}, "c": "d"}

    def metric(outputs: Any, targets: Tensor) -> Tensor:
        return (outputs["a"]["b"][0].argmax(1) == targets).float().mean()

    plain = evaluator_of(task_of(metric=lambda o, t: (o.argmax(1) == t).float().mean()))
    found = evaluator_of(task_of(forward=forward, metric=metric))
    readings = []
    for one in (plain, found):
        one.baseline(Linear(), "search")
        readings.append(one.read(Linear(0.5), "search"))
    assert readings[1].divergence == pytest.approx(readings[0].divergence, rel=1e-5)
    assert readings[0].value == readings[1].value


@pytest.mark.parametrize(
    ("decode", "metric"),
    [
        (lambda y: y, "accuracy"),
        (lambda y: [str(int(i)) for i in y], None),
        (lambda y: [[int(i)] for i in y], None),
        (lambda y: torch.stack([y, y], 1), None),
    ],
    ids=["classes", "text", "tokens", "columns"],
)
def test_decisions_diverge_where_they_differ(decode, metric):
    def right(outputs: Any, targets: Tensor) -> float:
        return 0.5

    def forward(model: nn.Module, x: Tensor) -> Any:
        return decode(model(x).argmax(1))

    found = evaluator_of(task_of(forward=forward, metric=metric or right, higher_is_better=True))
    found.baseline(Linear(), "search")
    batches = [x for x, _ in found.splits.search]
    with torch.no_grad():
        ours, theirs = (
            torch.cat([m(x).argmax(1) for x in batches]) for m in (Linear(0.5), Linear())
        )
    share = float((ours != theirs).double().mean())
    assert 0 < share < 1
    assert found.read(Linear(0.5), "search").divergence == pytest.approx(share)
    # The same decisions on n samples are no proof of none that differs.
    assert found.read(Linear(), "search").divergence == pytest.approx(0.5 / len(ours))


@pytest.mark.parametrize("dims", [2, 3])
def test_masked_outputs_of_the_float_model_fail_no_trial(dims):
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        outputs = model(x)
        outputs = torch.cat([outputs, torch.full_like(outputs[:, :1], -math.inf)], 1)
        return outputs if dims == 2 else outputs[:, None]

    def metric(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.reshape(-1, 4).argmax(1) == targets).float().mean()

    found = evaluator_of(task_of(forward=forward, metric="accuracy" if dims == 2 else metric))
    found.baseline(Linear(), "search")
    divergence = found.read(Linear(0.5), "search").divergence
    assert 0 < divergence < math.inf


class TestEvaluate:
    def run(self, **parts: Callable[[nn.Module], Any]) -> Evaluator:
        return evaluator_of(Task(**parts))  # type: ignore[arg-type]

    def test_values_are_what_the_functions_return(self):
        modes = []

        def evaluate(model: nn.Module) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return model.weight.sum()  # type: ignore[operator, union-attr, return-value]

        model, worse = Linear(), Linear(0.1)
        found = self.run(evaluate=evaluate, evaluate_confirm=lambda m: 5)
        assert found.confirms
        assert found.example() is None
        base, reading = found.baseline(model, "search"), found.read(worse, "search")
        assert base.value == model.weight.sum().item()
        assert reading.value == worse.weight.sum().item()
        assert reading.evidence is None
        assert reading.divergence is None
        assert reading.samples == 0
        assert found.baseline(model, "confirm").value == 5
        assert found.drop("search", base.value - 1) == pytest.approx(1)
        assert not any(modes)

    def test_without_evaluate_confirm_nothing_confirms(self):
        assert not self.run(evaluate=lambda m: 1.0).confirms

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (math.nan, "evaluate returned nan"),
            (math.inf, "evaluate returned inf"),
            ("good", "evaluate returned str, not one number"),
            (torch.zeros(2), "evaluate returned Tensor of shape [2], not one number"),
            (None, "evaluate returned NoneType, not one number"),
        ],
    )
    def test_what_is_no_number_fails_the_trial(self, value, reason):
        found = self.run(evaluate=lambda m: value)
        with pytest.raises(TrialError) as raised:
            found.read(Linear(), "search")
        assert str(raised.value) == reason

    def test_an_evaluate_that_raises_fails_the_trial(self):
        def evaluate(model: nn.Module) -> float:
            raise IndexError("no beam")

        with pytest.raises(TrialError, match="evaluate failed: IndexError: no beam"):
            self.run(evaluate=evaluate).read(Linear(), "search")


def test_example_is_a_batch_of_the_calibration_data():
    x, _ = data()
    task = task_of(calibration_data=lambda: x[:64].split(16))
    found = evaluator_of(task)
    assert torch.equal(found.example(), x[:16])
    found = evaluator_of(task_of())
    assert torch.equal(found.example(), found.splits.calibrate[0])


class Small(nn.Module):
    """A linear layer on a device with room for few samples at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.linear = Linear()
        self.room = room
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.linear(x)


def test_batches_that_do_not_fit_are_run_in_pieces():
    whole, found = evaluator_of(task_of()), evaluator_of(task_of())
    said: list[str] = []
    found.say = said.append
    expected = [whole.baseline(Linear(), "search"), whole.read(Linear(), "search")]
    largest = max(len(x) for x, _ in found.splits.search)
    model = Small(largest // 3)
    readings = [found.baseline(model, "search"), found.read(model, "search")]
    for ours, theirs in zip(readings, expected, strict=True):
        assert (ours.value, ours.samples) == (theirs.value, theirs.samples)
        assert ours.divergence == pytest.approx(theirs.divergence)
    assert said == ["out of memory: batches are run in 4 pieces from here on"]
    assert model.sizes[-1] <= largest // 3
    tried = len(model.sizes)
    model.room = 0
    with pytest.raises(TrialError, match=r"^out of memory on the accelerator$"):
        found.read(model, "search")
    model.room = largest // 3
    model.sizes.clear()
    found.read(model, "search")  # as it did before that candidate
    assert tried > len(model.sizes) == 4 * len(found.splits.search)
    assert len(said) == 1
