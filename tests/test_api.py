"""The few names of the Python API, used as the README uses them."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from torch import Tensor, nn

import autoquant
from autoquant.errors import SpecError, StudyError, TaskError, UserError
from autoquant.spec.techniques import NEAREST, UNCORRECTED


class Net(nn.Module):
    """A convolution, its BatchNorm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 8, 3, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.norm.running_var = torch.rand(8) + 0.5
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


def inputs(n: int = 240) -> tuple[Tensor, ...]:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)).split(40)


def batches() -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [(x, Net().eval()(x).argmax(1)) for x in inputs()]


def accuracy(model: nn.Module, part: slice) -> float:
    pairs = batches()[part]
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    return right / sum(len(y) for _, y in pairs)


def task_of(**parts: Any) -> autoquant.Task:
    return autoquant.Task(**({"evaluation_data": batches, "metric": "accuracy"} | parts))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all():
    names = ["Recipe", "SearchSpace", "Task", "apply", "keep_freed_memory", "load", "resume"]
    names.append("search")
    assert autoquant.__all__ == names
    assert dir(autoquant) == names
    for name in names:
        found = getattr(autoquant, name)
        assert callable(found)
        assert found.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'quantize'"):
        autoquant.quantize  # noqa: B018


def test_search_can_be_called_whatever_was_imported_before():
    """A subpackage has the same name: the import system puts it where the function was."""
    code = (
        "import autoquant\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        autoquant.search(None, 'no.py')\n"
        "    except autoquant.errors.TaskError as error:\n"
        "        print(error)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.splitlines() == [f"{Path('no.py').absolute()}: no such task file"] * 2, (
        child.stderr
    )


