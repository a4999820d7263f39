"""``autoquant export``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.cli.options import RECIPES, OutputFile, json_option, storage_option, task_options
from autoquant.errors import UserError

if TYPE_CHECKING:
    from autoquant.models.files import LoadedModel
    from autoquant.models.task import Task
    from autoquant.session.exporting import Exported
    from autoquant.spec.recipe import Recipe

KINDS = {"recipe": ".yaml", "onnx": ".onnx", "openvino": ".xml"}
"""What can be written, and what the names of such files end in."""
Chosen = tuple["Recipe", "LoadedModel", "Task"]
"""A recipe, and the model and the task that it is for."""


@click.command(
    epilog="Example: autoquant export mobilenet --bits 5 -o recipe5.yaml; "
    "autoquant export recipe.yaml --to openvino --model model.pt --task task.py -o quantized.xml"
)
@click.argument("study", metavar="[STUDY|RECIPE]", required=False)
@click.option(
    "--to",
    "kind",
    type=click.Choice(tuple(KINDS)),
    default="recipe",
    show_default=True,
    help="What is written: a recipe, or the quantized model as a file of another runtime, which "
    "is measured there.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default=None,
    type=OutputFile(*RECIPES, ".onnx", ".xml"),
    help="Where it goes: a .yaml, .onnx or .xml, with a .bin beside it. Default: recipe.yaml, "
    "quantized.onnx, quantized.xml.",
)
@click.option("--trial", type=int, metavar="N", help="The recipe of this trial.")
@click.option("--bits", type=float, metavar="B", help="The best one of at most B average bits.")
@click.option("--size", metavar="N%", help="The best one of at most this size (25%, 4MB).")
@click.option(
    "--model",
    type=click.Path(),
    metavar="FILE",
    help="The float model, for --to: of a RECIPE, or where that of STUDY is now.",
)
@task_options
@click.option(
    "--accept-changes", is_flag=True, help="Export although the recipe is for another model file."
)
@storage_option
@json_option
def command(
    study: str | None,
    kind: str,
    output: str | None,
    trial: int | None,
    bits: float | None,
    size: str | None,
    model: str | None,
    task: str | None,
    data: str | None,
    metric: str | None,
    trust_pickle: bool,
    accept_changes: bool,
    storage: str | None,
    as_json: bool,
) -> None:
    """Write a recipe out of STUDY (default: the newest), or a quantized model for another runtime.

    The recipe is the study's best one, or another: --bits and --size cut the Pareto front of the
    trials at another budget; no new trial is run. Their numbers are those of the search's data;
    `autoquant evaluate` measures the rest. With --to onnx or openvino the model of that recipe, or
    of a RECIPE file, is written, loaded by the runtime itself, and measured there on data that the
    search did not see: its metric, how far its outputs are off, which products run in integers,
    and the time beside the float model's in the same runtime.
    """
    if sum(x is not None for x in (trial, bits, size)) > 1:
        raise UserError("--trial, --bits and --size each choose a recipe; give one")
    target = Path(output or ("recipe" if kind == "recipe" else "quantized") + KINDS[kind])
    if kind == "recipe":
        given = {"--model": model, "--task": task, "--data": data, "--metric": metric}
        wrong = next((name for name, value in given.items() if value is not None), None)
        if wrong is not None or trust_pickle or as_json:
            name = wrong or ("--trust-pickle" if trust_pickle else "--json")
            raise UserError(f"{name} is of a model that is written: give --to onnx or openvino too")
        _recipe(study, target, trial, bits, size, storage)
        return
    target = Path(os.path.abspath(target))  # before the task runs, which may change the folder
    if study is not None and Path(study).suffix in RECIPES:
        if any(x is not None for x in (trial, bits, size)):
            raise UserError("--trial, --bits and --size choose a recipe of a study: name one")
        chosen = _of_file(study, kind, target, model, (task, data, metric), trust_pickle)
    else:
        extracted = (trial, bits, size)
        chosen = _of_study(study, kind, target, storage, extracted, model, task, data)
    _export(chosen, kind, target, accept_changes, as_json)


def _recipe(
    study: str | None,
    target: Path,
    trial: int | None,
    bits: float | None,
    size: str | None,
    storage: str | None,
) -> None:
    """Write a study's recipe."""
    from autoquant.report.tables import describe_bits
    from autoquant.spec.outputs import check_target, is_signed
    from autoquant.spec.recipe_file import save
    from autoquant.study.extract import extract
    from autoquant.study.ledger import Ledger
    from autoquant.study.tuned import take_along

    if target.suffix not in RECIPES:
        raise UserError(f"{target}: a recipe's name ends in .yaml; for a model give --to")
    check_target(target, is_signed)
    ledger = Ledger.open(study, storage, write=False)
    recipe, chosen = extract(ledger, trial=trial, bits=bits, size=size)
    save(take_along(recipe, target), target)
    evidence = recipe.evidence
    assert evidence is not None
    print(
        f"{target}: trial {chosen}, drop {evidence.reported.drop:.4g}, "
        f"{describe_bits(evidence.average_weight_bits, evidence.of_layers)}"
    )


