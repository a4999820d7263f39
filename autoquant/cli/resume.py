"""``autoquant resume``."""

from __future__ import annotations

import click

from autoquant.cli.failures import verdict_status
from autoquant.cli.loading import loading
from autoquant.cli.options import (
    Trials,
    json_option,
    log_folder,
    log_option,
    memory_option,
    seconds,
    storage_option,
)


@click.command(
    epilog="Example: autoquant resume mobilenet --trials 200; after the model was moved: "
    "autoquant resume mobilenet --model models/mobilenet.pt"
)
@click.argument("study", required=False)
@storage_option
@click.option(
    "--trials",
    type=Trials(),
    metavar="N|auto",
    help="Trials in all, instead of what the study was given; auto: until more gain too little.",
)
@click.option(
    "--timeout",
    metavar="TIME",
    help="Be done after this long (90s, 10m, 2h), counted from the start of the command, with the "
    "profile and the confirmation; what there was no time for is said.",
)
@memory_option
@log_option
@click.option(
    "--model", metavar="FILE", type=click.Path(), help="Where the model is now; the study keeps it."
)
@click.option("--task", metavar="TASK.py", type=click.Path(), help="Where the task file is now.")
@click.option("--data", metavar="FILE", type=click.Path(), help="Where the data file is now.")
@click.option("--out", metavar="DIR", type=click.Path(), help="Where recipe.yaml goes from now on.")
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Go on although the model, the task, its data, the space or autoquant has changed since "
    "the study began.",
)
@click.option(
    "--worker",
    type=click.IntRange(0, 999),
    default=0,
    show_default=True,
    help="Number of this process, where several work on one study at a time.",
)
@json_option
def command(
    study: str | None,
    storage: str | None,
    trials: int | str | None,
    timeout: str | None,
    memory: str | None,
    log: str | None,
    model: str | None,
    task: str | None,
    data: str | None,
    out: str | None,
    accept_changes: bool,
    worker: int,
    as_json: bool,
) -> int:
    """Go on with STUDY (default: the newest) from its storage alone.

    The study knows its model, task, space and options. It gives the same trials as a study that
    was never interrupted. A project that was moved or copied as a whole finds its own files; what
    lies elsewhere now is named by --model, --task or --data.

    Several processes, on one machine or on several that share a database, may work on a study at
    the same time: `autoquant resume STUDY --worker 1` beside the search that began it, and so on.
    Each profiles the model for itself, learns from the trials of all, and proposes others.

    The exit status is that of a search: 0 PASS, 3 FAIL, 4 NOT PROVEN.
    """
    from autoquant.errors import UserError

    if task is not None and data is not None:
        raise UserError("--task and --data are two sources of data; give one")
    scalars = log_folder(log)
    with loading():
        from autoquant.cli.progress import searching
        from autoquant.optimize.resume import resume

    limit = seconds(timeout)
    with searching(as_json, storage, scalars) as reporter:
        result = resume(
            study,
            storage=storage,
            trials=trials,
            timeout=limit,
            memory=memory,
            model=model,
            task=task,
            data=data,
            out=out,
            accept_changes=accept_changes,
            reporter=reporter,
            worker=worker,
            began=click.get_current_context().find_root().obj,
        )
    reporter.finish(result)
    return verdict_status(result.verdict)
