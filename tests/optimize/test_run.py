"""A whole search on a small model: what it does with candidates that fail, and how it ends."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn

from autoquant.errors import StudyError, TrialError, UserError
from autoquant.models.files import LoadedModel, state_hash
from autoquant.models.task import Task
from autoquant.optimize import confirm as confirming
from autoquant.optimize.callbacks import Silent
from autoquant.optimize.evaluate import measure_recipe
from autoquant.optimize.loop import FAILURES, Stop
from autoquant.optimize.result import SearchResult
from autoquant.optimize.resume import resume
from autoquant.optimize.run import search
from autoquant.session.preflight import Preflight
from autoquant.spec.goal import Goal
from autoquant.spec.recipe_file import load
from autoquant.spec.space import SearchSpace
from autoquant.study import tuned
from autoquant.study.ledger import Ledger
from autoquant.study.opening import new_name
from autoquant.study.source import Source, space_file
from autoquant.study.trials import measured

SPACE = """\
autoquant_space: 1
rules:
  - weight_bits: [8, 6, 4, 2]
    activation_bits: [8, 16]
    activation_calibration: [max, mse]
"""
GROUPS = """\
autoquant_space: 1
rules:
  - weight_bits: [4, 2]
    weight_granularity: [per_group_32, per_channel]
"""
REFUSED = "over the limit by arithmetic (size), not measured"
LOCKED = """\
autoquant_space: 1
rules:
  - lock: {weight: {bits: 4}}