def _of_file(
    recipe: str,
    kind: str,
    target: Path,
    model: str | None,
    task: tuple[str | None, str | None, str | None],
    trust_pickle: bool,
) -> Chosen:
    """Return the recipe of a file, and the model that it is for."""
    from autoquant.session.exporting import check_export
    from autoquant.spec.recipe_file import load
    from autoquant.study.source import Source

    if model is None:
        raise UserError(f"{recipe}: which model is it for? give --model FILE and --task TASK.py")
    loaded_recipe = load(Path(recipe))
    source = Source(model, *task, trust_pickle)
    check_export(kind, target, {"recipe": recipe, **source.files})
    loaded_task = source.load_task()
    return loaded_recipe, source.load(loaded_task), loaded_task


def _of_study(
    study: str | None,
    kind: str,
    target: Path,
    storage: str | None,
    extracted: tuple[int | None, float | None, str | None],
    model: str | None,
    task: str | None,
    data: str | None,
) -> Chosen:
    """Return a recipe of a study, and its model and task."""
    from autoquant.session.exporting import check_export
    from autoquant.study.checks import saved_source, saved_task
    from autoquant.study.extract import extract
    from autoquant.study.header import Header
    from autoquant.study.ledger import Ledger

    ledger = Ledger.open(study, storage, write=False)
    header = Header.read(ledger.header, ledger.name)
    trial, bits, size = extracted
    recipe, _ = extract(ledger, trial=trial, bits=bits, size=size)
    source = saved_source(header, ledger.storage, model, task, data)
    if not source.model:
        raise UserError(f"study {ledger.name} is of a module in Python: give --model FILE")
    check_export(kind, target, source.files)
    loaded_task = saved_task(ledger.name, source)
    return recipe, source.load(loaded_task), loaded_task


def _export(chosen: Chosen, kind: str, target: Path, accept: bool, as_json: bool) -> None:
    """Write the model and say what it is in its runtime."""
    from autoquant.cli.output import emit
    from autoquant.session.apply import check_model
    from autoquant.session.exporting import export
    from autoquant.spec.outputs import check_folder

    recipe, loaded, task = chosen
    check_folder(target.parent)
    check_model(recipe, loaded, accept=accept)
    found = export(loaded, task, recipe, kind, target, say=(lambda _: None) if as_json else print)
    if as_json:
        emit(found.plain())
        return
    for line in lines(found):
        print(line)


def lines(found: Exported) -> list[str]:
    """Return what is said of an exported model."""
    from autoquant.report.tables import plain_number

    said = [
        f"{found.metric} on {found.samples} samples ({found.split}): float "
        f"{plain_number(found.baseline)}, recipe {plain_number(found.reference)}, in "
        f"{found.runtime} {plain_number(found.value)}",
        f"outputs differ from the recipe's by {found.difference:.2%} (root of noise over signal)",
    ]
    if found.integers is not None:
        done, every = found.integers
        said.append(f"{done} of {every} products run in integers")
    word = "faster" if found.speedup >= 1 else "slower"
    times = found.speedup if found.speedup >= 1 else 1 / found.speedup
    said += [
        f"{found.ms:.3g} ms a batch, float {found.float_ms:.3g} ms in the same runtime: "
        f"{times:.2f} times {word} ({found.threads} thread{'s' * (found.threads != 1)})",
        f"{found.path}: {found.size_bytes:,} bytes",
    ]
    return said
