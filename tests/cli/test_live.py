"""What a person who watches training sees, and what a log and TensorBoard are given."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from autoquant.cli import live, progress
from autoquant.libraries import library
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.training.train import Step
from autoquant.training.trainer import Trainer
from tests.cli.test_tune import RECIPE, TUNE, WORDS, content

FULL = ("--method", "full", "--steps", "40", "--rate", "10")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def plain(project):
    """Return the project with a recipe by hand."""
    (project / "r.yaml").write_text(RECIPE)
    return project


class Screen(io.TextIOWrapper):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


class Terminal:
    """A terminal that standard error is said to be."""

    def __init__(self, encoding="utf-8", width=100):
        self.bytes = io.BytesIO()
        self.file = Screen(self.bytes, encoding, write_through=True)
        self.encoding, self.width = encoding, width

    def console(self, **words):
        words = {k: v for k, v in words.items() if k != "stderr"}
        screen = {"file": self.file, "force_terminal": True, "width": self.width, "height": 40}
        return Console(**words, **screen, _environ={"TERM": "xterm"})

    @property
    def raw(self):
        return self.bytes.getvalue().decode(self.encoding)

    @property
    def lines(self):
        """All lines ever drawn, without what moves the cursor."""
        return CONTROL.sub("\n", STYLE.sub("", self.raw)).replace("\r", "\n").split("\n")


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that has standard error be a terminal."""

    def make(**words):
        found = Terminal(**words)
        for module in (live, progress):
            monkeypatch.setattr(module, "Console", found.console)
        return found

    return make


@pytest.fixture
def poisoned(monkeypatch):
    """Have the loss of step 22 be no number."""
    own = Trainer._gradients

    def gradients(self, number):
        loss, found = own(self, number)
        return (loss * math.nan if number == 22 else loss), found

    monkeypatch.setattr(Trainer, "_gradients", gradients)


@pytest.mark.usefixtures("poisoned")
def test_a_terminal_shows_a_bar_and_the_last_state(plain, cli, terminal):
    screen = terminal()
    result = cli(*TUNE, *FULL)
    assert (result.status, result.err) == (0, "")
    assert screen.raw.count(HIDE) == screen.raw.count(SHOW) == 1
    last = screen.raw[screen.raw.rindex("training") :]
    bar, loss, held, rates, weights = CONTROL.sub("", last).split("\n")[:5]
    assert "40/40" in bar
    assert "0 s left" in bar
    assert re.match(r"loss \d\.\d+ [▁-█]{5}x[▁-█]{4}$", loss.strip())
    assert re.match(r"on the search data \d\.\d+ [▁-█]{10} best \d\.\d+$", held.strip())
    assert re.match(r"accuracy 0\.\d+; rates \S+ to \S+ \(10 of 10 lowered, 0 stopped\)", rates)
    assert "of the weights frozen" in weights
    assert "rounded to 0" in weights
    found = [line for line in screen.lines if "the loss is not finite" in line]
    assert found == [
        "step 22: the loss is not finite; back to the last check, and all rates are halved"
    ]


