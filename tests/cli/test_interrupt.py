"""Ctrl-C and SIGTERM: the study is kept, and one line says how to go on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoquant.optimize import choose
from autoquant.samplers.knapsack import proposer
from autoquant.session import preflight
from autoquant.session.session import Session

WORDS = ("search", "model.pt", "--task", "task.py", "--study", "s")


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def resume_command(err: str) -> list[str]:
    """Return the words of the command that the last line of ``err`` gives."""
    line = err.splitlines()[-1]
    assert line.startswith("interrupted: ")
    words = shlex.split(line.partition("go on with: ")[2])
    assert words[0] == "autoquant"
    return words[1:]


def count(cli, *words: str) -> int:
    """Return how many trials a study has, without those that were tuned after them."""
    rows = json.loads(cli("show", *words, "--json").out)["trials"]
    return sum(row["tuned"] is None for row in rows)


@pytest.mark.parametrize("storage", [None, "sqlite:///a b.db", "kept/x.journal"])
def test_in_a_trial(project, cli, monkeypatch, storage):
    where = () if storage is None else ("--storage", storage)
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        finished = Session.measure

        def measure(*args: object, **kwargs: object) -> object:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return finished(*args, **kwargs)

        patch.setattr(Session, "measure", measure)
        result = cli(*WORDS, *where, "--trials", 9)
    assert (result.status, result.out) == (130, "")
    assert "Traceback" not in result.err
    assert "interrupted: every finished trial is kept" in result.err.splitlines()[-1]
    assert not (project / "recipe.yaml").exists()
    assert count(cli, "s", *where) == 5
    assert cli(*resume_command(result.err)).done
    assert count(cli, "s", *where) == 9


@pytest.mark.parametrize(("module", "name"), [(proposer, "profile"), (choose, "finalists")])
def test_before_and_after_the_trials(project, cli, monkeypatch, module, name):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        result = cli(*WORDS, "--trials", 9)
    assert (result.status, result.out) == (130, "")
    assert count(cli, "s") == (9 if name == "finalists" else 0)
    assert cli(*resume_command(result.err)).done
    assert count(cli, "s") == 9


def test_in_the_preflight_nothing_was_begun(project, cli, monkeypatch):
    monkeypatch.setattr(preflight, "_check_round_trip", interrupt)
    result = cli(*WORDS)
    assert (result.status, result.out) == (130, "")
    assert result.err.splitlines() == ["interrupted: nothing was begun"]
    assert {path.name for path in project.iterdir()} == {"model.pt", "task.py"}


def test_the_handler_of_sigterm_is_given_back(project, cli):
    before = signal.getsignal(signal.SIGTERM)
    assert cli(*WORDS, "--trials", 2).done
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signal(project, cli, sent):
    child = subprocess.Popen(
        [sys.executable, "-m", "autoquant", *WORDS, "--trials", "100000"],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background has SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = project / ".autoquant" / "s.journal"
    ends = time.monotonic() + 60
    while lines(journal) < 8 and child.poll() is None and time.monotonic() < ends:
        time.sleep(0.01)
    written = lines(journal)
    child.send_signal(sent)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert resume_command(err) == ["resume", "s"]
    kept = count(cli, "s")
    # The study, its header and the profile are lines that are no trials.
    assert kept >= written - 3
    assert cli("resume", "s", "--trials", kept + 2).done
    assert count(cli, "s") == kept + 2


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
