"""A small project, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from autoquant.cli import main
from autoquant.cli.failures import STATUSES

KEYS = {
    "study",
    "recipe",
    "metric",
    "average_weight_bits",
    "layer_weight_bits",
    "size_bytes",
    "float_size_bytes",
    "trials",
    "tuning",
    "seconds",
    "device",
    "candidates_per_second",
    "layers_computed_by",
    "rest",
    "searched",
    "verdict",
}
METRIC_KEYS = {"name", "float", "quantized", "drop", "interval", "higher_is_better"}

TASK = """\
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
                         nn.Linear(16, 4))


def load_model(path):
    model = net()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 12, generator=generator)
    return x, (x @ torch.randn(12, 4, generator=generator)).argmax(1)


def calibration_data():
    return data()[0][:80].split(40)


def evaluation_data():
    x, y = data()
    return zip(x[80:].split(64), y[80:].split(64))


metric = "accuracy"
"""


@dataclass(frozen=True)
class Run:
    """How one command ended."""

    status: int
    out: str
    err: str

    @property
    def done(self) -> bool:
        """Whether it did what it was asked to, whatever its verdict on the drop is."""
        return self.status in STATUSES.values()


Cli = Callable[..., Run]


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    """Return the weights of the project's network, trained."""
    scope: dict = {}
    exec(TASK, scope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = scope["net"]()
        x, y = scope["data"]()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(150):
            loss = nn.functional.cross_entropy(model(x[80:300]), y[80:300])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


@pytest.fixture
def project(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    weights: dict,
) -> Path:
    """Return a folder with model.pt and task.py, which is the working directory."""
    (tmp_path / "task.py").write_text(TASK)
    torch.save(weights, tmp_path / "model.pt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs the command line and says how it ended."""

    def run(*words: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Run(ended.value.code, out, err)

    return run


@pytest.fixture
def searched(project: Path, cli: Cli) -> Path:
    """Return the project after a short search: study "s"."""
    words = ("--task", "task.py", "--trials", 14, "--study", "s")
    assert cli("search", "model.pt", *words).done
    return project


@pytest.fixture
def checked() -> Callable[[dict, Path], dict]:
    """Return the check that a search's JSON object is as promised; it gives the recipe's YAML."""
    return check_result


def check_result(found: dict, folder: Path) -> dict:
    """Assert that the one JSON object of a search has the promised keys; return its recipe."""
    # A few trials say nothing of a profile, and not every search ends of itself.
    assert set(found) - {"profile", "done"} == KEYS
    assert set(found["metric"]) == METRIC_KEYS
    assert set(found["trials"]) == {"complete", "pruned", "failed"}
    assert found["device"] == "cpu"
    assert found["seconds"] > 0
    path = Path(found["recipe"])
    path = path if path.is_absolute() else folder / path
    recipe = yaml.safe_load(path.read_text())
    confirm = recipe["metric"]["confirm"]
    metric = found["metric"]
    assert metric["name"] == recipe["metric"]["name"] == "accuracy"
    assert metric["higher_is_better"] is True
    for name in ("float", "quantized", "drop", "interval"):
        assert metric[name] == confirm[name]
    assert found["verdict"] == recipe["metric"]["verdict"]
    assert found["verdict"]["interval"] == metric["interval"]
    search = recipe["metric"]["search"]
    assert found["searched"] == {key: search[key] for key in found["searched"]}
    low, high = metric["interval"]
    assert low < high
    assert low <= metric["drop"] <= high
    assert metric["drop"] == pytest.approx(metric["float"] - metric["quantized"])
    for name in ("average_weight_bits", "size_bytes", "float_size_bytes"):
        assert found[name] == recipe[name]
    return recipe
