"""A place of studies is the same however it is written, and its paths are absolute."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import optuna
import pytest

from autoquant.errors import StudyError
from autoquant.study.ledger import Ledger, names
from autoquant.study.storage import Storage


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spellings(folder: Path) -> list[str]:
    """Return ways to write the database ``s.db`` of ``folder``, which is the working directory."""
    return [
        "sqlite:///s.db",
        "sqlite:///./s.db",
        f"sqlite:///../{urllib.parse.quote(folder.name)}/s.db",
        f"sqlite:///{urllib.parse.quote(str(folder))}/s.db",
        "sqlite:///s.db?timeout=60",
        "sqlite+pysqlite:///s.db",
        "sqlite+pysqlite:///s.db?timeout=60&check_same_thread=false",
        "sqlite:///file:s.db?uri=true",
        "sqlite:///file:s.db?uri=true&timeout=60&mode=rwc",
        f"sqlite:///file:{urllib.parse.quote(urllib.parse.quote(str(folder)))}/s.db?uri=true",
        f"sqlite:///file://{urllib.parse.quote(urllib.parse.quote(str(folder)))}/s.db?uri=true",
    ]


@pytest.mark.parametrize("first", range(11))
def test_a_database_is_one_place_however_it_is_written(tmp_path, first):
    every = spellings(tmp_path)
    Ledger.create("s", every[first], {"goal": first})
    assert sorted(os.listdir()) == ["s.db"]
    for url in every:
        with pytest.raises(StudyError, match="study s exists already"):
            Ledger.create("s", url, {"goal": "other"})
        assert Ledger.open("s", url).header == {"goal": first}
        assert Storage.parse(url).path == tmp_path / "s.db"
    assert sorted(os.listdir()) == ["s.db"]


@pytest.mark.parametrize("folder", ["a b", "ä", "50% {x}", "a?b#c&d=e", "é'\""])
@pytest.mark.parametrize("storage", [None, "s.journal", *spellings(Path("/x"))[::4]])
def test_in_folders_of_any_name_and_from_anywhere(tmp_path, monkeypatch, folder, storage):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    place = Storage.parse(storage)
    monkeypatch.chdir("/")
    Ledger.create("s", place, {"goal": 1}).note(more=2)
    assert Ledger.open("s", place, write=False).header == {"goal": 1, "more": 2}
    assert names(place) == ["s"]
    assert place.base == tmp_path / folder
    assert {str(p.relative_to(tmp_path)).split("/")[0] for p in tmp_path.rglob("*")} == {folder}


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite+pysqlite:///:memory:?timeout=3",
        "sqlite:///file::memory:?cache=shared&uri=true",
        "sqlite:///file:name?mode=memory&cache=shared&uri=true",
    ],
)
def test_what_keeps_nothing_is_refused(url):
    for call in (Storage.parse, lambda u: Ledger.create("s", u, {}), names):
        with pytest.raises(StudyError, match="a database in memory keeps nothing; give a file"):
            call(url)
    assert os.listdir() == []


@pytest.mark.parametrize("url", ["studies", "s.db", "s.journal.gz", "://", "sqlite:/s.db"])
def test_what_is_no_storage_is_refused(url):
    with pytest.raises(StudyError, match="--storage"):
        Storage.parse(url)


def test_a_database_whose_name_ends_like_a_journal_is_a_database():
    Ledger.create("s", "sqlite:///s.journal", {"a": 1})
    assert Path("s.journal").read_bytes().startswith(b"SQLite format 3")


def test_a_password_is_not_printed():
    place = Storage.parse("postgresql://me:secret@host/studies")
    assert place.url == "postgresql://me:secret@host/studies"
    assert "secret" not in place.shown + place.words


def test_another_program_s_study_is_never_taken_over():
    journal = optuna.storages.journal.JournalFileBackend("all.journal")
    for url, storage in (
        ("sqlite:///all.db", "sqlite:///all.db"),
        ("all.journal", optuna.storages.JournalStorage(journal)),
    ):
        theirs = optuna.create_study(study_name="s", storage=storage)
        with pytest.raises(StudyError, match="is not autoquant's"):
            Ledger.create("s", url, {"a": 1})
        assert theirs.user_attrs == {}
        assert names(url) == []
        assert names(url, every=True) == ["s"]


def test_a_database_with_no_table_of_ours_is_as_good_as_a_new_one():
    Path("s.db").touch()
    assert names("sqlite:///s.db", every=True) == []
    with pytest.raises(StudyError, match=r"no study in sqlite:///s\.db"):
        Ledger.open("s", "sqlite:///s.db")
    Ledger.create("s", "sqlite:///s.db", {"a": 1})
    assert names("sqlite:///s.db") == ["s"]


CREATE = """
import sys, time
from autoquant.errors import StudyError
from autoquant.study.ledger import Ledger
from autoquant.study.storage import Storage

me, storage, *names = sys.argv[1:]
place = Storage.parse(storage or None)
print("ready", flush=True)
sys.stdin.readline()
for name in names:
    try:
        ledger = Ledger.create(name.replace("ME", me), place, {"by": me})
        assert ledger.header == {"by": me}
        print(name, flush=True)
    except StudyError as error:
        assert "exists already" in str(error), error
"""


def race(storage: str | None, studies: list[str], processes: int = 4) -> list[list[str]]:
    """Return which studies each of several processes got that created all at once."""
    command = [sys.executable, "-c", CREATE]
    started = [
        subprocess.Popen(
            [*command, str(i), storage or "", *studies],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = []
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(out.split())
    return found


@pytest.mark.parametrize(
    "storage", [None, "all.journal", "sqlite:///s.db", "sqlite:///s.db?timeout=60"]
)
def test_of_processes_that_create_one_name_at_a_time_one_gets_it(storage):
    wanted = [f"s{i}" for i in range(12)]
    got = race(storage, wanted)
    assert sorted(name for own in got for name in own) == sorted(wanted)  # each once
    for me, own in enumerate(got):
        for name in own:
            assert Ledger.open(name, storage, write=False).header == {"by": str(me)}


@pytest.mark.parametrize("storage", [None, "all.journal", "sqlite:///s.db"])
def test_processes_that_create_other_names_do_not_disturb_each_other(storage):
    got = race(storage, [f"s{i}-ME" for i in range(4)])
    assert [len(own) for own in got] == [4] * 4


KILLED = """
import os, signal, sys, time
import optuna
from autoquant.study.ledger import Ledger

def dead(self, key, value):
    os.kill(os.getpid(), signal.SIGKILL)

optuna.Study.set_user_attr = dead
Ledger.create("s", None, {"by": "killed"})
"""


def test_a_study_that_was_killed_as_it_began_is_taken_over_by_one():
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, timeout=60)
    assert killed.returncode == -9
    assert Path(".autoquant/s.journal").read_bytes().count(b"\n") == 1
    got = race(None, ["s"])
    assert sorted(map(len, got)) == [0, 0, 0, 1]


def test_a_study_that_could_not_be_written_whole_is_not_left_behind(monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    for storage in (None, "all.journal", "sqlite:///s.db"):
        with monkeypatch.context() as patch:
            patch.setattr(optuna.Study, "set_user_attr", broken)
            with pytest.raises(KeyboardInterrupt):
                Ledger.create("s", storage, {"a": 1})
        began = time.monotonic()
        assert Ledger.create("s", storage, {"a": 2}).header == {"a": 2}
        assert time.monotonic() - began < 5
