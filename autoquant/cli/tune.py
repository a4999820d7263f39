"""``autoquant tune``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from autoquant.cli.options import (
    RECIPES,
    OutputFile,
    backend_option,
    device_option,
    json_option,
    task_options,
)
from autoquant.cli.output import emit


@click.command(epilog="Example: autoquant tune recipe.yaml model.pt --task task.py -o tuned.yaml")
@click.argument("recipe", type=click.Path())
@click.argument("model", type=click.Path())
@task_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="tuned.yaml",
    show_default=True,
    type=OutputFile(*RECIPES),
    help="The tuned recipe; what was learned goes beside it, as NAME.learned.safetensors.",
)
@click.option(
    "--ridge",
    "ridges",
    metavar="STRENGTH",
    type=click.FloatRange(0.0, 1e9),
    multiple=True,
    help="How strongly weights are drawn to the float ones; may be given several times, and the "
    "best is taken. Default: 200, with inputs that are far off counting less, and as any other.",
)
@click.option(
    "--accept-changes", is_flag=True, help="Tune the recipe although it is for another model file."
)
@device_option
@backend_option("auto")
@json_option
def command(
    recipe: str,
    model: str,
    task: str | None,
    data: str | None,
    metric: str | None,
    trust_pickle: bool,
    output: str,
    ridges: tuple[float, ...],
    accept_changes: bool,
    device: str,
    backend: str,
    as_json: bool,
) -> None:
    """Fit the layers of RECIPE to each other, on unlabelled calibration data.

    Each layer in turn is fitted to the float model's output, on what the quantized layers before it
    give: bits, granularities and activations stay as they are. The tuned recipe is written with its
    confirmed metric; where nothing makes it better, it is the recipe as it was.
    """
    from autoquant.spec.recipe_file import load

    loaded_recipe = load(Path(recipe))
    from autoquant.optimize.tune import check_tuned, tune
    from autoquant.report.tables import plain_number
    from autoquant.report.verdicts import verdict_line
    from autoquant.session.apply import check_model
    from autoquant.study.opening import check_folder
    from autoquant.study.source import Source

    target = Path(os.path.abspath(output))  # before the task runs, which may change the folder
    source = Source(model, task, data, metric, trust_pickle)
    check_folder(target.parent)
    check_tuned(target, loaded_recipe, {"recipe": recipe, **source.files})
    loaded_task = source.load_task()
    loaded = source.load(loaded_task)
    check_model(loaded_recipe, loaded, accept=accept_changes)
    found = tune(
        loaded, loaded_task, loaded_recipe, target, ridges=ridges, device=device,
        backend=backend, say=(lambda _: None) if as_json else click.echo,
    )  # fmt: skip
    if as_json:
        emit(found.plain() | {"path": str(target)})
        return
    for row in found.tried:
        print(f"{row.technique}: loss {plain_number(row.loss)} in {row.seconds:.1f} s")
    change = "nothing gained" if not found.gained else f"now {plain_number(found.after)}"
    print(f"loss on the search data: {plain_number(found.before)}, {change}")
    evidence = found.recipe.evidence
    assert evidence is not None
    result = evidence.reported
    print(
        f"{evidence.metric}: float {plain_number(result.baseline)}, quantized "
        f"{plain_number(result.quantized)}, drop {plain_number(result.drop)} "
        f"({result.samples} samples)"
    )
    if evidence.verdict is not None:
        print(verdict_line(evidence.verdict, evidence.metric))
    print(f"recipe: {target}")
