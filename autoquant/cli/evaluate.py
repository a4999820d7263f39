"""``autoquant evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli.failures import verdict_status
from autoquant.cli.options import backend_option, device_option, json_option, task_options
from autoquant.cli.output import emit


@click.command(epilog="Example: autoquant evaluate model.pt --task task.py --recipe recipe.yaml")
@click.argument("model", type=click.Path())
@task_options
@click.option("--recipe", metavar="FILE", type=click.Path(), help="Measure this recipe, too.")
@click.option(
    "--accept-changes", is_flag=True, help="Use the recipe although it is for another model file."
)
@click.option(
    "--max-drop",
    metavar="DROP",
    help="Say whether the recipe is proven to lose no more than this (1%, or a number in the "
    "metric's unit). Default: what its search was told.",
)
@device_option
@backend_option("reference")
@json_option
def command(
    model: str,
    task: str | None,
    data: str | None,
    metric: str | None,
    trust_pickle: bool,
    recipe: str | None,
    accept_changes: bool,
    max_drop: str | None,
    device: str,
    backend: str,
    as_json: bool,
) -> int:
    """Measure MODEL on its task and, with --recipe, the quantized model beside it.

    Both splits are measured: the one that a search looks at, and the one that it does not.

    With --max-drop the exit status is the verdict: 0 PASS, 3 FAIL, 4 NOT PROVEN.
    """
    from autoquant.errors import UserError
    from autoquant.spec.recipe_file import load

    if max_drop is not None and recipe is None:
        raise UserError("--max-drop judges a recipe; give --recipe, too")
    loaded_recipe = None if recipe is None else load(Path(recipe))
    from autoquant.models.direction import in_words
    from autoquant.optimize.evaluate import measure_recipe
    from autoquant.report.tables import describe_bits, megabytes, plain_number
    from autoquant.report.verdicts import verdict_line
    from autoquant.session.apply import check_model
    from autoquant.spec.recipe import FLOAT32
    from autoquant.study.source import Source

    source = Source(model, task, data, metric, trust_pickle)
    loaded_task = source.load_task()
    loaded = source.load(loaded_task)
    if loaded_recipe is not None:
        check_model(loaded_recipe, loaded, accept=accept_changes)
    found = measure_recipe(loaded, loaded_task, loaded_recipe, device, backend, max_drop)
    status = verdict_status(None if max_drop is None else found.verdict)
    if as_json:
        emit(found.plain())
        return status
    for name, split in found.splits.items():
        line = f"{name} ({split.samples} samples): float {found.metric} "
        line += f"({in_words(found.higher_is_better)}) {plain_number(split.baseline)}"
        if loaded_recipe is not None:
            line += f", quantized {plain_number(split.quantized)}, drop {plain_number(split.drop)}"
            if split.interval is not None:
                low, high = split.interval
                line += f", 95% interval {plain_number(low)} … {plain_number(high)}"
        print(line)
    if found.verdict is not None:
        print(verdict_line(found.verdict, found.metric))
    if loaded_recipe is not None:
        print(
            f"{describe_bits(found.average_weight_bits, found.layer_weight_bits)}, "
            f"{megabytes(found.size_bytes)} of {megabytes(found.float_size_bytes)}"
            + ("" if found.rest == FLOAT32 else f", the rest in {found.rest}")
        )
    return status
