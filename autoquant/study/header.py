"""What a study began with: a value that is written once, and read and checked in one place."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoquant.errors import SpecError, StudyError
from autoquant.spec.documents import Fields
from autoquant.spec.options import Options
from autoquant.spec.recipe import ModelIdentity
from autoquant.study.places import Places
from autoquant.version import __version__

FORMAT = 2
"""Version of the header. A study of another one can't be read."""
OWN, TORCH = "autoquant", "torch"
COSTS = ("latency", "macs", "float_bit_operations", "latency_checks")
"""What a study keeps of its costs, each where it asked for them."""


@dataclass(frozen=True)
class StoredSite:
    """A site, as much of it as it takes to resolve its space."""

    name: str
    layer: str
    matrix: tuple[int, int]
    activation: bool
    corrects: bool = False

    def plain(self) -> dict[str, Any]:
        """Return the site as JSON takes it."""
        return {
            "name": self.name,
            "layer": self.layer,
            "matrix": list(self.matrix),
            "activation": self.activation,
            "corrects": self.corrects,
        }

    @classmethod
    def read(cls, plain: Any, where: str = "site") -> StoredSite:
        """Return the site that ``plain`` wrote; SpecError names a field that is damaged."""
        fields = Fields(plain, where)
        matrix = fields.take("matrix")
        if not isinstance(matrix, list) or [type(n) for n in matrix] != [int, int]:
            raise fields.fail("matrix", matrix, "rows and columns")
        return cls(
            fields.text("name"),
            fields.text("layer"),
            (matrix[0], matrix[1]),
            fields.flag("activation"),
            fields.flag("corrects", False),
        )


@dataclass(frozen=True)
class Baseline:
    """The float model: its metric on the ``samples`` of the search split, and its size."""

    metric: str
    value: float
    samples: int
    higher_is_better: bool
    size_bytes: int


@dataclass(frozen=True)
class SavedSpace:
    """A search space: its text, its name, and whether that is one of those that ship."""

    name: str
    text: str
    shipped: bool = False

    @property
    def sha256(self) -> str:
        """The digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Header:
    """All that a study must know to be resumed or shown.

    - ``created``: when, as ISO 8601; ``versions``: of autoquant and torch.
    - ``model``, ``trust_pickle``: the model's name and digest, and the consent to unpickle it.
    - ``task``, ``metric``: the digest of the task or data file, and the metric of the latter.
    - ``data``: a digest of each part of the data, inputs and targets; empty where the task keeps
      them to itself.
    - ``space``, ``options``, ``places``, ``sites``, ``folded``: what was searched, how, and where.
    - ``baseline``, ``max_drop``: the float model, and the most it may lose, in the metric's unit.
    - ``costs``: see COSTS. ``transforms``: those of inputs, in all its recipes.
    """

    created: str
    versions: Mapping[str, str]
    model: ModelIdentity
    trust_pickle: bool
    task: str
    metric: str | None
    data: Mapping[str, str]
    space: SavedSpace
    options: Options
    places: Places
    sites: tuple[StoredSite, ...]
    folded: Mapping[str, str]
    baseline: Baseline
    max_drop: float
    costs: Mapping[str, Any] = field(default_factory=dict)
    transforms: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the header as JSON takes it."""
        base = self.baseline
        return {
            "format": FORMAT,
            "created": self.created,
            "versions": dict(self.versions),
            "model": {
                "name": self.model.name,
                "sha256": self.model.sha256,
                "trust_pickle": self.trust_pickle,
            },
            "task": {"sha256": self.task, "metric": self.metric},
            "data": dict(self.data),
            "space": {
                "name": self.space.name,
                "shipped": self.space.shipped,
                "text": self.space.text,
            },
            "options": self.options.plain(),
            "places": self.places.plain(),
            "sites": [site.plain() for site in self.sites],
            "folded": dict(self.folded),
            "float": {
                "metric": base.metric,
                "value": base.value,
                "samples": base.samples,
                "higher_is_better": base.higher_is_better,
                "size_bytes": base.size_bytes,
            },
            "max_drop": self.max_drop,
            "transforms": dict(self.transforms),
            **self.costs,
        }

    @classmethod
    def read(cls, plain: Mapping[str, Any], study: str) -> Header:
        """Return the header that ``plain`` wrote.

        Raises StudyError, naming ``study`` and the field, for one that is damaged or of another
        release. Fields that are not its own, such as what was noted since, are left alone.
        """
        found = plain.get("format")
        if found != FORMAT:
            raise StudyError(
                f"study {study}: written in format {found!r}, this release reads {FORMAT}"
            )
        try:
            return cls._read(plain)
        except SpecError as error:
            raise StudyError(f"study {study}: damaged: {error}") from None

    @classmethod
    def _read(cls, plain: Mapping[str, Any]) -> Header:
        top = Fields(plain, "header")
        model = Fields(top.take("model"), "header: model")
        task = Fields(top.take("task"), "header: task")
        space = Fields(top.take("space"), "header: space")
        base = Fields(top.take("float"), "header: float")
        sites = top.take("sites")
        if not isinstance(sites, list):
            raise top.fail("sites", sites, "a list")
        metric = task.take("metric")
        if metric is not None and not isinstance(metric, str):
            raise task.fail("metric", metric, "text or null")
        options = top.take("options")
        Fields(options, "header: options").integer("seed")
        return cls(
            top.text("created"),
            _texts(top, "versions"),
            ModelIdentity(model.text("name"), model.text("sha256")),
            model.flag("trust_pickle"),
            task.text("sha256"),
            metric,
            _texts(top, "data"),
            SavedSpace(space.text("name"), space.text("text"), space.flag("shipped")),
            Options.read(options),
            Places.read(top.take("places"), "header: places"),
            tuple(StoredSite.read(site, "header: sites") for site in sites),
            _texts(top, "folded"),
            Baseline(
                base.text("metric"),
                base.number("value"),
                base.integer("samples", low=0),
                base.flag("higher_is_better"),
                base.integer("size_bytes", low=0),
            ),
            top.number("max_drop"),
            {name: plain[name] for name in COSTS if name in plain},
            next((_texts(top, key) for key in ("transforms", "smoothing") if key in top), {}),
        )


def _texts(fields: Fields, name: str) -> dict[str, str]:
    value = fields.take(name)
    texts = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
    if not texts:
        raise fields.fail(name, value, "names and texts")
    return dict(value)


def versions() -> dict[str, str]:
    """Return the versions of what computes a study's numbers."""
    return {OWN: __version__, TORCH: importlib.metadata.version(TORCH)}
