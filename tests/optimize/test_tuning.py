"""Tuning within a search: what is measured, kept, resumed and written is one model."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from torch import nn

import autoquant
from autoquant.errors import UserError
from autoquant.models.data import make_splits
from autoquant.models.files import of_module
from autoquant.models.task import Task
from autoquant.optimize.callbacks import Silent
from autoquant.optimize.evaluate import measure_recipe
from autoquant.optimize.resume import resume
from autoquant.selection.schedule import Schedule
from autoquant.spec.recipe_file import load
from autoquant.spec.space import SearchSpace
from autoquant.study.extract import extract
from autoquant.study.ledger import Ledger
from autoquant.study.trials import measured
from autoquant.study.tuned import Shelf, searched, tuning_of

SPACE = """
autoquant_space: 1
rules:
  - {weight_bits: [8, 6, 5, 4, 3, 2], weight_calibration: [output_mse, max], activation_bits: [8]}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)
        return nn.Sequential(*layers)


def batches() -> list[Any]:
    # Inputs that go together: what one layer gets wrong another can mend.
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 24, generator=generator)
    x = torch.randn(1200, 6, generator=generator) @ mixed
    with torch.no_grad():
        return list(zip(x.split(50), net()(x).argmax(1).split(50), strict=True))


def task(**words: Any) -> Task:
    return Task(**({"evaluation_data": batches, "metric": "accuracy"} | words))


def search(study: str = "s", **words: Any) -> Any:
    given = {"trials": 12, "study": study, "out": study, "max_drop": "3%"} | words
    which = given.pop("task", None) or task()
    return autoquant.search(net(), which, space=SearchSpace.parse(SPACE, "mine"), **given)


def tuned_trials(study: str = "s") -> list[Any]:
    return [t for t in Ledger.open(study, None).trials() if tuning_of(t) is not None]


def evaluated(recipe: Any) -> list[tuple[float, float]]:
    splits = measure_recipe(of_module(net()), task(), recipe).splits
    return [(splits[name].quantized, splits[name].drop) for name in ("search", "confirm")]


def said(recipe: Any) -> list[tuple[float, float]]:
    return [(s.quantized, s.drop) for s in (recipe.evidence.search, recipe.evidence.confirm)]


@pytest.mark.parametrize(
    "words", [{}, {"sampler": "tpe"}, {"bits": 3.5}, {"sampler": "random", "bits": 3.5}], ids=str
)
def test_never_worse_and_what_is_written_is_what_was_measured(words):
    plain = search("plain", tune="none", **words)
    result = search(**words)
    assert not tuned_trials("plain")
    assert result.tuned == len(tuned_trials())
    assert result.tuned >= 2
    before = searched(Ledger.open("s", None).trials())
    assert [t.params for t in before] == [
        t.params for t in Ledger.open("plain", None).trials()
    ]  # tuning comes after the trials, and takes nothing from them
    ours, theirs = result.recipe.evidence, plain.recipe.evidence
    if "bits" not in words:
        assert ours.size_bytes <= theirs.size_bytes
    else:
        assert ours.average_weight_bits <= 3.5
    written = load(result.recipe_path)
    assert said(written) == said(result.recipe) == evaluated(written)
    model = autoquant.apply(written, net(), task())
    pairs = make_splits(task()).confirm
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    assert right / sum(len(y) for _, y in pairs) == ours.confirm.quantized


def test_a_recipe_that_lost_too_much_is_repaired():
    """The search must come to something smaller than it does without, or the test says nothing."""
    plain, result = search("plain", tune="none", trials=20), search(trials=20)
    assert result.recipe.reconstruction is not None
    assert result.recipe.evidence.size_bytes < plain.recipe.evidence.size_bytes
    assert Path(result.recipe.learned.path).name == "recipe.learned.safetensors"


def test_with_a_budget_the_loss_on_the_search_data_is_never_more():
    search(bits=3.0)
    losses = [
        (m["loss"], tuning_of(t)) for t in Ledger.open("s", None).trials() if (m := measured(t))
    ]
    tuned = min(loss for loss, how in losses if how is not None)
    plain = min(loss for loss, how in losses if how is None)
    assert tuned < plain


class Stopping(Silent):
    """Ends the search in the middle of the second recipe that is tuned."""

    def step(self, number: int, done: int, total: int) -> None:
        if total == 3 and done == 1 and len(tuned_trials()) == 1:
            raise KeyboardInterrupt


