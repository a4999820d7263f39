"""How training goes: drawn on a terminal while it lasts, or one line a check where there is none.

It is drawn on standard error, as a search's progress is, so that standard output can go to a file.
What is printed meanwhile, by the user's code too, appears above it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

import click

from autoquant.libraries import unchanged
from autoquant.report.training import block_line, live_lines, moment_line
from autoquant.training.guard import Finding
from autoquant.training.train import Moment, Step
from autoquant.training.turn import BlockDone

with unchanged():
    from rich.console import Console, ConsoleOptions, Group, RenderResult
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
    from rich.text import Text

RECENT = 50
"""Steps whose mean loss is shown."""
A_SECOND = 4.0
"""How often it is drawn anew, a second."""


class TrainingLines:
    """What is drawn below the bar; the last state of training."""

    def __init__(self) -> None:
        # Never changed in place: another thread draws.
        self._losses: tuple[float, ...] = ()
        self._moments: tuple[Moment, ...] = ()

    def step(self, step: Step) -> None:
        """Take in a step."""
        self._losses = (*self._losses, step.loss)[-RECENT:]

    def check(self, moment: Moment) -> None:
        """Take in a check."""
        self._moments = (*self._moments, moment)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in live_lines(self._moments, self._losses, ascii_only=options.ascii_only):
            # Lines that break would have to be drawn over by their number.
            yield Text(line, no_wrap=True, overflow="crop")


class Hearer(Protocol):
    """Hears how training goes."""

    def step(self, step: Step) -> None:
        """Take in a step of training."""

    def check(self, moment: Moment) -> None:
        """Take in a check."""


@dataclass(frozen=True)
class Several:
    """Tells each of ``hearers`` in turn."""

    hearers: tuple[Hearer, ...]

    def step(self, step: Step) -> None:
        """Tell of a step."""
        for hearer in self.hearers:
            hearer.step(step)

    def check(self, moment: Moment) -> None:
        """Tell of a check."""
        for hearer in self.hearers:
            hearer.check(moment)


class View(Hearer, Protocol):
    """Shows what ``tune`` says, and how training goes."""

    def say(self, text: str) -> None:
        """Name the stage that began."""

    def block(self, done: BlockDone) -> None:
        """Take in a block that was trained."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def view_of(as_json: bool) -> View:
    """Return the view of this process: drawn where standard error is a terminal that can
    be drawn on, else lines.

    Under --json no lines are printed. Where standard output alone is not a terminal, it has them
    beside what is drawn.
    """
    console = Console(stderr=True, highlight=False)
    # FORCE_COLOR, which many a CI sets, has rich take a log for a terminal.
    drawn = console.is_interactive and console.file.isatty()
    return Drawn(console, as_json) if drawn else Lines(as_json)


class Lines:
    """Prints one line a check on standard output, as a log takes it; nothing under --json."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def say(self, text: str) -> None:
        """Print it."""
        if not self._as_json:
            click.echo(text)

    def step(self, step: Step) -> None:
        """Do nothing: a log wants results."""

    def check(self, moment: Moment) -> None:
        """Print a check, and what was found since the one before."""
        self.say(moment_line(moment))
        for finding in moment.findings:
            self.say(f"  {finding}")

    def block(self, done: BlockDone) -> None:
        """Print how a block came out, and what was found in it."""
        self.say(block_line(done))
        for finding in done.findings:
            self.say(f"  {finding}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing."""


class Drawn:
    """Draws a bar with the time left, and the last state below it; findings stay above."""

    def __init__(self, console: Console, as_json: bool) -> None:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._said = Lines(as_json)
        self._to_log = not on_terminal
        self._lines = TrainingLines()
        self._seen: set[Finding] = set()
        self._first: tuple[int, float] | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._bar: TaskID | None = None
        self._live = Live(
            Group(self._progress, self._lines),
            console=console,
            refresh_per_second=A_SECOND,
            redirect_stdout=on_terminal,  # what goes to a file stays there
        )

    def say(self, text: str) -> None:
        """Print it, below what was drawn so far."""
        self._live.stop()
        self._said.say(text)

    def step(self, step: Step) -> None:
        """Move the bar; it has no end while sets of rates race."""
        self._lines.step(step)
        racing = step.number == 0
        if self._bar is None:
            self._bar = self._progress.add_task("", total=None, left="")
        self._live.start()
        if self._first is None and not racing:
            self._first = step.number, monotonic()
        self._progress.update(
            self._bar,
            description="rates race" if racing else "training",
            total=None if racing else step.steps,
            completed=step.number,
            left="" if racing else self._left(step),
        )
        self._print(step.findings)

    def _left(self, step: Step) -> str:
        """Return about how long the steps that are left take, checks included; "" at first."""
        assert self._first is not None
        first, began = self._first
        done = step.number - first
        if not done:
            return ""
        left = (monotonic() - began) / done * (step.steps - step.number)
        return f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"

    def check(self, moment: Moment) -> None:
        """Show a check."""
        self._lines.check(moment)
        self._print(moment.findings)
        if self._to_log:
            self._said.check(moment)

    def block(self, done: BlockDone) -> None:
        """Move the bar by a block, and say above it how that came out."""
        if self._bar is None:
            self._bar = self._progress.add_task("blocks", total=done.count, left="")
        self._live.start()
        self._progress.update(self._bar, total=done.count, completed=done.number)
        self._live.console.print(Text(block_line(done)))
        self._print(done.findings)
        if self._to_log:
            self._said.block(done)

    def _print(self, findings: tuple[Finding, ...]) -> None:
        for finding in findings:
            if finding not in self._seen:
                self._seen.add(finding)
                self._live.console.print(Text(str(finding)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on the terminal, and the cursor as it was."""
        self._live.stop()
