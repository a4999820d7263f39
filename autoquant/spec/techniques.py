"""Techniques: what repairs or trains a layer, as values that recipes hold and spaces list.

A technique is a frozen dataclass whose fields are its options, and what a space may search. Its
life: a recipe or a space names it, with or without options; what it ``needs`` is collected by the
one calibration pass and kept as long as any recipe may ask for it; the applier fits it to one layer
the first time that a candidate has it there, and keeps the result; what comes of it is never worse
than nearest rounding on the calibration data.

The name of a technique is that of its file below ``autoquant.methods``, for gradient estimators
below ``autoquant.quant.estimators``; other distributions add theirs by an entry point of the
technique's name, in the group ``autoquant.rounding``, ``autoquant.correction`` or
``autoquant.estimator``. A file imports torch only in functions: recipes are read without it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from autoquant.errors import SpecError
from autoquant.registry import Registry, unknown
from autoquant.spec.documents import Fields, as_number, show
from autoquant.spec.need import Need

if TYPE_CHECKING:
    from torch import Generator, Tensor

METHOD = "method"
LARGEST = sys.float_info.max
"""The high end of an option that has none."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an option may be: ``low`` … ``high``, ``low`` itself left out where ``above``."""

    low: float
    high: float
    above: bool = False

    def allow(self, value: float) -> bool:
        """Return whether ``value`` is within."""
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        most = "" if self.high == LARGEST else f", at most {self.high:g}"
        return f"a number {'>' if self.above else '≥'} {self.low:g}{most}"


def option(default: Any, low: float, high: float = LARGEST, *, above: bool = False) -> Any:
    """Return a field of a technique: a number within bounds."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(low, high, above)})


def choice(default: str, names: Iterable[str]) -> Any:
    """Return a field of a technique: one of ``names``, of a registry say."""
    return dataclasses.field(default=default, metadata={"names": names})


@dataclass(frozen=True)
class Technique:
    """What all techniques have: a name, options, and what they need of calibration."""

    method: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()

    def plain(self) -> dict[str, Any]:
        """Return it as a recipe has it: method and options."""
        return {METHOD: self.method, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """Return it in a few words: options that are not as usual are said."""
        fields = dataclasses.fields(self)
        own = [(f.name, getattr(self, f.name)) for f in fields]
        said = [f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in own]
        usual = [f.default for f in fields]
        return " ".join(
            [self.method, *(s for s, (_, v), u in zip(said, own, usual, strict=True) if v != u)]
        )

    @classmethod
    def checked(cls, name: str, value: Any, where: str) -> Any:
        """Return ``value`` as the option ``name`` takes it; SpecError says what it may be."""
        field = {f.name: f for f in dataclasses.fields(cls)}[name]
        kind: Any = type(field.default)
        if kind is bool:
            if type(value) is not bool:
                raise SpecError(f"{where}: {name}: found {show(value)}, allowed: true, false")
            return value
        if kind is str:
            names = tuple(field.metadata["names"])
            if value not in names:
                raise SpecError(f"{where}: {unknown(name, value, names)}")
            return value
        bounds: Bounds = field.metadata["bounds"]
        number = as_number(value)
        if number is None or not bounds.allow(number) or (kind is int and number % 1):
            rule = str(bounds).replace("a number", "an integer" if kind is int else "a number")
            raise SpecError(f"{where}: {name}: found {show(value)}, allowed: {rule}")
        return kind(number)


class Rounding(Technique):
    """How a weight is brought to its grid, once the grid is calibrated."""

    def fit(self, problem: Any) -> Any:
        """Return the weight of a ``SiteProblem`` on its grid, or on another of its scheme.

        A ``QuantizedWeight``, and always the same for the same problem. Whoever asks compares it
        with nearest rounding on the calibration data and takes the better, so it need not: by the
        layer's output where ``needs`` has Need.MOMENTS, else by the weight itself.
        """
        raise NotImplementedError


class Correction(Technique):
    """What is done to the rest of a layer for the errors of its rounded weight.

    ``centers`` says that errors of the mean output are taken off: calibrations and roundings are
    then judged about the mean. Any correction but none moves the bias (``shift``); a layer without
    one gets one.
    """

    centers: ClassVar[bool] = False

    def shift(self, delta: Any, means: Any) -> Any:
        """Return what the bias of each channel moves by, float32 [channels].

        ``delta`` is the error of the weight, float32 [channels, n]; ``means`` the mean input
        [groups, n], None where the correction does not need Need.MEANS.
        """
        raise NotImplementedError


class Reconstruction(Technique):
    """How the weights of many layers are learned together, each for what those before it became."""


class Estimator(Technique):
    """How a gradient passes the rounding and the clipping of a quantizer.

    Its life: a space or a recipe names it, with or without options; whoever trains a quantized
    model gives it to each of its quantizers; in forward it rounds, in backward it says what becomes
    of the gradient, of the number and of its scale. It has no state, and nothing of it is left in
    the model that was trained: that one rounds to the nearest point of its grid.

    All tensors are float32 and of one shape, but for ``lo`` and ``hi``, the ends of the grid, which
    are numbers or broadcast against them: ``r`` = x / scale, finite, is the position of a number in
    units of the grid, the zero point taken off; ``q`` the integer that it became; ``g`` = dL/dq.
    What is returned is computed element by element, from arguments that are left as they are, and
    grows as g does: for c > 0, c · g passes as c times what g passes as. So g may as well be the
    gradient of the real number scale · q, and what is returned is then per scale, too.
    """

    draws: ClassVar[bool] = False
    """Whether ``round`` draws at random where it has a generator."""

    def round(self, r: Tensor, generator: Generator | None) -> Tensor:
        """Return the integers of ``r``, positions within the grid; NaN stays NaN.

        ``generator`` is None but in training. Both ``r`` and the result may be overwritten.
        """
        return r.round_()

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return the estimate of dL/dr."""
        raise NotImplementedError

    def step(
        self,
        g: Tensor,
        r: Tensor,
        q: Tensor,
        lo: Tensor | float,
        hi: Tensor | float,
        passed: Tensor,
    ) -> Tensor:
        """Return what each number adds to the estimate of dL/d log(scale).

        ``passed`` is what ``position`` returned. With v = scale · q, and q a function of
        r = x / scale, dv/d log(scale) = scale · (q − r · dq/dr): hence g · q − passed · r.
        """
        return (g * q).addcmul_(passed, r, value=-1.0)

    def factor(self, numbers: int, lo: Tensor | float, hi: Tensor | float) -> Tensor | float:
        """Return what the gradient of a scale of ``numbers`` numbers is multiplied by."""
        return 1.0


