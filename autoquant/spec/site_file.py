"""What a recipe's file, and a lock of a space, say of one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoquant.errors import SpecError
from autoquant.spec.calibration import ACTIVATION_CALIBRATIONS, WEIGHT_CALIBRATIONS, percentile_of
from autoquant.spec.documents import Fields, as_number, show
from autoquant.spec.formats import FLOAT_BITS, FORMATS
from autoquant.spec.granularity import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.techniques import (
    CORRECTIONS,
    NEAREST,
    ROUNDINGS,
    UNCORRECTED,
    Correction,
    Rounding,
    technique_of,
)

SCHEMES = ("symmetric", "asymmetric")
LEARNED, BIAS = "learned_rounding", "bias"
"""What version 1 says by ``learning_rate`` and ``bias_correction``."""
BITS = (*FORMATS, FLOAT_BITS)


def site_from_plain(data: Any, where: str) -> SiteRecipe:
    """Return the site recipe that plain data describe; SpecError names the field."""
    fields = Fields(data, where)
    weight = _weight(Fields(fields.take("weight", {"bits": FLOAT_BITS}), f"{where}: weight"))
    activation = _activation(
        Fields(fields.take("activation", {"bits": FLOAT_BITS}), f"{where}: activation")
    )
    rounding, correction = _rounding(fields, where), _correction(fields, where)
    learned = fields.text("learned", "")
    fields.close()
    if weight is None:
        return SiteRecipe(None, activation)
    return SiteRecipe(replace(weight, rounding=rounding), activation, correction, learned)


def _rounding(fields: Fields, where: str) -> Rounding:
    """Return the rounding of a layer, which files of version 1 say by a learning rate."""
    found = fields.take("learning_rate", None)
    if "rounding" in fields:
        if found is not None:
            raise fields.fail("learning_rate", found, "none beside rounding, which it is part of")
        return technique_of(ROUNDINGS, fields.take("rounding"), where)
    if found is None:
        return NEAREST
    rate = as_number(found)
    if rate is None or rate <= 0:
        raise fields.fail("learning_rate", found, "a number > 0, or null")
    return technique_of(ROUNDINGS, {"method": LEARNED, "learning_rate": rate}, where)


def _correction(fields: Fields, where: str) -> Correction:
    """Return the correction of a layer, which files of version 1 say by a flag."""
    corrected = fields.flag("bias_correction", False)
    if "correction" not in fields:
        return technique_of(CORRECTIONS, BIAS, where) if corrected else UNCORRECTED
    if corrected:
        raise fields.fail("bias_correction", True, "none beside correction, which says the same")
    return technique_of(CORRECTIONS, fields.take("correction"), where)


def _weight(fields: Fields) -> WeightScheme | None:
    bits = fields.choice("bits", BITS)
    if bits == FLOAT_BITS:
        fields.close()
        return None
    scheme = WeightScheme(
        bits,
        fields.choice("granularity", WEIGHT_GRANULARITIES, "per_channel"),
        fields.choice("scheme", SCHEMES, "symmetric"),
        _calibration(fields, WEIGHT_CALIBRATIONS),
    )
    fields.close()
    return scheme


def _activation(fields: Fields) -> ActivationScheme | None:
    bits = fields.choice("bits", BITS)
    if bits == FLOAT_BITS:
        fields.close()
        return None
    granularity = fields.choice("granularity", ACTIVATION_GRANULARITIES, "per_tensor")
    kind = fields.choice("scheme", SCHEMES, "asymmetric")
    calibration = _calibration(fields, ACTIVATION_CALIBRATIONS)
    scheme = ActivationScheme(bits, granularity, kind, calibration, *_static(fields, bits))
    made_for = fields.take("calibrated_for", None)
    fields.close()
    if scheme.dynamic and scheme.scale is not None:
        raise fields.fail("scale", scheme.scale, "none: a per_token scale is found at run time")
    if scheme.symmetric and scheme.zero_point:
        raise fields.fail("zero_point", scheme.zero_point, "0, as the scheme is symmetric")
    # A file without a word on what its scales are for, as the first ones were, is taken as it is.
    now = _calibrated_for(scheme)
    if scheme.scale is not None and made_for not in (None, now):
        raise SpecError(
            f"{fields.where}: scale {scheme.scale:g} was calibrated for {show(made_for)}, and now "
            f"it stands beside {now}: delete scale and zero_point, to have them calibrated anew"
        )
    return scheme


def _static(fields: Fields, bits: int) -> tuple[float | None, int | None]:
    """Return the calibrated scale and zero point, both None where there are none."""
    found, zero_point = fields.take("scale", None), fields.take("zero_point", None)
    if found is None:
        if zero_point is not None:
            raise fields.fail("zero_point", zero_point, "none without a scale")
        return None, None
    scale = as_number(found)
    if scale is None or scale <= 0:
        raise fields.fail("scale", found, "a number > 0")
    zero_point = 0 if zero_point is None else zero_point
    grid = FORMATS[bits]
    if type(zero_point) is not int or not grid.qmin <= zero_point <= grid.qmax:
        raise fields.fail("zero_point", zero_point, f"an integer, {grid.qmin} … {grid.qmax}")
    return scale, zero_point


def _calibrated_for(scheme: ActivationScheme) -> str:
    """Return all that a static scale and its zero point depend on, besides the data."""
    return f"{scheme.bits} bits {scheme.scheme} {scheme.calibration}"


def _calibration(fields: Fields, names: tuple[str, ...]) -> str:
    value = fields.take("calibration", "max")
    if value not in names and (not isinstance(value, str) or percentile_of(value) is None):
        raise fields.fail("calibration", value, ", ".join(names))
    return str(value)


def site_to_plain(site: SiteRecipe) -> dict[str, Any]:
    """Return a site recipe as plain data, the fields in the order a person reads them."""
    weight: dict[str, Any] = {"bits": FLOAT_BITS}
    if site.weight is not None:
        w = site.weight
        weight = {
            "bits": w.bits,
            "granularity": w.granularity,
            "scheme": w.scheme,
            "calibration": w.calibration,
        }
    activation: dict[str, Any] = {"bits": FLOAT_BITS}
    if site.activation is not None:
        a = site.activation
        activation = {
            "bits": a.bits,
            "granularity": a.granularity,
            "scheme": a.scheme,
            "calibration": a.calibration,
        }
        if a.scale is not None:
            activation |= {"scale": a.scale, "zero_point": a.zero_point or 0}
            activation["calibrated_for"] = _calibrated_for(a)
    plain: dict[str, Any] = {"weight": weight, "activation": activation}
    if site.weight is not None and site.weight.rounding != NEAREST:
        plain["rounding"] = site.weight.rounding.plain()
    if site.correction != UNCORRECTED:
        plain["correction"] = site.correction.plain()
    if site.learned:
        plain["learned"] = site.learned
    return plain
