"""Search spaces: which choices each layer may take, from a YAML file of rules.

Rules are read from top to bottom; each names layer types or layer names (with * and ?) and gives
the choices of some dimensions; a later rule overrides an earlier one, dimension by dimension, and
ends what an earlier one locked or skipped. The first choice of a dimension is the one that uniform
recipes use.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from autoquant.errors import SpecError
from autoquant.registry import Registry, unknown
from autoquant.spec.calibration import ACTIVATION_CALIBRATIONS, WEIGHT_CALIBRATIONS, percentile_of
from autoquant.spec.documents import (
    Fields,
    as_number,
    is_one_of,
    label,
    parse_yaml,
    read_yaml,
    show,
)
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.granularity import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES, divides
from autoquant.spec.needs import Need, needs_of
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.site_file import BIAS, BITS, LEARNED, SCHEMES, site_from_plain
from autoquant.spec.techniques import (
    CORRECTIONS,
    NEAREST,
    ROUNDINGS,
    UNCORRECTED,
    Offer,
    merged,
    offer_of,
)
from autoquant.spec.transforms import BLOCKS, UNROTATED, UNSMOOTHED

VERSION = 1
DIMENSIONS: Mapping[str, tuple[Any, ...]] = {
    "weight_bits": BITS,
    "weight_granularity": WEIGHT_GRANULARITIES,
    "weight_scheme": SCHEMES,
    "weight_calibration": WEIGHT_CALIBRATIONS,
    "activation_bits": BITS,
    "activation_granularity": ACTIVATION_GRANULARITIES,
    "activation_scheme": SCHEMES,
    "activation_calibration": ACTIVATION_CALIBRATIONS,
}
"""Every dimension whose choices are names or numbers, and what they may be."""
TECHNIQUES: Mapping[str, Registry[Any]] = {"rounding": ROUNDINGS, "correction": CORRECTIONS}
"""Every dimension whose choices are techniques."""


class SiteLike(Protocol):
    """What a space needs to know of a site."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> str: ...  # noqa: D102
    @property
    def matrix(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def activation(self) -> bool: ...  # noqa: D102
    @property
    def corrects(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class SiteSpace:
    """The choices of one site; ``fixed`` locks it to one recipe.

    The choices of a technique are ``Offer``s. ``smoothing`` are the exponents that its input may be
    smoothed with, ``rotation`` the most channels of a block that it may be rotated by, 0 for not at
    all: which one is settled before the trials.
    """

    choices: Mapping[str, tuple[Any, ...]]
    fixed: SiteRecipe | None = None
    smoothing: tuple[float, ...] = UNSMOOTHED
    rotation: tuple[int, ...] = UNROTATED

    @property
    def needs(self) -> frozenset[Need]:
        """What some recipe of this space needs to know of the site's input."""
        if self.fixed is not None:
            return needs_of(self.fixed)
        c = self.choices
        found: set[Need] = set()
        for bits, method, rounding, correction in itertools.product(
            c["weight_bits"], c["weight_calibration"], c["rounding"], c["correction"]
        ):
            weight = None
            if bits != FLOAT_BITS:
                weight = WeightScheme(bits, calibration=method, rounding=rounding.technique)
            found |= needs_of(SiteRecipe(weight, None, correction.technique).canonical())
        for bits, granularity in itertools.product(
            c["activation_bits"], c["activation_granularity"]
        ):
            if bits != FLOAT_BITS:
                found |= needs_of(SiteRecipe(None, ActivationScheme(bits, granularity)))
        return frozenset(found)


@dataclass(frozen=True)
class Rule:
    """Choices for the layers that it matches, by type or by name; neither given means all."""

    types: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fixed: SiteRecipe | None = None
    smoothing: tuple[float, ...] | None = None
    rotation: tuple[int, ...] | None = None

    def matches(self, site: SiteLike) -> bool:
        """Return whether the rule speaks of ``site``."""
        by_type = not self.types or any(fnmatch.fnmatchcase(site.layer, t) for t in self.types)
        by_name = not self.names or any(fnmatch.fnmatchcase(site.name, n) for n in self.names)
        return by_type and by_name


DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "weight_bits": (8,),
    "weight_granularity": ("per_channel",),
    "weight_scheme": ("symmetric",),
    "weight_calibration": ("max",),
    "activation_bits": (8,),
    "activation_granularity": ("per_tensor",),
    "activation_scheme": ("asymmetric",),
    "activation_calibration": ("max",),
    "rounding": (Offer("nearest", NEAREST),),
    "correction": (Offer("none", UNCORRECTED),),
}
"""What a dimension is where no rule says otherwise."""


@dataclass(frozen=True)
class SearchSpace:
    """A named list of rules. ``text`` is the file as it was read: its hash is the space's."""

    name: str
    rules: tuple[Rule, ...]
    text: str = ""

    @classmethod
    def load(cls, name_or_path: str | Path) -> SearchSpace:
        """Return a shipped space by name, or the one in a file.

        Raises SpecError that names file, rule, field, what was found and what is allowed.
        """
        text = str(name_or_path)
        if isinstance(name_or_path, Path) or text.endswith((".yaml", ".yml")) or "/" in text:
            path = Path(name_or_path)
            read_yaml(path, "search space")  # for its message on a file that can't be read
            return cls.parse(path.read_text(encoding="utf-8"), str(path))
        if text not in shipped():
            allowed = shipped()
            raise SpecError(f"{unknown('search space', text, allowed)}, or the path of a YAML file")
        source = _folder().joinpath(f"{text}.yaml").read_text(encoding="utf-8")
        return cls.parse(source, text)

    @classmethod
    def parse(cls, text: str, where: str) -> SearchSpace:
        """Return the space that ``text`` (YAML) describes."""
        fields = Fields(parse_yaml(text, "search space", where), where)
        version = fields.take("autoquant_space", None)
        if not is_one_of(version, (VERSION,)):
            raise SpecError(f"{where}: autoquant_space: found {show(version)}, allowed: {VERSION}")
        name = fields.text("name", Path(where).stem)
        fields.text("description", "")
        rows = fields.take("rules")
        fields.close()
        if not isinstance(rows, list) or not rows:
            raise SpecError(f"{where}: rules: found {show(rows)}, allowed: a list of rules")
        rules = tuple(_rule(row, f"{where}: rule {i}") for i, row in enumerate(rows, 1))
        return cls(name, rules, text)

    def resolve(self, sites: Iterable[SiteLike]) -> dict[str, SiteSpace]:
        """Return what each site may take.

        Groups that do not divide a weight are left out, and the activation's choices where none
        meets the weight. Raises SpecError where a rule names layers and matches none.
        """
        sites = tuple(sites)
        for number, rule in enumerate(self.rules, 1):
            if rule.names and not any(rule.matches(site) for site in sites):
                raise SpecError(
                    f"space {label(self.name)}: rule {number}: names "
                    f"{', '.join(map(label, rule.names))} matches no layer; layers are "
                    f"{', '.join(label(s.name) for s in sites[:5])}"
                    + (", …" if len(sites) > 5 else "")
                )
        resolved = {site.name: self._site(site) for site in sites}
        if not any(_quantizes(space) for space in resolved.values()):
            raise SpecError(f"space {label(self.name)}: it leaves every layer in float")
        return resolved

    def _site(self, site: SiteLike) -> SiteSpace:
        choices = dict(DEFAULTS)
        fixed: SiteRecipe | None = None
        smoothing, rotation = UNSMOOTHED, UNROTATED
        for rule in self.rules:
            if not rule.matches(site):
                continue
            choices |= rule.choices
            fixed = rule.fixed
            smoothing = smoothing if rule.smoothing is None else rule.smoothing
            rotation = rotation if rule.rotation is None else rule.rotation
        grains = tuple(g for g in choices["weight_granularity"] if divides(g, site.matrix))
        choices["weight_granularity"] = grains or ("per_channel",)
        if not site.activation:
            choices |= {k: v for k, v in DEFAULTS.items() if k.startswith("activation")}
            choices |= {"activation_bits": (16,), "rounding": DEFAULTS["rounding"]}
            if fixed is not None:
                fixed = replace(fixed, activation=None)
        if not site.corrects:
            choices["correction"] = DEFAULTS["correction"]
            fixed = None if fixed is None else replace(fixed, correction=UNCORRECTED)
        lock = None if fixed is None else fixed.weight
        if lock is not None and not divides(lock.granularity, site.matrix):
            raise SpecError(
                f"space {label(self.name)}: {label(site.name)}: lock: {lock.granularity} does not "
                f"divide the {site.matrix[1]} inputs of a channel"
            )
        if fixed is not None:
            return SiteSpace(choices, fixed)
        return SiteSpace(choices, None, smoothing, rotation)


def _quantizes(space: SiteSpace) -> bool:
    if space.fixed is not None:
        return space.fixed.weight is not None or space.fixed.activation is not None
    return min(*space.choices["weight_bits"], *space.choices["activation_bits"], 16) < 16


def shipped() -> tuple[str, ...]:
    """Return the names of the spaces that come with the package."""
    names = sorted(p.name[:-5] for p in _folder().iterdir() if p.name.endswith(".yaml"))
    return tuple(sorted(names, key=lambda n: (n != "default", n)))


def _folder() -> Any:
    return resources.files("autoquant.search_spaces")


def _rule(data: Any, where: str) -> Rule:
    fields = Fields(data, where)
    types = _texts(fields, "types")
    names = _texts(fields, "names")
    fixed = None
    if fields.flag("skip", False):
        fixed = SiteRecipe()
    lock = fields.take("lock", None)
    if lock is not None:
        if fixed is not None:
            raise fields.fail("lock", lock, "lock or skip, not both")
        fixed = site_from_plain(lock, f"{where}: lock")
        if fixed.learned:
            raise SpecError(f"{where}: lock: learned: found a digest; a space has no learned file")
    choices = {}
    for dimension, allowed in DIMENSIONS.items():
        if dimension in fields:
            choices[dimension] = _choices(fields, dimension, allowed)
    for dimension, registry in TECHNIQUES.items():
        if (older := _older(fields, dimension, where)) is not None:
            choices[dimension] = older
        if dimension in fields:
            if older is not None:
                raise SpecError(f"{where}: {dimension} is given twice; {OLDER[dimension]} says it")
            choices[dimension] = _offers(registry, fields.take(dimension), where)
    smoothing = None
    if "smoothing" in fields:
        smoothing = _exponents(fields)
    rotation = _blocks(fields) if "rotation" in fields else None
    fields.close()
    if not choices and fixed is None and smoothing is None and rotation is None:
        raise SpecError(f"{where}: says nothing; give a dimension, lock or skip")
    return Rule(types, names, choices, fixed, smoothing, rotation)


def _blocks(fields: Fields) -> tuple[int, ...]:
    value = fields.take("rotation")
    found = value if isinstance(value, list) else [value]
    sizes = [0, *BLOCKS]
    if not found or not all(is_one_of(v, sizes) for v in found):
        raise fields.fail(
            "rotation", value, f"0 or a power of two from {BLOCKS[0]} to {BLOCKS[-1]}, or a list"
        )
    return tuple(dict.fromkeys(found))


def _exponents(fields: Fields) -> tuple[float, ...]:
    value = fields.take("smoothing")
    found = [as_number(v) for v in (value if isinstance(value, list) else [value])]
    if not found or any(v is None or not 0 <= v <= 1 for v in found):
        raise fields.fail("smoothing", value, "one exponent from 0 to 1, or a list of them")
    return tuple(dict.fromkeys(float(v) for v in found if v is not None))


OLDER = {"rounding": "learning_rate", "correction": "bias_correction"}
"""What said the same before techniques had names, and is read for ever."""


def _offers(registry: Registry[Any], value: Any, where: str) -> tuple[Offer, ...]:
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise SpecError(f"{where}: {registry.kind}: found an empty list, allowed: one or more")
    return merged([offer_of(registry, row, where) for row in rows])


def _older(fields: Fields, dimension: str, where: str) -> tuple[Offer, ...] | None:
    """Return the offers of a dimension in its older spelling, None where that is not used."""
    name = OLDER[dimension]
    if name not in fields:
        return None
    if dimension == "correction":
        return _offers(
            CORRECTIONS,
            [BIAS if on else "none" for on in _choices(fields, name, (True, False))],
            where,
        )
    return _learning_rate(fields.take(name), where)


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.take(name, ())
    if value == ():
        return ()
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise fields.fail(name, value, "a list of names, with * and ?")
    return tuple(value)


def _choices(fields: Fields, dimension: str, allowed: tuple[Any, ...]) -> tuple[Any, ...]:
    value = fields.take(dimension)
    value = value if isinstance(value, list) else [value]
    if not value:
        raise fields.fail(dimension, value, "one choice or more")
    for item in value:
        percentile = dimension.endswith("calibration") and isinstance(item, str)
        if not is_one_of(item, allowed) and not (percentile and percentile_of(item) is not None):
            raise fields.fail(dimension, item, ", ".join(map(str, allowed)))
    return tuple(dict.fromkeys(value))


def _learning_rate(value: Any, where: str) -> tuple[Offer, ...]:
    """Return the roundings that a learning rate offers: learned, and nearest where optional."""
    if value is None:
        return DEFAULTS["rounding"]
    single = as_number(value)
    if single is not None and single > 0:
        return _offers(ROUNDINGS, {"method": LEARNED, "learning_rate": single}, where)
    if not isinstance(value, dict):
        allowed = "a number > 0, or low, high and optional"
        raise SpecError(f"{where}: learning_rate: found {show(value)}, allowed: {allowed}")
    fields = Fields(value, f"{where}: learning_rate")
    low = fields.number("low", low=0, above=True)
    high = fields.number("high", low=low)
    optional = fields.flag("optional", True)
    fields.close()
    rate: Any = low if low == high else {"low": low, "high": high, "log": True}
    learned = {"method": LEARNED, "learning_rate": rate}
    return _offers(ROUNDINGS, ["nearest", learned] if optional else [learned], where)
