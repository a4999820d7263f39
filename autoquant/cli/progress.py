"""Progress of a search on standard error, and its result on standard output."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from autoquant.cli.failures import Interrupted
from autoquant.cli.live import TrainingLines
from autoquant.cli.output import emit
from autoquant.libraries import unchanged
from autoquant.models.usercode import interruptible
from autoquant.optimize.loop import Stop
from autoquant.optimize.result import SearchResult
from autoquant.report.scalars import ScalarLog
from autoquant.report.tables import (
    console,
    describe_bits,
    latency_lines,
    layers_table,
    megabytes,
    plain_number,
    preflight_lines,
)
from autoquant.report.verdicts import reported_line, verdict_line
from autoquant.session.preflight import Preflight
from autoquant.spec.costs import describe_seconds
from autoquant.spec.goal import Goal
from autoquant.study.ledger import REASON
from autoquant.study.opening import RECIPE_FILE
from autoquant.study.trials import measured
from autoquant.study.tuned import TUNED, searched
from autoquant.training.guard import Finding
from autoquant.training.train import Moment, Step
from autoquant.training.turn import BlockDone

with unchanged():
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text


class _SearchProgress(Progress):
    """A bar, and below it how training goes, while a trial is trained."""

    training: TrainingLines | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is drawn."""
        yield from super().get_renderables()
        if self.training is not None:
            yield self.training


