"""What would fail after hours is found before the first trial, in one line."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import ModelFileError, TaskError, UserError
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.report.tables import preflight_lines
from autoquant.session import preflight as module
from autoquant.session.preflight import Preflight, preflight
from autoquant.session.session import Session, open_session
from autoquant.spec.recipe import SiteRecipe, WeightScheme
from autoquant.spec.space import SearchSpace

CPU = torch.device("cpu")


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 36, 5),
            nn.PReLU(),
        )


def batches(n: int = 120) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return list(zip(x.split(40), x.flatten(1)[:, :5].argmax(1).split(40), strict=True))


def task_of(**parts: Any) -> Task:
    return Task(**({"evaluation_data": batches, "metric": "accuracy", "source": "t.py"} | parts))


def session_of(model: nn.Module, task: Task | None = None) -> Session:
    return open_session(LoadedModel(model.eval(), "module", "m", "0"), task or task_of(), CPU)


def check(model: nn.Module, task: Task | None = None, space: str = "default") -> Preflight:
    session = session_of(model, task)
    return preflight(session, SearchSpace.load(space).resolve(session.prepared.sites))


def test_what_is_found():
    found = check(net())
    assert found.metric == "accuracy"
    assert 0 <= found.value <= 1
    assert found.samples == {"calibrate": 30, "search": 45, "confirm": 45}
    assert [(s.name, s.layer) for s in found.sites] == [("0", "Conv2d"), ("4", "Linear")]
    # The BatchNorm went into the convolution, which has a bias now.
    assert found.parameters == 4 * 9 + 4 + 4 * 36 * 5 + 5 + 1
    held = {part.name: part.parameters for part in found.float_parts}
    assert sum(held.values()) == 4 + 5 + 1
    assert held["5"] == 1
    prelu = next(part for part in found.float_parts if part.name == "5")
    assert "PReLU" in prelu.reason
    assert found.share(prelu) == 1 / found.parameters
    assert found.seconds > 0


def test_the_session_is_left_in_float():
    session = session_of(net())
    preflight(session, SearchSpace.load("default").resolve(session.prepared.sites))
    x = batches()[0][0]
    with torch.no_grad():
        assert torch.allclose(session.model(x), net().eval()(x), atol=1e-5)


@pytest.mark.parametrize("space", ["default", "int8", "weight_only", "cnn", "full"])
def test_every_shipped_space_passes(space):
    assert check(net(), space=space).metric == "accuracy"


@pytest.mark.parametrize(
    "metric", [lambda o, t: float("nan"), lambda o, t: float("inf"), lambda o, t: o.mean() / 0]
)
def test_a_metric_that_is_not_finite(metric):
    with pytest.raises(TaskError, match=r"t\.py: on the float model: metric \S+ is (nan|inf|-inf)"):
        check(net(), task_of(metric=metric))


class Wrapped(nn.Module):
    """A network whose outputs something is done to."""

    def __init__(self, change: Callable[[Wrapped, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net()
        self.change = change
        self.calls = 0
        self.kept: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.change(self, self.net(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, y: y + 0.01 * torch.randn_like(y),
        lambda m, y: y * (1 + 0.01 * m.calls),
        lambda m, y: nn.functional.dropout(y, 0.5, training=True),
        lambda m, y: m.kept.setdefault(y.shape, torch.zeros_like(y)).add_(y),
    ],
    ids=["random", "stateful", "dropout", "written again"],
)
def test_outputs_that_do_not_repeat(change):
    with pytest.raises(
        TaskError, match=r"t\.py: the float model gives different outputs"
    ) as raised:
        check(Wrapped(change))
    assert "same inputs: the output differs by " in str(raised.value)
    # What it wraps is all right.
    assert "the first module that differs is the model itself (Wrapped), given" in str(raised.value)


class Decoder(nn.Module):
    """A decoder as Hugging Face has them: scores, some of them masked, and a cache."""

    class Cache:
        def __init__(self, keys: Tensor) -> None:
            self.layers = [types.SimpleNamespace(keys=keys)]

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> dict[str, Any]:
        scores = self.net(x)
        scores = torch.cat([scores, torch.full_like(scores[:, :1], -float("inf"))], 1)
        return {"hidden": {"scores": scores}, "past_key_values": Decoder.Cache(scores * 2)}


def test_outputs_are_compared_by_the_tensors_that_they_hold():
    found = check(
        Decoder(), task_of(evaluation_data=[(x, None) for x, _ in batches()], metric=None)
    )
    assert (found.metric, found.value) == ("noise_to_signal", 0.0)
    session = session_of(Decoder(), task_of(metric=None))
    preflight(session, SearchSpace.load("default").resolve(session.prepared.sites))
    sites = {site.name: SiteRecipe(WeightScheme(4)) for site in session.prepared.sites}
    m = session.measure(sites, "search")[0]
    assert 0 < m.loss == m.value < 1


def test_noise_of_the_size_of_rounding_is_no_matter():
    assert check(Wrapped(lambda m, y: y * (1 + 1e-7 * (m.calls % 2)))).metric == "accuracy"


def test_a_metric_that_does_not_repeat():
    values = iter(range(100))
    task = Task(
        evaluation_data=batches,
        metric=lambda outputs, targets: next(values),
        higher_is_better=True,
        source="t.py",
    )
    with pytest.raises(TaskError, match=r"t\.py: metric .* returned 0 and then \d on the same"):
        check(net(), task)


def test_an_evaluate_that_does_not_repeat():
    values = iter(range(100))
    task = Task(
        evaluate=lambda m: next(values) + 0 * float(m(batches()[0][0]).sum()),
        calibration_data=lambda: [x for x, _ in batches()],
        source="t.py",
    )
    with pytest.raises(TaskError, match=r"t\.py: evaluate\(model\) returned \d+ and then \d+"):
        check(net(), task)


def test_an_evaluate_that_fails_the_second_time():
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(float(model(batches()[0][0]).sum()))
        if len(calls) == 2:
            raise OSError("the file was closed")
        return 1.0

    task = Task(evaluate=evaluate, calibration_data=lambda: [batches()[0][0]], source="t.py")
    with pytest.raises(UserError, match=r"the float model fails .*: OSError.* the file was closed"):
        check(net(), task)


def test_a_forward_that_fails_now_and_then():
    def change(model: Wrapped, y: Tensor) -> Tensor:
        if model.calls > last:
            raise RuntimeError("that was too often")
        return y

    last = 10**9
    whole = Wrapped(change)
    check(whole)
    first = whole.calls
    for last in range(1, first):  # noqa: B007 (the closure reads it)
        with pytest.raises(UserError) as raised:
            check(Wrapped(change))
        assert "RuntimeError: that was too often" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_model_in_training_mode_is_measured_in_eval_mode(tmp_path):
    from autoquant.models.files import load

    def build(path: Path) -> nn.Module:
        model = nn.Sequential(net(), nn.Dropout(0.5), nn.Linear(5, 5))
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.train()

    torch.manual_seed(0)
    model = nn.Sequential(net(), nn.Dropout(0.5), nn.Linear(5, 5))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", load_model=build)
    session = open_session(loaded, task_of(), CPU)
    found = preflight(session, SearchSpace.load("default").resolve(session.prepared.sites))
    assert [s.name for s in found.sites] == ["0.0", "0.4", "2"]
    assert not any(m.training for m in session.model.modules() if isinstance(m, nn.Dropout))


def test_nothing_to_quantize():
    with pytest.raises(ModelFileError, match="nothing to quantize: the model holds 1× PReLU"):
        check(nn.Sequential(nn.PReLU(), nn.Flatten()))


def test_layers_that_are_never_used():
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5]

    with pytest.raises(ModelFileError, match="none of the 1 quantizable layers is used"):
        check(Bypass())


def test_a_uniform_recipe_that_fails():
    class Picky(nn.Module):
        """Refuses every weight but its own."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 5)
            self.total = self.layer.weight.sum().item()

        def forward(self, x: Tensor) -> Tensor:
            if abs(self.layer.weight.sum().item() - self.total) > 1e-12:
                raise RuntimeError("who touched my weights")
            return self.layer(x.flatten(1))

    with pytest.raises(UserError) as raised:
        check(Picky())
    message = "a uniform 8-bit recipe fails: forward failed: RuntimeError: who touched my weights"
    assert str(raised.value) == message


