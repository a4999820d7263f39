"""A session: a model prepared for its task, given recipes and measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import TrialError, UserError
from autoquant.measure.evaluator import Bar
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.session import session as module
from autoquant.session.session import Session, choose_device, open_session
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme

CPU = torch.device("cpu")
WEIGHT = WeightScheme(4, "per_channel", "symmetric", "max")
ACTIVATION = ActivationScheme(8, "per_tensor", "asymmetric", "max")


class Net(nn.Module):
    """A convolution with its BatchNorm, and a linear layer."""

    def __init__(self, contiguous: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(2, 4, 3, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.norm.running_mean = torch.randn(4)
            self.norm.running_var = torch.rand(4) + 0.5
            self.head = nn.Linear(4 * 36, 5)
        self.contiguous = contiguous

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        if self.contiguous:
            return self.head(x.view(len(x), -1))
        return self.head(x.flatten(1))


def batches(n: int = 120) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 8, 8, generator=generator)
    with torch.no_grad():
        y = Net().eval()(x).argmax(1)
    return list(zip(x.split(40), y.split(40), strict=True))


def opened(model: nn.Module | None = None, **parts: Any) -> Session:
    task = Task(**({"evaluation_data": batches, "metric": "accuracy", "source": "t.py"} | parts))
    model = Net() if model is None else model
    return open_session(LoadedModel(model.eval(), "module", "m", "0" * 64), task, CPU)


def test_choose_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    for built, reason in ((None, "this torch is a CPU build"), ("12.8", "no GPU is visible")):
        monkeypatch.setattr(torch.version, "cuda", built)
        with pytest.raises(UserError) as raised:
            choose_device("cuda")
        assert str(raised.value) == f"--device cuda: {reason}; use --device cpu or auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == CPU


def test_measure_equals_a_model_quantized_by_hand():
    session = opened()
    assert session.prepared.folded == {"norm": "conv"}
    sites = {"head": SiteRecipe(WEIGHT, None)}
    base = session.baseline("search")
    m, reading, done = session.measure(sites, "search")

    by_hand = Net().eval()
    weight = by_hand.head.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 7
    by_hand.head.weight.data = (weight / scale).round().clamp(-8, 7) * scale
    x = torch.cat([x for x, _ in session.splits.search])
    y = torch.cat([y for _, y in session.splits.search])
    with torch.no_grad():
        outputs = by_hand(x)
    assert m.value == reading.value == float((outputs.argmax(1) == y).double().mean())
    assert base.value == 1.0
    assert m.drop == 1.0 - m.value
    assert m.loss == reading.divergence > 0
    assert done["head"] == sites["head"]
    assert done["conv"] == SiteRecipe()
    numel = {"conv": 4 * 2 * 9, "head": 5 * 144}
    assert m.average_weight_bits == (16 * numel["conv"] + 4 * numel["head"]) / sum(numel.values())
    folded = 4 * (numel["conv"] + 4 + numel["head"] + 5)
    assert m.size_bytes == folded - 4 * numel["head"] + numel["head"] // 2 + 4 * 5
    assert m.seconds > 0


def test_measure_gives_the_static_numbers():
    session = opened()
    session.baseline("search")
    _, _, done = session.measure({"head": SiteRecipe(WEIGHT, ACTIVATION)}, "search")
    found = done["head"].activation
    assert found is not None
    x = torch.cat(session.splits.calibrate)
    model = Net().eval()
    with torch.no_grad():
        inputs = model.norm(model.conv(x)).relu().flatten(1)
    assert found.scale == pytest.approx(float(inputs.max()) / 255, rel=1e-5)
    assert found.zero_point == -128
    assert found.uncalibrated() == ACTIVATION


def test_measuring_leaves_no_trace():
    session = opened()
    x = batches()[0][0]
    with torch.no_grad():
        expected = session.model(x)
    session.baseline("search")
    first = session.measure({"head": SiteRecipe(WEIGHT, ACTIVATION)}, "search")[0]
    session.measure({"conv": SiteRecipe(WEIGHT, None)}, "search")
    again = session.measure({"head": SiteRecipe(WEIGHT, ACTIVATION)}, "search")[0]
    assert (again.value, again.loss, again.size_bytes) == (
        first.value,
        first.loss,
        first.size_bytes,
    )
    session.baseline("confirm")
    with torch.no_grad():
        assert torch.equal(session.model(x), expected)


def test_loss_is_the_drop_where_outputs_cannot_be_compared():
    def evaluate(model: nn.Module) -> float:
        return float(-(model(batches()[0][0]) ** 2).mean())

    session = opened(
        evaluation_data=None,
        metric=None,
        evaluate=evaluate,
        calibration_data=lambda: [x for x, _ in batches()],
    )
    session.baseline("search")
    m, _, _ = session.measure({"head": SiteRecipe(WEIGHT, None)}, "search")
    assert m.loss == max(m.drop, 1e-9)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA"), "out of memory on the accelerator"),
    ],
)
def test_no_memory_for_a_candidate_fails_the_trial(monkeypatch, error, reason):
    session = opened()
    session.baseline("search")

    def apply(sites: object) -> None:
        raise error

    monkeypatch.setattr(session.applier, "apply", apply)
    with pytest.raises(TrialError) as raised:
        session.measure({}, "search")
    assert str(raised.value) == reason


def test_a_float_model_that_fails_on_the_data():
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.flatten(1))

    with pytest.raises(UserError, match="the float model fails on the task's data: RuntimeError"):
        opened(forward=forward)


def test_channels_last_where_the_model_takes_it():
    free, bound = opened(), opened(Net(contiguous=True))
    assert free.model.conv.forward.channels_last
    assert not bound.model.conv.forward.channels_last
    with torch.no_grad():
        x = batches()[0][0]
        assert torch.allclose(free.model(x), bound.model(x), atol=1e-5)


def test_the_folds_of_a_recipe_are_repeated():
    task = Task(evaluation_data=batches, metric="accuracy")
    loaded = LoadedModel(Net().eval(), "module", "m", "0")
    session = open_session(loaded, task, CPU, recipe=Recipe({}))
    assert session.prepared.folded == {}
    assert any(part.name == "norm" for part in session.prepared.float_parts)


def test_the_stages_are_named():
    heard: list[str] = []
    task = Task(evaluation_data=batches, metric="accuracy")
    loaded = LoadedModel(Net().eval(), "module", "m", "0")
    open_session(loaded, task, CPU, say=heard.append)
    stages = ["reading the data", "running the float model", "finding the layers", "calibrating"]
    assert heard == stages


def test_recipe_says_which_model_it_is_of():
    session = opened()
    recipe = session.recipe({"head": SiteRecipe(WEIGHT, None)})
    assert recipe.model == module.ModelIdentity("m", "0" * 64)
    assert recipe.folded == {"norm": "conv"}


def test_what_was_measured_to_its_end_is_not_measured_again(monkeypatch):
    session = opened()
    session.baseline("search")
    calls = []
    read = session.evaluator.read
    monkeypatch.setattr(
        session.evaluator, "read", lambda *a, **k: (calls.append(k.get("bar")), read(*a, **k))[1]
    )
    sites = {s.name: SiteRecipe(WeightScheme(8)) for s in session.prepared.sites}
    first = session.measure(sites, "search")
    assert session.measure(dict(sites), "search") is first
    assert len(calls) == 1
    # A bar that it was not held against may stop it, and the reference may compute otherwise.
    session.measure(sites, "search", bar=Bar(0.5))
    with session.prepared.engine.reference():
        session.measure(sites, "search")
    assert len(calls) == 3
    session.measure(sites, "search", bar=Bar(0.5))
    assert len(calls) == 3