def test_import_is_instant():
    code = (
        "import autoquant, sys; print([m for m in ('torch', 'optuna', 'yaml') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_search_and_apply_leave_the_model_as_it_is():
    model, task = Net().train(), task_of()
    state = copy.deepcopy(model.state_dict())
    x = inputs()[0]
    result = autoquant.search(model, task, trials=8)
    assert result.study == "Net"
    assert result.recipe.folded == {"norm": "conv"}
    assert [type(m) for m in model.modules()] == [type(m) for m in Net().modules()]
    assert model.training
    assert model.norm.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    quantized = autoquant.apply(result.recipe, model, task)
    again = autoquant.apply(result.recipe, model, task)
    # What no data taught: scales that a recipe carries, and ranges of the weights themselves.
    plain = {
        name: replace(
            site,
            weight=replace(site.weight, calibration="max", rounding=NEAREST),
            correction=UNCORRECTED,
        )
        for name, site in result.recipe.sites.items()
        if site.weight is not None
    }
    autoquant.apply(result.recipe.with_sites(plain), model)
    with pytest.raises(SpecError, match="needs the task"):
        autoquant.apply(result.recipe, model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        outputs = quantized(x)
        assert torch.equal(outputs, again(x))
        assert not torch.equal(outputs, Net().eval()(x))
    assert sum(p.numel() for p in quantized.parameters()) < sum(
        p.numel() for p in model.parameters()
    )


def test_the_reported_metric_is_that_of_the_applied_model():
    from autoquant.models.data import make_splits

    task = task_of()
    recipe = autoquant.search(Net(), task, trials=8).recipe
    assert recipe.evidence is not None
    assert recipe.evidence.confirm is not None
    model = autoquant.apply(recipe, Net(), task)
    splits = make_splits(task)
    for split, reported in (
        ("search", recipe.evidence.search),
        ("confirm", recipe.evidence.confirm),
    ):
        pairs = getattr(splits, split)
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
        assert right / reported.samples == reported.quantized


def test_a_study_of_python_objects_is_resumed_with_them():
    model, task = Net(), task_of()
    autoquant.search(model, task, trials=4, study="a", tune="none")
    whole = autoquant.search(model, task, trials=9, study="b", out="b", tune="none")
    with pytest.raises(StudyError, match=r"Task in Python: go on with autoquant\.resume\(task=…\)"):
        autoquant.resume("a", model=model)
    with pytest.raises(StudyError, match=r"in Python: go on with autoquant\.resume\(model=…\)"):
        autoquant.resume("a", task=task)
    other = Net()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(StudyError, match="the model has changed since the study began"):
        autoquant.resume("a", model=other, task=task)
    resumed = autoquant.resume("a", model=model, task=task, trials=9)
    assert resumed.recipe == whole.recipe
    assert resumed.recipe == autoquant.resume("a", model=model, task=task).recipe


TASK = """
import torch

def load_model(path):
    import sys
    return sys.modules["net_of_the_test"].load(path)

def evaluation_data():
    import sys
    return sys.modules["net_of_the_test"].batches()

metric = "accuracy"
"""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a folder with model.pt and task.py."""
    import types

    def load(path: Path) -> nn.Module:
        model = Net()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    module = types.SimpleNamespace(load=load, batches=batches)
    monkeypatch.setitem(sys.modules, "net_of_the_test", module)
    (tmp_path / "task.py").write_text(TASK)
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    return tmp_path


def test_files_and_objects_in_any_pairing(files):
    both = autoquant.search("model.pt", "task.py", trials=3, study="both", out="a")
    assert autoquant.resume("both").recipe == both.recipe

    part = autoquant.search(Net(), files / "task.py", trials=3, study="module", out="b")
    assert autoquant.resume("module", model=Net()).recipe == part.recipe

    def load(path: Path) -> nn.Module:
        return sys.modules["net_of_the_test"].load(path)

    task = task_of(load_model=load)
    part = autoquant.search(files / "model.pt", task, trials=3, study="task", out="c")
    with pytest.raises(StudyError, match=r"resume\(task=…\)"):
        autoquant.resume("task")
    assert autoquant.resume("task", task=task).recipe == part.recipe
    for result in (both, part):
        assert result.recipe.sites == both.recipe.sites
    loaded = yaml.safe_load(Path("a/recipe.yaml").read_text())
    assert loaded["model"]["name"] == "model"


class Own(optuna.samplers.RandomSampler):
    """Somebody's own sampler; it counts what it is asked."""

    asked = 0

    def sample_relative(self, *args: Any) -> dict[str, Any]:
        type(self).asked += 1
        return super().sample_relative(*args)


def test_a_sampler_of_one_s_own():
    result = autoquant.search(Net(), task_of(), sampler=Own(seed=1), trials=14, study="own")
    assert sum(result.trials.values()) == 14
    assert 1 <= Own.asked < 14  # the uniform recipes come first, without it
    with pytest.raises(StudyError, match=r"begun with a sampler of one's own \(Own\)"):
        autoquant.resume("own", model=Net(), task=task_of())
    more = autoquant.resume("own", model=Net(), task=task_of(), sampler=Own(seed=1), trials=16)
    assert sum(more.trials.values()) == 16


def test_a_task_that_only_evaluates():
    task = autoquant.Task(evaluate=lambda m: accuracy(m, slice(None)), calibration_data=inputs)
    result = autoquant.search(Net(), task, trials=4)
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.confirm is None
    assert evidence.reported is evidence.search
    assert evidence.reported.samples == 0
    assert evidence.reported.interval is None
    assert result.plain()["metric"] == {
        "name": "evaluate",
        "float": 1.0,
        "quantized": evidence.search.quantized,
        "drop": evidence.search.drop,
        "interval": None,
        "higher_is_better": True,
    }
    # The file says so to whoever reads it, and is read back.
    text = Path("recipe.yaml").read_text()
    assert yaml.safe_load(text)["metric"]["confirm"].startswith("not measured")
    assert "the drop is on what search saw" in " ".join(text.split())
    quantized = autoquant.apply(result.recipe, Net(), task)
    with torch.no_grad():
        assert accuracy(quantized, slice(None)) == evidence.search.quantized


def test_a_task_that_evaluates_on_two_sets():
    task = autoquant.Task(
        evaluate=lambda m: accuracy(m, slice(3)),
        evaluate_confirm=lambda m: accuracy(m, slice(3, None)),
        calibration_data=inputs,
    )
    result = autoquant.search(Net(), task, trials=4)
    evidence = result.recipe.evidence
    assert evidence is not None
    assert evidence.confirm is not None
    quantized = autoquant.apply(result.recipe, Net(), task)
    with torch.no_grad():
        assert accuracy(quantized, slice(3)) == evidence.search.quantized
        assert accuracy(quantized, slice(3, None)) == evidence.confirm.quantized
    assert result.plain()["metric"]["quantized"] == evidence.confirm.quantized


def test_evaluate_calibrates_where_there_is_no_calibration_data():
    task = autoquant.Task(evaluate=lambda m: accuracy(m, slice(None)))
    result = autoquant.search(Net(), task, trials=2)
    assert result.recipe.sites["head"].activation is not None
    assert result.recipe.sites["head"].activation.scale is not None


@pytest.mark.parametrize(("logits", "metric"), [(True, "kl"), (False, "noise_to_signal")])
def test_without_targets_the_metric_is_fidelity(logits, metric):
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) if logits else model(x)[:, :, None]

    task = autoquant.Task(evaluation_data=inputs, forward=forward)
    result = autoquant.search(Net(), task, trials=6)
    found = result.plain()["metric"]
    assert found["name"] == metric
    assert found["higher_is_better"] is False
    assert found["float"] == 0
    assert found["quantized"] == found["drop"] > 0
    assert result.max_drop == 0.01
    assert found["interval"][0] <= found["drop"] <= found["interval"][1]


def test_spaces_by_name_file_and_value(files):
    text = "autoquant_space: 1\nrules:\n  - weight_bits: 8\n    activation_bits: 16\n"
    (files / "mine.yaml").write_text(text)
    value = autoquant.SearchSpace.parse(text, "mine")
    found = [
        autoquant.search("model.pt", "task.py", space=space, trials=2, study=f"s{i}").recipe.sites
        for i, space in enumerate(["mine.yaml", files / "mine.yaml", value])
    ]
    assert found[0] == found[1] == found[2]
    (files / "mine.yaml").write_text(text.replace("8", "7"))
    for study in ("s0", "s1"):
        with pytest.raises(StudyError, match="the space has changed"):
            autoquant.resume(study)
    assert autoquant.resume("s2").recipe.sites == found[2]  # a value is in the study alone
    assert autoquant.search(Net(), task_of(), space="int8", trials=2).recipe.sites


def test_a_value_named_like_a_shipped_space_is_not_taken_for_it(files):
    text = "autoquant_space: 1\nname: int8\nrules:\n  - weight_bits: 5\n"
    space = autoquant.SearchSpace.parse(text, "value")
    autoquant.search("model.pt", "task.py", space=space, trials=2, study="s")
    recipe = autoquant.resume("s").recipe
    assert {site.weight_bits for site in recipe.sites.values()} == {5}


def test_mistakes_are_one_line():
    with pytest.raises(TaskError, match="neither evaluation_data nor evaluate"):
        autoquant.Task()
    with pytest.raises(TaskError, match=r"no\.py: no such task file"):
        autoquant.search(Net(), "no.py")
    with pytest.raises(UserError, match="unknown sampler 'tpee'"):
        autoquant.search(Net(), task_of(), sampler="tpee")
    with pytest.raises(SpecError, match="unknown search space 'int9'"):
        autoquant.search(Net(), task_of(), space="int9")
    with pytest.raises(UserError, match=r"model\.pt: no such file"):
        autoquant.search("model.pt", task_of())
    with pytest.raises(UserError, match="no study"):
        autoquant.resume()
    assert list(Path().iterdir()) == []


def test_results_are_the_same_each_time():
    first = autoquant.search(Net(), task_of(), trials=8, study="a", seed=5, out="a")
    second = autoquant.search(Net(), task_of(), trials=8, study="b", seed=5, out="b")
    assert first.recipe == second.recipe
    assert Path("a/recipe.yaml").read_text() == Path("b/recipe.yaml").read_text()
    assert hash(first.recipe) == hash(second.recipe)
