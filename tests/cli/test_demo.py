"""The demo's model, from the search to a file that plain torch runs with the same numbers."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import autoquant
from autoquant.cli import main
from autoquant.models.data import make_splits
from autoquant.models.task import load_task

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

PLAIN = """
import json, sys
import torch

found = []
batches = torch.load(sys.argv[1], weights_only=True)
for path in sys.argv[2:]:
    model = torch.export.load(path).module()
    right = total = 0
    with torch.no_grad():
        for inputs, targets in batches:
            right += int((model(inputs).argmax(1) == targets).sum())
            total += len(targets)
    found.append([right / total, total])
assert not any(name.startswith("autoquant") for name in sys.modules)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Demo:
    """Where the demo ran, and what it printed."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Run ``autoquant demo d --json`` in a folder that has a study called "demo" already."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / ".autoquant").mkdir()
    (folder / ".autoquant" / "demo.journal").touch()
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main(["demo", "d", "--json"])
        assert ended.value.code == 0
        yield Demo(folder, out.getvalue(), err.getvalue())


def measured(cli, *words: object) -> dict:
    """Return the splits that ``evaluate`` measures on the demo's model."""
    result = cli("evaluate", "d/model.pt", "--task", "d/task.py", "--json", *words)
    assert result.status == 0, result.err
    return json.loads(result.out)["splits"]


def test_result(demo, checked):
    found = json.loads(demo.out)
    checked(found, demo.folder)
    assert found["study"] == "demo-2"
    assert found["metric"]["float"] > 0.9
    assert found["metric"]["drop"] <= 0.01
    assert found["average_weight_bits"] <= 8
    written = {path.name for path in (demo.folder / "d").iterdir()}
    assert written - {"__pycache__"} == {"model.pt", "task.py", "recipe.yaml"}


def test_the_printed_command_gives_the_same(demo, cli):
    line = next(row for row in demo.err.splitlines() if row.startswith("$ autoquant search"))
    typed = cli(*line.replace("demo-2", "typed").split()[2:], "--json")
    assert typed.done
    first, second = json.loads(demo.out), json.loads(typed.out)
    for key in ("metric", "average_weight_bits", "size_bytes", "trials"):
        assert second[key] == first[key]


def test_plain_torch_gives_the_reported_metric(demo, cli, tmp_path):
    expected = []
    files = []
    for number, cut in enumerate([(), ("--trial", 0), ("--size", "20%")]):
        recipe, file = tmp_path / f"{number}.yaml", tmp_path / f"{number}.pt2"
        assert cli("export", "demo-2", *cut, "-o", recipe).status == 0
        splits = measured(cli, "--recipe", recipe)
        if not cut:
            reported = yaml.safe_load(recipe.read_text())["metric"]
            assert splits == {name: reported[name] for name in ("search", "confirm")}
        words = (recipe, "d/model.pt", "--task", "d/task.py", "-o", file)
        written = cli("apply", *words)
        assert written.status == 0
        assert "torch.export.load" in written.out
        expected.append([splits["confirm"]["quantized"], splits["confirm"]["samples"]])
        files.append(str(file))
    confirm = tmp_path / "confirm.pt"
    torch.save(list(make_splits(load_task(Path("d/task.py"))).confirm), confirm)
    child = subprocess.run(
        [sys.executable, "-c", PLAIN, str(confirm), *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(child.stdout) == expected


def test_archive_restored_by_load(demo, cli):
    recipe = yaml.safe_load(Path("d/recipe.yaml").read_text())
    words = ("d/recipe.yaml", "d/model.pt", "--task", "d/task.py", "-o", "q.safetensors")
    written = cli("apply", *words)
    assert written.status == 0
    path = str(Path("q.safetensors").absolute())
    assert f"autoquant.load({path!r}, model)" in written.out
    # The file is as large as the search said, but for names and the recipe.
    size = Path("q.safetensors").stat().st_size
    assert recipe["size_bytes"] < size < recipe["size_bytes"] + 8192
    task = load_task(Path("d/task.py"))
    assert task.load_model is not None
    model = task.load_model(Path("d/model.pt")).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(7)  # only the architecture counts
    restored = autoquant.load("q.safetensors", model)
    right = total = 0
    with torch.no_grad():
        for inputs, targets in make_splits(task).confirm:
            right += int((restored(inputs).argmax(1) == targets).sum())
            total += len(targets)
    assert right / total == recipe["metric"]["confirm"]["quantized"]
