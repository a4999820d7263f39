"""The ledger of a study: an Optuna study that each trial enters in one durable write.

A trial is written when it is finished, whole: a kill loses at most the one in flight. To
optuna-dashboard and Optuna's own tools it is an ordinary study with ordinary trials.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from autoquant.errors import StudyError
from autoquant.search.journal import Journal

FOLDER = Path(".autoquant")
HEADER = "autoquant"
"""User attribute of a study that holds all it needs to be resumed."""
MEASURED = "measured"
"""User attribute of a trial that holds its measurement."""
REASON = "reason"
"""User attribute of a failed trial that says why."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Ledger:
    """One study on its storage."""

    def __init__(self, study: optuna.Study, where: str) -> None:
        self.study = study
        self.where = where
        self.name = study.study_name
        self.header: dict[str, Any] = dict(study.user_attrs.get(HEADER, {}))

    @staticmethod
    def exists(storage: str) -> bool:
        """Return whether there is something at a storage URL that is a file."""
        if storage.startswith("sqlite:///"):
            return Path(storage[10:]).exists()
        return "://" in storage or Path(storage).exists()

    @classmethod
    def check_free(cls, name: str, storage: str | None) -> None:
        """Raise StudyError where a study can't be called ``name``, before any work is done."""
        if not NAME.fullmatch(name):
            raise StudyError(
                f"study name {name!r}: use letters, digits, '.', '_' and '-', at most 100"
            )
        there = journal_path(name).exists() if storage is None else cls.exists(storage)
        if there and _begun(name, storage):
            where = "" if storage is None else f" --storage {storage}"
            raise StudyError(
                f"study {name} exists already in {storage or FOLDER}; continue it with `autoquant "
                f"resume {name}{where}`, or give another --study"
            )

    @classmethod
    def create(cls, name: str, storage: str | None, header: Mapping[str, Any]) -> Ledger:
        """Start a study; StudyError where the name is taken or the storage can't be written.

        A study of that name without a header is one that was killed while it was created: nothing
        is in it yet, and it is taken over.
        """
        cls.check_free(name, storage)
        with storage_errors(name):
            backend = open_storage(name, storage, create=True)
            study = optuna.create_study(
                study_name=name, storage=backend, direction="minimize", load_if_exists=True
            )
            study.set_user_attr(HEADER, dict(header))
        return cls(study, storage or str(journal_path(name)))

    @classmethod
    def open(cls, name: str | None, storage: str | None) -> Ledger:
        """Return a study by name, or the newest one where ``name`` is None."""
        if name is None:
            known = names(storage)
            if not known:
                raise StudyError(f"no study in {storage or FOLDER}; start one: autoquant search")
            name = known[0]
        if storage is None and not journal_path(name).exists():
            known = names(None)
            have = f"; there are {', '.join(known[:5])}" if known else ""
            raise StudyError(f"no study {name!r} in {FOLDER}/{have}")
        with storage_errors(name):
            backend = open_storage(name, storage, create=False)
            try:
                study = optuna.load_study(study_name=name, storage=backend)
            except KeyError:
                raise StudyError(f"no study {name!r} in {storage or journal_path(name)}") from None
        ledger = cls(study, storage or str(journal_path(name)))
        if not ledger.header:
            raise StudyError(f"study {name} in {ledger.where} was not made by autoquant search")
        return ledger

    def trials(self) -> list[FrozenTrial]:
        """Return every trial, in order; not copies."""
        with storage_errors(self.name):
            return self.study.get_trials(deepcopy=False)

    def add(self, trial: FrozenTrial) -> None:
        """Write a finished trial, whole; StudyError where the storage can't take it."""
        with storage_errors(self.name):
            self.study.add_trial(trial)

    def note(self, **fields: Any) -> None:
        """Add fields to the study's header."""
        self.header |= fields
        with storage_errors(self.name):
            self.study.set_user_attr(HEADER, self.header)