class ConsoleReporter:
    """Draws a bar with the best recipe so far, its drop, its size and the time left.

    ``log`` is where scalars of training go.
    """

    def __init__(self, as_json: bool, storage: str | None, log: Path | None = None) -> None:
        self.as_json = as_json
        self.storage = storage
        self.study: str | None = None
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.log = None if log is None else ScalarLog(log, self._warn)
        self._findings: set[Finding] = set()
        self.progress = _SearchProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.bar: Any = None
        self.stop = Stop(None)
        self.began = 0.0
        self.done = self.before = 0

    def say(self, text: str) -> None:
        """Name the stage that began, to a person who watches: a log wants results."""
        if self.console.is_terminal:
            self.console.print(Text(f"{text} …", style="dim"))

    def preflight(self, found: Preflight) -> None:
        """Print what the preflight found."""
        for line in preflight_lines(found):
            self.console.print(line, markup=False)

    def begin(self, study: str, goal: Goal, done: Sequence[FrozenTrial], stop: Stop) -> None:
        """Start the bar."""
        self.study = study
        self.stop = stop
        self.began = time.monotonic()
        self.done = self.before = len(searched(done))
        had = f", {len(done)} trials already" if done else ""
        self.console.print(f"study {study}{had}", markup=False)
        self.bar = self.progress.add_task(
            "searching", total=stop.trials, completed=len(done), best="", left=""
        )
        self.progress.start()

    def step(self, number: int, done: int, total: int) -> None:
        """Show how far the trial in flight is."""
        if self.bar is not None:
            self.progress.update(self.bar, description=f"trial {number} {done}/{total}")

    def trained(self, step: Step) -> None:
        """Show a step of training below the bar, which ``step`` moves."""
        if self.progress.training is None:
            self.progress.training = TrainingLines()
        self.progress.training.step(step)
        self._print(step.findings)
        if self.log is not None:
            self.log.step(step)

    def checked(self, moment: Moment) -> None:
        """Show a check of training."""
        if self.progress.training is not None:
            self.progress.training.check(moment)
        self._print(moment.findings)
        if self.log is not None:
            self.log.check(moment)

    def block(self, done: BlockDone) -> None:
        """Show what went wrong in a block: how far it is, ``step`` shows."""
        self._print(done.findings)

    def _print(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            if finding not in self._findings:
                self._findings.add(finding)
                self.console.print(f"training, {finding}", markup=False)

    def _warn(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        """Take the bar away, and write what is left of scalars."""
        self.progress.stop()
        if self.log is not None:
            self.log.close()

    def trial(self, trial: FrozenTrial, best: FrozenTrial | None) -> None:
        """Show a finished trial."""
        self.progress.training = None
        self.done += TUNED not in trial.user_attrs  # those come on top of what was asked for
        text = "no recipe yet"
        m = None if best is None else measured(best)
        if best is not None and m is not None:
            text = (
                f"best #{best.number}: drop {m['drop']:.4g}, {m['average_weight_bits']:.2f} bits, "
                f"{megabytes(m['size_bytes'])}"
            )
            if "latency" in m:
                text += f", {describe_seconds(m['latency'])}"
        self.progress.update(self.bar, completed=self.done, best=text, left=self._left())
        if trial.state == TrialState.FAIL:
            self.console.print(
                f"trial {trial.number} failed: {trial.user_attrs[REASON]}", markup=False
            )
        elif TUNED in trial.user_attrs:
            m = measured(trial)
            assert m is not None
            self.console.print(
                f"trial {trial.number}, tuned: drop {m['drop']:.4g}, "
                f"{m['average_weight_bits']:.2f} bits",
                markup=False,
            )
        elif not self.console.is_terminal and self.done % 10 == 0:
            self.console.print(f"{self.done} trials, {text}", markup=False)

    def _left(self) -> str:
        spent = time.monotonic() - self.began
        found = []
        if self.stop.schedule is not None:
            found.append(self.stop.schedule.for_trials)
        if self.stop.trials is not None and self.done > self.before:
            found.append(spent / (self.done - self.before) * (self.stop.trials - self.done))
        if not found:
            return ""
        left = max(min(found), 0.0)
        return f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"

    def finish(self, result: SearchResult) -> None:
        """Print the result: a table for people, or one JSON object."""
        if self.as_json:
            emit(result.plain())
            return
        out = console()
        evidence = result.recipe.evidence
        assert evidence is not None
        out.print(layers_table(result.recipe))
        out.print(reported_line(evidence), markup=False)
        if evidence.verdict is not None:
            out.print(verdict_line(evidence.verdict, evidence.metric), markup=False)
        out.print(
            f"{describe_bits(evidence.average_weight_bits, evidence.of_layers)}, "
            f"{megabytes(evidence.size_bytes)} of {megabytes(evidence.float_size_bytes)} "
            f"({evidence.size_bytes / evidence.float_size_bytes:.1%})",
            markup=False,
        )
        if evidence.latency is not None:
            lines = latency_lines(evidence.latency, result.latency_checks, result.max_latency)
            for line in lines:
                out.print(line, markup=False)
        if evidence.bit_operations is not None and evidence.float_bit_operations:
            share = evidence.bit_operations / evidence.float_bit_operations
            out.print(
                f"{evidence.bit_operations:.3g} bit operations, {share:.1%} of the float model's",
                markup=False,
            )
        if not result.holds:
            out.print(
                f"no recipe kept the drop within {plain_number(result.max_drop)} on the confirm "
                "data; this one comes nearest",
                markup=False,
            )
        trials = ", ".join(f"{n} {state}" for state, n in result.trials.items())
        out.print(f"study {result.study}: {trials}; {result.seconds:.1f} s on {result.device}")
        if result.tuned:
            best = result.recipe.reconstruction
            chosen = "none of them is the best" if best is None else f"the best one is ({best})"
            out.print(f"tuned: {result.tuned} trials; {chosen}", markup=False)
        for note in result.notes:
            out.print(note, markup=False)
        if result.done is not None:
            out.print(result.done, markup=False)
        for what in result.skipped:
            out.print(f"skipped for --timeout: {what}", markup=False)
        if result.fidelity is not None:
            f = result.fidelity
            how = f"gradients on {f.samples} samples" if f.samples else "damage at the layers"
            out.print(
                f"profile ({how}): predicted and measured losses of {f.trials} trials agree in "
                f"rank by {f.spearman:.2f} (Spearman)"
            )
        if result.speed.candidates:
            layers = ", ".join(f"{share:.0%} {by}" for by, share in result.speed.shares.items())
            out.print(
                f"{result.speed.per_second:.2f} candidates a second; layers computed in: {layers}"
            )
        if result.recipe_path.name != RECIPE_FILE:
            own = result.recipe_path.with_name(RECIPE_FILE)
            out.print(f"note: {own} was edited meanwhile, and is left as it is", markup=False)
        out.print(f"recipe: {result.recipe_path}", markup=False)


@contextlib.contextmanager
def searching(
    as_json: bool, storage: str | None, log: Path | None = None
) -> Iterator[ConsoleReporter]:
    """Give a reporter; on Ctrl-C or SIGTERM say how to go on, and exit with status 130."""
    reporter = ConsoleReporter(as_json, storage, log)
    try:
        with interruptible(signal.SIGINT, signal.SIGTERM):
            yield reporter
    except KeyboardInterrupt:
        reporter.progress.stop()
        if reporter.study is None:
            raise Interrupted("nothing was begun") from None
        words = ["autoquant", "resume", reporter.study]
        words += [] if storage is None else ["--storage", storage]
        raise Interrupted(
            f"every finished trial is kept; go on with: {shlex.join(words)}"
        ) from None
    finally:
        reporter.close()
