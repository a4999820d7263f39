"""The ledger of a study: an Optuna study that each trial enters in one durable write.

A trial is written when it is finished, whole: a kill loses at most the one in flight. To
optuna-dashboard and Optuna's own tools it is an ordinary study with ordinary trials.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from autoquant.errors import StudyError
from autoquant.study.storage import FOLDER, SUFFIX, Storage, located

HEADER = "autoquant"
"""User attribute of a study that holds what it began with; it is written once."""
NOTE = "autoquant:"
"""How the user attributes begin that hold what was found since: one each, so that no worker
overwrites what another one noted."""
MEASURED = "measured"
"""User attribute of a trial that holds its measurement."""
REASON = "reason"
"""User attribute of a failed trial that says why."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class StudyTaken(StudyError):
    """There is a study of that name already."""


class Ledger:
    """One study on its storage. ``header`` is what it began with, and all notes since.

    Places are given as ``--storage`` says them, or as a Storage: that stays the same place when the
    working directory changes.
    """

    def __init__(self, study: optuna.Study, storage: Storage) -> None:
        self.study = study
        self.storage = storage
        self.name = study.study_name
        self.where = storage.shown if storage.shared else str(storage.file(self.name))
        attrs = study.user_attrs
        header = attrs.get(HEADER)
        notes = {k.removeprefix(NOTE): v for k, v in attrs.items() if k.startswith(NOTE)}
        self.header: dict[str, Any] = dict(header) | notes if isinstance(header, Mapping) else {}

    @classmethod
    def check_free(cls, name: str, storage: Storage | str | None) -> None:
        """Raise StudyError where a study can't be called ``name``, before any work is done."""
        if not NAME.fullmatch(name):
            raise StudyError(
                f"study name {name!r}: use letters, digits, '.', '_' and '-', at most 100"
            )
        place = located(storage)
        with storage_errors(name):
            if not place.exists(name):
                return
            try:
                study = optuna.load_study(study_name=name, storage=place.open(name, write=False))
            except KeyError:
                return
        if not _killed(study, place):
            raise _taken(name, place, ours=HEADER in study.user_attrs)

    @classmethod
    def create(cls, name: str, storage: Storage | str | None, header: Mapping[str, Any]) -> Ledger:
        """Start a study; StudyError where the name is taken or the storage can't be written.

        Of several processes that create one name at a time, one gets it: the storage takes each
        name once. What was killed between that and the header is taken over in the folder of
        studies, where nobody else's studies lie; the lock of the journal says that it is dead.
        """
        place = located(storage)
        cls.check_free(name, place)
        with storage_errors(name), place.beginning(name) as (backend, alone):
            try:
                with quiet_optuna():
                    study = optuna.create_study(
                        study_name=name, storage=backend, direction="minimize"
                    )
            except optuna.exceptions.DuplicatedStudyError:
                study = optuna.load_study(study_name=name, storage=backend)
                if not (alone and _killed(study, place)):
                    raise _taken(name, place, ours=True) from None
            try:
                study.set_user_attr(HEADER, dict(header))
            except BaseException:
                with contextlib.suppress(Exception):
                    backend.delete_study(study._study_id)
                raise
        return cls(study, place)

    @classmethod
    def open(cls, name: str | None, storage: Storage | str | None, *, write: bool = True) -> Ledger:
        """Return a study by name, or the newest one where ``name`` is None.

        Without ``write`` nothing is written, and the storage need not be writable.
        """
        place = located(storage)
        if name is None:
            known = names(place)
            if not known:
                raise StudyError(f"no study in {place.shown}; start one: autoquant search")
            name = known[0]
        if not place.shared and not place.exists(name):
            known = names(place)
            have = f"; there are {', '.join(known[:5])}" if known else ""
            raise StudyError(f"no study {name!r} in {place.shown}/{have}")
        with storage_errors(name):
            backend = place.open(name, write=write)
            try:
                study = optuna.load_study(study_name=name, storage=backend)
            except KeyError:
                where = place.shown if place.shared else place.file(name)
                raise StudyError(f"no study {name!r} in {where}") from None
        ledger = cls(study, place)
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
        """Add fields to what is known of the study, or replace them."""
        for field, value in fields.items():
            with storage_errors(self.name):
                self.study.set_user_attr(f"{NOTE}{field}", value)
            self.header[field] = value


def _killed(study: optuna.Study, storage: Storage) -> bool:
    """Return whether a study was killed while it was created: nothing is in it yet."""
    return not storage.shared and not study.user_attrs and not study.get_trials(deepcopy=False)


def _taken(name: str, storage: Storage, *, ours: bool) -> StudyTaken:
    if not ours:
        return StudyTaken(
            f"study {name} exists already in {storage.shown} and is not autoquant's, or was killed "
            "as it began; give another --study"
        )
    return StudyTaken(
        f"study {name} exists already in {storage.shown}; continue it with `autoquant resume "
        f"{name}{storage.words}`, or give another --study"
    )


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's progress messages off the log inside, and give its verbosity back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


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
    return FOLDER / f"{name}{SUFFIX}"


def names(storage: Storage | str | None, *, every: bool = False) -> list[str]:
    """Return the names of all studies, newest first.

    Of a storage that others share, those of ``autoquant search``, or ``every`` one.
    """
    place = located(storage)
    if not place.shared:
        assert place.path is not None
        found = sorted(place.path.glob(f"*{SUFFIX}"), key=_written, reverse=True)
        return [path.name.removesuffix(SUFFIX) for path in found]
    with storage_errors("all"):
        if every and not place.exists(""):
            return []
        studies = optuna.get_all_study_summaries(place.open("", write=False))
    # In the order of creation: a study that was killed before its first trial has no date.
    ordered = sorted(studies, key=lambda s: s._study_id, reverse=True)
    return [s.study_name for s in ordered if every or HEADER in s.user_attrs]


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a link to a file that is gone: whoever opens it is told
        return 0.0


def _database_errors() -> tuple[type[Exception], ...]:
    """Return what a database raises; its library is loaded where there is one."""
    library = sys.modules.get("sqlalchemy.exc")
    own = () if library is None else (library.SQLAlchemyError,)
    return (optuna.exceptions.StorageInternalError, *own)


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
    except _database_errors() as error:
        internal = isinstance(error, optuna.exceptions.StorageInternalError)
        cause = (error.__cause__ or error) if internal else error
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