def test_an_interrupted_tuning_goes_on_where_it_was():
    whole = search("whole")
    with pytest.raises(KeyboardInterrupt):
        search(reporter=Stopping())
    (first,) = tuned_trials()
    files = {p.name: p.stat().st_mtime_ns for p in Path(".autoquant/s.learned").iterdir()}
    result = resume("s", model=net(), task=task())
    assert result.tuned == whole.tuned
    assert tuned_trials()[0].datetime_complete == first.datetime_complete
    now = {p.name: p.stat().st_mtime_ns for p in Path(".autoquant/s.learned").iterdir()}
    assert files.items() <= now.items()
    assert dict(result.recipe.sites) == dict(whole.recipe.sites)
    assert result.recipe.learned.sha256 == whole.recipe.learned.sha256
    once_more = resume("s", model=net(), task=task())
    assert once_more.tuned == result.tuned
    assert once_more.recipe == result.recipe


def trained_trials(study: str = "s", method: str = "distillation") -> list[Any]:
    return [t for t in tuned_trials(study) if tuning_of(t).technique.method == method]


@pytest.mark.parametrize("words", [{}, {"bits": 3.0}], ids=str)
def test_what_was_fitted_is_trained_where_that_is_asked_for(words):
    fitted = search("fitted", tune="layer", **words)
    result = search(tune="full", **words)
    assert not trained_trials("fitted")
    (trial,) = trained_trials()
    assert result.tuned == fitted.tuned + 1
    same = [
        measured(t)["loss"]
        for t in Ledger.open("s", None).trials()
        if t.params == trial.params and t.number != trial.number
    ]
    assert len(same) > 1
    assert measured(trial)["loss"] < min(same)
    written = load(result.recipe_path)
    assert said(written) == said(result.recipe) == evaluated(written)
    assert [p.name for p in Path(".autoquant/s.learned").glob("training*")] == []


@pytest.mark.parametrize("words", [{}, {"bits": 3.0}], ids=str)
def test_blocks_are_trained_where_that_is_asked_for(words):
    fitted = search("fitted", tune="layer", **words)
    result = search(tune="block", **words)
    assert len(trained_trials(method="blockwise")) == 1
    assert not trained_trials()
    assert result.tuned == fitted.tuned + 1
    written = load(result.recipe_path)
    assert said(written) == said(result.recipe) == evaluated(written)
    assert [p.name for p in Path(".autoquant/s.learned").glob("training*")] == []


def test_blocks_that_are_interrupted_go_on_where_they_were():
    whole = search("whole", tune="block", bits=3.0)

    class Ending(Silent):
        def step(self, number: int, done: int, total: int) -> None:
            if done == 230 and total == 600:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(reporter=Ending(), tune="block", bits=3.0)
    (file,) = Path(".autoquant/s.learned").glob("training*")
    steps: list[int] = []

    class Listening(Silent):
        def step(self, number: int, done: int, total: int) -> None:
            if total == 600:
                steps.append(done)

    result = resume("s", model=net(), task=task(), reporter=Listening())
    assert min(steps) == 200
    assert not file.exists()
    assert dict(result.recipe.sites) == dict(whole.recipe.sites)


class Killed(Silent):
    """Ends the search in the middle of training."""

    def step(self, number: int, done: int, total: int) -> None:
        if done == 130 < total:
            raise KeyboardInterrupt


def test_training_that_is_interrupted_goes_on_where_it_was():
    whole = search("whole", tune="full", bits=3.0)
    with pytest.raises(KeyboardInterrupt):
        search(reporter=Killed(), tune="full", bits=3.0)
    assert not trained_trials()
    (file,) = Path(".autoquant/s.learned").glob("training*")
    steps: list[int] = []

    class Listening(Silent):
        def step(self, number: int, done: int, total: int) -> None:
            steps.append(done)

    result = resume("s", model=net(), task=task(), reporter=Listening())
    assert min(s for s in steps if s > 10) == 120
    assert not file.exists()
    assert dict(result.recipe.sites) == dict(whole.recipe.sites)
    ours, theirs = trained_trials()[0], trained_trials("whole")[0]
    assert tuning_of(ours) == tuning_of(theirs)
    assert measured(ours)["loss"] == measured(theirs)["loss"]


def test_what_cannot_be_trained_is_said_and_the_fitted_one_is_returned():
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    result = search(task=task(forward=forward), tune="full", bits=3.0)
    assert result.notes == ("not trained: no gradient reaches the model's outputs",)
    assert result.recipe.reconstruction.method == "sequential"
    again = resume("s", model=net(), task=task(forward=forward))
    assert again.notes == result.notes


