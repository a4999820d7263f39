"""recipe.yaml: a recipe as a file that a person can read, review and edit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autoquant.errors import SpecError
from autoquant.spec.calibration import ACTIVATION_CALIBRATIONS, WEIGHT_CALIBRATIONS, percentile_of
from autoquant.spec.costs import LatencyEvidence
from autoquant.spec.documents import (
    Fields,
    as_number,
    is_one_of,
    label,
    parse_yaml,
    read_yaml,
    show,
)
from autoquant.spec.formats import FLOAT_BITS, FORMATS
from autoquant.spec.granularity import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES
from autoquant.spec.outputs import check_target, is_signed, signed, write_text
from autoquant.spec.recipe import (
    READABLE,
    VERSION,
    ActivationScheme,
    Evidence,
    LearnedFile,
    ModelIdentity,
    Recipe,
    SiteRecipe,
    SplitResult,
    WeightScheme,
)
from autoquant.spec.techniques import (
    CORRECTIONS,
    NEAREST,
    RECONSTRUCTIONS,
    ROUNDINGS,
    UNCORRECTED,
    Correction,
    Rounding,
    technique_of,
)
from autoquant.spec.verdict import OUTCOMES, Verdict

SCHEMES = ("symmetric", "asymmetric")
LEARNED, BIAS = "learned_rounding", "bias"
"""What version 1 says by ``learning_rate`` and ``bias_correction``."""
BITS = (*FORMATS, FLOAT_BITS)


def load(path: Path) -> Recipe:
    """Return the recipe in ``path``; SpecError names file, layer, field, found and allowed."""
    recipe = _recipe(read_yaml(path, "recipe"), str(path))
    if recipe.learned is None:
        return recipe
    beside = replace(recipe.learned, path=os.path.abspath(path.parent / recipe.learned.path))
    return replace(recipe, learned=beside)


def loads(text: str, where: str = "recipe") -> Recipe:
    """Return the recipe in ``text``."""
    return _recipe(parse_yaml(text, "recipe", where), where)


def _recipe(data: dict[str, Any], where: str) -> Recipe:
    fields = Fields(data, where)
    if "autoquant_recipe" not in fields:
        raise SpecError(f"{where}: not a recipe: it has no autoquant_recipe field")
    version = fields.take("autoquant_recipe")
    if not is_one_of(version, READABLE):
        raise SpecError(
            f"{where}: autoquant_recipe: found version {show(version)}, this release reads "
            f"{' and '.join(map(str, READABLE))}; use the release that wrote it"
        )
    model = fields.take("model", None)
    metric = fields.take("metric", None)
    bits = fields.number("average_weight_bits", 0.0, low=0)
    layer_bits = _optional(fields, "layer_weight_bits")
    size = fields.integer("size_bytes", 0, low=0)
    float_size = fields.integer("float_size_bytes", 0, low=0)
    latency = _latency(fields.take("latency", None), f"{where}: latency")
    operations = _optional(fields, "bit_operations")
    float_operations = _optional(fields, "float_bit_operations")
    seed = fields.integer("seed", 0, low=0)
    folded = fields.take("folded", None) or {}
    if not isinstance(folded, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in folded.items()
    ):
        raise fields.fail("folded", folded, "names of BatchNorm layers and of the layers before")
    layers = fields.take("layers")
    reconstruction = None
    if "reconstruction" in fields:
        reconstruction = technique_of(RECONSTRUCTIONS, fields.take("reconstruction"), where)
    learned = _learned_file(fields.take("learned", None), f"{where}: learned")
    fields.close()
    if not isinstance(layers, dict) or not layers:
        raise fields.fail("layers", layers, "one entry or more")
    sites = {}
    for name, site in layers.items():
        if not isinstance(name, str):
            raise SpecError(f"{where}: layers: {show(name)} is not a layer name; put it in quotes")
        sites[name] = site_from_plain(site, f"{where}: {label(name)}")
    lost = [name for name, site in sites.items() if site.learned and learned is None]
    if lost:
        raise SpecError(f"{where}: {label(lost[0])}: learned: the recipe names no learned file")
    evidence = None
    if metric is not None:
        evidence = replace(
            _evidence(Fields(metric, f"{where}: metric"), bits, size, float_size),
            latency=latency,
            bit_operations=operations,
            float_bit_operations=float_operations,
            layer_weight_bits=layer_bits,
        )
    return Recipe(sites, _model(model, where), evidence, folded, seed, reconstruction, learned)


def _learned_file(data: Any, where: str) -> LearnedFile | None:
    if data is None:
        return None
    fields = Fields(data, where)
    file, digest = fields.text("file"), fields.text("sha256")
    fields.close()
    # A recipe from a stranger names no file but one that lies beside it.
    if Path(file).name != file or file in ("", ".", ".."):
        raise fields.fail("file", file, "the name of a file beside the recipe")
    return LearnedFile(file, digest)


def _model(data: Any, where: str) -> ModelIdentity | None:
    if data is None:
        return None
    fields = Fields(data, f"{where}: model")
    identity = ModelIdentity(fields.text("name"), fields.text("sha256"))
    fields.close()
    return identity


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


def _evidence(fields: Fields, bits: float, size: int, float_size: int) -> Evidence:
    name = fields.text("name")
    higher = fields.flag("higher_is_better")
    search = _split(Fields(fields.take("search"), f"{fields.where}: search"))
    confirm = fields.take("confirm", None)
    result = None
    if confirm is not None and not isinstance(confirm, str):  # text says why there is none
        result = _split(Fields(confirm, f"{fields.where}: confirm"))
    verdict = _verdict(fields.take("verdict", None), f"{fields.where}: verdict")
    fields.close()
    return Evidence(name, higher, search, result, bits, size, float_size, verdict=verdict)


def _verdict(data: Any, where: str) -> Verdict | None:
    if data is None:
        return None
    fields = Fields(data, where)
    rate, needed = fields.take("flip_rate", None), fields.take("samples_needed", None)
    share = None if rate is None else as_number(rate)
    if rate is not None and (share is None or not 0 <= share <= 1):
        raise fields.fail("flip_rate", rate, "a number, 0 … 1, or null")
    if needed is not None and (type(needed) is not int or needed < 0):
        raise fields.fail("samples_needed", needed, "an integer ≥ 0, or null")
    verdict = Verdict(
        fields.choice("outcome", OUTCOMES),
        fields.number("max_drop", low=0),
        fields.number("drop"),
        _interval(fields),
        share,
        fields.integer("samples", 0, low=0),
        needed,
    )
    fields.close()
    return verdict


def _optional(fields: Fields, name: str) -> float | None:
    """Return a field that only some searches write."""
    return fields.number(name, low=0) if name in fields else None


def _latency(data: Any, where: str) -> LatencyEvidence | None:
    if data is None:
        return None
    fields = Fields(data, where)
    found = fields.take("seconds", None)
    measured = None if found is None else as_number(found)
    if found is not None and (measured is None or measured < 0):
        raise fields.fail("seconds", found, "a number ≥ 0, or null")
    evidence = LatencyEvidence(
        fields.number("predicted_seconds", low=0),
        measured,
        fields.number("float_seconds", low=0),
        fields.integer("samples", 0, low=0),
        fields.text("device"),
    )
    fields.close()
    return evidence


def _interval(fields: Fields) -> tuple[float, float] | None:
    found = fields.take("interval", None)
    if found is None:
        return None
    ends = [as_number(x) for x in found] if isinstance(found, list) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        raise fields.fail("interval", found, "two numbers or null")
    return ends[0], ends[1]


def _split(fields: Fields) -> SplitResult:
    interval = _interval(fields)
    result = SplitResult(
        fields.integer("samples", 0, low=0),
        fields.number("float"),
        fields.number("quantized"),
        fields.number("drop"),
        interval,
    )
    fields.close()
    return result


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


NOT_SPLIT = "not measured: the task gives no second data set, so the drop is on what search saw"


def dumps(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML."""
    head: dict[str, Any] = {"autoquant_recipe": VERSION}
    if recipe.model is not None:
        head["model"] = {"name": recipe.model.name, "sha256": recipe.model.sha256}
    evidence = recipe.evidence
    if evidence is not None:
        head["metric"] = {
            "name": evidence.metric,
            "higher_is_better": evidence.higher_is_better,
            "search": _split_to_plain(evidence.search),
            "confirm": NOT_SPLIT if evidence.confirm is None else _split_to_plain(evidence.confirm),
        }
        if evidence.verdict is not None:
            head["metric"]["verdict"] = evidence.verdict.plain()
        head["average_weight_bits"] = evidence.average_weight_bits
        if evidence.layer_weight_bits is not None:
            head["layer_weight_bits"] = evidence.layer_weight_bits
        head["size_bytes"] = evidence.size_bytes
        head["float_size_bytes"] = evidence.float_size_bytes
        if evidence.latency is not None:
            head["latency"] = evidence.latency.plain()
        for name in ("bit_operations", "float_bit_operations"):
            if getattr(evidence, name) is not None:
                head[name] = getattr(evidence, name)
    head["seed"] = recipe.seed
    if recipe.folded:
        head["folded"] = dict(recipe.folded)
    if recipe.reconstruction is not None:
        head["reconstruction"] = recipe.reconstruction.plain()
    if recipe.learned is not None:
        file = Path(recipe.learned.path).name
        head["learned"] = {"file": file, "sha256": recipe.learned.sha256}
    text = yaml.dump(head, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    layers = {name: site_to_plain(site) for name, site in recipe.sites.items()}
    return text + yaml.dump(
        {"layers": layers}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=200
    )


def _split_to_plain(result: SplitResult) -> dict[str, Any]:
    return {
        "samples": result.samples,
        "float": result.baseline,
        "quantized": result.quantized,
        "drop": result.drop,
        "interval": list(result.interval) if result.interval else None,
    }


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes each scheme on one line, and everything else as a block."""


def _represent(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.Node:
    node = dumper.represent_mapping("tag:yaml.org,2002:map", data.items())
    node.flow_style = any(key in data for key in ("bits", "samples", "method"))
    return node


_Dumper.add_representer(dict, _represent)


def save(recipe: Recipe, path: Path) -> None:
    """Write ``recipe`` to ``path``, whole or not at all.

    The learned file that it names is written before, beside it, by whoever learned.

    Raises UserError where it can't be written, or a file is there that is not a recipe as this
    function wrote it.
    """
    check_target(path, is_signed)
    write_text(path, signed(dumps(recipe)))
