"""What a recipe's file says was measured."""

from __future__ import annotations

from typing import Any

from autoquant.spec.costs import LatencyEvidence
from autoquant.spec.documents import Fields, as_number
from autoquant.spec.recipe import Evidence, SplitResult
from autoquant.spec.verdict import OUTCOMES, Verdict

NOT_SPLIT = "not measured: the task gives no second data set, so the drop is on what search saw"


def take_evidence(fields: Fields) -> Evidence | None:
    """Take what was measured from the top of a file; None where it says of no metric."""
    where = fields.where
    metric = fields.take("metric", None)
    bits = fields.number("average_weight_bits", 0.0, low=0)
    layer_bits = _optional(fields, "layer_weight_bits")
    size = fields.integer("size_bytes", 0, low=0)
    float_size = fields.integer("float_size_bytes", 0, low=0)
    latency = _latency(fields.take("latency", None), f"{where}: latency")
    operations = _optional(fields, "bit_operations")
    float_operations = _optional(fields, "float_bit_operations")
    if metric is None:
        return None
    own = Fields(metric, f"{where}: metric")
    name = own.text("name")
    higher = own.flag("higher_is_better")
    search = _split(Fields(own.take("search"), f"{own.where}: search"))
    confirm = own.take("confirm", None)
    result = None
    if confirm is not None and not isinstance(confirm, str):  # text says why there is none
        result = _split(Fields(confirm, f"{own.where}: confirm"))
    verdict = _verdict(own.take("verdict", None), f"{own.where}: verdict")
    own.close()
    return Evidence(
        name,
        higher,
        search,
        result,
        bits,
        size,
        float_size,
        latency,
        operations,
        float_operations,
        verdict,
        layer_bits,
    )


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


def evidence_to_plain(evidence: Evidence) -> dict[str, Any]:
    """Return the fields at the top of a file that ``take_evidence`` reads."""
    metric: dict[str, Any] = {
        "name": evidence.metric,
        "higher_is_better": evidence.higher_is_better,
        "search": _split_to_plain(evidence.search),
        "confirm": NOT_SPLIT if evidence.confirm is None else _split_to_plain(evidence.confirm),
    }
    if evidence.verdict is not None:
        metric["verdict"] = evidence.verdict.plain()
    found: dict[str, Any] = {"metric": metric, "average_weight_bits": evidence.average_weight_bits}
    if evidence.layer_weight_bits is not None:
        found["layer_weight_bits"] = evidence.layer_weight_bits
    found["size_bytes"] = evidence.size_bytes
    found["float_size_bytes"] = evidence.float_size_bytes
    if evidence.latency is not None:
        found["latency"] = evidence.latency.plain()
    for name in ("bit_operations", "float_bit_operations"):
        if getattr(evidence, name) is not None:
            found[name] = getattr(evidence, name)
    return found


def _split_to_plain(result: SplitResult) -> dict[str, Any]:
    return {
        "samples": result.samples,
        "float": result.baseline,
        "quantized": result.quantized,
        "drop": result.drop,
        "interval": list(result.interval) if result.interval else None,
    }
