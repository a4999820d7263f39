"""No command overwrites a file of the user's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autoquant.cli import demo
from autoquant.optimize import confirm as confirming

SEARCH = ("search", "model.pt", "--task", "task.py", "--trials", 3)
APPLY = ("apply", "recipe.yaml", "model.pt", "--task", "task.py")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refused(project, cli):
    def run(*words: object) -> str:
        before = content(project)
        result = cli(*words)
        assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1), result
        assert content(project) == before
        return result.err

    return run


def edit(path: Path) -> str:
    path.write_text(path.read_text() + "# mine\n")
    return path.read_text()


def test_a_recipe_that_was_edited(searched, cli, refused):
    cli("resume", "s")  # what nobody edited is written anew
    edit(searched / "recipe.yaml")
    for words in (SEARCH, ("resume", "s", "--trials", 20), ("export", "s")):
        line = refused(*words)
        assert "recipe.yaml: is there already and was edited" in line
    assert cli("resume", "s", "--trials", 15, "--out", "other").done
    assert cli("export", "s", "-o", "other.yaml").done


@pytest.mark.parametrize("as_json", [False, True])
def test_a_recipe_that_is_edited_while_the_search_runs(searched, cli, monkeypatch, as_json):
    found = confirming.confirm
    mine = []

    def confirm(*args, **kwargs):
        if not mine:
            mine.append(edit(searched / "recipe.yaml"))
        return found(*args, **kwargs)

    monkeypatch.setattr(confirming, "confirm", confirm)
    result = cli("resume", "s", "--trials", 15, *(["--json"] * as_json))
    assert result.done, result.err
    assert (searched / "recipe.yaml").read_text() == mine[0]
    beside = searched / "recipe-s-1.yaml"
    assert beside.exists()
    if as_json:
        assert Path(json.loads(result.out)["recipe"]) == beside
    else:
        assert "recipe.yaml was edited meanwhile, and is left as it is" in result.out
        assert f"recipe: {beside}" in result.out


def test_a_recipe_by_hand_that_was_there_before(project, refused):
    (project / "recipe.yaml").write_text(
        "autoquant_recipe: 1\nlayers: {'0': {weight: {bits: 8}}}\n"
    )
    assert "recipe.yaml: is there already" in refused(*SEARCH)


def test_a_space_that_is_named_like_the_recipe(project, refused):
    (project / "recipe.yaml").write_text("autoquant_space: 1\nrules:\n  - weight_bits: [8, 4]\n")
    line = refused(*SEARCH, "--space", "recipe.yaml")
    assert "recipe.yaml: is the search space, which is read" in line


@pytest.mark.parametrize("how", ["name", "absolute", "soft", "hard"])
def test_the_model_as_the_output_of_apply(searched, refused, how):
    (searched / "model.pt").rename(searched / "model.pt2")
    output = {"name": "model.pt2", "absolute": searched / "model.pt2"}.get(how, f"{how}.pt2")
    if how == "soft":
        (searched / output).symlink_to("model.pt2")
    elif how == "hard":
        os.link(searched / "model.pt2", searched / output)
    line = refused("apply", "recipe.yaml", "model.pt2", "--task", "task.py", "-o", output)
    assert "is the model, which is read; write to another file" in line


@pytest.mark.parametrize(("target", "called"), [("recipe.yaml", "recipe"), ("task.py", "task")])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_another_input_as_the_output_of_apply(searched, refused, target, called, link):
    link(searched / target, searched / "linked.pt2")
    line = refused(*APPLY, "-o", "linked.pt2")
    assert f"is the {called}, which is read; write to another file" in line


def test_export_over_what_is_no_recipe_of_ours(searched, refused):
    (searched / "notes.yaml").write_text("notes: mine\n")
    os.symlink(searched / "task.py", searched / "task.yaml")
    for target in ("notes.yaml", "task.yaml"):
        assert "not written by autoquant" in refused("export", "s", "-o", target)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch.export.save
def test_what_apply_wrote_is_written_anew_and_nothing_else(searched, cli, refused):
    for name in ("q.pt2", "q.safetensors"):
        for _ in range(2):
            result = cli(*APPLY, "-o", name, "--json")
            assert result.done, result.err
            assert Path(json.loads(result.out)["path"]) == searched / name
    program = torch.export.load(searched / "q.pt2").module()
    assert program(torch.zeros(3, 12)).shape == (3, 4)
    shutil.copy(searched / "model.pt", searched / "float.pt2")
    torch.export.save(
        torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), searched / "own.pt2"
    )
    save_file({"w": torch.zeros(3)}, str(searched / "own.safetensors"))
    for name in ("float.pt2", "own.pt2", "own.safetensors"):
        assert f"{name}: is there already and was edited" in refused(*APPLY, "-o", name)


def test_an_archive_beside_a_program_that_can_not_be(searched, cli):
    save_file({"w": torch.zeros(3)}, str(searched / "q.safetensors"))
    before = (searched / "q.safetensors").read_bytes()
    recipe = cli("export", "s", "-o", "plain.yaml")
    assert recipe.done
    text = (searched / "task.py").read_text()
    twice = "def forward(model, x):\n    return model(x) + 0 * model(x)\n\n\nmetric"
    (searched / "task.py").write_text(text.replace("metric", twice, 1))
    result = cli(*APPLY, "-o", "q.pt2")
    assert result.status == 2
    assert "q.safetensors: is there already" in result.err
    assert (searched / "q.safetensors").read_bytes() == before


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "TRIALS", 2)
    trained = []
    train = demo.train

    def counted(task, path):
        trained.append(path)
        train(task, path)

    monkeypatch.setattr(demo, "train", counted)
    return trained


def test_the_demo_again(project, cli, refused, quick):
    assert cli("demo", "d").done
    again = cli("demo", "d")
    assert again.done, again.err
    assert "trained before" in again.err
    assert len(quick) == 1
    edit(project / "d" / "recipe.yaml")
    assert "recipe.yaml: is there already" in refused("demo", "d")
    (project / "d" / "recipe.yaml").unlink()
    edit(project / "d" / "task.py")
    assert "task.py: is there already" in refused("demo", "d")


def test_the_demo_in_a_folder_with_a_model_of_one_s_own(project, refused, quick):
    (project / "task.py").unlink()
    assert "model.pt: is there already" in refused("demo", ".")
    assert not quick
