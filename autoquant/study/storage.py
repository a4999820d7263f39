"""Where studies are kept, as ``--storage`` says it: a folder of journals, one journal, a database.

It is read once, before any code of the user's runs: from then on its paths are absolute, and the
same place is known under every way to write it (``sqlite:///s.db``, ``sqlite:///s.db?timeout=60``,
``sqlite+pysqlite:////home/me/s.db``, a ``file:`` URI).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from optuna.storages import BaseStorage, JournalStorage, RDBStorage

from autoquant.errors import StudyError
from autoquant.study.journal import Journal

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

FOLDER = Path(".autoquant")
"""Where studies are kept unless --storage says otherwise."""
SUFFIX = ".journal"
TABLE = "studies"
"""The table of Optuna's schema that every one of its databases has."""
ATTEMPTS = 20
"""Times that a database is opened: another process may be making its tables."""
RACES = ("exist", "no such table", "UNIQUE", "uplicate", "is locked")
"""What databases say where another process makes the same tables at the same moment."""


@dataclass(frozen=True)
class Storage:
    """A place of studies. ``shown`` is what a person calls it, without a password.

    ``path`` is absolute: the folder with a journal for each study where ``url`` is None and
    ``shared`` is not set, the one journal of all, or the file of an SQLite database; None for a
    database that is no file. ``url`` is what Optuna opens.
    """

    shown: str
    path: Path | None
    url: str | None = None
    shared: bool = True

    @classmethod
    def parse(cls, text: str | None) -> Storage:
        """Return the place that ``--storage`` names, None the folder .autoquant.

        Raises StudyError for what is no storage, and for a database in memory, which keeps nothing.
        """
        if text is None:
            return cls(str(FOLDER), Path(os.path.abspath(FOLDER)), shared=False)
        if "://" not in text:
            if not text.endswith(SUFFIX):
                raise StudyError(
                    f"--storage {text!r}: give a database URL (sqlite:///studies.db, "
                    f"postgresql://…, mysql://…) or a file that ends in {SUFFIX}"
                )
            return cls(text, Path(os.path.abspath(text)))
        # It sets the level of its log, so it is imported only where it is needed.
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            raise StudyError(
                f"--storage {text!r}: no database URL, such as sqlite:///studies.db"
            ) from None
        shown = url.render_as_string(hide_password=True)
        if url.get_backend_name() != "sqlite":
            return cls(shown, None, url.render_as_string(hide_password=False))
        return cls(shown, *_sqlite(url, text))

    @property
    def words(self) -> str:
        """What a command line needs to name this place, with a space before; the default nothing.

        A relative path is as it was typed: the user's shell is where it was.
        """
        return f" --storage {self.shown}" if self.shared else ""

    @property
    def base(self) -> Path | None:
        """The folder that a study's relative paths start from; None for a database elsewhere.

        It is the one that holds ``.autoquant``, the journal or the database, so that a project
        which is moved or copied as a whole finds its own files.
        """
        return None if self.path is None else self.path.parent

    def file(self, name: str) -> Path | None:
        """Return the file that holds the study ``name``; None for a database that is no file."""
        if self.path is None or self.shared:
            return self.path
        return self.path / f"{name}{SUFFIX}"

    def exists(self, name: str) -> bool:
        """Return whether there is something to look for the study ``name`` in."""
        file = self.file(name)
        if file is not None and not file.exists():
            return False
        if self.url is None:
            return True
        from sqlalchemy import create_engine, inspect

        engine = create_engine(self.url)
        try:
            return inspect(engine).has_table(TABLE)
        finally:
            engine.dispose()

    def journal(self, name: str, *, write: bool, create: bool = False) -> Journal | None:
        """Return the journal that holds the study ``name``; None where it is a database.

        Without ``write`` nothing is written, and nothing needs to be writable; ``create`` makes the
        file, with its folder. Raises StudyError where there is none to open.
        """
        if self.url is not None:
            return None
        path = self.file(name)
        assert path is not None
        if not create and not path.exists():
            raise StudyError(f"no such journal: {self.shown if self.shared else path}")
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            ignore = path.parent / ".gitignore"
            if path.parent.name == FOLDER.name and not ignore.exists():
                ignore.write_text("*\n", encoding="utf-8")
        return Journal(path, write=write)

    def open(self, name: str, *, write: bool) -> BaseStorage:
        """Return Optuna's storage with the study ``name``; see ``journal`` for ``write``.

        Raises StudyError where there is nothing to open, and whatever the storage raises.
        """
        journal = self.journal(name, write=write)
        if journal is not None:
            return JournalStorage(journal)
        if self.path is not None and not self.path.exists():
            raise StudyError(f"no such database: {self.shown.partition(':///')[2]}")
        if not self.exists(name):
            raise StudyError(f"no study in {self.shown}; start one: autoquant search")
        return self._database(create=False)

    @contextlib.contextmanager
    def beginning(self, name: str) -> Iterator[tuple[BaseStorage, bool]]:
        """Give what a study is created in, and whether nobody else creates one there meanwhile."""
        journal = self.journal(name, write=True, create=True)
        if journal is None:
            yield self._database(create=True), False
            return
        with journal.alone() as alone:
            yield JournalStorage(journal), alone

    def _database(self, *, create: bool) -> BaseStorage:
        from sqlalchemy.exc import SQLAlchemyError

        assert self.url is not None
        url = self.url.replace("{", "{{").replace("}", "}}")  # Optuna takes it for a template
        for attempt in range(ATTEMPTS):
            try:
                return RDBStorage(url, skip_table_creation=not create)
            except SQLAlchemyError as error:
                if attempt == ATTEMPTS - 1 or not any(word in str(error) for word in RACES):
                    raise
                time.sleep(0.05)
        raise AssertionError("unreachable")


def located(storage: Storage | str | None) -> Storage:
    """Return the place, of what ``--storage`` says or of a place."""
    return storage if isinstance(storage, Storage) else Storage.parse(storage)


def _sqlite(url: URL, text: str) -> tuple[Path, str]:
    """Return the absolute path of an SQLite database and the URL that opens it from anywhere."""
    database, query = url.database or "", dict(url.query)
    uri = database.startswith("file:") and _true(query.get("uri"))
    # What follows the path in a URI is part of the URL's query already.
    name = unquote(database[5:]) if uri else database
    if uri and name.startswith("//"):
        name = "/" + name.lstrip("/")
    memory = (
        name in ("", ":memory:") or query.get("mode") == "memory" or query.get("vfs") == "memdb"
    )
    if memory:
        raise StudyError(
            f"--storage {text}: a database in memory keeps nothing; give a file, such as "
            "sqlite:///studies.db"
        )
    path = Path(os.path.abspath(name))
    database = f"file:{quote(str(path))}" if uri else str(path)
    return path, url.set(database=database).render_as_string(hide_password=False)


def _true(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes", "on")