def _begun(name: str, storage: str | None) -> bool:
    """Return whether there is a study ``name`` with a header."""
    with storage_errors(name):
        try:
            backend = open_storage(name, storage, create=False)
            study = optuna.load_study(study_name=name, storage=backend)
        except KeyError:
            return False
        return HEADER in study.user_attrs


def finished(
    state: TrialState,
    *,
    params: dict[str, Any],
    distributions: Mapping[str, BaseDistribution],
    started: datetime.datetime,
    value: float | None = None,
    constraints: Mapping[str, float] | None = None,
    user_attrs: dict[str, Any] | None = None,
    system_attrs: dict[str, Any] | None = None,
) -> FrozenTrial:
    """Return a finished trial, ready to be written in one call."""
    trial = create_trial(
        state=state,
        value=value,
        params=params,
        distributions=dict(distributions),
        user_attrs=user_attrs or {},
        system_attrs=system_attrs or {},
        constraints=dict(constraints) if constraints else None,
    )
    trial.datetime_start = started
    trial.datetime_complete = datetime.datetime.now()
    return trial


def count(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    """Return how many trials are complete, pruned and failed."""
    states = [t.state for t in trials]
    return {
        "complete": states.count(TrialState.COMPLETE),
        "pruned": states.count(TrialState.PRUNED),
        "failed": states.count(TrialState.FAIL),
    }


def journal_path(name: str) -> Path:
    """Return where the embedded default keeps the study ``name``."""
    return FOLDER / f"{name}.journal"


def names(storage: str | None) -> list[str]:
    """Return the names of all studies, newest first."""
    if storage is None:
        found = sorted(FOLDER.glob("*.journal"), key=lambda p: -p.stat().st_mtime)
        return [path.name.removesuffix(".journal") for path in found]
    with storage_errors("all"):
        studies = optuna.get_all_study_summaries(open_storage("", storage, create=False))
    # In the order of creation: a study that was killed before its first trial has no date.
    ordered = sorted(studies, key=lambda s: s._study_id, reverse=True)
    return [s.study_name for s in ordered if HEADER in s.user_attrs]


def open_storage(name: str, url: str | None, *, create: bool) -> BaseStorage:
    """Return the storage at ``url``: a database URL, a ``.journal`` file, or the default."""
    if url is None or url.endswith(".journal"):
        path = journal_path(name) if url is None else Path(url)
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            ignore = path.parent / ".gitignore"
            if path.parent.name == FOLDER.name and not ignore.exists():
                ignore.write_text("*\n", encoding="utf-8")
        elif not path.exists():
            raise StudyError(f"no such journal: {path}")
        return JournalStorage(Journal(path))
    if "://" not in url:
        raise StudyError(
            f"--storage {url!r}: give a database URL (sqlite:///studies.db, postgresql://…, "
            "mysql://…) or a file that ends in .journal"
        )
    if url.startswith("sqlite:///") and not create and not Path(url[10:]).exists():
        raise StudyError(f"no such database: {url[10:]}")
    return RDBStorage(url)


@contextlib.contextmanager
def storage_errors(name: str) -> Iterator[None]:
    """Turn what a storage raises into one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StudyError(
                f"study {name}: the disk is full; every finished trial is kept; free some space, "
                f"then `autoquant resume {name}`"
            ) from error
        where = f": {error.filename}" if error.filename else ""
        raise StudyError(f"study {name}: {error.strerror or error}{where}") from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
        line = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        raise StudyError(f"study {name}: the database says: {line}") from error
    except ModuleNotFoundError as error:
        raise StudyError(f"study {name}: the database needs `pip install {error.name}`") from error
    except ImportError as error:
        line = str(error).splitlines()[0]
        raise StudyError(f"study {name}: the database driver is missing: {line}") from error
    except (KeyError, ValueError, TypeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StudyError(f"study {name}: the storage holds no sound study: {line}") from error