def test_a_log_has_a_line_a_check_and_nothing_that_moves(plain, cli):
    result = cli(*TUNE, *FULL)
    assert (result.status, result.err) == (0, "")
    assert "\x1b" not in result.out
    lines = [line for line in result.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 10
    for i, line in enumerate(lines, 1):
        assert line.startswith(f"step {4 * i} of 40: loss ")
        assert re.search(r"; accuracy 0\.\d+; \d+\.\d\d% of the weights frozen, ", line)


@pytest.mark.usefixtures("poisoned")
def test_a_log_has_findings_after_their_check(plain, cli):
    lines = cli(*TUNE, *FULL).out.splitlines()
    (place,) = (i for i, line in enumerate(lines) if "not finite" in line)
    assert lines[place].startswith("  step 22: ")
    assert lines[place - 1].startswith("step 24 of 40: ")


def test_standard_output_that_is_a_file_has_the_lines_beside_a_terminal(plain, cli, terminal):
    screen = terminal()
    result = cli(*TUNE, *FULL)
    assert "40/40" in screen.raw
    assert "step 40 of 40: " in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize("drawn", [False, True])
def test_json_is_the_object_alone(plain, cli, terminal, drawn):
    screen = terminal() if drawn else None
    result = cli(*TUNE, *FULL, "--json")
    assert result.done
    (line,) = result.out.splitlines()
    assert json.loads(line)["path"] == str(plain / "tuned.yaml")
    if screen is None:
        assert result.err == ""
    else:
        assert "40/40" in screen.raw


def test_a_terminal_without_such_signs_is_given_ascii(plain, cli, terminal):
    screen = terminal(encoding="ascii")
    assert cli(*TUNE, *FULL).done  # what can't be encoded would raise
    assert "40/40" in screen.raw
    assert re.search(r"on the search data \S+ [_.\-=+*#@]{10} best ", screen.raw)


@pytest.mark.parametrize("width", [30, 60])
def test_lines_are_cut_to_a_narrow_terminal(plain, cli, terminal, width):
    screen = terminal(width=width)
    assert cli(*TUNE, *FULL).done
    assert max(map(len, screen.lines)) <= width


def test_a_race_is_shown_before_training(plain, cli, terminal, monkeypatch):
    monkeypatch.setattr(live, "A_SECOND", 500.0)
    screen = terminal()
    assert cli(*TUNE, *FULL, "--rivals", "2").done
    text = CONTROL.sub("", screen.raw)
    assert "/40" in text[text.rindex("rates race") :]


def test_the_time_left_is_told_by_the_steps_that_were_taken_here(terminal, monkeypatch):
    """Those before training was interrupted took no time of it."""
    screen, now = terminal(), iter(range(0, 1000, 10))
    with monkeypatch.context() as patch, live.view_of(False) as view:
        patch.setattr(live, "monotonic", lambda: next(now))
        for number in (31, 32, 33):
            view.step(Step(number, 40, 0.5))
    last = screen.lines[-5:]
    assert any("33/40" in line and "70 s left" in line for line in last), last
    assert any("loss 0.5000; not yet measured on the search data" in line for line in last)


def test_colours_that_are_forced_make_no_terminal_of_a_log(plain, cli, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = cli(*TUNE, *FULL)
    assert result.out.count("\nstep ") == 10
    assert "\x1b" not in result.out + result.err


def test_layers_that_are_fitted_alone_draw_nothing(plain, cli, terminal):
    screen = terminal()
    assert cli(*TUNE).done
    assert screen.raw == ""


def test_a_dumb_terminal_is_given_lines(plain, cli, monkeypatch):
    def console(**words):
        del words["stderr"]
        file = Screen(io.BytesIO())
        return Console(**words, file=file, force_terminal=True, _environ={"TERM": "dumb"})

    monkeypatch.setattr(live, "Console", console)
    assert "step 40 of 40: " in cli(*TUNE, *FULL).out


def killed_at(at):
    """Return a patch under which training is interrupted at a step."""
    step = Trainer.step
    patch = pytest.MonkeyPatch()

    def killed(self):
        if self.done == at:
            raise KeyboardInterrupt
        step(self)

    patch.setattr(Trainer, "step", killed)
    return patch


def test_ctrl_c_gives_the_terminal_back(plain, cli, terminal):
    screen = terminal()
    patch = killed_at(30)
    result = cli(*TUNE, *FULL)
    patch.undo()
    assert result.status == 130
    assert screen.raw.count(HIDE) == screen.raw.count(SHOW) == 1
    assert (plain / "tuned.training.safetensors").exists()
    stdout = sys.stdout
    assert cli(*TUNE, *FULL).done
    assert sys.stdout is stdout
    assert screen.raw.count(HIDE) == screen.raw.count(SHOW) == 2


@pytest.mark.slow
def test_ctrl_c_on_a_real_terminal(plain):
    pty = pytest.importorskip("pty")
    main, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "autoquant", *TUNE, "--method", "full", "--steps", "1000000"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    found, ends = b"", time.monotonic() + 120
    while b"/1000000" not in found and time.monotonic() < ends:
        found += os.read(main, 4096)
    child.send_signal(signal.SIGINT)
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    assert child.wait(30) == 130
    text = found.decode()
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert text.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in text
    os.close(main)


def test_a_search_shows_training_below_its_bar(plain, cli, terminal):
    screen = terminal(width=160)
    words = ("--trials", 6, "--bits", "3", "--tune", "full")
    result = cli("search", *WORDS, *words)
    assert result.done, result.err
    assert "on the search data" in screen.raw
    assert re.search(r"trial \d+ \d+/400", screen.raw)
    assert re.search(r"accuracy 0\.\d+; rates ", screen.raw)
    assert screen.raw.count(HIDE) == screen.raw.count(SHOW)


@pytest.mark.usefixtures("poisoned")
def test_a_search_tells_a_log_what_was_found(plain, cli):
    words = ("--trials", 6, "--bits", "3", "--tune", "full")
    result = cli("search", *WORDS, *words)
    found = [line for line in result.err.splitlines() if line.startswith("training, ")]
    assert found[0].startswith("training, step 22: the loss is not finite; back to")
    assert len(set(found)) == len(found)


def read(folder):
    """Return what TensorBoard itself reads: tag → {step: value}."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), {"scalars": 0})
    found.Reload()
    tags = found.Tags()["scalars"]
    rows = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}
    assert all(len(dict(row)) == len(row) for row in rows.values())  # no step is there twice
    return {tag: dict(row) for tag, row in rows.items()}


logged = functools.partial(pytest.approx, rel=1e-3, abs=1e-4)


def test_scalars_are_what_the_lines_say(plain, cli):
    pytest.importorskip("tensorboard")
    (plain / "task.py").write_text("import os\nos.chdir('/')\n" + (plain / "task.py").read_text())
    result = cli(
        "tune", "r.yaml", str(plain / "model.pt"), "--task", "task.py", *FULL, "--log", "a/logs"
    )
    assert (result.status, result.err) == (0, "")
    scalars = read(plain / "a" / "logs")
    pattern = re.compile(
        r"step (\d+) of 40: loss (\S+), on the search data (\S+), best (\S+); accuracy (\S+); "
        r"(\S+)% of the weights frozen, (\S+)% rounded to 0"
    )
    rows = [m.groups() for line in result.out.splitlines() if (m := pattern.match(line))]
    assert len(rows) == 10
    for step, loss, held, best, metric, frozen, lost in rows:
        told = {
            "loss/mean": float(loss),
            "loss/held": float(held),
            "loss/best": float(best),
            "metric/accuracy": float(metric),
            "weights/frozen": float(frozen) / 100,
            "weights/lost": float(lost) / 100,
        }
        assert {tag: scalars[tag][int(step)] for tag in told} == {
            tag: logged(value) for tag, value in told.items()
        }
        mean = [scalars["loss/step"][n] for n in range(int(step) - 3, int(step) + 1)]
        assert sum(mean) / 4 == logged(float(loss))
    assert set(scalars["loss/step"]) == set(range(1, 41))
    for name in "024":
        assert scalars[f"rate_weight/{name}"] == scalars["rate/weight"]
    usual = Distillation().weight_rate
    assert usual < max(scalars["rate/weight"].values()) <= 10 * usual * (1 + 1e-6)


def test_scalars_of_training_that_was_killed_and_goes_on(plain, cli):
    pytest.importorskip("tensorboard")
    assert cli(*TUNE, *FULL, "-o", "whole.yaml", "--log", "whole").done
    patch = killed_at(30)
    assert cli(*TUNE, *FULL, "--log", "logs").status == 130
    patch.undo()
    assert max(read(plain / "logs")["loss/step"]) == 30
    assert cli(*TUNE, *FULL, "--log", "logs").done
    assert len(list((plain / "logs").iterdir())) == 2
    assert read(plain / "logs") == read(plain / "whole")


def test_scalars_of_a_search(plain, cli):
    pytest.importorskip("tensorboard")
    words = ("--trials", 6, "--bits", "3", "--tune", "full", "--log", "logs")
    result = cli("search", *WORDS, *words, "--json")
    assert result.done, result.err
    scalars = read(plain / "logs")
    assert set(scalars["loss/step"]) == set(range(1, max(scalars["loss/step"]) + 1))
    assert len(scalars["metric/accuracy"]) > 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            (*TUNE, "--log", "logs"),
            "--log is of training all layers together: give --method full too",
        ),
        ((*TUNE, *FULL, "--log", "r.yaml"), "r.yaml is no folder"),
        ((*TUNE, *FULL, "--log", "r.yaml/logs"), "r.yaml is no folder"),
        (("search", *WORDS, "--log", "r.yaml"), "r.yaml is no folder"),
        (("search", *WORDS, "--tune", "layer", "--log", "l"), "give --tune full or auto too"),
        (("search", *WORDS, "--tune", "block", "--log", "l"), "give --tune full or auto too"),
    ],
)
def test_logs_that_cannot_be(plain, cli, command, said):
    if "no folder" in said:
        pytest.importorskip("tensorboard")
    before = content(plain)
    result = cli(*command)
    assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1), result
    assert said in result.err
    assert content(plain) == before


@pytest.mark.parametrize(
    "command",
    [(*TUNE, *FULL), ("search", *WORDS), ("resume", "s")],
    ids=["tune", "search", "resume"],
)
def test_without_tensorboard_it_says_what_to_install(plain, cli, monkeypatch, command):
    for name in [n for n in sys.modules if n.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    library.cache_clear()
    before = content(plain)
    result = cli(*command, "--log", "logs")
    assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1), result
    assert "pip install tensorboard" in result.err
    assert content(plain) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_costs_the_log_alone(plain, cli, monkeypatch):
    pytest.importorskip("tensorboard")
    from autoquant.report.scalars import ScalarLog

    opened = ScalarLog._open

    def full(self, number):
        opened(self, number)
        self._file.close()
        self._file = self._records._writer = io.BufferedWriter(io.FileIO("/dev/full", "w"))

    monkeypatch.setattr(ScalarLog, "_open", full)
    result = cli(*TUNE, *FULL, "--log", "logs")
    assert result.status == 0
    (line,) = result.err.splitlines()
    assert "No space left on device; no more is logged" in line
    assert (plain / "tuned.yaml").exists()
