"""Whatever the user's own code raises is that code's failure, named; only Ctrl-C ends a search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

import autoquant
from autoquant.errors import UserError
from autoquant.models.task import load_task
from autoquant.study.ledger import Ledger

RAISED = {
    "exit 0": ("SystemExit(0)", "SystemExit: 0"),
    "exit without a status": ("SystemExit()", "SystemExit"),
    "generator": ("GeneratorExit()", "GeneratorExit"),
    "its own interrupt": ("KeyboardInterrupt()", "KeyboardInterrupt"),
    "a base of its own": ("Own('stop')", "Own: stop"),
    "unprintable": ("Unprintable()", "Unprintable"),
}
PLACES = {
    "import": ("", "raise {}\n", "task.py: failed to load: "),
    "load_model": ("def load_model(path):", "    raise {}\n", "load_model() raised "),
    "calibration data": (
        "def calibration_data():",
        "    raise {}\n",
        "task.py: calibration_data() failed: ",
    ),
    "a calibration batch": (
        "def calibration_data():",
        "    yield data()[0][:40]\n    raise {}\n",
        "task.py: calibration_data, batch 2 failed: ",
    ),
    "an evaluation batch": (
        "def evaluation_data():",
        "    yield tuple(part[80:120] for part in data())\n    raise {}\n",
        "task.py: evaluation_data, batch 2 failed: ",
    ),
    "forward": (
        "",
        "def forward(model, x):\n    raise {}\n",
        "the float model fails on the task's data: ",
    ),
    "metric": (
        "",
        "def metric(outputs, targets):\n    raise {}\n",
        "metric metric failed: ",
    ),
    "evaluate": (
        "",
        "del evaluation_data, metric\ndef evaluate(model):\n    raise {}\n",
        "evaluate failed: ",
    ),
}
OWN = """
class Own(BaseException):
    pass

class Unprintable(BaseException):
    def __str__(self):
        raise RuntimeError("no words")
"""


def change(project: Path, after: str, text: str) -> None:
    """Put ``text`` into the task file after the line ``after``, or at its end."""
    file = project / "task.py"
    old = OWN + file.read_text()
    new = old.replace(f"{after}\n", f"{after}\n{text}", 1) if after else f"{old}\n{text}"
    assert new != old
    file.write_text(new)


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("place", PLACES)
def test_it_is_named(project, cli, place, raised):
    after, text, said = PLACES[place]
    call, name = RAISED[raised]
    change(project, after, text.format(call))
    for command in (("search", "--study", "s"), ("evaluate",)):
        result = cli(command[0], "model.pt", "--task", "task.py", *command[1:])
        assert (result.status, result.out) == (2, "")
        assert "Traceback" not in result.err
        line = result.err.splitlines()[-1]
        assert line.startswith("error: ")
        assert said + name in line
        assert "task.py:" in line.partition(name)[2]
    assert not (project / ".autoquant").exists()


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("place", ["forward", "metric", "evaluate"])
def test_in_a_trial_it_costs_that_trial(project, cli, place, raised):
    call, name = RAISED[raised]
    bodies = {
        "forward": "def forward(model, x):\n    step(model)\n    return model(x)\n",
        "metric": "def metric(outputs, targets):\n    step(None)\n"
        "    return float((outputs.argmax(1) == targets).float().mean())\n",
        "evaluate": "pairs = list(evaluation_data())\ndel evaluation_data, metric\n"
        "def evaluate(model):\n    step(model)\n"
        "    return sum(float((model(x).argmax(1) == y).sum()) for x, y in pairs)\n",
    }
    counting = (
        "from pathlib import Path\n"
        "def step(model):\n"
        f"    if Path(__file__).with_name('fail').exists(): raise {call}\n"
    )
    change(project, "", counting + bodies[place])
    failing = project / "fail"

    from autoquant.optimize import loop

    begun, run_one = [], loop._run_one
    with pytest.MonkeyPatch.context() as patch:

        def one(*args):
            begun.append(0)
            if len(begun) in (4, 5):
                failing.touch()
            try:
                return run_one(*args)
            finally:
                failing.unlink(missing_ok=True)

        patch.setattr(loop, "_run_one", one)
        words = ("--task", "task.py", "--study", "s", "--trials", 9, "--no-prune")
        result = cli("search", "model.pt", *words)
    assert result.status in (0, 4), result.err
    trials = json.loads(cli("show", "s", "--json").out)["trials"]
    assert [t["trial"] for t in trials if t["state"] == "fail"] == [3, 4]
    assert f"{place} " in trials[3]["reason"]
    assert name in trials[3]["reason"]


TYPED = """
def forward(model, x):
    import os, signal
    from pathlib import Path
    if Path("ready").exists():
        Path("ready").unlink()
        {}
    return model(x)
"""
SWALLOWED = """
        try:
            os.kill(os.getpid(), signal.{sent})
            import time; time.sleep(5)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_signal_in_user_code_ends_the_search(project, cli, sent, swallowed):
    """Also one that the user's own code catches."""
    kill = f"os.kill(os.getpid(), signal.{sent})"
    body = SWALLOWED.format(sent=sent).strip("\n").lstrip() if swallowed else kill
    change(project, "", TYPED.format(body))
    script = (
        "import sys, pathlib\n"
        "from autoquant.optimize import loop\n"
        "from autoquant.cli import main\n"
        "one, count = loop._run_one, []\n"
        "def run(*args):\n"
        "    count.append(0)\n"
        "    if len(count) == 4: pathlib.Path('ready').touch()\n"
        "    return one(*args)\n"
        "loop._run_one = run\n"
        "main(sys.argv[1:])\n"
    )
    words = ("search", "model.pt", "--task", "task.py", "--study", "s", "--trials", "9")
    child = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (child.returncode, child.stdout) == (130, ""), child.stderr
    assert "go on with: autoquant resume s" in child.stderr.splitlines()[-1]
    assert len(json.loads(cli("show", "s", "--json").out)["trials"]) == 3


class Broken(optuna.samplers.RandomSampler):
    """A sampler whose own code fails, before a trial or after it."""

    def __init__(self, where: str) -> None:
        super().__init__(seed=0)
        self.where = where
        self.calls = 0

    def _fail(self, where: str) -> None:
        self.calls += where == self.where
        if self.calls == 3:
            raise SystemExit(0)

    def sample_relative(self, *args):
        self._fail("before")
        return super().sample_relative(*args)

    def after_trial(self, *args):
        self._fail("after")
        super().after_trial(*args)


def test_a_sampler_of_ones_own(project):
    """The trial after which it fails was measured: it is kept."""
    task, kept = load_task(Path("task.py")), {}
    for where in ("before", "after"):
        with pytest.raises(UserError, match="sampler Broken failed: SystemExit: 0"):
            autoquant.search("model.pt", task, sampler=Broken(where), trials=30, study=where)
        trials = Ledger.open(where, None).trials()
        assert {t.state.name for t in trials} == {"COMPLETE"}
        kept[where] = len(trials)
    assert kept["after"] == kept["before"] + 1
