"""The pure parts of the comparison of training with other tools."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

from autoquant.training.schedule import Lessons
from tests.benchmarks.peers.results import Results
from tests.benchmarks.training_peers import __main__ as main
from tests.benchmarks.training_peers import plan as planning
from tests.benchmarks.training_peers import table
from tests.benchmarks.training_peers.cases import CASES
from tests.benchmarks.training_peers.distil import Course, Trainee, distil, held_loss
from tests.benchmarks.training_peers.levels import Product, Unfit, check, products
from tests.benchmarks.training_peers.rows import STEPS, TIME, Row
from tests.benchmarks.training_peers.tools import BY_NAME, MEASURE, TOOLS

CASE = CASES["resnext2"]


def row(tool="brevitas", rate=1e-3, seed=0, goal=STEPS, **fields):
    given = {"steps": 400, "held": 0.1, "kl": 0.2, "kl_error": 0.01, "metric": 0.9}
    given |= {"float_metric": 0.98, "drop_low": 0.05, "drop_high": 0.11}
    given |= {"prepared": 10.0, "seconds": 50.0}
    return Row(CASE.name, tool, goal, rate, seed, **given | fields)


def test_rates_are_tried_further_while_the_best_is_at_an_end():
    assert planning.next_rate({}) == 1e-3
    assert planning.next_rate({1e-3: 3.0, 3e-3: 2.0}) == 1e-2
    assert planning.next_rate({1e-3: 3.0, 3e-3: 2.0, 1e-2: 2.5}) is None
    assert planning.next_rate({1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0}) == 3e-2
    assert planning.next_rate({1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0, 3e-2: 2.0}) is None
    assert planning.next_rate({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}) == 3e-4
    rising = {1e-4: 0.5, 3e-4: 0.7, 1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}
    assert planning.next_rate(rising) is None
    assert planning.next_rate({1e-3: 9.0, 3e-3: 8.0, 1e-2: 7.0, 3e-2: 6.0, 1e-1: 5.0}) is None


def test_a_run_that_failed_is_no_best_one():
    rows = [row(rate=1e-3), row(rate=3e-3, held=None, error="killed"), row(rate=1e-2, held=0.3)]
    assert planning.best_rate(rows, "brevitas") == 1e-3
    assert planning.best_rate(rows[1:2], "brevitas") is None
    assert planning.best_rate(rows, "modelopt") is None


def test_the_same_time_is_counted_in_a_peers_own_steps():
    assert planning.steps_in(60.0, row()) == 500
    assert planning.steps_in(1.0, row()) == 1
    assert planning.steps_in(60.0, row(seconds=None)) is None
    rows = [row(goal=TIME, steps=500)]
    assert planning.known(rows, row(goal=TIME, steps=500))
    assert not planning.known(rows, row(goal=TIME, steps=510))
    assert not planning.known([row(error="killed")], row())


def carried_out(tools, answer, seeds=2):
    """Return the keys of a plan's runs, each answered as it is asked for."""
    rows, keys = [], []
    for wanted in planning.plan(CASE, tools, lambda: rows, seeds):
        if not planning.known(rows, wanted):
            keys.append((wanted.tool, wanted.goal, wanted.rate, wanted.seed))
            rows.append(answer(wanted))
    return keys, rows


def test_the_plan_sweeps_rates_then_goes_on_with_the_best():
    losses = {1e-3: 0.3, 3e-3: 0.1, 1e-2: 0.2}

    def answer(wanted):
        seconds = 10.0 + 0.1 * wanted.steps
        held = losses.get(wanted.rate, 0.1)
        return replace(wanted, held=held, prepared=10.0, seconds=seconds)

    tools = [BY_NAME[name] for name in ("fitted", MEASURE, "brevitas")]
    keys, rows = carried_out(tools, answer)
    assert keys == [
        ("fitted", STEPS, 0.0, 0),
        (MEASURE, STEPS, 0.0, 0),
        *(("brevitas", STEPS, rate, 0) for rate in losses),
        ("brevitas", TIME, 3e-3, 0),
        (MEASURE, STEPS, 0.0, 1),
        ("brevitas", STEPS, 3e-3, 1),
        ("brevitas", TIME, 3e-3, 1),
    ]
    assert {r.steps for r in rows if r.goal == TIME} == {CASE.steps}


def test_a_tool_that_comes_to_nothing_is_tried_once():
    keys, _ = carried_out([BY_NAME["torchao_modules"]], lambda wanted: replace(wanted, error="no"))
    assert keys == [("torchao_modules", STEPS, 1e-3, 0)]