"""


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(360, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net()(x).argmax(1)
    return list(zip(x.split(60), y.split(60), strict=True))


def task_of(**parts: Any) -> Task:
    return Task(**({"evaluation_data": batches, "metric": "accuracy"} | parts))


def narrow(model: nn.Module) -> bool:
    """Return whether the first layer has weights of 4 bits or fewer."""
    return model[0].weight[0].unique().numel() <= 16  # type: ignore[index]


def searched(task: Task | None = None, space: str = SPACE, **words: Any) -> SearchResult:
    given = {"trials": 12, "study": "s"} | words
    return search(net(), task or task_of(), space=SearchSpace.parse(space, "mine"), **given)


def trials(study: str = "s") -> list[FrozenTrial]:
    """Return the trials of a study, without those that were tuned."""
    return tuned.searched(Ledger.open(study, None).trials())


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Switch(Silent):
    """Turns on what makes candidates fail when the trials begin: after the preflight."""

    on = False

    def begin(self, *args: Any) -> None:
        self.on = True


def failing(switch: Switch, act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        outputs = model(x)
        return act(outputs) if switch.on and narrow(model) else outputs

    return forward


def throw(error: BaseException) -> Callable[[Tensor], Tensor]:
    def act(outputs: Tensor) -> Tensor:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (throw(ValueError("too coarse")), "forward failed: ValueError: too coarse"),
        (throw(MemoryError()), "out of memory"),
        (throw(torch.OutOfMemoryError("GPU")), "out of memory on the accelerator"),
        (lambda y: y * math.nan, "outputs contain NaN"),
        (lambda y: y[:, :1], "is no class of 1"),
        (lambda y: y[:5], "do not fit"),
        (lambda y: None, "outputs of type NoneType are not numbers"),
    ],
)
@pytest.mark.parametrize("sampler", ["knapsack", "tpe"])
def test_a_candidate_that_fails_is_recorded_with_its_reason(act, reason, sampler):
    switch = Switch()
    task = task_of(forward=failing(switch, act))
    result = searched(task, reporter=switch, sampler=sampler)
    failed = [t for t in trials() if t.state == TrialState.FAIL]
    assert failed
    assert result.trials["failed"] == len(failed)
    assert sum(result.trials.values()) == 12
    for trial in failed:
        assert reason in trial.user_attrs["reason"]
        assert "\n" not in trial.user_attrs["reason"]
        assert trial.params["0.weight_bits"] <= 4
    for trial in trials():
        if trial.state == TrialState.COMPLETE:
            assert trial.params["0.weight_bits"] > 4
            assert measured(trial) is not None
    weight = result.recipe.sites["0"].weight
    assert weight is not None
    assert weight.bits > 4


def test_a_metric_that_is_nan_on_some_candidates_only():
    state = {"narrow": False}

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        state["narrow"] = narrow(model)
        return model(x)

    def score(outputs: Tensor, targets: Tensor) -> float:
        return math.nan if state["narrow"] else float((outputs.argmax(1) == targets).float().mean())

    searched(task_of(forward=forward, metric=score))
    reasons = {t.user_attrs.get("reason") for t in trials() if t.state == TrialState.FAIL}
    assert reasons == {"metric score is nan"}


@pytest.mark.parametrize("after", [0, 3])
def test_ten_in_a_row_end_the_search_with_the_reason(after):
    calls = itertools.count()
    switch = Switch()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        # Gradients are taken before the trials, and may fail as they like.
        if switch.on and not torch.is_grad_enabled() and next(calls) >= after * per_trial:
            raise RuntimeError("the cable is out")
        return model(x)

    per_trial = len(searched_batches())
    task = task_of(forward=forward)
    with pytest.raises(StudyError) as raised:
        searched(task, reporter=switch, trials=40)
    message = "10 trials in a row failed, the last one: forward failed: RuntimeError: the cable"
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(trials()) == after + FAILURES
    assert not Path("recipe.yaml").exists()

    # The study is kept: with the cable plugged in, it goes on.
    result = resume("s", model=net(), task=task_of(), trials=20)
    assert result.trials["failed"] == FAILURES
    assert result.trials["complete"] + result.trials["pruned"] == 20 - FAILURES
    assert Path("recipe.yaml").exists()


def searched_batches() -> Sequence[object]:
    """Return the batches of the search split."""
    from autoquant.models.data import make_splits

    return make_splits(task_of()).search


def test_nine_in_a_row_do_not():
    ended: list[TrialState] = []

    class Counting(Switch):
        def trial(self, trial: FrozenTrial, best: FrozenTrial | None) -> None:
            ended.append(trial.state)

    switch = Counting()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if switch.on and len(ended) < 30 and len(ended) % 10 != 9:
            raise RuntimeError("nearly always")
        return model(x)

    result = searched(task_of(forward=forward), reporter=switch, trials=30)
    assert result.trials["failed"] == 27


def test_failures_at_the_confirmation_leave_the_study(monkeypatch):
    def confirm(*args: object) -> None:
        raise TrialError("no finalist could be measured again: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(confirming, "confirm", confirm)
        with pytest.raises(StudyError, match="study s: no finalist could be measured again"):
            searched()
    assert len(trials()) == 12
    assert sum(resume("s", model=net(), task=task_of()).trials.values()) == 12


def test_the_recipe_is_in_the_study_even_where_it_cannot_be_written(monkeypatch):
    def save(*args: object) -> None:
        raise UserError("recipe.yaml: cannot write: No space left on device")

    monkeypatch.setattr(confirming, "save", save)
    with pytest.raises(UserError, match="cannot write"):
        searched()
    assert "autoquant_recipe" in Ledger.open("s", None).header["recipe"]["text"]


class Heard(Silent):
    """Writes down what a reporter hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def say(self, text: str) -> None:
        self.heard.append(text)

    def preflight(self, found: Preflight) -> None:
        self.heard.append(found)

    def begin(self, study: str, goal: Goal, done: Sequence[FrozenTrial], stop: Stop) -> None:
        self.heard.append((study, goal, len(done), stop))

    def trial(self, trial: FrozenTrial, best: FrozenTrial | None) -> None:
        self.heard.append((trial.number, None if best is None else best.number))


