"""A study that is killed again and again ends where one that was left alone ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from autoquant.cli.failures import STATUSES

pytestmark = pytest.mark.slow

KILLS = 20
TASK = """
import torch
from sklearn.datasets import load_digits
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32, 10))

def load_model(path):
    model = net()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model

def images():
    digits = load_digits()
    return torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)

def calibration_data():
    return images()[0][:128].split(64)

def evaluation_data():
    x, y = images()
    return zip(x[900:].split(100), y[900:].split(100))

metric = "accuracy"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small trained model and its task."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "task.py").write_text(TASK)
    scope: dict = {}
    exec(TASK, scope)
    torch.manual_seed(0)
    model: nn.Module = scope["net"]()
    x, y = scope["images"]()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(x[:900]), y[:900])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "model.pt")
    return folder


def start(project: Path, cwd: Path, *words: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "autoquant", *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def search_words(project: Path, sampler: str, trials: int) -> list[str]:
    words = ["search", str(project / "model.pt"), "--task", str(project / "task.py"), "--json"]
    return [*words, "--trials", str(trials), "--sampler", sampler, "--study", "s", "--seed", "7"]


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def rows(cwd: Path) -> list:
    shown = start(Path(), cwd, "show", "s", "--json")
    out, err = shown.communicate()
    assert shown.returncode == 0, err
    trials = json.loads(out)["trials"]
    for trial in trials:
        if trial["measured"]:
            del trial["measured"]["seconds"]
    return trials


def journal_trials(cwd: Path) -> list:
    """Return number, state, parameters and value of every trial, read by Optuna itself."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(cwd / ".autoquant" / "s.journal")))
    study = optuna.load_study(study_name="s", storage=storage)
    return [(t.number, t.state.name, t.params, t.value, t.constraints) for t in study.trials]


@pytest.mark.parametrize(("sampler", "trials", "kills"), [("knapsack", 500, KILLS), ("tpe", 60, 4)])
def test_killed_and_resumed_equals_left_alone(project, tmp_path, sampler, trials, kills):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    process = start(project, alone, *search_words(project, sampler, trials))
    out, err = process.communicate()
    assert process.returncode in STATUSES.values(), err

    moments = random.Random(0)
    journal = killed / ".autoquant" / "s.journal"
    words = search_words(project, sampler, trials)
    known: list = []
    done = 0
    while done < kills:
        process = start(project, killed, *words)
        before = lines(journal)
        if done % 5 == 4:
            time.sleep(moments.uniform(0.1, 3.0))  # also while it is still starting
        else:
            while process.poll() is None and lines(journal) < before + 2:
                time.sleep(0.005)
            time.sleep(moments.uniform(0.0, 0.15))
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done += 1
        if not journal.exists() or not lines(journal):
            continue
        if lines(journal) >= 2:  # the study and its header
            words = ["resume", "s", "--json"]
            now = rows(killed)
            assert now[: len(known)] == known  # every completed trial is still there
            known = now
    process = start(project, killed, *words)
    out_killed, err = process.communicate()
    assert process.returncode in STATUSES.values(), err

    assert journal_trials(killed) == journal_trials(alone)
    texts = [(folder / "recipe.yaml").read_text() for folder in (alone, killed)]
    assert texts[0] == texts[1]
    first, second = json.loads(out), json.loads(out_killed)
    assert first["metric"] == second["metric"]
    assert first["trials"] == second["trials"]
