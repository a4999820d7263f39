"""Comparing what a study finds when it is resumed with what it began with."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from autoquant.errors import StudyError
from autoquant.models.data import Splits, without_samples
from autoquant.models.digests import PARTS, digests, sample_digests
from autoquant.models.task import Task
from autoquant.session.preflight import REPEATS, Preflight
from autoquant.spec.space import SearchSpace
from autoquant.study.header import OWN, TORCH, Header, versions
from autoquant.study.places import READ
from autoquant.study.source import Source
from autoquant.study.storage import Storage

SEEN = "seen"
"""Field that a study notes: digests of the samples that were calibrated with or searched by."""
SEEN_BYTES = 6
"""Bytes of a digest there: one in 3 billion samples looks like one of 100,000 others."""


def compare(study: str, what: str, then: str, now: str, accept: bool) -> None:
    """Raise StudyError where the file ``what`` is no longer what the study began with."""
    if then != now:
        _changed(study, f"the {what} has changed since the study began", accept, then, now)


def _changed(study: str, line: str, accept: bool, then: str = "", now: str = "") -> None:
    if accept:
        return
    shown = f" (sha256 {then[:12]}… → {now[:12]}…)" if then or now else ""
    raise StudyError(
        f"study {study}: {line}{shown}; start a new study, or go on with --accept-changes"
    )


def check_versions(study: str, then: Mapping[str, str], accept: bool) -> tuple[str, ...]:
    """Raise StudyError where another autoquant began the study; return what else is to be said."""
    now = versions()
    if then.get(OWN) != now[OWN]:
        line = f"it was begun by autoquant {then.get(OWN)}, this is {now[OWN]}"
        _changed(study, line, accept)
    if then.get(TORCH) == now[TORCH]:
        return ()
    return (
        f"the study was begun with torch {then.get(TORCH)}, this is {now[TORCH]}: its numbers may "
        "differ in the last digits",
    )


def saved_source(
    header: Header,
    storage: Storage,
    model: object = None,
    task: object = None,
    data: object = None,
) -> Source:
    """Return where the model, the task and the space of a study are now.

    ``model``, ``task`` and ``data`` say so, where they are paths; the study itself does otherwise.
    """
    now = {name: header.places.find(name, storage) for name in READ}
    if isinstance(model, str | os.PathLike):
        now["model"] = os.fspath(model)
    if isinstance(task, str | os.PathLike):
        now |= {"task": os.fspath(task), "data": None}
    if isinstance(data, str | os.PathLike):
        now |= {"task": None, "data": os.fspath(data)}
    return Source(
        now["model"] or "",
        now["task"],
        now["data"],
        header.metric,
        header.trust_pickle,
        now["space"],
    )


def saved_task(study: str, source: Source) -> Task:
    """Return the task of a study; StudyError where it was one in Python."""
    path = source.task or source.data
    if path is None:
        raise StudyError(
            f"study {study} is of a Task in Python: go on with autoquant.resume(task=…)"
        )
    if not os.path.exists(path):
        what, option = ("task", "--task") if source.task else ("data file", "--data")
        raise StudyError(
            f"study {study}: its {what} is gone: {path}; say where it is: {option} FILE"
        )
    return source.load_task()


def saved_space(study: str, header: Header, path: str | None, accept: bool) -> SearchSpace:
    """Return the space as the study keeps it, which its trials are of, accepted changes or not.

    Where it came from a file that is still at ``path``, or ships, that must hold the same text.
    """
    saved = header.space
    if saved.shipped or (path is not None and Path(path).exists()):
        now = SearchSpace.load(saved.name if saved.shipped else Path(str(path)))
        compare(study, "space", saved.sha256, replace(saved, text=now.text).sha256, accept)
    return SearchSpace.parse(saved.text, saved.name)


def check_data(study: str, splits: Splits, header: Header, seen: str, accept: bool) -> Splits:
    """Return the data to go on with; StudyError where they are not those of the study.

    Where a change is accepted, what was calibrated with or searched by before, as ``seen`` says,
    is taken out of what is confirmed with.
    """
    now = digests(splits)
    changed = [part for part in PARTS if now.get(part) != header.data.get(part)]
    if not changed:
        return splits
    named = " and ".join((", ".join(changed[:-1]), changed[-1])) if changed[1:] else changed[0]
    _changed(study, f"its data have changed since the study began ({named})", accept)
    known = set(_pieces(base64.b64decode(seen)))
    left = without_samples(splits, known, SEEN_BYTES)
    if splits.confirm and not left.confirm:
        raise StudyError(
            f"study {study}: every sample to confirm with was searched by before; give data that "
            "this study has not seen"
        )
    return left


def seen_samples(splits: Splits, before: str = "") -> str:
    """Return digests of all samples that the search may look at, and of those ``before``."""
    inputs: Iterable = (*splits.calibrate, *(inputs for inputs, _ in splits.search))
    found = {d[:SEEN_BYTES] for d in sample_digests(inputs)} | set(
        _pieces(base64.b64decode(before))
    )
    return base64.b64encode(b"".join(sorted(found))).decode("ascii")


def _pieces(digests: bytes) -> Iterable[bytes]:
    return (digests[i : i + SEEN_BYTES] for i in range(0, len(digests), SEEN_BYTES))


def check_float(study: str, header: Header, found: Preflight, accept: bool) -> None:
    """Raise StudyError where the float model's metric is not what it was."""
    base = header.baseline
    if found.metric != base.metric:
        line = f"its metric is {found.metric}, and was {base.metric} when it began"
        _changed(study, line, accept)
    elif abs(found.value - base.value) > REPEATS * max(abs(base.value), 1e-12):
        _changed(
            study,
            f"the float model's {base.metric} is {found.value:g}, and was {base.value:g} when the "
            "study began",
            accept,
        )