def test_what_a_reporter_hears():
    heard = Heard()
    result = searched(reporter=heard, trials=5)
    events = heard.heard
    begun = next(i for i, e in enumerate(events) if isinstance(e, tuple))
    assert [e for e in events[:begun] if isinstance(e, str)] == [
        "reading the data",
        "running the float model",
        "finding the layers",
        "calibrating",
        "preflight",
    ]
    study, goal, done, stop = events[begun]
    assert (study, done, stop) == ("s", 0, Stop(5))
    assert goal.max_drop == result.max_drop == 0.01
    assert [e[0] for e in events[begun + 1 :] if isinstance(e, tuple)] == list(
        range(5 + result.tuned)  # what is tuned is heard of, too
    )
    assert events[-1] == "confirming"


def test_nothing_to_choose_is_one_trial():
    result = searched(space=LOCKED, trials=None)
    assert result.trials == {"complete": 1, "pruned": 0, "failed": 0}
    assert {site.weight_bits for site in result.recipe.sites.values()} == {4}


@pytest.mark.parametrize("sampler", ["knapsack", "random"])
def test_a_search_that_is_told_nothing_ends_itself(sampler):
    result = searched(trials=None, sampler=sampler, tune="none")
    assert result.done is not None
    assert result.done.startswith("done after ")
    assert len(trials()) < 60
    assert searched(trials=60, study="told", sampler=sampler, tune="none").done is None


@pytest.mark.parametrize(
    "words", [{"trials": 50}, {"trials": "auto"}, {"trials": 50, "sampler": "random"}]
)
def test_a_small_space_is_tried_to_its_end(words):
    space = SPACE.replace("[8, 6, 4, 2]", "[8, 4]").replace("[8, 16]", "[8]")
    result = searched(space=space, **words)
    assert result.done == "done: all 16 recipes of the space were tried"
    keys = {repr(sorted(trial.params.items())) for trial in trials()}
    assert len(trials()) == len(keys) == 16
    # One trial fewer than there are recipes: the sampler has to choose.
    assert searched(space=space, study="fewer", trials=15).done is None


def test_workers_on_one_study_try_different_recipes():
    def deep() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(8)]
            return nn.Sequential(*layers, nn.Linear(64, 4))

    # Models and labels are made here: threads share torch's generator, and a worker that seeds it
    # while the other draws its weights would have another model.
    first, *models = [deep() for _ in range(3)]
    x = torch.cat([x for x, _ in batches()])
    with torch.no_grad():
        labelled = [(x, first(x).argmax(1))]

    task = task_of(evaluation_data=lambda: labelled)
    search(first, task, study="s", trials=10, bits=5.0)
    begun = len(trials())

    def work(worker: int) -> SearchResult:
        return resume("s", trials=begun + 16, worker=worker, model=models[worker], task=task)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, (0, 1)))
    new = trials()[begun:]
    assert 16 <= len(new) <= 17  # each may have one in flight when the last is counted
    assert len({repr(sorted(t.params.items())) for t in new}) >= 15
    assert all(sum(r.trials.values()) >= begun + 16 for r in results)


def test_timeout_ends_a_search_without_a_number_of_trials():
    began = time.monotonic()
    result = searched(trials=None, timeout=4.0)
    assert time.monotonic() - began < 8
    assert sum(result.trials.values()) >= 1


def test_a_timeout_that_nothing_fits_into_is_refused_before_the_study_begins():
    with pytest.raises(UserError, match=r"^--timeout 1e-09s: .* give \d+s or more$"):
        searched(trials=None, timeout=1e-9)
    assert not Path(".autoquant").exists()


def test_a_budget_that_no_trial_keeps():
    """Uniform recipes take the first granularity, whose scales are too large for this size."""
    words = {"space": GROUPS, "sampler": "random", "trials": 2}
    with pytest.raises(StudyError, match="study s: none of its 2 trials is within the budget"):
        searched(size="640b", **words)
    result = resume("s", model=net(), task=task_of(), trials=30)
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.size_bytes <= 640
    for trial in trials():
        m = measured(trial)
        assert (m is None) == (trial.state == TrialState.PRUNED)
        if m is None:
            assert trial.user_attrs["reason"] == REFUSED
            assert trial.constraints["size"] > 0
        else:
            assert m["size_bytes"] <= 640