def test_cells_show_the_median_run_and_why_there_is_none():
    rows = [row(seed=i, kl=kl, metric=m) for i, (kl, m) in enumerate(((0.3, 0.9), (0.1, 0.95)))]
    cells = table.cells("B", [*rows, row(seed=2, kl=0.2, metric=0.91)])
    assert cells[:3] == ["B", "400", "0.001"]
    assert cells[3] == "0.2000 ± 0.0100 (0.1000 … 0.3000)"
    assert cells[5] == "+7.00 (+5.00 … +11.00)"
    assert cells[6:8] == ["50", "100"]
    assert cells[-1] == "3"
    assert len(cells) == len(table.HEAD)
    failed = table.cells("B", [row(error="only 1 of 23 | layers")])
    assert failed[3] == "only 1 of 23 / layers"
    assert len(failed) == len(table.HEAD)


def test_lines_have_the_best_rate_alone_and_same_time_below():
    rows = [row(rate=1e-3, held=0.5), row(rate=3e-3, kl=0.15), row(rate=3e-3, goal=TIME, kl=0.12)]
    found = table.lines([*rows, row(MEASURE, rate=0.0, kl=0.11)])
    assert [cells[0] for cells in found] == [
        BY_NAME[MEASURE].title, "Brevitas", "Brevitas, same time",
    ]  # fmt: skip
    assert [cells[2] for cells in found] == ["–", "0.003", "0.003"]
    assert table.rates_line(rows) == "Brevitas 0.001: 0.5000, 0.003: 0.1000"
    short = table.short("C", rows)
    assert short == ["C", "–", "–", "0.1500, top-1 0.9000 (Brevitas)",
                     "0.1200, top-1 0.9000 (Brevitas)"]  # fmt: skip


def test_levels_are_those_that_are_multiplied():
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, (2, 3, 5, 5), generator=draw) * 0.3
    kernel = torch.randint(-2, 2, (4, 3, 3, 3), generator=draw) * torch.rand(4, 1, 1, 1)
    head = torch.randint(-1, 2, (5, 4), generator=draw) * torch.rand(5, 1)

    def run(x):
        y = F.conv2d(x, kernel).mean((2, 3))
        return F.linear((y / 0.1).round().clamp(0, 3) * 0.1, head, torch.randn(5))

    found = products(run, x)
    assert found[0] == Product(4, 4)
    assert found[1].weights <= 3
    check(found, 2, 2, 2)
    with pytest.raises(Unfit, match="only 1 of 2 layers have 2 and 2 bits"):
        check([found[0], Product(9, 4)], 2, 2, 2)
    with pytest.raises(Unfit, match="only 2 of 3 layers"):
        check(found, 3, 2, 2)


def test_what_was_best_on_the_way_is_kept():
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    data = torch.randn(64, 4)
    held = [torch.randn(32, 4)]
    pairs = [(held[0], teacher(held[0]).detach())]
    before = held_loss(student, pairs)
    lessons = Lessons([data[:32], data[32:]])
    course = Course(steps=60, batch=16, rate=0.05, seed=0)
    best = distil(Trainee(student, student.train), teacher, lessons, held, course)
    assert best < before / 4
    assert held_loss(student, pairs) == pytest.approx(best)
    assert not student.training
    wild = replace(course, rate=1e3)
    kept = distil(Trainee(student, student.train), teacher, lessons, held, wild)
    assert held_loss(student, pairs) == pytest.approx(kept)
    assert kept <= best


def test_the_command_measures_what_is_not_known_and_writes_the_report(tmp_path, monkeypatch):
    asked = []

    def worker(module, arguments, log, threads, most):
        asked.append((arguments["tool"], arguments["rate"], arguments["seed"]))
        if arguments["tool"] == "torchao_modules":
            return {"error": "Unfit: only 0 of 23 layers"}
        held = abs(arguments["rate"] - 3e-3) + 0.1
        plain = row(held=held, machine="Measured on x.", version="1").plain()
        return {n: plain[n] for n in plain if n not in ("case", "tool", "goal", "rate", "seed")}

    monkeypatch.setattr(main, "weights_of", lambda *_: None)
    monkeypatch.setattr(main, "call_worker", worker)
    rows = tmp_path / "rows.jsonl"
    words = ["--case", CASE.name, "--seeds", "1", "--rows", str(rows), "--cache", str(tmp_path)]
    found = CliRunner().invoke(main.main, words)
    assert found.exit_code == 0, found.output
    text = (tmp_path / "rows.md").read_text()
    assert "## ResNeXt (8 groups), MNIST digits, W2 A2" in text
    assert "Unfit: only 0 of 23 layers" in text
    assert ("brevitas", 3e-3, 0) in asked
    count = len(asked)
    again = CliRunner().invoke(main.main, words)
    assert again.exit_code == 0, again.output
    assert asked[count:] == [("torchao_modules", 1e-3, 0)]  # what failed is tried again
    anew = CliRunner().invoke(main.main, [*words, "--only", "default", "--anew"])
    assert anew.exit_code == 0, anew.output
    assert asked[count + 1 :] == [("default", 0.0, 0)]
    assert len(Results(rows, Row).rows(tool="default")) == 1


def test_every_tool_has_a_name_of_its_own():
    assert len(BY_NAME) == len(TOOLS)
    assert BY_NAME[MEASURE].trains
    assert not BY_NAME["fitted"].trains
