import datetime
import json
import os

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from autoquant.errors import StudyError
from autoquant.search.ledger import Ledger, count, finished, journal_path, names


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trial(value=0.5, state=TrialState.COMPLETE, params=200):
    return finished(
        state,
        value=value if state == TrialState.COMPLETE else None,
        params={f"p{i}": 3 for i in range(params)},
        distributions={f"p{i}": IntDistribution(0, 7) for i in range(params)},
        started=datetime.datetime.now(),
        constraints={"drop": -0.01},
        user_attrs={"reason": "none"},
    )


@pytest.mark.parametrize("storage", [None, "sqlite:///s.db", "elsewhere.journal"])
def test_what_is_written_is_read_back_by_another_process(storage):
    ledger = Ledger.create("s", storage, {"a": 1})
    ledger.add(trial(0.25))
    ledger.add(trial(state=TrialState.FAIL))
    again = Ledger.open("s", storage)
    assert again.header == {"a": 1}
    assert [t.value for t in again.trials()] == [0.25, None]
    assert again.trials()[0].constraints == {"drop": -0.01}
    assert again.trials()[0].params["p199"] == 3
    assert count(again.trials()) == {"complete": 1, "pruned": 0, "failed": 1}
    assert names(storage) == ["s"]


def test_a_trial_is_one_line_of_the_journal_and_an_ordinary_trial_to_optuna():
    ledger = Ledger.create("s", None, {"a": 1})
    before = journal_path("s").read_bytes().count(b"\n")
    ledger.add(trial())
    assert journal_path("s").read_bytes().count(b"\n") == before + 1
    backend = optuna.storages.journal.JournalFileBackend(str(journal_path("s")))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name="s", storage=storage)
    assert study.best_trial.params["p7"] == 3
    assert study.trials[0].user_attrs == {"reason": "none"}


@pytest.mark.parametrize("rest", [b'{"op', b'{"op_code":4,"x":1}', b"\x00\x00"])
def test_what_a_killed_writer_left_is_cut_off(rest):
    ledger = Ledger.create("s", None, {"a": 1})
    ledger.add(trial(0.1))
    whole = journal_path("s").read_bytes()
    with journal_path("s").open("ab") as file:
        file.write(rest)
    again = Ledger.open("s", None)
    assert journal_path("s").read_bytes() == whole
    again.add(trial(0.2))
    assert [t.value for t in Ledger.open("s", None).trials()] == [0.1, 0.2]


def test_a_journal_that_is_damaged_in_the_middle_is_one_line():
    Ledger.create("s", None, {"a": 1}).add(trial())
    lines = journal_path("s").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:10] + b"\n"
    journal_path("s").write_bytes(b"".join(lines))
    with pytest.raises(StudyError, match="line 2 is damaged"):
        Ledger.open("s", None)


def test_a_full_disk_is_one_line_and_loses_nothing(monkeypatch):
    ledger = Ledger.create("s", None, {"a": 1})
    ledger.add(trial(0.1))
    real = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StudyError, match=r"the disk is full.*autoquant resume s"):
        ledger.add(trial(0.2))
    monkeypatch.setattr("os.fsync", real)
    for line in journal_path("s").read_text().splitlines():
        json.loads(line)
    assert Ledger.open("s", None).trials()[0].value == 0.1


def test_names_that_are_taken_missing_or_impossible():
    with pytest.raises(StudyError, match="no study in"):
        Ledger.open(None, None)
    Ledger.create("s", None, {"a": 1})
    with pytest.raises(StudyError, match="exists already"):
        Ledger.create("s", None, {})
    with pytest.raises(StudyError, match="there are s"):
        Ledger.open("t", None)
    with pytest.raises(StudyError, match="letters, digits"):
        Ledger.create("../up", None, {})
    with pytest.raises(StudyError, match="no such database"):
        Ledger.open("s", "sqlite:///absent.db")
    with pytest.raises(StudyError, match="database URL"):
        Ledger.open("s", "somewhere")
    optuna.create_study(study_name="theirs", storage="sqlite:///theirs.db")
    with pytest.raises(StudyError, match="not made by autoquant"):
        Ledger.open("theirs", "sqlite:///theirs.db")


@pytest.mark.parametrize("storage", [None, "sqlite:///s.db"])
def test_a_study_that_was_killed_while_it_was_created_is_taken_over(storage):
    url = storage or journal_path("s")
    if storage is None:
        Ledger.create("s", None, {"a": 1})
        lines = url.read_bytes().splitlines(keepends=True)
        url.write_bytes(lines[0])
    else:
        optuna.create_study(study_name="s", storage=url, direction="minimize")
    ledger = Ledger.create("s", storage, {"b": 2})
    ledger.add(trial(0.3))
    assert Ledger.open("s", storage).header == {"b": 2}
    with pytest.raises(StudyError, match="exists already"):
        Ledger.create("s", storage, {})
