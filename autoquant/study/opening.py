"""What is checked and written down before a study's first trial."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

from autoquant.errors import UserError
from autoquant.measure.size import weight_bytes
from autoquant.models.digests import digests
from autoquant.models.files import LoadedModel
from autoquant.models.metrics import parse_max_drop
from autoquant.models.task import Task
from autoquant.nn.transforms import transforms_of
from autoquant.sensitivity.profile import weight_schemes
from autoquant.session.costs import header_of
from autoquant.session.preflight import Preflight
from autoquant.session.session import Session
from autoquant.spec.goal import Goal
from autoquant.spec.options import Options, parse_latency, parse_size
from autoquant.spec.outputs import check_folder, check_target, is_signed
from autoquant.spec.recipe import ModelIdentity, SiteRecipe
from autoquant.spec.space import SearchSpace, SiteSpace, shipped
from autoquant.study.header import Baseline, Header, SavedSpace, StoredSite, versions
from autoquant.study.ledger import names
from autoquant.study.places import Places
from autoquant.study.source import Source
from autoquant.study.storage import Storage, located

RECIPE_FILE = "recipe.yaml"
"""What a search writes."""


def check_size(size: str | None, session: Session, spaces: Mapping[str, SiteSpace]) -> None:
    """Raise UserError where the smallest recipe of the space is larger than ``size``."""
    if size is None:
        return
    narrow = {}
    for site in session.prepared.sites:
        sizes = {w: weight_bytes(site, w) for w in weight_schemes(site, spaces[site.name])}
        narrow[site.name] = SiteRecipe(min(sizes, key=sizes.__getitem__, default=None))
    whole, least = session.sizes.float_size_bytes, session.sizes.bytes(narrow)
    if least > parse_size(size, whole):
        raise UserError(
            f"--size {size}: the space's smallest recipe has {least:,} bytes, {least / whole:.1%} "
            "of the float model; give that or more, or a space with fewer bits"
        )


def check_out(folder: Path, source: Source) -> None:
    """Raise UserError where the recipe could not be written to ``folder`` after long work."""
    check_folder(folder)
    check_target(folder / RECIPE_FILE, is_signed, source.files)


def make_goal(session: Session, options: Options, found: Preflight) -> Goal:
    """Return the goal in the metric's own unit and in bytes."""
    metric, size = session.baseline("search").metric, session.sizes.float_size_bytes
    table, limit = session.costs.latency, options.max_latency
    base = 1.0 if table is None else table.float_seconds
    return Goal(
        parse_max_drop(options.most_drop).absolute(metric, found.value),
        size,
        options.bits,
        None if options.size is None else parse_size(options.size, size),
        None if limit is None else parse_latency(limit, base),
        options.objective,
        base,
        session.costs.of({}).bit_operations or 1.0,
    )


def header_of_study(
    session: Session,
    loaded: LoadedModel,
    task: Task,
    source: Source,
    space: SearchSpace,
    options: Options,
    found: Preflight,
    goal: Goal,
    places: Places,
) -> Header:
    """Return all that a study must know to be resumed or shown."""
    ships = source.space is None and space.name in shipped()
    return Header(
        datetime.datetime.now().isoformat(timespec="seconds"),
        versions(),
        ModelIdentity(loaded.name, loaded.sha256),
        source.trust_pickle,
        task.sha256,
        source.metric,
        digests(session.splits),
        SavedSpace(
            space.name, space.text, ships and SearchSpace.load(space.name).text == space.text
        ),
        options,
        places,
        tuple(
            StoredSite(s.name, s.layer, s.matrix, s.activation, s.corrects)
            for s in session.prepared.sites
        ),
        dict(session.prepared.folded),
        Baseline(
            found.metric,
            found.value,
            found.samples.get("search", 0),
            found.higher_is_better,
            session.sizes.float_size_bytes,
        ),
        goal.max_drop,
        header_of(session.costs, found.latency),
        transforms_of(session.prepared),
    )


def new_name(model: str, storage: Storage | str | None) -> str:
    """Return a study name that is not taken: the model's, with a number where needed."""
    plain = (c if (c.isascii() and c.isalnum()) or c in "._-" else "-" for c in model)
    stem = "".join(plain).strip(".-_")[:80] or "study"
    place = located(storage)
    taken = set(names(place, every=True))
    if stem not in taken:
        return stem
    return next(f"{stem}-{i}" for i in range(2, len(taken) + 3) if f"{stem}-{i}" not in taken)
