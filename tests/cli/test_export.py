"""``autoquant export --to``: a file of another runtime, and what it is there."""

from __future__ import annotations

import json

import pytest
import torch

from autoquant.export.exporter import EXPORTERS
from autoquant.spec.recipe_file import load
from tests.cli.test_tune import RECIPE, content

WORDS = ("--model", "model.pt", "--task", "task.py")
KINDS = [(name, EXPORTERS.get(name).suffix) for name in EXPORTERS]
INT8 = "{weight: {bits: 8}, activation: {bits: 8}}"


@pytest.fixture
def plain(project):
    (project / "r.yaml").write_text(RECIPE)
    return project


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_a_recipe_is_written_and_measured_where_it_runs(plain, cli, kind, suffix):
    words = f"autoquant_recipe: 2\nlayers:\n  '0': {INT8}\n  '2': {INT8}\n  '4': {INT8}\n"
    (plain / "r.yaml").write_text(words)
    result = cli("export", "r.yaml", *WORDS, "--to", kind, "--json")
    assert (result.status, result.err) == (0, ""), result
    found = json.loads(result.out)
    evaluated = json.loads(
        cli("evaluate", "model.pt", "--task", "task.py", "--recipe", "r.yaml", "--json").out
    )["splits"]["confirm"]
    assert found["recipe"] == evaluated["quantized"]
    assert found["float"] == evaluated["float"]
    assert found["samples"] == evaluated["samples"]
    assert found["split"] == "confirm"
    assert abs(found["exported"] - found["recipe"]) * found["samples"] <= 3
    assert found["difference"] < 0.05
    assert found["integer_products"][1] == 3
    assert found["ms"] > 0 < found["float_ms"]
    assert found["speedup"] == found["float_ms"] / found["ms"]
    target = plain / f"quantized{suffix}"
    files = [target, target.with_suffix(".bin")] if kind == "openvino" else [target]
    assert found["size_bytes"] == sum(file.stat().st_size for file in files)
    # A second time it replaces its own.
    result = cli("export", "r.yaml", *WORDS, "--to", kind, "-o", f"quantized{suffix}")
    assert result.status == 0, result.err
    assert "of 3 products run in integers" in result.out
    assert "in the same runtime" in result.out


def test_a_studys_recipe_finds_its_own_model_and_task(searched, cli):
    result = cli("export", "s", "--to", "openvino", "--json")
    assert (result.status, result.err) == (0, ""), result
    found = json.loads(result.out)
    evidence = load(searched / "recipe.yaml").evidence
    assert found["recipe"] == evidence.confirm.quantized
    assert found["float"] == evidence.confirm.baseline
    other = json.loads(cli("export", "s", "--to", "openvino", "--trial", 1, "--json").out)
    assert other["recipe"] != found["recipe"] or other["size_bytes"] != found["size_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("r.yaml", "--to", "onnx"), "which model is it for? give --model FILE"),
        (("r.yaml", "--to", "onnx", "--model", "model.pt"), "give a task: --task TASK.py"),
        (("r.yaml", *WORDS, "--to", "onnx", "-o", "x.xml"), "what --to onnx writes ends in .onnx"),
        (("r.yaml", *WORDS, "--to", "onnx", "--bits", 4), "choose a recipe of a study"),
        (("r.yaml", *WORDS, "--to", "onnx", "-o", "model.pt"), "what is written ends in"),
        (("r.yaml", "--model", "model.pt"), "--model is of a model that is written: give --to"),
        (("--json",), "--json is of a model that is written: give --to"),
        (("-o", "x.onnx"), "a recipe's name ends in .yaml; for a model give --to"),
        (("nobody", "--to", "onnx"), "nobody"),
        (("no.yaml", *WORDS, "--to", "onnx"), "no.yaml"),
    ],
)
def test_what_can_not_be_written_is_one_line(plain, cli, words, said):
    before = content(plain)
    result = cli("export", *words)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result
    assert said in result.err
    assert content(plain) == before


@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_a_file_that_is_not_ours_stays(plain, cli, kind, suffix):
    (plain / f"quantized{suffix}").write_text("mine")
    before = content(plain)
    result = cli("export", "r.yaml", *WORDS, "--to", kind)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result
    assert f"quantized{suffix}" in result.err
    assert content(plain) == before


def test_what_the_format_can_not_say_is_named_before_anything_is_written(plain, cli):
    text = (plain / "task.py").read_text()
    text = text.replace(
        "def net():\n",
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.gru, self.head = nn.GRU(12, 8, batch_first=True), nn.Linear(8, 4)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.gru(x[:, None])[0][:, -1])\n\n\n"
        "def net():\n    return Net()\n",
    )
    (plain / "task.py").write_text(text)
    scope: dict = {}
    exec(text, scope)
    torch.save(scope["net"]().state_dict(), plain / "model.pt")
    (plain / "r.yaml").write_text(
        f"autoquant_recipe: 2\nlayers:\n  gru.weight_ih_l0: {INT8}\n  head: {INT8}\n"
    )
    before = content(plain)
    result = cli("export", "r.yaml", *WORDS, "--to", "onnx")
    assert (result.status, len(result.err.splitlines())) == (2, 1), result
    assert "can't be written as onnx: gru: a recurrent layer" in result.err
    assert content(plain) == before