ROUNDINGS: Registry[type[Rounding]] = Registry(
    "rounding", "autoquant.methods.rounding", "autoquant.rounding"
)
CORRECTIONS: Registry[type[Correction]] = Registry(
    "correction", "autoquant.methods.correction", "autoquant.correction"
)
RECONSTRUCTIONS: Registry[type[Reconstruction]] = Registry(
    "reconstruction", "autoquant.methods.reconstruction", "autoquant.reconstruction"
)
ESTIMATORS: Registry[type[Estimator]] = Registry(
    "estimator", "autoquant.quant.estimators", "autoquant.estimator"
)


@ROUNDINGS.register("nearest")
@dataclass(frozen=True)
class Nearest(Rounding):
    """Round each weight to the nearest point of the grid."""

    method: ClassVar[str] = "nearest"

    def fit(self, problem: Any) -> Any:
        """Return the weight as it was calibrated."""
        return problem.nearest


@CORRECTIONS.register("none")
@dataclass(frozen=True)
class Uncorrected(Correction):
    """Correct nothing."""

    method: ClassVar[str] = "none"


NEAREST = Nearest()
UNCORRECTED = Uncorrected()


@dataclass(frozen=True, slots=True)
class Axis:
    """An option that a space leaves open: one of ``choices``, or from ``low`` to ``high``."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def offers(self, value: Any) -> bool:
        """Return whether the axis holds ``value``."""
        return value in self.choices if self.choices else self.low <= value <= self.high

    @property
    def middle(self) -> Any:
        """The value that stands for the axis where one is needed: its first, or its middle."""
        if self.choices:
            return self.choices[0]
        if not self.log:
            return self.low + (self.high - self.low) / 2
        middle = math.sqrt(self.low) * math.sqrt(self.high)
        return min(max(middle, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Offer:
    """A technique as a space offers it: options that are settled, and ``axes`` that are open.

    ``label`` tells it from other offers of the same dimension.
    """

    label: str
    technique: Technique
    axes: tuple[Axis, ...] = ()

    def of(self, values: dict[str, Any]) -> Technique:
        """Return the technique with ``values`` for its open options."""
        return dataclasses.replace(self.technique, **values) if values else self.technique

    def values(self, technique: Technique) -> dict[str, Any] | None:
        """Return the open options of ``technique``; None where it is not on offer."""
        if type(technique) is not type(self.technique):
            return None
        found = {axis.name: getattr(technique, axis.name) for axis in self.axes}
        same = self.of(found) == technique
        return found if same and all(a.offers(found[a.name]) for a in self.axes) else None


def technique_of(registry: Registry[Any], data: Any, where: str) -> Any:
    """Return the technique that ``data`` name: a method, or {method: …, option: …}."""
    kind, fields = _kind(registry, data, where)
    made = {f.name: fields.take(f.name) for f in dataclasses.fields(kind) if f.name in fields}
    fields.close()
    return kind(**{n: kind.checked(n, v, fields.where) for n, v in made.items()})


def offer_of(registry: Registry[Any], data: Any, where: str) -> Offer:
    """Return what a space offers by ``data``: options may be lists, or {low, high, log}."""
    kind, fields = _kind(registry, data, where)
    settled, axes = {}, []
    for field in dataclasses.fields(kind):
        if field.name not in fields:
            continue
        value = fields.take(field.name)
        if isinstance(value, dict):
            axes.append(_range(kind, field.name, value, fields.where))
        elif isinstance(value, list):
            axes.append(_list(kind, field.name, value, fields.where))
        else:
            settled[field.name] = kind.checked(field.name, value, fields.where)
    fields.close()
    technique = kind(**settled, **{axis.name: axis.middle for axis in axes})
    return Offer(kind.method, technique, tuple(axes))


def _kind(registry: Registry[Any], data: Any, where: str) -> tuple[type[Any], Fields]:
    where = f"{where}: {registry.kind}"
    fields = Fields({METHOD: data} if isinstance(data, str) else data, where)
    method = fields.text(METHOD)
    if method not in registry:
        raise SpecError(f"{where}: {unknown('method', method, registry.names())}")
    return registry.get(method), fields


def _range(kind: type[Technique], name: str, data: dict[str, Any], where: str) -> Axis:
    default = {f.name: f for f in dataclasses.fields(kind)}[name].default
    if type(default) is not float:
        raise SpecError(f"{where}: {name}: found a range, allowed: a value, or a list of values")
    fields = Fields(data, f"{where}: {name}")
    low = kind.checked(name, fields.take("low"), where)
    high = kind.checked(name, fields.take("high"), where)
    log = fields.flag("log", False)
    fields.close()
    if high < low or (log and low <= 0):
        rule = "a high above the low" if high < low else "a low above 0, where log is true"
        raise SpecError(f"{where}: {name}: found {low:g} … {high:g}, allowed: {rule}")
    return Axis(name, low, high, log)


def _list(kind: type[Technique], name: str, data: list[Any], where: str) -> Axis:
    if not data:
        raise SpecError(f"{where}: {name}: found an empty list, allowed: one value or more")
    return Axis(name, choices=tuple(dict.fromkeys(kind.checked(name, v, where) for v in data)))


def merged(offers: list[Offer]) -> tuple[Offer, ...]:
    """Return ``offers``, each once; those of one method are numbered from the second on."""
    found: list[Offer] = []
    for offer in offers:
        if any(offer.technique == o.technique and offer.axes == o.axes for o in found):
            continue
        count = sum(o.technique.method == offer.technique.method for o in found)
        label = offer.label if not count else f"{offer.label} {count + 1}"
        found.append(dataclasses.replace(offer, label=label))
    return tuple(found)