def test_the_first_answer_is_never_stopped_early():
    """Every candidate is hopeless, and yet the search says what the best of them costs."""
    space = LOCKED.replace("bits: 4", "bits: 2, granularity: per_tensor")
    result = searched(space=space, max_drop=0)
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.search.drop > 0.1
    assert result.trials == {"complete": 1, "pruned": 0, "failed": 0}
    assert not result.holds


def test_no_recipe_holds():
    result = searched(max_drop=0, space=LOCKED.replace("bits: 4", "bits: 2"))
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.reported.drop > 0
    assert not result.holds
    assert result.recipe == load(Path("recipe.yaml"))


def test_measure_recipe_reproduces_both_splits():
    recipe = searched().recipe
    evidence = recipe.evidence
    assert evidence is not None
    loaded = LoadedModel(net().eval(), "module", "m", "0")
    found = measure_recipe(loaded, task_of(), recipe)
    assert found.splits == {"search": evidence.search, "confirm": evidence.confirm}
    assert found.size_bytes == evidence.size_bytes
    plain = measure_recipe(LoadedModel(net().eval(), "module", "m", "0"), task_of(), None)
    assert plain.splits["search"].drop == 0
    assert plain.average_weight_bits == 16
    assert plain.size_bytes == plain.float_size_bytes


def test_measure_recipe_of_code_that_fails():
    switch = Switch()
    recipe = searched(space=LOCKED).recipe
    task = task_of(forward=failing(switch, throw(ValueError("too coarse"))))
    switch.on = True
    loaded = LoadedModel(net().eval(), "module", "m", "0")
    with pytest.raises(UserError, match="forward failed: ValueError: too coarse"):
        measure_recipe(loaded, task, recipe)


def test_a_study_of_another_format(tmp_path):
    searched(trials=2)
    Ledger.open("s", None).note(format=99)
    with pytest.raises(StudyError, match="study s: written in format 99, this release reads 2"):
        resume("s", model=net(), task=task_of())


def test_new_name_is_not_taken(tmp_path):
    for expected in ("m", "m-2", "m-3"):
        assert new_name("m", None) == expected
        searched(trials=1, study=expected)
    assert new_name("m", f"{tmp_path}/other.journal") == "m"


def test_state_hash():
    model = net()
    digest = state_hash(model)
    assert digest == state_hash(net())
    with torch.no_grad():
        model[2].bias[3] += 1e-7  # type: ignore[index, union-attr]
    assert state_hash(model) != digest
    assert state_hash(net().half()) != digest
    assert state_hash(nn.Sequential(*net(), nn.Linear(4, 4))) != digest
    scalar = nn.BatchNorm1d(3).to(torch.bfloat16)  # a tensor without dimensions, and odd dtypes
    assert state_hash(scalar) == state_hash(scalar)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_state_hash_of_sparse_and_complex_tensors(layout):
    def made(value: complex, row: int) -> nn.Module:
        model = nn.Linear(2, 2)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        dense = torch.zeros(3, 3)
        dense[row, 1] = 2.0
        model.register_buffer("edges", dense.to_sparse(layout=layout))
        model.register_buffer("turn", torch.tensor([value]).conj())
        return model

    digest = state_hash(made(1 + 2j, 0))
    assert digest == state_hash(made(1 + 2j, 0))
    assert digest != state_hash(made(1 - 2j, 0))
    assert digest != state_hash(made(1 + 2j, 1))


def test_source_needs_data():
    with pytest.raises(UserError, match=r"give a task: --task TASK\.py, or --data FILE"):
        Source("model.pt").load_task()


def test_space_file():
    assert space_file("default") is None
    assert space_file("mine.yaml") == "mine.yaml"
    assert space_file(Path("sub/mine.yaml")) == "sub/mine.yaml"
