"""The GPU's benchmark runs, with small models and a recorder of the CPU; it measures nothing."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.session.session import open_session
from tests.benchmarks import evaluation, gpu_evaluation
from tests.benchmarks.gpu_models import MODELS


@pytest.mark.parametrize("name", ["encoder", "resnet50"])
def test_a_model_is_one_recording_for_two_recipes_of_one_form(name):
    bench = gpu_evaluation.Bench(MODELS[name], gpu_evaluation.stand_in())
    bench.switching(1)
    assert not bench.said
    assert bench.programs.recordings == 1
    assert bench.programs.replays == 7
    assert bench.error() < 0.05


def test_it_says_that_nothing_was_measured_and_writes_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_evaluation, "REPORTS", tmp_path)
    words = ["--simulate", "--quick", "--repeats", "1", "encoder"]
    done = CliRunner().invoke(evaluation.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.startswith("No measurement")
    assert done.output.splitlines()[-1].startswith("No measurement")
    assert "small, no measurement" in done.output
    assert not list(tmp_path.iterdir())


def test_candidates_of_a_model_with_data_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 8)
    data = list(zip(x.split(16), model(x).argmax(1).split(16), strict=True))
    task = Task(evaluation_data=lambda: data, metric="accuracy")
    session = open_session(LoadedModel(model, "module", "m", "0" * 64), task, torch.device("cpu"))
    name, batches, fast, plain, recordings = gpu_evaluation.zoo_row("made up", session, recipes=2)
    assert (name, fast, recordings) == ("made up", "", "0")  # a CPU records nothing
    assert int(batches) == len(session.splits.search)
    assert float(plain) > 0
