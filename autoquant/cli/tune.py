"""``autoquant tune``."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoquant.cli.options import (
    RECIPES,
    OutputFile,
    backend_option,
    device_option,
    json_option,
    log_folder,
    log_option,
    task_options,
)
from autoquant.cli.output import emit
from autoquant.errors import UserError

if TYPE_CHECKING:
    from autoquant.methods.training import Training


TRAINED = ("block", "full")
"""Methods that train."""
LAYER_RATES: dict[str, dict[str, float]] = {
    "alike": {},
    "curvature": {"curvature_power": 1.0},
    "mismatch": {"mismatch_power": 1.0},
}
"""What --layer-rates stands for."""


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
    "--method",
    type=click.Choice(("layer", *TRAINED)),
    default="layer",
    show_default=True,
    help="layer fits the layers to each other; block trains one block after another after that, "
    "full all layers together.",
)
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(1, 10**7),
    default=None,
    help="Steps of training (--method full), or of each block (--method block). Default: 400, or "
    "200 of each block.",
)
@click.option(
    "--batch",
    metavar="N",
    type=click.IntRange(1, 2**16),
    default=None,
    help="Samples of a step (--method block or full); of large blocks fewer. Default: 16.",
)
@click.option(
    "--rate",
    metavar="FACTOR",
    type=click.FloatRange(0.0, 1000.0, min_open=True),
    default=None,
    help="Multiplies all rates of training (--method block or full). Default: 1.",
)
@click.option(
    "--rivals",
    metavar="N",
    type=click.IntRange(1, 1000),
    default=None,
    help="Sets of rates that race for a short while before training (--method full). Default: 1, "
    "which is the usual rates and no race.",
)
@click.option(
    "--layer-rates",
    type=click.Choice(tuple(LAYER_RATES)),
    default=None,
    help="Have layers learn at different rates (--method full): by curvature, that noise in the "
    "weights of each costs the same; by mismatch, that those whose gradient leads elsewhere are "
    "slower. Default: alike.",
)
@click.option(
    "--labels",
    metavar="SHARE",
    type=click.FloatRange(0.0, 1.0),
    default=None,
    help="Share of the task's training_loss in what is made small, where it has one; the rest is "
    "how far outputs are from the float model's (--method full). Default: 0.2.",
)
@click.option(
    "--estimator",
    metavar="NAME",
    default=None,
    help="How gradients pass quantizers (--method block or full). Default: lsq.",
)
@click.option(
    "--gradient-bits",
    "gradients",
    metavar="FORMAT",
    default=None,
    help="Bring the gradient by each layer's output to int8, int4, fp8 (E5M2) or log4 (powers of "
    "two) while training, stochastically (--method block or full). Default: float32.",
)
@click.option(
    "--most",
    metavar="N",
    type=click.IntRange(1, 10**6),
    default=None,
    help="Most quantized layers of a block (--method block). Default: 8.",
)
@click.option(
    "--drop",
    metavar="SHARE",
    type=click.FloatRange(0.0, 1.0),
    default=None,
    help="Share of the numbers of a block's input that are as in the float model, drawn for each "
    "step (--method block). Default: 0.",
)
@click.option(
    "--accept-changes", is_flag=True, help="Tune the recipe although it is for another model file."
)
@log_option
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
    method: str,
    steps: int | None,
    batch: int | None,
    rate: float | None,
    rivals: int | None,
    layer_rates: str | None,
    labels: float | None,
    estimator: str | None,
    gradients: str | None,
    most: int | None,
    drop: float | None,
    accept_changes: bool,
    log: str | None,
    device: str,
    backend: str,
    as_json: bool,
) -> None:
    """Fit the layers of RECIPE to each other, or train them, on unlabelled data.

    Each layer in turn is fitted to the float model's output, on what the quantized ones before it
    give: bits, granularities and activations stay as they are. With --method block the model's
    blocks are trained after that, one after another, each to give what it gives in the float model;
    with --method full all layers are trained together. Both learn from the task's training_data,
    or its calibration data; killed, they go on where they were when the command is given again. The
    tuned recipe is written with its confirmed metric; where nothing makes it better, it is the
    recipe as it was.
    """
    from autoquant.report.scalars import ScalarLog
    from autoquant.spec.recipe_file import load

    loaded_recipe = load(Path(recipe))
    training = _training(
        method,
        {
            "steps": steps,
            "batch": batch,
            "rate": rate,
            "rivals": rivals,
            "layer_rates": layer_rates,
            "labels": labels,
            "estimator": estimator,
            "gradients": gradients,
            "most": most,
            "drop": drop,
        },
    )
    if log is not None and method != "full":
        raise UserError("--log is of training all layers together: give --method full too")
    folder = log_folder(log)
    from autoquant.cli.live import Several, view_of
    from autoquant.optimize.tune import check_tuned, tune
    from autoquant.report.tables import plain_number
    from autoquant.report.verdicts import verdict_line
    from autoquant.session.apply import check_model
    from autoquant.spec.outputs import check_folder
    from autoquant.study.source import Source

    target = Path(os.path.abspath(output))  # before the task runs, which may change the folder
    source = Source(model, task, data, metric, trust_pickle)
    check_folder(target.parent)
    check_tuned(target, loaded_recipe, {"recipe": recipe, **source.files})
    loaded_task = source.load_task()
    if labels is not None and loaded_task.training_loss is None:
        raise UserError(f"--labels: {loaded_task.source} has no training_loss that would take them")
    loaded = source.load(loaded_task)
    check_model(loaded_recipe, loaded, accept=accept_changes)
    with contextlib.ExitStack() as ends:
        view = ends.enter_context(view_of(as_json))
        hearers = Several((view,))
        if folder is not None:
            scalars = ScalarLog(folder, functools.partial(click.echo, err=True))
            hearers = Several((view, ends.enter_context(contextlib.closing(scalars))))
        found = tune(
            loaded, loaded_task, loaded_recipe, target, ridges=ridges, training=training,
            device=device, backend=backend, say=view.say,
            watch=hearers.check, follow=hearers.step, block=view.block,
        )  # fmt: skip
    if as_json:
        emit(found.plain() | {"path": str(target)})
        return
    for row in found.tried:
        print(f"{row.technique}: loss {plain_number(row.loss)} in {row.seconds:.1f} s")
        if row.layers:
            low, high = min(row.layers.values()), max(row.layers.values())
            print(f"layers learned at {low:.2f} to {high:.2f} times the usual rates")
        if row.lost is not None:
            print("weights that rounding makes 0: {:.1%} before, {:.1%} after".format(*row.lost))
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


def _training(method: str, given: dict[str, Any]) -> Training | None:
    """Return how to train, None for not at all; UserError for options that say nothing then."""
    own = dict.fromkeys(("most", "drop"), ("block",))
    own |= dict.fromkeys(("rivals", "layer_rates", "labels"), ("full",))
    for name, value in given.items():
        methods = own.get(name, TRAINED)
        if value is not None and method not in methods:
            wanted = " or ".join(methods)
            raise UserError(f"{_option(name)} is of training: give --method {wanted} too")
    if method not in TRAINED:
        return None
    from autoquant.methods.reconstruction.blockwise import Blockwise
    from autoquant.methods.reconstruction.distillation import Distillation

    kind: type[Training] = Blockwise if method == "block" else Distillation
    usual = kind()
    rate, layers = given.pop("rate") or 1.0, given.pop("layer_rates")
    options = {k: v for k, v in given.items() if v is not None}
    options |= LAYER_RATES[layers or "alike"]
    for name in ("weight_rate", "scale_rate", "bias_rate", "activation_rate"):
        options[name] = min(getattr(usual, name) * rate, 1.0)
    checked = {k: kind.checked(k, v, _option(k)) for k, v in options.items()}
    return kind(**checked)


def _option(name: str) -> str:
    """Return what an option of training is called on the command line."""
    return "--gradient-bits" if name == "gradients" else "--" + name.replace("_", "-")
