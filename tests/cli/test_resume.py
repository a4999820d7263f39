"""A study goes on from its storage alone, and notices what has changed since it began."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autoquant.spec import space as spaces

SPACE = """\
autoquant_space: 1
name: mine
rules:
  - weight_bits: [8, 6, 4]
    activation_bits: [8, 16]
"""


@pytest.fixture
def begun(project: Path, cli) -> Path:
    """Return the project after a search of six trials in a space of its own: study "s"."""
    (project / "space.yaml").write_text(SPACE)
    words = ("--task", "task.py", "--trials", 6, "--study", "s", "--space", "space.yaml")
    assert cli("search", "model.pt", *words).done
    return project


def trials(cli, *words: object) -> list:
    """Return a study's trials but for the seconds they took."""
    rows = json.loads(cli("show", *words, "--json").out)["trials"]
    for row in rows:
        row["measured"].pop("seconds")
    return rows


def append(name: str, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(path.read_text() + text)

    return change


def other_weights(folder: Path) -> None:
    state = torch.load(folder / "model.pt", weights_only=True)
    torch.save({key: value * 1.001 for key, value in state.items()}, folder / "model.pt")


CHANGES: dict[str, Callable[[Path], object]] = {
    "model": other_weights,
    "task": append("task.py", "\n# changed\n"),
    "space": append("space.yaml", "    weight_scheme: [symmetric, asymmetric]\n"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed(begun, cli, what):
    before = trials(cli, "s")
    CHANGES[what](begun)
    journal = (begun / ".autoquant" / "s.journal").read_bytes()
    recipe = (begun / "recipe.yaml").read_bytes()
    refused = cli("resume", "s", "--trials", 9)
    assert (refused.status, refused.out) == (2, "")
    line = refused.err.splitlines()
    assert len(line) == 1
    assert f"study s: the {what} has changed since the study began (sha256 " in line[0]
    assert "--accept-changes" in line[0]
    assert (begun / ".autoquant" / "s.journal").read_bytes() == journal
    assert (begun / "recipe.yaml").read_bytes() == recipe

    accepted = cli("resume", "s", "--trials", 9, "--accept-changes")
    assert accepted.done, accepted.err
    after = trials(cli, "s")
    assert len(after) == 9
    assert after[:6] == before


def test_the_same_content_written_again_is_no_change(begun, cli):
    for name in ("task.py", "space.yaml", "model.pt"):
        path = begun / name
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert cli("resume", "s").done


def test_a_space_file_that_is_gone_is_in_the_study(begun, cli):
    (begun / "space.yaml").unlink()
    assert cli("resume", "s", "--trials", 8).done
    assert len(trials(cli, "s")) == 8


@pytest.mark.parametrize(("name", "what"), [("model.pt", "model"), ("task.py", "task")])
def test_gone(begun, cli, name, what):
    (begun / name).unlink()
    result = cli("resume", "s")
    assert (result.status, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert str(begun / name) in result.err


def test_a_shipped_space_that_ships_otherwise_now(searched, cli, tmp_path, monkeypatch):
    assert cli("resume", "s").done
    folder = tmp_path / "shipped"
    folder.mkdir()
    source = importlib.resources.files("autoquant.search_spaces").joinpath("default.yaml")
    (folder / "default.yaml").write_text(source.read_text() + "# of another release\n")
    monkeypatch.setattr(spaces, "_folder", lambda: folder)
    refused = cli("resume", "s")
    assert refused.status == 2
    assert "study s: the space has changed since the study began" in refused.err
    assert cli("resume", "s", "--accept-changes").done


def test_other_layers_need_a_new_study(begun, cli):
    task = begun / "task.py"
    net = "nn.Linear(16, 4))"
    assert net in task.read_text()
    task.write_text(
        task.read_text()
        .replace(net, "nn.Linear(16, 4), nn.Linear(4, 4))")
        .replace("load_state_dict(", "load_state_dict(strict=False, state_dict=")
    )
    result = cli("resume", "s", "--accept-changes")
    assert (result.status, result.out) == (2, "")
    assert "other layers" in result.err.splitlines()[-1]


@pytest.mark.parametrize("storage", ["sqlite:///{}/studies.db", "{}/kept/all.journal"])
def test_from_another_folder(project, cli, storage, tmp_path_factory, monkeypatch):
    storage = storage.format(project)
    words = ("--task", "task.py", "--storage", storage, "--space", "int8", "--max-drop", "3%")
    words += ("--tune", "none")  # what was tuned after 4 trials would be a finalist after 7, too
    started = cli("search", "model.pt", *words, "--trials", 4, "--seed", 3, "--out", "made")
    assert started.done, started.err
    whole = ("--trials", 7, "--seed", 3, "--out", "whole", "--study", "whole")
    assert cli("search", "model.pt", *words, *whole).done
    assert not (project / ".autoquant").exists()
    first = (project / "made" / "recipe.yaml").read_text()
    (project / "made" / "recipe.yaml").unlink()

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    resumed = cli("resume", "model", "--storage", storage, "--json")
    assert resumed.done, resumed.err
    found = json.loads(resumed.out)
    assert sum(found["trials"].values()) == 4
    assert (project / "made" / "recipe.yaml").read_text() == first

    # More trials are those that the study would have had, had it been told so from the start.
    assert cli("resume", "model", "--storage", storage, "--trials", 7).done
    rows = trials(cli, "model", "--storage", storage)
    assert rows == trials(cli, "whole", "--storage", storage)
    texts = [(project / d / "recipe.yaml").read_text() for d in ("made", "whole")]
    assert texts[0] == texts[1]
    listed = json.loads(cli("studies", "--storage", storage, "--json").out)
    assert {row["study"] for row in listed} == {"model", "whole"}
    export = ("export", "model", "--storage", storage, "-o", "here.yaml")
    assert cli(*export).status == 0
    assert (elsewhere / "here.yaml").read_text() == texts[0]
    assert {path.name for path in elsewhere.iterdir()} == {"here.yaml"}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Constraints have been set")  # of CMA-ES
@pytest.mark.parametrize("sampler", ["knapsack", "tpe", "nsga2", "gp", "cmaes", "qmc", "random"])
def test_stopped_and_resumed_gives_the_trials_of_one_run(project, cli, sampler):
    words = (
        "search",
        "model.pt",
        "--task",
        "task.py",
        "--sampler",
        sampler,
        "--space",
        "mine.yaml",
    )
    (project / "mine.yaml").write_text(SPACE)
    assert cli(*words, "--trials", 4, "--study", "a").done
    for total in (5, 8, 14):
        assert cli("resume", "a", "--trials", total).done
    assert cli(*words, "--trials", 14, "--study", "b", "--out", "b").done
    assert trials(cli, "a") == trials(cli, "b")
    assert (project / "recipe.yaml").read_text() == (project / "b" / "recipe.yaml").read_text()


def test_the_newest_study_is_the_default(searched, cli):
    words = ("--task", "task.py", "--trials", 2, "--study", "later")
    assert cli("search", "model.pt", *words).done
    assert json.loads(cli("show", "--json").out)["study"] == "later"
    assert json.loads(cli("resume", "--json").out)["study"] == "later"
