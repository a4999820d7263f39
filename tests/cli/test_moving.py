"""A study that was moved or copied goes on with its own files, and leaves the original's alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import autoquant
from tests.cli.test_resume import SPACE, trials


@pytest.fixture
def begun(project: Path, cli) -> Path:
    """Return a folder ``project`` with a study "s" of four trials, begun from inside it."""
    here = project / "project"
    here.mkdir()
    (here / "space.yaml").write_text(SPACE)
    for name in ("model.pt", "task.py"):
        (project / name).rename(here / name)
    return here


STORAGES = {
    "folder": (),
    "journal": ("--storage", "all.journal"),
    "db": ("--storage", "sqlite:///s.db"),
}


def begin(cli, monkeypatch, folder: Path, *words: object, model: object = "model.pt") -> None:
    monkeypatch.chdir(folder)
    task = ("--task", "task.py", "--space", "space.yaml", "--study", "s", "--trials", 4)
    result = cli("search", model, *task, *words)
    assert result.done, result.err


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("where", STORAGES)
def test_a_project_that_was_moved(begun, cli, monkeypatch, where, absolute):
    model = begun / "model.pt" if absolute else "model.pt"
    begin(cli, monkeypatch, begun, *STORAGES[where], "--out", "made", model=model)
    first = (begun / "made" / "recipe.yaml").read_bytes()
    moved = begun.parent / "deeper" / "moved"
    moved.parent.mkdir()
    monkeypatch.chdir("/")
    begun.rename(moved)
    monkeypatch.chdir(moved)
    (moved / "made" / "recipe.yaml").unlink()
    result = cli("resume", "s", *STORAGES[where], "--json")
    assert result.done, result.err
    assert (moved / "made" / "recipe.yaml").read_bytes() == first
    assert not begun.exists()
    assert cli("resume", "s", *STORAGES[where], "--trials", 6).done
    assert len(trials(cli, "s", *STORAGES[where])) == 6


@pytest.mark.parametrize("where", STORAGES)
def test_a_copy_leaves_the_original_alone(begun, cli, monkeypatch, where):
    begin(cli, monkeypatch, begun, *STORAGES[where])
    copy = begun.parent / "copy"
    shutil.copytree(begun, copy)
    before = content(begun)
    monkeypatch.chdir(copy)
    (copy / "recipe.yaml").unlink()
    result = cli("resume", "s", *STORAGES[where], "--trials", 6)
    assert result.done, result.err
    assert content(begun) == before
    assert (copy / "recipe.yaml").exists()
    assert len(trials(cli, "s", *STORAGES[where])) == 6


@pytest.mark.parametrize("where", STORAGES)
def test_a_copy_whose_recipe_would_go_to_the_original_s_place(begun, cli, monkeypatch, where):
    results = begun.parent / "results"
    begin(cli, monkeypatch, begun, *STORAGES[where], "--out", results)
    copy = begun.parent / "copy"
    shutil.copytree(begun, copy)
    before = content(results)
    monkeypatch.chdir(copy)
    refused = cli("resume", "s", *STORAGES[where], "--trials", 6)
    assert (refused.status, refused.out, len(refused.err.splitlines())) == (2, "", 1)
    assert "study s is a copy of the one in " in refused.err
    assert "--out DIR" in refused.err
    assert content(results) == before
    for words in (("--out", "mine"), ()):  # once said, it is known
        result = cli("resume", "s", *STORAGES[where], "--trials", 6, *words)
        assert result.done, result.err
        assert content(results) == before
        assert (copy / "mine" / "recipe.yaml").exists()


def test_a_study_alone_that_was_copied_reads_what_it_is_of_and_writes_beside_itself(
    begun, cli, monkeypatch
):
    begin(cli, monkeypatch, begun)
    before = content(begun)
    elsewhere = begun.parent / "elsewhere"
    shutil.copytree(begun / ".autoquant", elsewhere / ".autoquant")
    monkeypatch.chdir(elsewhere)
    assert cli("resume", "s", "--trials", 5).done
    assert content(begun) == before
    assert (elsewhere / "recipe.yaml").exists()


def test_where_the_files_are_now_can_be_said(begun, cli, monkeypatch):
    begin(cli, monkeypatch, begun)
    other = begun.parent / "other"
    other.mkdir()
    for name, option in (("model.pt", "--model FILE"), ("task.py", "--task FILE")):
        (begun / name).rename(other / name)
        refused = cli(
            "resume", "s", *(("--model", other / "model.pt") if name != "model.pt" else ())
        )
        assert refused.status == 2
        assert str(begun / name) in refused.err
        assert option in refused.err
    words = ("--model", "../other/model.pt", "--task", "../other/task.py", "--out", "../new")
    result = cli("resume", "s", *words, "--trials", 5)
    assert result.done, result.err
    assert (begun.parent / "new" / "recipe.yaml").exists()
    assert cli("resume", "s", "--trials", 6).done  # the study keeps it
    # What is named must be what the study is of.
    (other / "task.py").write_text((other / "task.py").read_text() + "# other\n")
    refused = cli("resume", "s", "--task", "../other/task.py")
    assert refused.status == 2
    assert "the task has changed" in refused.err


def test_from_python(begun, monkeypatch):
    monkeypatch.chdir(begun)
    autoquant.search("model.pt", "task.py", trials=3, study="s")
    for name in ("model.pt", "task.py"):
        (begun / name).rename(begun / f"new_{name}")
    result = autoquant.resume("s", model="new_model.pt", task=Path("new_task.py"), out="new")
    assert result.recipe_path == begun / "new" / "recipe.yaml"
    assert autoquant.resume("s").recipe == result.recipe


def test_a_data_file_and_two_sources(project, cli, monkeypatch):
    import numpy as np
    import torch

    x = torch.randn(80, 12, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(project / "data.npz", inputs=x)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    torch.save(model, project / "whole.pt")
    words = ("--data", "data.npz", "--trust-pickle", "--trials", 2, "--study", "s")
    assert cli("search", "whole.pt", *words).done
    os.rename("data.npz", "moved.npz")
    refused = cli("resume", "s")
    assert refused.status == 2
    assert "its data file is gone" in refused.err
    assert "--data FILE" in refused.err
    assert cli("resume", "s", "--data", "moved.npz", "--trials", 3).done
    assert cli("resume", "s", "--data", "moved.npz", "--task", "task.py").status == 2
    assert json.loads(cli("show", "s", "--json").out)["study"] == "s"
