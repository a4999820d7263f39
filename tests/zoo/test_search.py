"""The whole tool on real models, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoquant.cli.failures import STATUSES
from autoquant.models.data import make_splits
from autoquant.models.files import load
from autoquant.models.task import load_task
from autoquant.nn.convert import prepare
from autoquant.spec import recipe_file

pytestmark = [pytest.mark.zoo, pytest.mark.slow, pytest.mark.xdist_group("zoo")]

NAMES = ("resnext", "g2p", "minilm", "mobilenet_v2")
TRIALS = {"mobilenet_v2": 12, "minilm": 12, "g2p": 12, "resnext": 20}
POINT = 0.01

PLAIN = {
    "accuracy": "float((torch.cat(outputs).argmax(1) == torch.cat(targets)).double().mean())",
    "spearman": "float(scipy.stats.spearmanr(torch.cat(outputs), torch.cat(targets)).statistic)",
}
SCRIPT = """
import sys, scipy.stats, torch
model = torch.export.load(sys.argv[1]).module()
outputs, targets = [], []
with torch.no_grad():
    for inputs, target in torch.load(sys.argv[2], weights_only=True):
        outputs.append(model(**inputs) if isinstance(inputs, dict) else
                       model(*inputs) if isinstance(inputs, tuple) else model(inputs))
        targets.append(target)
assert not [name for name in sys.modules if name.startswith("autoquant")]
print(repr({score}))
"""


def autoquant(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "autoquant", *words], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode in STATUSES.values(), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def searched(zoo, tmp_path_factory):
    """Return a function from a name to (case, folder, what the search printed); searched once."""
    found = {}

    def get(name):
        case = zoo(name)
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            words = ["search", str(case.model), "--task", str(case.task), "--max-drop", "1%"]
            words += ["--trials", str(TRIALS[name]), "--json"]
            found[name] = json.loads(autoquant(*words, cwd=folder))
            found[name]["folder"] = folder
        return case, found[name]["folder"], found[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_a_search_finds_a_recipe_within_one_point_on_held_out_data(searched, name):
    _, folder, result = searched(name)
    assert result["metric"]["drop"] <= POINT
    assert result["average_weight_bits"] <= 8
    assert result["size_bytes"] < 0.3 * result["float_size_bytes"]
    assert (folder / "recipe.yaml").exists()


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_repeats_the_reported_metric(searched, name):
    case, folder, result = searched(name)
    words = ["evaluate", str(case.model), "--task", str(case.task), "--recipe", "recipe.yaml"]
    found = json.loads(autoquant(*words, "--json", cwd=folder))
    assert found["splits"]["confirm"]["quantized"] == result["metric"]["quantized"]
    assert found["splits"]["confirm"]["float"] == result["metric"]["float"]
    assert found["size_bytes"] == result["size_bytes"]


@pytest.mark.parametrize("name", ["resnext", "minilm", "mobilenet_v2"])
def test_the_written_model_gives_the_reported_metric_in_plain_torch(searched, name, tmp_path):
    case, folder, result = searched(name)
    words = ["apply", "recipe.yaml", str(case.model), "--task", str(case.task)]
    written = json.loads(autoquant(*words, "-o", "quantized.pt2", "--json", cwd=folder))
    assert written["kind"] == "pt2", written["reason"]
    confirm = list(make_splits(load_task(case.task)).confirm)
    torch.save(confirm, tmp_path / "confirm.pt")
    script = SCRIPT.replace("{score}", PLAIN[result["metric"]["name"]])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, folder / "quantized.pt2", tmp_path / "confirm.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(result["metric"]["quantized"], abs=1e-9)


def test_a_restored_archive_gives_the_reported_metric(searched):
    import autoquant as package
    from autoquant.measure.evaluator import Evaluator

    case, folder, result = searched("g2p")
    words = ["apply", "recipe.yaml", str(case.model), "--task", str(case.task)]
    written = json.loads(autoquant(*words, "-o", "quantized.pt2", "--json", cwd=folder))
    assert written["kind"] == "archive"
    model = package.load(folder / written["path"], case.module.load_model(case.model))
    task = load_task(case.task)
    evaluator = Evaluator(task, make_splits(task), torch.device("cpu"))
    assert evaluator.baseline(model, "confirm").value == result["metric"]["quantized"]


def test_one_model_in_three_forms_gives_the_same_sites_and_metric(searched, tmp_path):
    case, folder, result = searched("mobilenet_v2")
    model = case.module.load_model(case.model).eval()
    torch.save(model, tmp_path / "model.pickle.pt")
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    example = torch.zeros(2, 3, 224, 224)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    recipe = folder / "recipe.yaml"
    for file, flags in (("model.pt2", []), ("model.pickle.pt", ["--trust-pickle"])):
        words = ["evaluate", str(tmp_path / file), "--task", str(case.task), *flags]
        words += ["--recipe", str(recipe), "--accept-changes", "--json"]
        found = json.loads(autoquant(*words, cwd=tmp_path))
        assert found["splits"]["confirm"]["quantized"] == result["metric"]["quantized"]
        assert found["size_bytes"] == result["size_bytes"]
        loaded = load(tmp_path / file, trust_pickle=True)
        prepared = prepare(loaded.module, lambda module: module(example))
        assert [site.name for site in prepared.sites] == list(recipe_file.load(recipe).sites)
