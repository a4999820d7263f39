import contextlib
import datetime
import errno
import json
import os
import sqlite3

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from autoquant.errors import StudyError
from autoquant.study.ledger import Ledger, count, finished, journal_path, names


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


def test_a_study_that_was_killed_while_it_was_created_is_taken_over():
    Ledger.create("s", None, {"a": 1})
    lines = journal_path("s").read_bytes().splitlines(keepends=True)
    journal_path("s").write_bytes(lines[0])
    ledger = Ledger.create("s", None, {"b": 2})
    ledger.add(trial(0.3))
    assert Ledger.open("s", None).header == {"b": 2}
    with pytest.raises(StudyError, match="exists already"):
        Ledger.create("s", None, {})


def refused(call, *words):
    with pytest.raises(StudyError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_the_newest_study_is_the_one_that_was_written_last():
    for i, name in enumerate(("first", "second", "third")):
        Ledger.create(name, None, {"i": i})
        os.utime(journal_path(name), (i, i))
    assert names(None) == ["third", "second", "first"]
    Ledger.open("first", None).add(trial())
    assert names(None)[0] == "first"
    assert Ledger.open(None, None).name == "first"


@pytest.mark.parametrize("storage", ["sqlite:///s.db", "all.journal"])
def test_the_newest_study_of_a_shared_storage_is_the_one_that_was_begun_last(storage):
    Ledger.create("b", storage, {"i": 0}).add(trial())
    optuna.create_study(
        study_name="theirs",
        storage=storage
        if "://" in storage
        else optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage)),
    )
    Ledger.create("a", storage, {"i": 1})  # killed before its first trial
    assert names(storage) == ["a", "b"]
    assert Ledger.open(None, storage).name == "a"
    assert Ledger.open("b", storage).header == {"i": 0}


def test_notes_are_kept_and_added_to():
    ledger = Ledger.create("s", None, {"a": 1, "deep": {"b": [1, 2]}})
    ledger.note(best=3)
    ledger.note(a=2)
    assert Ledger.open("s", None).header == {"a": 2, "deep": {"b": [1, 2]}, "best": 3}
    assert ledger.header == Ledger.open("s", None).header


@pytest.mark.parametrize("storage", [None, "sqlite:///s.db"])
def test_what_one_worker_notes_no_other_takes_back(storage):
    first = Ledger.create("s", storage, {"a": 1})
    second = Ledger.open("s", storage)
    first.note(profile=[1], best=3)
    second.note(state={"x": 2})
    found = Ledger.open("s", storage).header
    assert found == {"a": 1, "profile": [1], "best": 3, "state": {"x": 2}}


def test_everything_of_a_trial_is_kept():
    made = finished(
        TrialState.COMPLETE,
        value=0.1 + 0.2,
        params={"a": 1, "b": "mse", "c": 0.1},
        distributions={
            "a": IntDistribution(0, 7),
            "b": optuna.distributions.CategoricalDistribution(("max", "mse")),
            "c": optuna.distributions.FloatDistribution(0.01, 1.0, log=True),
        },
        started=datetime.datetime.now(),
        constraints={"drop": 1e-17, "bits": -3.0},
        user_attrs={"measured": {"loss": 1e-300}},
        system_attrs={"sampler_state": {"id": 3}},
    )
    for storage in (None, "sqlite:///s.db"):
        ledger = Ledger.create("s", storage, {"x": 1})
        ledger.add(made)
        found = Ledger.open("s", storage).trials()[0]
        for field in ("value", "params", "distributions", "user_attrs", "constraints"):
            assert getattr(found, field) == getattr(made, field)
        assert found.system_attrs["sampler_state"] == {"id": 3}
        assert abs(found.datetime_complete - made.datetime_complete).total_seconds() < 1e-3
        assert found.duration is not None


def test_the_folder_of_studies_stays_out_of_version_control():
    Ledger.create("s", None, {"x": 1})
    assert (journal_path("s").parent / ".gitignore").read_text() == "*\n"
    Ledger.create("t", "here.journal", {"x": 1})
    assert not os.path.exists(".gitignore")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../up", "-x", "ä", "x" * 101, "a b", "a\n"]
)
def test_names_that_could_be_a_path_or_an_option_are_refused(name):
    refused(lambda: Ledger.create(name, None, {}), "use letters, digits")
    assert not os.path.exists(".autoquant")


def test_a_name_is_taken_once_in_a_database_as_well():
    Ledger.create("s", "sqlite:///s.db", {"x": 1})
    words = ("study s exists already in sqlite:///s.db", "resume s --storage sqlite:///s.db")
    refused(lambda: Ledger.create("s", "sqlite:///s.db", {}), *words)
    Ledger.create("s", "sqlite:///other.db", {"x": 1})
    Ledger.create("t", "sqlite:///s.db", {"x": 1})


def test_checking_a_name_writes_nothing():
    for storage in (None, "sqlite:///s.db", "s.journal"):
        Ledger.check_free("s", storage)
    assert os.listdir() == []


def test_storages_that_are_none(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    (tmp_path / "text.journal").write_text("this is no journal\n")
    (tmp_path / "odd.journal").write_text('{"what": 1}\n')
    (tmp_path / "folder.journal").mkdir()
    refused(lambda: Ledger.open("s", "sqlite:///text.db"), "not a database")
    refused(lambda: Ledger.open("s", "text.journal"), "line 1 is damaged")
    refused(lambda: Ledger.open("s", "odd.journal"), "holds no sound study")
    refused(lambda: Ledger.open("s", "folder.journal"), "directory")
    refused(lambda: Ledger.open("s", "absent.journal"), "no such journal: absent.journal")
    refused(lambda: Ledger.open("s", "sqlite:///absent.db"), "no such database: absent.db")
    refused(lambda: Ledger.open(None, "sqlite:///absent.db"), "no such database")
    refused(
        lambda: Ledger.create("s", "sqlite:///no/such/folder/s.db", {}), "study s: the database"
    )
    refused(lambda: Ledger.open("s", "nosql://here"), "study s:")
    refused(lambda: Ledger.open("s", "s.db"), "--storage 's.db': give a database URL")
    assert not os.path.exists("absent.db")


def test_a_database_that_breaks_under_a_study():
    ledger = Ledger.create("s", "sqlite:///s.db", {"x": 1})
    with contextlib.closing(sqlite3.connect("s.db")) as database:
        database.execute("DROP TABLE study_user_attributes")
        database.commit()
    refused(lambda: ledger.note(best=1), "study s: the database says: no such table")


def test_a_failed_trial_is_kept_with_its_reason():
    ledger = Ledger.create("s", None, {"x": 1})
    ledger.add(trial(state=TrialState.FAIL))
    ledger.add(trial(state=TrialState.PRUNED))
    assert count(Ledger.open("s", None).trials()) == {"complete": 0, "pruned": 1, "failed": 1}


def test_two_processes_on_one_study_see_each_other():
    one = Ledger.create("s", None, {"x": 1})
    two = Ledger.open("s", None)
    one.add(trial(0.1))
    two.add(trial(0.2))
    one.add(trial(0.3))
    for ledger in (one, two):
        assert [(t.number, t.value) for t in ledger.trials()] == [(0, 0.1), (1, 0.2), (2, 0.3)]


def test_an_error_without_a_file_is_still_one_line(monkeypatch):
    ledger = Ledger.create("s", None, {"x": 1})

    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(StudyError, match=r"^study s: Input/output error$"):
        ledger.add(trial())
