"""The commands one after the other, on a small model: each takes what the one before it wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from autoquant.models.task import load_task


def evaluate(cli, *words: object) -> dict:
    """Return what ``evaluate --json`` prints, asserting that it prints nothing else."""
    result = cli("evaluate", *words, "--json")
    assert result.status == 0, result.err
    return json.loads(result.out)


def test_search_prints_one_object_and_progress_elsewhere(project, cli, checked):
    words = ("--task", "task.py", "--trials", 12, "--json", "--out", "made/here")
    result = cli("search", "model.pt", *words)
    assert result.done
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    checked(found, project)
    assert found["study"] == "model"
    assert Path(found["recipe"]) == project / "made/here/recipe.yaml"
    assert sum(found["trials"].values()) == 12
    assert "float accuracy" in result.err
    assert "study model" in result.err
    assert "3 layers to quantize (3 Linear)" in result.err
    assert "stays in float" in result.err


def test_resume_prints_the_same_object(searched, cli, checked):
    before = (searched / "recipe.yaml").read_text()
    result = cli("resume", "--json")
    assert result.done
    found = json.loads(result.out)
    checked(found, searched)
    assert found["study"] == "s"
    assert (searched / "recipe.yaml").read_text() == before
    more = json.loads(cli("resume", "s", "--trials", 17, "--json").out)
    assert sum(more["trials"].values()) == 17


def test_studies_show_and_export(searched, cli):
    listed = json.loads(cli("studies", "--json").out)
    assert [(row["study"], row["model"], row["trials"]) for row in listed] == [("s", "model", 14)]
    assert "s" in cli("studies").out

    shown = json.loads(cli("show", "s", "--json").out)
    trials = shown["trials"]
    assert [t["trial"] for t in trials] == list(range(14))
    complete = {t["trial"]: t["measured"] for t in trials if t["state"] == "complete"}
    # The front against its definition: nothing else is at least as good in both, better in one.
    for number, m in complete.items():
        beaten = any(
            (o["size_bytes"], o["drop"]) != (m["size_bytes"], m["drop"])
            and o["size_bytes"] <= m["size_bytes"]
            and o["drop"] <= m["drop"]
            for o in complete.values()
        )
        if number in shown["front"]:
            assert not beaten
        elif not beaten:  # a twin of one that is on the front
            twins = [complete[n] for n in shown["front"]]
            assert any((t["size_bytes"], t["drop"]) == (m["size_bytes"], m["drop"]) for t in twins)
    sizes = [point["size_bytes"] for point in shown["foretold"]]
    assert len(sizes) > 2
    assert sizes == sorted(sizes)
    text = cli("show").out
    assert "Pareto front" in text
    assert "not measured" in text
    assert f"best trial: {shown['best']}" in text

    assert cli("export", "-o", "again.yaml").status == 0
    assert (searched / "again.yaml").read_text() == (searched / "recipe.yaml").read_text()

    number = 1
    assert cli("export", "s", "--trial", number, "-o", "trial.yaml").status == 0
    recipe = yaml.safe_load((searched / "trial.yaml").read_text())
    assert recipe["metric"]["search"]["drop"] == complete[number]["drop"]
    assert recipe["size_bytes"] == complete[number]["size_bytes"]

    for bits in (4, 5.5, 8):
        assert cli("export", "s", "--bits", bits, "-o", "cut.yaml").status == 0
        recipe = yaml.safe_load((searched / "cut.yaml").read_text())
        within = [m for m in complete.values() if m["average_weight_bits"] <= bits]
        assert recipe["average_weight_bits"] <= bits
        # Of the outputs nearest to the float model's: less noisy than the metric itself.
        nearest = min(within, key=lambda m: m["loss"])
        assert recipe["metric"]["search"]["drop"] == nearest["drop"]
    share = 0.35
    assert cli("export", "s", "--size", f"{share:.0%}", "-o", "cut.yaml").status == 0
    recipe = yaml.safe_load((searched / "cut.yaml").read_text())
    assert recipe["size_bytes"] <= share * recipe["float_size_bytes"]


def test_show_why_says_what_is_known_of_a_layer(searched, cli):
    found = json.loads(cli("show", "s", "--why", "0", "--json").out)
    assert (found["layer"], found["layers"]) == ("0", 3)
    assert found["samples"] > 0
    for half in ("weights", "activations"):
        assert sum(row["chosen"] for row in found[half]) == 1
    widest = [row for row in found["weights"] if row["bits"] == 8]
    narrow = [row for row in found["weights"] if row["bits"] == 4]
    assert min(r["loss"] for r in widest) < min(r["loss"] for r in narrow)
    text = cli("show", "s", "--why", "0").out
    assert "estimated loss, by gradients" in text
    assert "chosen" in text
    assert "most of the loss: " in text
    shares = [json.loads(cli("show", "--why", n, "--json").out)["share"] for n in ("0", "2", "4")]
    assert sum(shares) == pytest.approx(1.0)
    wrong = cli("show", "s", "--why", "7")
    assert wrong.status == 2
    assert "unknown layer '7'" in wrong.err


def test_trials_auto_ends_of_itself(project, cli):
    words = ("search", "model.pt", "--task", "task.py", "--bits", "5")
    done = cli(*words, "--trials", "auto", "--study", "auto", "--json")
    assert done.done, done.err
    found = json.loads(done.out)
    assert found["done"].startswith("done after ")
    assert 8 < found["trials"]["complete"] + found["trials"]["pruned"] < 200
    assert -1 <= found["profile"]["spearman"] <= 1
    wrong = cli(*words, "--trials", "many")
    assert wrong.status == 2
    assert "neither a number nor auto" in wrong.err


@pytest.mark.parametrize("source", ["best", "trial"])
def test_evaluate_reproduces_the_recipe(searched, cli, source):
    if source == "trial":
        assert cli("export", "s", "--trial", 2, "-o", "recipe.yaml").status == 0
    recipe = yaml.safe_load((searched / "recipe.yaml").read_text())
    words = ("model.pt", "--task", "task.py", "--recipe", "recipe.yaml")
    found = evaluate(cli, *words)
    assert found["splits"]["search"].items() >= {
        (key, value)
        for key, value in recipe["metric"]["search"].items()
        if key not in ("interval",)
    }
    if source == "best":
        assert found["splits"]["confirm"] == recipe["metric"]["confirm"]
        assert found["splits"]["search"] == recipe["metric"]["search"]
    for name in ("average_weight_bits", "size_bytes", "float_size_bytes"):
        assert found[name] == recipe[name]
    text = cli("evaluate", *words).out
    assert "search (160 samples): float accuracy (higher is better) 0." in text
    assert "average weight bits" in text
    if source == "best":
        assert found["verdict"] == recipe["metric"]["verdict"]
        assert "drop ≤ 1 point: " in text
    else:  # nobody judged it
        assert found["verdict"] is None
        assert "drop ≤ 5 points: " in cli("evaluate", *words, "--max-drop", "5%").out
    plain = cli("evaluate", "model.pt", "--task", "task.py")
    assert plain.status == 0
    assert "quantized" not in plain.out


def test_a_budget_is_kept(project, cli):
    words = ("--task", "task.py", "--trials", 12, "--space", "weight_only", "--json")
    found = json.loads(cli("search", "model.pt", *words, "--bits", 3.5, "--study", "a").out)
    assert found["average_weight_bits"] <= 3.5
    found = json.loads(cli("search", "model.pt", *words, "--size", "25%", "--study", "b").out)
    assert found["size_bytes"] <= 0.25 * found["float_size_bytes"]


def test_latency_and_bit_operations_where_they_are_asked_for(project, cli):
    words = ("search", "model.pt", "--task", "task.py", "--trials", 12)
    result = cli(*words, "--max-latency", "10s", "--study", "a", "--json")
    assert result.done, result.err
    found = json.loads(result.out)["latency"]
    assert found["max_seconds"] == 10
    assert found["samples"] == 40
    assert 0 < found["predicted_seconds"] < 10
    assert [c["recipe"] for c in found["checks"]][-1] == "result"
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    assert recipe["latency"]["seconds"] == found["seconds"]
    assert "latency for a batch of 40" in result.err
    assert (Path(os.environ["XDG_CACHE_HOME"]) / "autoquant" / "latency.json").exists()
    assert " latency " in cli("show", "a").out
    resumed = cli("resume", "a", "--trials", 13)
    assert resumed.done, resumed.err
    assert "of the float model's" in resumed.out
    assert cli("export", "a", "--bits", 8, "-o", "cut.yaml").status == 0
    cut = yaml.safe_load((project / "cut.yaml").read_text())
    assert cut["latency"]["seconds"] is None
    used = ("model.pt", "--task", "task.py")
    assert cli("apply", "recipe.yaml", *used, "-o", "q.safetensors").status == 0
    assert cli("evaluate", *used, "--recipe", "recipe.yaml").status == 0
    result = cli(*words, "--objective", "bitops", "--study", "b")
    assert result.done, result.err
    assert "bit operations," in result.out


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch.export.save
def test_data_instead_of_a_task(project, cli, checked):
    import numpy as np

    task = load_task(project / "task.py")
    pairs = list(task.evaluation_data())
    inputs = torch.cat([x for x, _ in pairs]).numpy()
    targets = torch.cat([y for _, y in pairs]).numpy()
    np.savez(project / "data.npz", inputs=inputs, targets=targets)
    model = task.load_model(project / "model.pt").eval()
    program = torch.export.export(
        model, (torch.zeros(2, 12),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    torch.export.save(program, project / "model.pt2")
    words = ("--data", "data.npz", "--metric", "accuracy")
    result = cli("search", "model.pt2", *words, "--trials", 10, "--json")
    assert result.done, result.err
    recipe = checked(json.loads(result.out), project)
    assert recipe["metric"]["confirm"]["samples"] == 120
    words = ("apply", "recipe.yaml", "model.pt2", "--data", "data.npz", "--json")
    written = json.loads(cli(*words).out)
    assert Path(written["path"]) == project / "quantized.pt2"
    assert (written["kind"], written["reason"]) == ("pt2", None)
    assert written["size_bytes"] == (project / "quantized.pt2").stat().st_size


def test_a_pickle_with_the_flag(project, cli, checked):
    model = load_task(project / "task.py").load_model(project / "model.pt")
    torch.save(model, project / "pickle.pt")
    words = ("--task", "task.py", "--trials", 6, "--trust-pickle", "--json")
    result = cli("search", "pickle.pt", *words)
    assert result.done, result.err
    checked(json.loads(result.out), project)
    assert cli("resume", "pickle", "--trials", 8).done  # the study keeps the consent
