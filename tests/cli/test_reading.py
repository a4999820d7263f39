"""Studies are read without writing anything, and a broken one doesn't hide the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from autoquant.study.ledger import Ledger
from tests.study.headers import plain_header

COMMANDS = [("studies",), ("show", "s"), ("show",), ("show", "s", "--json"), ("export", "s")]
STORAGES = {"folder": None, "journal": "all.journal", "database": "sqlite:///s.db"}

WATCHED = """
import os, sys
folder, words = sys.argv[1], sys.argv[2:]

def watch(event, found):
    # What only root may write is opened by root all the same: so what is asked for is looked at.
    if event == "open" and isinstance(found[0], str):
        writes = found[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and os.path.abspath(found[0]).startswith(folder):
            os.write(2, f"WRITES {found[0]}\\n".encode())
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.truncate", "os.symlink", "os.link"):
        if os.path.abspath(found[0]).startswith(folder):
            os.write(2, f"WRITES {event} {found}\\n".encode())

sys.addaudithook(watch)
from autoquant.cli import main
main(words)
"""


def listing(folder: Path) -> dict[str, tuple]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes())
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("where", STORAGES)
def test_a_folder_that_may_only_be_read(project, cli, tmp_path_factory, where):
    storage = STORAGES[where]
    words = () if storage is None else ("--storage", storage)
    result = cli("search", "model.pt", "--task", "task.py", "--trials", 4, "--study", "s", *words)
    assert result.done, result.err
    for lock in project.rglob("*.flock"):
        lock.unlink()
    kept = [project, project / ".autoquant"] if storage is None else [project]
    before = listing(project)
    for folder in kept:
        folder.chmod(0o555)
    try:
        for command in COMMANDS:
            more = ("-o", str(tmp_path_factory.mktemp("out") / "r.yaml"))
            line = [*command, *words, *(more if command[0] == "export" else ())]
            child = subprocess.run(
                [sys.executable, "-c", WATCHED, str(project), *line],
                cwd=project,
                capture_output=True,
                text=True,
            )
            assert (child.returncode, child.stderr) == (0, ""), command
        refused = cli("resume", "s", *words) if os.getuid() else None
        assert refused is None or refused.status == 2
    finally:
        for folder in kept:
            folder.chmod(0o755)
    assert listing(project) == before


def test_a_line_that_a_killed_writer_left_is_skipped_and_left(project, cli):
    Ledger.create("s", None, plain_header())
    journal = project / ".autoquant" / "s.journal"
    with journal.open("ab") as file:
        file.write(b'{"op')
    whole = journal.read_bytes()
    assert json.loads(cli("show", "s", "--json").out)["trials"] == []
    assert journal.read_bytes() == whole


BROKEN = {
    "no header": lambda: optuna.create_study(study_name="b", storage=_journal()),
    "a header that is a list": lambda: _study().set_user_attr("autoquant", [1]),
    "a header that is empty": lambda: _study().set_user_attr("autoquant", {}),
    "another format": lambda: Ledger.create("b", None, plain_header(format=99)),
    "a name that is a number": lambda: Ledger.create(
        "b", None, plain_header(model={"name": 3, "sha256": "x", "trust_pickle": False})
    ),
    "no model": lambda: Ledger.create("b", None, without("model")),
    "no date": lambda: Ledger.create("b", None, plain_header(created=None)),
    "a space that is a text": lambda: Ledger.create("b", None, plain_header(space="int8")),
    "options that are a list": lambda: Ledger.create("b", None, plain_header(options=[])),
    "a journal that is a text": lambda: _write("hello\n"),
    "a journal that is another JSON": lambda: _write('{"a": 1}\n'),
    "a journal that is a folder": lambda: Path(".autoquant/b.journal").mkdir(),
    "a link to nowhere": lambda: Path(".autoquant/b.journal").symlink_to("nowhere"),
    "an empty file": lambda: _write(""),
    "another study": lambda: optuna.create_study(study_name="c", storage=_journal()),
}


def _journal():
    backend = optuna.storages.journal.JournalFileBackend(".autoquant/b.journal")
    return optuna.storages.JournalStorage(backend)


def _study():
    return optuna.create_study(study_name="b", storage=_journal())


def _write(text: str) -> None:
    Path(".autoquant/b.journal").write_text(text)


def without(name: str) -> dict:
    header = plain_header()
    del header[name]
    return header


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_study_does_not_hide_the_others(project, cli, case):
    Ledger.create("a", None, plain_header())
    BROKEN[case]()
    result = cli("studies", "--json")
    assert result.done, result.err
    assert [row["study"] for row in json.loads(result.out)] == ["a"]
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("note: ")
    assert "b" in result.err
    assert cli("studies").done
    for command in (("show", "b"), ("export", "b", "-o", "r.yaml"), ("resume", "b")):
        broken = cli(*command)
        assert broken.status == 2 or command == ("show", "b"), broken
        assert broken.done or len(broken.err.splitlines()) == 1
        assert "Traceback" not in broken.err
    assert not (project / "r.yaml").exists()


@pytest.mark.parametrize("storage", ["all.journal", "sqlite:///all.db"])
def test_in_a_storage_that_several_share(project, cli, storage):
    Ledger.create("a", storage, plain_header())
    Ledger.create("b", storage, without("model"))
    Ledger.create("c", storage, plain_header())
    result = cli("studies", "--storage", storage, "--json")
    assert [row["study"] for row in json.loads(result.out)] == ["c", "a"]
    assert "study b: damaged: header: model is missing" in result.err
