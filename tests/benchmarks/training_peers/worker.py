"""One run of one tool in a process of its own: a tool that patches torch spoils no other.

``python -m tests.benchmarks.training_peers.worker ARGUMENTS.json RESULT.json``
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.heap import keep_freed_memory
from autoquant.models.metrics import METRICS
from autoquant.models.noninferiority import drop_interval
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers.score import divergences, mean_and_error
from tests.benchmarks.peers.version import commit, package_version
from tests.benchmarks.training_peers.cases import CASES, Case, data_of, load_float, load_session
from tests.benchmarks.training_peers.distil import Course, distil
from tests.benchmarks.training_peers.levels import check, products
from tests.benchmarks.training_peers.ours import made, technique_of
from tests.benchmarks.training_peers.tools import BY_NAME, Tool


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row."""
    tool, case = BY_NAME[arguments["tool"]], CASES[arguments["case"]]
    said = package_version(tool.package)
    if not said:
        return {"error": f"not installed ({tool.package})"}
    make = ours if tool.package == "autoquant" else theirs
    steps = arguments["steps"] if tool.trains else 0
    course = Course(steps, case.batch, arguments["rate"], arguments["seed"])
    return {
        "version": said,
        "commit": commit(),
        "machine": describe_machine(),
        "batch": case.batch if steps else 0,
        "steps": steps,
        **make(tool, case, course, Path(arguments["folder"])),
    }


def ours(tool: Tool, case: Case, course: Course, folder: Path) -> dict[str, Any]:
    """Return what autoquant comes to."""
    technique = technique_of(case, tool.options, course.steps) if tool.trains else None
    found = made(case, folder, technique, course.seed)
    session = found.session
    teacher = load_float(case, folder)
    with found.running() as quantized:
        measured = measure(quantized, teacher, case, session.splits.confirm)
    return {
        "held": found.held,
        "prepared": found.prepared,
        "seconds": found.seconds,
        **measured,
    }


def theirs(tool: Tool, case: Case, course: Course, folder: Path) -> dict[str, Any]:
    """Return what a peer comes to."""
    data = data_of(load_session(case, folder))
    model, teacher = load_float(case, folder), load_float(case, folder)
    first = next(name for name, module in model.named_modules() if _multiplies(module))
    module, function = tool.place.split(":")
    prepare = getattr(
        importlib.import_module(f"tests.benchmarks.training_peers.{module}"), function
    )
    torch.manual_seed(course.seed)
    began = time.process_time()
    trainee = prepare(model, data.calibration, case.weights, case.activations, first)
    prepared = time.process_time() - began
    trainee.switch(False)
    _check(trainee.module, teacher, case, data.search[0][0])  # before time is spent on it
    began = time.process_time()
    held = distil(trainee, teacher, data.lessons, [inputs for inputs, _ in data.search], course)
    seconds = prepared + time.process_time() - began
    measured = measure(trainee.module, teacher, case, data.confirm)
    return {"held": held, "prepared": prepared, "seconds": seconds, **measured}


def measure(
    quantized: Callable[[Any], Tensor],
    teacher: nn.Module,
    case: Case,
    batches: Sequence[tuple[Any, Any]],
) -> dict[str, Any]:
    """Return how far a quantized model is from the float model, and how many levels it has."""
    found = _check(quantized, teacher, case, batches[0][0])
    metric = METRICS.get("accuracy")
    with torch.no_grad():
        wanted = [(teacher(inputs), targets) for inputs, targets in batches]
        given = [(quantized(inputs), targets) for inputs, targets in batches]
    before, after = metric.evidence(wanted), metric.evidence(given)
    sure = drop_interval(before, after, metric)
    scores = [torch.cat([scores for scores, _ in pairs]) for pairs in (wanted, given)]
    mean, error = mean_and_error(divergences(*scores))
    return {
        "kl": mean,
        "kl_error": error,
        "metric": after.score(),
        "float_metric": before.score(),
        "drop_low": sure.low,
        "drop_high": sure.high,
        **found,
    }


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


def _check(
    quantized: Callable[[Any], Tensor], teacher: nn.Module, case: Case, inputs: Any
) -> dict[str, int]:
    """Return the most levels of any layer. Raises Unfit where there are more than bits allow."""
    layers = sum(map(_multiplies, teacher.modules()))
    found = products(quantized, inputs)
    check(found, layers, case.weights, case.activations)
    return {
        "weight_levels": max(p.weights for p in found),
        "activation_levels": max(p.activations for p in found),
        "layers": layers,
    }


def main() -> None:
    """Run what the first file asks for and write the second."""
    keep_freed_memory()
    torch.set_num_threads(1)
    arguments = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        found = run(arguments)
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines()
        line = f": {text[0]}" if text else ""
        found = {"error": f"{type(error).__name__}{line}"[:200]}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
