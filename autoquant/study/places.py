"""Where the files of a study lie: kept so that a project which is moved or copied finds its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.errors import StudyError
from autoquant.spec.documents import Fields
from autoquant.study.storage import Storage

if TYPE_CHECKING:
    from autoquant.study.source import Source

READ = ("model", "task", "data", "space")
"""The files that a study is of."""


@dataclass(frozen=True)
class SavedPath:
    """A path as a study keeps it: absolute, and from the study's own folder where it has one."""

    absolute: str
    relative: str | None

    @classmethod
    def of(cls, path: str, base: Path | None) -> SavedPath:
        """Return how a study in ``base`` keeps the absolute ``path``."""
        return cls(path, None if base is None else os.path.relpath(path, base))

    def ways(self, base: Path | None) -> list[str]:
        """Return what the path may be now, for a study in ``base``, the likeliest first.

        What lies in the study's folder goes where it goes. What lies elsewhere stays where it was,
        unless it was moved together with the study.
        """
        if base is None or self.relative is None:
            return [self.absolute]
        here = os.path.abspath(base / self.relative)
        return [here, self.absolute] if self.inside else [self.absolute, here]

    @property
    def inside(self) -> bool:
        """Whether the path lies in the study's own folder."""
        return self.relative is not None and self.relative.split(os.sep)[0] != os.pardir

    def find(self, base: Path | None) -> str:
        """Return the first way that leads somewhere; where none does, the likeliest one."""
        ways = self.ways(base)
        return next((way for way in ways if os.path.exists(way)), ways[0])


@dataclass(frozen=True)
class Places:
    """The files of a study, the folder of its recipe, and where the study itself lay.

    ``home`` is the study's own file when this was written: None for a database that is no file.
    """

    files: Mapping[str, SavedPath]
    out: SavedPath
    home: str | None

    @classmethod
    def of(cls, source: Source, out: Path, storage: Storage, study: str) -> Places:
        """Return the places of a study that reads ``source`` and writes to the folder ``out``."""
        base, home = storage.base, storage.file(study)
        given = {name: path for name in READ if (path := getattr(source, name))}
        files = {name: SavedPath.of(path, base) for name, path in given.items()}
        return cls(files, SavedPath.of(str(out), base), None if home is None else str(home))

    def find(self, name: str, storage: Storage) -> str | None:
        """Return where the file ``name`` (see READ) is now; None where the study has none."""
        saved = self.files.get(name)
        return None if saved is None else saved.find(storage.base)

    def find_out(self, storage: Storage, study: str) -> Path:
        """Return the folder that the recipe goes to.

        Raises StudyError for a copy whose original is still there and would write to that folder,
        too: its recipe is not the copy's to overwrite.
        """
        base = storage.base
        found = self.out.ways(base)[0] if self.out.inside else self.out.find(base)
        home = storage.file(study)
        copied = self.home is not None and home is not None and not _same(self.home, home)
        if copied and found == self.out.absolute and os.path.exists(str(self.home)):
            raise StudyError(
                f"study {study} is a copy of the one in {self.home}, whose recipe goes to {found}; "
                "say where this one's goes: --out DIR"
            )
        return Path(found)

    def plain(self) -> dict[str, Any]:
        """Return the places as JSON takes them."""
        saved = {**self.files, "out": self.out}
        found = {name: [path.relative, path.absolute] for name, path in saved.items()}
        return {**found, "home": self.home}

    @classmethod
    def read(cls, plain: Any, where: str) -> Places:
        """Return the places that ``plain`` wrote; SpecError names a field that is damaged."""
        fields = Fields(plain, where)
        home = fields.take("home")
        if home is not None and not isinstance(home, str):
            raise fields.fail("home", home, "a path or null")
        files = {name: _read(fields, name) for name in READ if name in fields}
        return cls(files, _read(fields, "out"), home)


def _read(fields: Fields, name: str) -> SavedPath:
    value = fields.take(name)
    whole = isinstance(value, list) and len(value) == 2
    if not whole or not isinstance(value[1], str) or not isinstance(value[0], str | None):
        raise fields.fail(name, value, "a path from the study and an absolute one")
    return SavedPath(value[1], value[0])


def _same(one: str, other: Path) -> bool:
    """Return whether two paths are one file, by its name or by whatever links lead to it."""
    if os.path.exists(one) and other.exists():
        return os.path.samefile(one, other)
    return one == str(other)
