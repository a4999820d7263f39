"""A task that changes the working directory changes nothing: all paths are absolute before it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import autoquant

SPACE = """\
autoquant_space: 1
name: mine
rules:
  - weight_bits: [8, 6]
    activation_bits: [8, 16]
"""
LEAVE = "import os, tempfile\nos.chdir(tempfile.mkdtemp(dir=os.environ['AWAY']))\n"
GONE = f"{LEAVE}os.rmdir(os.getcwd())\n"
MOVES = {
    "at import": lambda text: GONE + text,
    "in the data": lambda text: text.replace("def data():\n", f"def data():\n{indented(LEAVE)}"),
    "in load_model": lambda text: text.replace(
        "    model = net()\n", indented(GONE) + "    model = net()\n"
    ),
}


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=MOVES)
def moving(request, project, monkeypatch, tmp_path_factory):
    """Return the project with a task that leaves its folder, as it is now."""
    monkeypatch.setenv("AWAY", str(tmp_path_factory.mktemp("away")))
    text = (project / "task.py").read_text()
    (project / "task.py").write_text(MOVES[request.param](text))
    assert (project / "task.py").read_text() != text
    (project / "space.yaml").write_text(SPACE)
    return project


WHERE = {"folder": None, "journal": "kept/all.journal", "database": "sqlite:///all.db?timeout=9"}


@pytest.mark.parametrize("where", WHERE)
def test_every_command_reads_and_writes_where_it_was_started(moving, cli, monkeypatch, where):
    storage = () if WHERE[where] is None else ("--storage", WHERE[where])
    before = files(moving)
    task = ("--task", "task.py")

    def run(*words: object):
        monkeypatch.chdir(moving)
        result = cli(*words)
        assert result.done, result.err
        return result

    words = ("--trials", 3, "--space", "space.yaml", "--out", "made", "--study", "s")
    found = run("search", "model.pt", *task, *words, *storage, "--json")
    assert Path(json.loads(found.out)["recipe"]) == moving / "made" / "recipe.yaml"
    (moving / "made" / "recipe.yaml").unlink()
    run("resume", "s", "--trials", 4, *storage)
    assert (moving / "made" / "recipe.yaml").exists()
    run("evaluate", "model.pt", *task, "--recipe", "made/recipe.yaml")
    run("apply", "made/recipe.yaml", "model.pt", *task, "-o", "made/small.safetensors")
    run("export", "s", "-o", "made/again.yaml", *storage)
    run("show", "s", *storage)
    study = {
        "folder": {".autoquant/s.journal", ".autoquant/s.journal.flock", ".autoquant/.gitignore"},
        "journal": {"kept/all.journal", "kept/all.journal.flock"},
        "database": {"all.db"},
    }[where]
    made = {"made/recipe.yaml", "made/small.safetensors", "made/again.yaml"}
    assert files(moving) - before == study | made
    assert files(Path(os.environ["AWAY"])) == set()


@pytest.mark.parametrize("where", WHERE)
def test_the_python_api_as_well(moving, monkeypatch, where):
    storage = WHERE[where]
    result = autoquant.search(
        "model.pt", "task.py", space="space.yaml", trials=3, study="s", storage=storage, out="made"
    )
    assert result.recipe_path == moving / "made" / "recipe.yaml"
    monkeypatch.chdir(moving)
    autoquant.resume("s", storage=storage, trials=4)
    assert files(Path(os.environ["AWAY"])) == set()
    assert {"made/recipe.yaml", "space.yaml"} <= files(moving)


def test_a_data_file_and_a_cache_with_a_relative_name(project, cli, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    np.savez(project / "data.npz", inputs=torch.randn(60, 12, generator=generator).numpy())
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    torch.save(model, project / "whole.pt")
    words = ("--data", "data.npz", "--trust-pickle", "--trials", 2, "--max-latency", "10s")
    result = cli("search", "whole.pt", *words)
    assert result.done, result.err
    assert not (project / "cache").exists()
    assert (tmp_path / "home" / ".cache" / "autoquant" / "latency.json").exists()
