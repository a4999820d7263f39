"""``autoquant search``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoquant.cli.failures import verdict_status
from autoquant.cli.loading import loading
from autoquant.cli.options import (
    OutputFolder,
    Trials,
    backend_option,
    device_option,
    json_option,
    log_folder,
    log_option,
    memory_option,
    seconds,
    storage_option,
    task_options,
)

if TYPE_CHECKING:
    from autoquant.optimize.result import SearchResult


@click.command(
    epilog="Example: autoquant search model.pt --task task.py --max-drop 1% --timeout 10m; "
    "as fast as possible: autoquant search model.pt --task task.py --objective latency; to be "
    "deployed in bfloat16: autoquant search model.pt --task task.py --rest bf16"
)
@click.argument("model", type=click.Path())
@task_options
@click.option(
    "--space",
    metavar="NAME|FILE",
    default="default",
    show_default=True,
    help="Search space: default, int8, weight_only, cnn, transformer, rnn, full, or a YAML file.",
)
@click.option(
    "--max-drop",
    metavar="DROP",
    help="Most that the metric may lose. 1% is one point of a fraction such as accuracy, and 1% of "
    "the float value of any other metric; a plain number is in the metric's unit. Default: 1%, "
    "or none with a budget.",
)
@click.option(
    "--bits",
    type=float,
    metavar="B",
    help="Budget: average bits of all weights (16 in float); best metric within it.",
)
@click.option(
    "--size", metavar="N%", help="Budget: model size, as a share of the float one (25%) or 4MB."
)
@click.option(
    "--max-latency",
    metavar="TIME",
    help="Most time for one batch of the task's data: 20ms, 0.5s, 300us or, as a share of the "
    "float model's, 60%. Each layer is timed on the device itself, under every choice.",
)
@click.option(
    "--objective",
    metavar="NAME",
    help="What is made small under --max-drop: size, bits, latency or bitops "
    "(multiplications x weight bits x activation bits). Default: size.",
)
@click.option(
    "--trials",
    type=Trials(),
    metavar="N|auto",
    help="Trials in all; auto: until more would gain too little. Default: auto, but at most 60, or "
    "as --timeout allows.",
)
@click.option(
    "--timeout",
    metavar="TIME",
    help="Be done after this long (90s, 10m, 2h), counted from the start of the command, with the "
    "profile and the confirmation; what there was no time for is said.",
)
@click.option(
    "--sampler",
    metavar="NAME",
    default="knapsack",
    show_default=True,
    help="knapsack, tpe, nsga2, gp, cmaes, qmc or random.",
)
@click.option("--study", metavar="NAME", help="Name of the study. Default: the model's.")
@storage_option
@device_option
@backend_option("auto")
@click.option(
    "--prune/--no-prune",
    default=True,
    show_default=True,
    help="Stop candidates early that surely can't win, by a paired test over the samples so far.",
)
@click.option(
    "--tune",
    metavar="HOW",
    default="auto",
    show_default=True,
    help="After the trials make good recipes better, on unlabelled data: layer fits the layers to "
    "each other, block trains one block after another after that, full all layers together, none "
    "does nothing; auto fits layers, and trains them together, where it is no more work than twice "
    "the trials.",
)
@click.option(
    "--rest",
    metavar="FORMAT",
    default="float32",
    show_default=True,
    help="Format of all that stays in float (attention, norms, layers that are not quantized): "
    "float32, or bf16, as models are deployed on many GPUs. What that costs counts as drop.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the search.")
@memory_option
@log_option
@click.option(
    "--out",
    metavar="DIR",
    default=".",
    show_default=True,
    type=OutputFolder(),
    help="Folder that recipe.yaml goes to.",
)
@json_option
def command(
    model: str,
    task: str | None,
    data: str | None,
    metric: str | None,
    trust_pickle: bool,
    space: str,
    max_drop: str | None,
    bits: float | None,
    size: str | None,
    max_latency: str | None,
    objective: str | None,
    trials: int | str | None,
    timeout: str | None,
    sampler: str,
    study: str | None,
    storage: str | None,
    device: str,
    backend: str,
    prune: bool,
    tune: str,
    rest: str,
    seed: int,
    memory: str | None,
    log: str | None,
    out: str,
    as_json: bool,
) -> int:
    """Find the best recipe for MODEL and write it to DIR/recipe.yaml.

    The best recipe is the smallest model whose metric drops no more than --max-drop or, with a
    budget (--bits or --size), the best metric within it. --max-latency keeps either fast enough,
    and --objective makes something else than the size small. The study is kept after every trial:
    Ctrl-C, a crash or a kill lose at most the trial in flight, and `autoquant resume` goes on.

    The exit status says whether the maximum drop is kept: 0 PASS (or a budget and no --max-drop),
    3 FAIL, 4 NOT PROVEN.
    """
    from autoquant.errors import UserError
    from autoquant.spec.options import AUTO, FULL, Options, check

    # All that is cheap to check comes before what takes seconds to import.
    limit = seconds(timeout)
    options = Options(
        max_drop=max_drop,
        bits=bits,
        size=size,
        trials=trials,
        timeout=limit,
        sampler=sampler,
        device=device,
        seed=seed,
        max_latency=max_latency,
        objective=objective,
        backend=backend,
        prune=prune,
        memory=memory,
        tune=tune,
        rest=rest,
    )
    check(options)
    if task is not None and data is not None:
        raise UserError("--task and --data are two sources of data; give one")
    if metric is not None and data is None:
        raise UserError("--metric goes with --data; a task file names its own metric")
    if not Path(model).exists():
        raise UserError(f"{model}: no such file")
    sources = (model, task, data, metric, trust_pickle, space)
    if log is not None and tune not in (FULL, AUTO):
        raise UserError(
            f"--log is of training all layers together: give --tune {FULL} or {AUTO} too"
        )
    result = run(*sources, options, study, storage, out, as_json, log)
    return verdict_status(result.verdict)


def run(
    model: str,
    task: str | None,
    data: str | None,
    metric: str | None,
    trust_pickle: bool,
    space: str,
    options: Any,
    study: str | None,
    storage: str | None,
    out: str,
    as_json: bool,
    log: str | None = None,
) -> SearchResult:
    """Search, drawing progress on standard error and the result on standard output.

    Scalars of training go to the folder ``log``.
    """
    from autoquant.spec.space import SearchSpace

    chosen = SearchSpace.load(space)
    scalars = log_folder(log)
    with loading():
        from autoquant.cli.progress import searching
        from autoquant.optimize.run import Request, start
        from autoquant.study.source import Source, space_file
        from autoquant.study.storage import Storage

    # Before the task runs, which may change the working directory.
    place, folder = Storage.parse(storage), Path(os.path.abspath(out))
    source = Source(model, task, data, metric, trust_pickle, space_file(space))
    with searching(as_json, storage, scalars) as reporter:
        loaded_task = source.load_task()
        request = Request(
            loaded=source.load(loaded_task),
            task=loaded_task,
            source=source,
            space=chosen,
            options=options,
            study=study,
            storage=place,
            out=folder,
            began=click.get_current_context().find_root().obj,
        )
        result = start(request, reporter)
    reporter.finish(result)
    return result