def test_training_is_done_by_itself_where_it_is_little_work(monkeypatch):
    search("some")
    assert not trained_trials("some")
    monkeypatch.setattr("autoquant.optimize.tuning.TRAINING_WORK", 0.5)
    search("more")
    (trial,) = trained_trials("more")
    assert 100 <= tuning_of(trial).technique.steps <= 400
    search("none", tune="layer")
    assert not trained_trials("none")


@pytest.mark.parametrize("storage", [None, "all.journal", "sqlite:///studies.db"])
def test_a_tuned_trial_is_extracted_as_it_was_measured(storage, tmp_path):
    search(storage=storage)
    ledger = Ledger.open("s", storage)
    trial = next(t for t in reversed(ledger.trials()) if tuning_of(t) is not None)
    recipe, number = extract(ledger, trial=trial.number)
    assert number == trial.number
    assert Path(recipe.learned.path).parent == Shelf.of(ledger.storage, "s").folder
    # Trials are measured by the fast kernels, recipes by the reference.
    assert evaluated(recipe)[0][0] == pytest.approx(measured(trial)["value"], abs=0.005)
    confirmed, _ = extract(ledger)
    assert evaluated(confirmed) == said(confirmed)


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_what_was_learned_and_is_gone_is_left_out_and_said(damage):
    first = search()
    assert first.recipe.reconstruction is not None
    folder = Path(".autoquant/s.learned")
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[:-1])
    shutil.rmtree("s")
    result = resume("s", model=net(), task=task())
    assert len(result.notes) == first.tuned
    assert all(
        f"what a tuned trial learned is {damage[:4]}" in n or "damaged" in n for n in result.notes
    )
    assert result.recipe.learned is None
    with pytest.raises(UserError, match="what a tuned trial learned"):
        extract(Ledger.open("s", None), trial=tuned_trials()[0].number)


def test_it_is_not_done_where_it_cannot_be_or_takes_too_long(monkeypatch):
    def evaluate(model: nn.Module) -> float:
        pairs = [(model(x).argmax(1) == y).float().mean() for x, y in batches()]
        return float(torch.stack(pairs).mean())

    alone = search("alone", task=Task(evaluate=evaluate), trials=4)
    assert alone.notes == (
        "not tuned: the task gives no calibration data, which tuning learns from",
    )
    monkeypatch.setattr("autoquant.optimize.tuning.WORK", 1e-3)
    much = search("much")
    assert much.tuned == 0
    (note,) = much.notes
    assert note.startswith("not tuned: fitting 3 layers would take about as long as ")
    assert note.endswith("--tune layer asks for it")
    assert search("asked", tune="layer").tuned >= 2
    # The work of all is limited, not that of one.
    monkeypatch.setattr("autoquant.optimize.tuning.WORK", 3.0 / 12)
    some = search("some")
    assert some.tuned == 2
    assert some.notes == ("no more was tuned: it would take longer than twice the trials",)


@pytest.mark.slow
def test_a_timeout_covers_tuning():
    def slow(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002 * len(x))
        return model(x)

    began = time.monotonic()
    search(task=task(forward=slow), trials=None, timeout=20.0, tune="layer")
    assert time.monotonic() - began < 26


@pytest.mark.parametrize("seconds", [-1.0, 0.05])
def test_what_there_is_no_time_for_is_said(seconds, monkeypatch):
    monkeypatch.setattr(Schedule, "for_tuning", property(lambda self: seconds))
    monkeypatch.setattr(Schedule, "for_trials", property(lambda self: self.left / 2))
    result = search(timeout=600.0, tune="layer", trials=8)
    assert result.notes == ("no more was tuned: there was no time",)
    assert not any(t.state == TrialState.FAIL for t in tuned_trials())


def test_a_failing_recipe_is_a_failed_trial_and_is_not_tuned_again():
    fitting = False

    class Noticing(Silent):
        def say(self, text: str) -> None:
            nonlocal fitting
            fitting = text == "tuning"

    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if fitting:
            raise ValueError("no more")
        return model(x)

    result = search(task=task(forward=forward), reporter=Noticing(), bits=3.5, tune="layer")
    found = tuned_trials()
    assert {t.state for t in found} == {TrialState.FAIL}
    assert "no more" in found[0].user_attrs["reason"]
    assert result.recipe.learned is None


def test_words():
    with pytest.raises(UserError, match=r"--tune 'blocks': give auto, none, layer, block, full"):
        search(tune="blocks")
