"""The pure parts of the comparison with other tools."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from tests.benchmarks.peers import __main__ as main
from tests.benchmarks.peers import hindsight, summary, tables
from tests.benchmarks.peers.cases import NAMES
from tests.benchmarks.peers.greedy import average, greedy
from tests.benchmarks.peers.plan import Wanted, plan
from tests.benchmarks.peers.results import Results, Row
from tests.benchmarks.peers.score import average_bits, divergences
from tests.benchmarks.peers.tools import TOOLS

SIZES = {"a": 100, "b": 100, "c": 200}
TABLE = {
    "a": {6: 0.1, 4: 0.9},
    "b": {6: 0.2, 4: 0.3},
    "c": {6: 0.4, 4: 5.0},
}


def row(tool="tpe", seed=0, **fields):
    return Row(tool, "resnext", 5.0, seed, 40, **fields)


def test_greedy_takes_the_cheapest_flips_until_the_budget_holds():
    assert greedy(TABLE, SIZES, 8.0) == {"a": 8, "b": 8, "c": 8}
    assert greedy(TABLE, SIZES, 7.5) == {"a": 6, "b": 8, "c": 8}
    # b goes to 6, then to 4, before c goes to 6
    assert greedy(TABLE, SIZES, 6.5) == {"a": 6, "b": 4, "c": 8}
    assert greedy(TABLE, SIZES, 4.0) == {"a": 4, "b": 4, "c": 4}


def test_greedy_never_makes_a_layer_wider_again():
    table = {"a": {6: 0.5, 4: 0.1}, "b": {6: 0.9, 4: 1.0}, "c": {6: 0.6, 4: 2.0}}
    widths = greedy(table, SIZES, 6.0)
    assert widths == {"a": 4, "b": 8, "c": 6}
    assert average(widths, SIZES) <= 6.0


def test_a_layer_in_float_counts_as_sixteen_bits():
    assert average_bits({"a": 4}, {"a": 300, "b": 100}) == 7.0


def test_divergence_is_that_of_the_softmax():
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert divergences(p, q).float().numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert float(divergences(p, p + 3.0).abs().max()) < 1e-6


def test_results_are_found_again_and_failures_are_tried_again(tmp_path):
    path = tmp_path / "results.jsonl"
    first, failed = row(kl=0.5, curve=(1.0, 0.5)), row(seed=1, error="not installed")
    results = Results(path)
    results.add(first)
    results.add(failed)
    again = Results(path)
    assert again.rows(tool="tpe") == [first, failed]
    assert again.done(first.key)
    assert not again.done(failed.key)
    again.add(row(seed=1, kl=0.4))
    assert Results(path).done(failed.key)
    assert Results(path).rows() == again.rows() == [first, row(seed=1, kl=0.4)]


def test_rows_of_other_code_are_measured_again(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(row(kl=0.5, commit="abc"))
    key = row().key
    assert results.done(key)
    assert results.done(key, "abc")
    assert not results.done(key, "def")
    results.add(row(kl=0.4, commit="def"))
    assert Results(results.path).done(key, "def")


def test_rivals_have_time_at_the_first_budget_of_a_model():
    runs = {(r.row.tool, r.row.budget, r.row.seed): r for r in plan(NAMES[:1], (), 2)}
    assert runs["tpe", 5.0, 1].row.trials == 300
    assert runs["autoquant", 5.0, 1].row.trials == 40
    limits = [runs["tpe", b, 0].limit for b in (5.0, 6.0)] + [runs["gp", 5.0, 0].limit]
    assert limits[0] > limits[2] > limits[1]
    assert runs["autoquant", 6.0, 0].limit == limits[0]
    assert ("greedy", 5.0, 0) in runs
    assert ("greedy", 5.0, 1) not in runs
    assert {key[1] for key in runs} == {5.0, 6.0, 8.0}
    assert {r.row.budget for r in plan(NAMES, (6.0,), 1)} == {6.0}
    order = [(r.row.model, r.row.budget) for r in plan(NAMES, (), 1)]
    assert order.index(("minilm", 5.0)) < order.index(("mobilenet_v2", 6.0))


def test_runs_at_a_time_have_cores_of_their_own():
    whole = main.shares_of_cores(1)
    assert len(whole) == 1
    parts = main.shares_of_cores(len(whole[0]))
    assert all(len(part) == 1 for part in parts)
    assert set().union(*parts) == whole[0]
    assert main.shares_of_cores(10_000) == parts
    assert main.shares_of_cores(0) == whole


def test_a_budget_that_is_not_planned_is_refused_and_nothing_is_written(tmp_path):
    rows = tmp_path / "rows.jsonl"
    words = ["--model", "resnext", "--bits", "7", "--rows", str(rows), "--cache", str(tmp_path)]
    found = CliRunner().invoke(main.main, words)
    assert found.exit_code == 2
    assert "7 is no budget here: 4.5" in found.output
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_written_beside_the_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    known = Results(rows)
    for run in plan(("resnext",), (), 1):
        known.add(replace(run.row, bits=4.5, kl=0.1, kl_error=0.01, metric=0.9, seconds=1.0))
    words = ["--model", "resnext", "--seeds", "1", "--rows", str(rows), "--cache", str(tmp_path)]
    found = CliRunner().invoke(main.main, words)
    assert found.exit_code == 0, found.output
    assert found.output.startswith("0 runs")
    assert "at most 4.5 bits" in (tmp_path / "rows.md").read_text()


def test_each_run_is_a_process_and_a_failure_is_a_row(tmp_path):
    rows = [found for found, _ in main.measure([Wanted(row("no such tool", 1))], tmp_path, 1)]
    assert [(r.tool, r.seed) for r in rows] == [("no such tool", 1)]
    assert rows[0].error == "KeyError: 'no such tool'"


def test_a_line_that_was_cut_short_costs_that_line(tmp_path):
    path = tmp_path / "results.jsonl"
    results = Results(path)
    results.add(row(kl=0.5))
    with path.open("a") as file:
        file.write('\n{"tool": "tp')
    again = Results(path)
    again.add(row(seed=1, kl=0.3))
    assert [r.kl for r in Results(path).rows()] == [0.5, 0.3]


def test_cells_show_the_median_and_the_ends_of_seeds():
    rows = [row(seed=i, bits=5.0, kl=kl, kl_error=0.01) for i, kl in enumerate((0.3, 0.1, 0.2))]
    cells = tables.cells("x", rows)
    assert cells[1:3] == ["5.00", "0.2000 ± 0.0100 (0.1000 … 0.3000)"]
    assert cells[-1] == "3"
    assert tables.cells("x", rows[:1])[2] == "0.3000 ± 0.0100"
    assert tables.cells("x", [row(error="not installed (nncf)")])[2] == "not installed (nncf)"


def test_evaluations_are_counted_to_where_a_rival_had_its_best():
    assert tables.reached((5.0, 3.0, 3.0, 1.0), 3.0) == 2
    assert tables.reached((5.0, 3.0), 2.0) is None
    theirs = [row(seed=0, curve=(5.0, 4.0, 4.0)), row(seed=1, curve=(5.0, 5.0, 1.0))]
    ours = [
        row("autoquant", 0, curve=(4.0, 4.0, 3.0)),
        row("autoquant", 1, curve=(4.0, 3.0, 2.0)),
        row("autoquant", 2, curve=(1.0, 1.0, 1.0)),
    ]
    assert tables.pairs(ours, theirs) == [(1, 2), (None, 3)]
    assert tables.speed_cells("TPE", ours, theirs)[3] == "more than 3 (1 … more than 3)"
    assert tables.speed_cells("GP", ours, [])[1] == "not run"


def test_seconds_count_where_the_first_answer_is_as_good():
    theirs = row("modelopt_gradient", kl=0.2, seconds=40.0)
    cells = tables.seconds_cells("M", theirs, row("one_shot", kl=0.1, seconds=20.0))
    assert cells == ["M", "40", "0.2000", "20", "0.1000", "0.50"]
    worse = tables.seconds_cells("M", theirs, row("one_shot", kl=0.3, seconds=20.0))
    assert worse[-1] == "not as good"
    assert tables.seconds_cells("M", row(), row("one_shot", kl=0.3))[1:] == [
        "–",
        "–",
        "–",
        "0.3000",
        "not as good",
    ]


def test_tools_are_asked_for_budgets_that_they_can_keep():
    assert len({tool.name for tool in TOOLS}) == len(TOOLS)
    named = {tool.name: tool for tool in TOOLS}
    assert not named["nncf"].takes(5.0, "resnext")
    assert named["nncf"].takes(8.0, "resnext")
    assert not named["nncf"].takes(8.0, "g2p")
    assert named["modelopt_gradient"].takes(5.0, "minilm")
    assert not named["modelopt_kl"].takes(8.0, "resnext")
    assert all(tool.takes(5.0, "g2p") for tool in TOOLS if tool.stochastic)


def test_the_summary_names_the_best_of_the_peers_by_each_measure():
    runs = {
        "float": [row("float", metric=0.10, metric_name="token_error_rate", kl=0.0)],
        "naive": [row("naive", metric=0.14, kl=0.5)],
        "autoquant": [row("autoquant", i, metric=0.11, kl=kl) for i, kl in enumerate((1, 2, 3))],
        "tpe": [row(metric=0.13, kl=4.0), row(seed=1, error="killed")],
        "greedy": [row("greedy", metric=0.12, kl=8.0)],
        "gp": [row("gp", error="took more than 9 s")],
        "one_shot": [row("one_shot", metric=0.0, kl=0.1)],
    }
    titles = {name: name.upper() for name in runs}
    cells = summary.cells("m", 5.0, runs, titles)
    assert cells[2:5] == ["2.0000", "–", "4.0000 (TPE): 0.50 of it"]
    assert cells[5:] == ["+1.00", "+2.00 (GREEDY)", "+4.00"]
    more = runs | {"nncf": [row("nncf", metric=0.13, kl=1.0)]}
    assert summary.cells("m", 5.0, more, titles | {"nncf": "N"})[3] == "1.0000 (N): 2.00 of it"
    assert summary.cells("m", 5.0, runs | {"tpe": [], "greedy": []}, titles) is None
    assert summary.cells("m", 5.0, runs | {"autoquant": []}, titles) is None
    higher = row("float", metric=0.9, metric_name="accuracy")
    assert summary.lost(row(metric=0.88), higher) == pytest.approx(2.0)
    assert summary.lost(row(), higher) is None


def test_hindsight_sorts_by_the_test_data_and_says_what_foretold_it():
    rows = [
        [4.9, 0.03, 0.001, 0.03, 0.13],
        [4.8, 0.01, 0.003, 0.01, 0.11],
        [4.7, 0.02, 0.002, 0.02, 0.12],
    ]
    text = hindsight.report("g2p", 5.0, rows, ["4 8", "8 4", "6 6"], 0.1)
    shown = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert [row.strip("| ") for row in shown[2:]] == ["8 4", "6 6", "4 8"]
    assert "0.1000; the least of any mixture 0.1100, the median 0.1200" in text
    assert "searched by 1.00, of the drop on the same data -1.00" in text
