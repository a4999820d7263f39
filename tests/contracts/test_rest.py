"""A search with its rest in bfloat16: what it confirms is what is evaluated, applied and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from autoquant import apply, resume, search
from autoquant.errors import UserError
from autoquant.models.data import make_splits
from autoquant.models.files import of_module
from autoquant.models.metrics import resolve_metric
from autoquant.models.task import Task
from autoquant.nn.archive import load_archive
from autoquant.optimize.evaluate import measure_recipe
from autoquant.optimize.tune import tune
from autoquant.session.apply import write
from autoquant.spec.recipe import Recipe
from autoquant.spec.recipe_file import load
from autoquant.spec.space import SearchSpace
from autoquant.study.extract import extract
from autoquant.study.ledger import Ledger

SPACE = """\
autoquant_space: 1
rules:
  - weight_bits: [8, 4, 16]
    activation_bits: [8, 16]
    smoothing: [0.0, 0.5]
    rotation: [0, 16]
"""


class Net(nn.Module):
    """Convolution, BatchNorms (one is folded, one can't be), attention, an LSTM, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16)
            self.last_norm = nn.BatchNorm1d(16)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.lstm = nn.LSTM(16, 16, batch_first=True)
            self.head = nn.Linear(16, 3)
            for norm in (self.norm, self.last_norm):
                nn.init.uniform_(norm.running_mean, -1, 1)
                nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = x + torch.linspace(-1, 1, x.shape[1])[:, None]  # float32, whatever the rest is
        x, _ = self.lstm(self.layer(x))
        return self.head(self.last_norm(x.mean(1)).relu())


def _data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(96, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = Net().eval()(x)
    return list(zip(x.split(24), y.split(24), strict=True))


DATA = _data()
TASK = Task(evaluation_data=lambda: DATA, metric="mse")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def searched(**words: object) -> Recipe:
    space = SearchSpace.parse(SPACE, "mine")
    given = {"trials": 7, "study": "s", "bits": 8.0, "rest": "bf16", "tune": "none"} | words
    search(Net().eval(), TASK, space=space, **given)
    return load(Path("recipe.yaml"))


def score(model: nn.Module) -> list[float]:
    """Return the metric of a model on both splits, by torch alone."""
    splits, metric = make_splits(TASK), resolve_metric(TASK, DATA[0][1])
    with torch.no_grad():
        return [
            metric.evidence([(model(x), y) for x, y in split]).score()
            for split in (splits.search, splits.confirm)
        ]


def told(recipe: Recipe) -> list[float]:
    assert recipe.evidence is not None
    assert recipe.evidence.confirm is not None
    return [recipe.evidence.search.quantized, recipe.evidence.confirm.quantized]


def test_what_is_confirmed_is_evaluated_applied_written_and_loaded():
    recipe = searched(trials=5)
    resume("s", model=Net().eval(), task=TASK, trials=7)
    assert load(Path("recipe.yaml")).rest == recipe.rest == "bf16"
    recipe = load(Path("recipe.yaml"))
    assert recipe.folded == {"norm": "conv"}
    again = measure_recipe(of_module(Net().eval()), TASK, recipe).splits
    assert [split.quantized for split in again.values()] == told(recipe)
    # The float model is the user's own, so that the cost of bfloat16 counts.
    assert [split.baseline for split in again.values()] == score(Net().eval())
    applied = apply(recipe, Net().eval(), TASK)
    assert score(applied) == told(recipe)
    assert score(apply(recipe, Net().eval())) == told(recipe)  # by the scales in the recipe
    archive = write(applied, recipe, None, Path("quantized.safetensors"))
    assert score(load_archive(archive.path, Net().eval())) == told(recipe)
    program = write(applied, recipe, TASK, Path("quantized.pt2"))
    assert program.kind == "pt2", program.reason
    assert score(torch.export.load(program.path).module()) == told(recipe)
    wide = yaml.safe_load(Path("recipe.yaml").read_text().split("\n", 1)[1])
    del wide["rest"]
    Path("wide.yaml").write_text(yaml.safe_dump(wide))
    other = measure_recipe(of_module(Net().eval()), TASK, load(Path("wide.yaml"))).splits
    assert [split.quantized for split in other.values()] != told(recipe)


def test_recipes_of_trials_and_tuned_ones_keep_the_rest():
    recipe = searched(tune="layer", memory="64MB")  # with results of layers that are kept
    assert told(recipe) == score(apply(recipe, Net().eval(), TASK))
    ledger = Ledger.open("s", None)
    assert {extract(ledger, trial=i)[0].rest for i in range(3)} == {"bf16"}
    found = tune(of_module(Net().eval()), TASK, extract(ledger, trial=0)[0], "tuned.yaml").recipe
    assert found.rest == load(Path("tuned.yaml")).rest == "bf16"
    assert told(found) == score(apply(load(Path("tuned.yaml")), Net().eval(), TASK))


def test_a_recipe_of_nothing_but_the_rest_loses_what_bfloat16_loses():
    found = measure_recipe(of_module(Net().eval()), TASK, Recipe({}, rest="bf16")).splits["search"]
    plain = Net().eval()
    assert 0 < found.quantized < 1e-3 * float(torch.cat([y for _, y in DATA]).var())
    assert found.baseline == score(plain)[0]


@pytest.mark.parametrize("words", [{"max_latency": "50%"}, {"objective": "latency"}])
def test_latency_is_refused(words):
    with pytest.raises(UserError) as raised:
        searched(**words)
    assert str(raised.value) == (
        "--rest bf16: layers are timed with the rest in float32, so neither --max-latency nor "
        "--objective latency goes with it"
    )


def test_another_rest_is_refused():
    with pytest.raises(UserError) as raised:
        searched(rest="float16")
    assert str(raised.value) == "--rest 'float16': give float32 or bf16"


def test_a_model_that_does_not_run_in_bfloat16_is_refused_by_the_name_of_its_part():
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    class Sound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spectrum, self.head = Spectrum(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.spectrum(x).mean(1))

    task = Task(evaluation_data=lambda: [(x, y[:, :2]) for x, y in DATA], metric="mse")
    with pytest.raises(UserError) as raised:
        search(Sound().eval(), task, rest="bf16", study="s", trials=2)
    said = str(raised.value)
    begins = "spectrum (Spectrum) does not run with the rest in bf16: RuntimeError: "
    assert said.startswith(begins)
    assert said.endswith("; --rest float32 does")
    assert "\n" not in said


def test_a_task_that_calls_parts_of_a_model_is_refused():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def embed(self, x: Tensor) -> Tensor:
            return self.head(self.words(x.long().clamp(0, 8)).mean(1).mean(1))

    task = Task(
        evaluation_data=lambda: [(x, y[:, :2]) for x, y in DATA],
        forward=lambda model, x: model.embed(x),
        metric="mse",
    )
    with pytest.raises(UserError) as raised:
        search(Parts().eval(), task, rest="bf16", study="s", trials=2)
    assert str(raised.value) == (
        "--rest bf16: the task calls a part of the model by itself, words (Embedding); only what "
        "goes through the model's own forward can be rounded: --rest float32"
    )
    assert search(Parts().eval(), task, study="s", trials=2, tune="none").recipe.rest == "float32"