def test_a_model_that_comes_back_different(monkeypatch):
    restored = module.load_archive

    def load(path: Path, model: nn.Module) -> nn.Module:
        found = restored(path, model)
        with torch.no_grad():
            next(p for n, p in found.named_parameters() if n.endswith("bias")).add_(0.5)
        return found

    monkeypatch.setattr(module, "load_archive", load)
    with pytest.raises(UserError, match="other outputs after it was written and loaded back"):
        check(net())


def test_no_room_to_write(monkeypatch):
    def save(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_archive", save)
    with pytest.raises(UserError, match=r"can't be written: .*No space left on device"):
        check(net())


def test_not_enough_memory(monkeypatch):
    session = session_of(net())
    spaces = SearchSpace.load("default").resolve(session.prepared.sites)
    size = session.sizes.float_size_bytes
    for free, enough in ((12 * size, True), (5 * size, False), (0, False)):
        memory = types.SimpleNamespace(available=free)
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda memory=memory: memory)
        if enough:
            preflight(session, spaces)
            continue
        with pytest.raises(
            UserError, match=r"not enough memory: a search needs about \d.* GiB are free"
        ):
            preflight(session, spaces)


def test_a_float_model_at_chance_level_is_warned_of():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 5)
            nn.init.zeros_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1)) * 0 + torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])

    found = check(Constant(), task_of(evaluation_data=[(x, y * 0 + 2) for x, y in batches()]))
    assert len(found.warnings) == 1
    assert "the float model's accuracy is 0, no better than the most common" in found.warnings[0]
    assert "warning: " + found.warnings[0] in list(preflight_lines(found))
    labelled = [(x, net().eval()(x).argmax(1)) for x, _ in batches()]
    good = check(net(), task_of(evaluation_data=labelled))
    assert good.warnings == ()
    assert "higher is better" in next(preflight_lines(good))


def test_the_direction_of_a_loss_is_said():
    task = task_of(metric=lambda o, t: float((o.argmax(1) != t).float().mean()))
    found = check(net(), dataclasses.replace(task, higher_is_better=False))
    assert "lower is better" in next(preflight_lines(found))
