"""``autoquant tune``: what it writes is what it says, and it takes nothing from the user."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import autoquant
from autoquant.methods.learned import LearnedWeight
from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.optimize import tune as tuning
from autoquant.session import tuning as fitting
from autoquant.spec.recipe import WeightScheme
from autoquant.spec.recipe_file import load
from autoquant.study.source import Source
from autoquant.training.trainer import Trainer
from tests.cli.conftest import TASK

RECIPE = """\
autoquant_recipe: 2
layers:
  '0': {weight: {bits: 2}, activation: {bits: 8}}
  '2': {weight: {bits: 3}, activation: {bits: 6, granularity: per_token}}
  '4': {weight: {bits: 3}}
"""
WORDS = ("model.pt", "--task", "task.py")
TUNE = ("tune", "r.yaml", *WORDS)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def plain(project):
    """Return the project with a recipe by hand."""
    (project / "r.yaml").write_text(RECIPE)
    return project


@pytest.fixture(scope="module")
def written():
    """Return what the first test to ask has tuned: it is the same every time."""
    return {}


@pytest.fixture
def tuned(plain, cli, written):
    """Return the project with what ``tune`` writes."""
    if not written:
        result = cli(*TUNE)
        assert result.status == 0, result.err
        written |= {p.name: p.read_bytes() for p in plain.glob("tuned.*")}
    for name, text in written.items():
        (plain / name).write_bytes(text)
    return plain


@pytest.fixture
def refused(plain, cli):
    """Return a function that runs a command that must fail before the task does anything."""

    def run(*words, early=True):
        if early:
            text = (plain / "task.py").read_text()
            (plain / "task.py").write_text(f"open('it ran', 'w').close()\n{text}")
        before = content(plain)
        result = cli(*words)
        assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1), result
        assert content(plain) == before
        return result.err

    return run


def evaluated(cli, recipe):
    result = cli("evaluate", *WORDS, "--recipe", recipe, "--json")
    assert result.done, result.err
    return json.loads(result.out)


def net():
    scope: dict = {}
    exec(TASK, scope)
    return scope["net"](), scope["data"]()


def test_it_writes_a_recipe_and_what_was_learned(plain, cli):
    result = cli(*TUNE)
    assert (result.status, result.err) == (0, ""), result
    assert "loss on the search data: " in result.out
    assert "nothing gained" not in result.out
    assert result.out.count("fitting the layers to each other") == 2
    assert f"recipe: {plain / 'tuned.yaml'}" in result.out
    recipe, before = load(plain / "tuned.yaml"), load(plain / "r.yaml")
    assert recipe.learned.path == str(plain / "tuned.learned.safetensors")
    assert set(recipe.sites) == set(before.sites)
    for name, site in recipe.sites.items():
        assert site.learned
        assert site.weight == before.sites[name].weight
        assert (site.activation is None) == (before.sites[name].activation is None)
    assert recipe.reconstruction.method == "sequential"
    assert recipe.model.name == "model"
    assert (
        evaluated(cli, "tuned.yaml")["average_weight_bits"] == recipe.evidence.average_weight_bits
    )


def test_evaluate_gives_the_very_numbers_of_the_file(tuned, cli):
    evidence = load(tuned / "tuned.yaml").evidence
    found = evaluated(cli, "tuned.yaml")
    for name, split in (("search", evidence.search), ("confirm", evidence.confirm)):
        assert found["splits"][name]["float"] == split.baseline
        assert found["splits"][name]["quantized"] == split.quantized
        assert found["splits"][name]["drop"] == split.drop
        assert tuple(found["splits"][name]["interval"]) == split.interval
    assert found["size_bytes"] == evidence.size_bytes
    assert found["average_weight_bits"] == evidence.average_weight_bits


def test_training_goes_on_from_what_was_fitted(plain, cli):
    words = ("--method", "full", "--steps", "100", "--rate", "10")
    result = cli(*TUNE, *words)
    assert (result.status, result.err) == (0, ""), result
    assert "training all layers together (distillation steps 100" in result.out
    assert "step 10 of 100: loss " in result.out
    assert "weights that rounding makes 0: " in result.out
    assert not list(plain.glob("*training*"))
    cli("tune", "r.yaml", *WORDS, "-o", "fitted.yaml")
    ours, theirs = (load(plain / f"{name}.yaml") for name in ("tuned", "fitted"))
    assert ours.reconstruction.method == "distillation"
    losses = [
        json.loads(cli("tune", f"{name}.yaml", *WORDS, "-o", "x.yaml", "--json").out)["before"]
        for name in ("tuned", "fitted")
    ]
    assert losses[0] < losses[1]
    assert set(ours.sites) == set(theirs.sites)
    found = evaluated(cli, "tuned.yaml")["splits"]["confirm"]
    assert found["quantized"] == ours.evidence.confirm.quantized
    result = cli("apply", "tuned.yaml", *WORDS, "-o", "q.safetensors")
    assert result.done, result.err


def test_blocks_are_trained_on_from_what_was_fitted(plain, cli):
    words = ("--method", "block", "--steps", "200", "--rate", "4", "--most", "4", "--drop", "0.1")
    result = cli(*TUNE, *words)
    assert (result.status, result.err) == (0, ""), result
    assert "training one block after another (blockwise " in result.out
    assert "block 1 of 3, 0: loss on held-back samples " in result.out
    assert not list(plain.glob("*training*"))
    ours = load(plain / "tuned.yaml")
    assert ours.reconstruction.method == "blockwise"
    assert (ours.reconstruction.most, ours.reconstruction.drop) == (4, 0.1)
    found = evaluated(cli, "tuned.yaml")["splits"]["confirm"]
    assert found["quantized"] == ours.evidence.confirm.quantized
    result = cli(*TUNE, *words, "-o", "again.yaml", "--json")
    row = json.loads(result.out)["tried"][-1]
    assert row["technique"] == ours.reconstruction.plain()
    assert row["loss"] < min(r["loss"] for r in json.loads(result.out)["tried"][:-1])


def test_blocks_that_were_killed_go_on(plain, cli, monkeypatch):
    words = ("--method", "block", "--steps", "20", "--rate", "3")
    assert cli(*TUNE, *words, "-o", "whole.yaml").done
    step, steps = Trainer.step, []

    def killed(self):
        if len(steps) == 30:
            raise KeyboardInterrupt
        steps.append(self.done)
        step(self)

    monkeypatch.setattr(Trainer, "step", killed)
    assert cli(*TUNE, *words).status != 0
    assert (plain / "tuned.training.safetensors").exists()
    monkeypatch.setattr(Trainer, "step", step)
    result = cli(*TUNE, *words)
    assert result.done, result.err
    assert "block 1 of 3" not in result.out
    assert "block 2 of 3" in result.out
    ours, whole = (load(plain / f"{name}.yaml") for name in ("tuned", "whole"))
    assert dict(ours.sites) == dict(whole.sites)
    assert not list(plain.glob("*training*"))


def test_a_recipe_says_which_rates_won(plain, cli):
    words = ("--method", "full", "--steps", "40", "--rivals", "5")
    result = cli(*TUNE, *words, "--json")
    assert result.done, result.err
    row = json.loads(result.out)["tried"][-1]
    assert row["technique"]["method"] == "distillation"
    assert row["technique"]["rivals"] == 5
    recipe = load(plain / "tuned.yaml")
    if recipe.reconstruction.method == "distillation":
        assert recipe.reconstruction.plain() == row["technique"]
    usual = Distillation()
    every = row["technique"]["scale_rate"] / usual.scale_rate
    assert row["technique"]["bias_rate"] / usual.bias_rate == pytest.approx(every)


@pytest.mark.parametrize("how", ["alike", "curvature", "mismatch"])
def test_layers_learn_at_rates_of_their_own(plain, cli, how):
    words = ("--method", "full", "--steps", "20", "--layer-rates", how)
    result = cli(*TUNE, *words, "--json")
    assert result.done, result.err
    row = json.loads(result.out)["tried"][-1]
    powers = row["technique"]["curvature_power"], row["technique"]["mismatch_power"]
    assert powers == (float(how == "curvature"), float(how == "mismatch"))
    assert set(row["layer_rates"]) == (set() if how == "alike" else {"0", "2", "4"})
    assert ("layers learned at" in cli(*TUNE, *words).out) == (how != "alike")


def test_labels_are_used_where_the_task_says_how(plain, cli, refused):
    words = ("--method", "full", "--steps", "100", "--rate", "10")
    share = ("--labels", "0.02")
    line = refused(*TUNE, *words, *share, early=False)
    assert "task.py has no training_loss that would take them" in line
    bare = json.loads(cli(*TUNE, *words, "--json").out)["tried"][-1]
    text = (plain / "task.py").read_text()
    more = """
def training_data():
    x, y = data()
    return [(x[:80] + 0.01, y[:80])]
def training_loss(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets)
"""
    (plain / "task.py").write_text(text + more)
    rows = [json.loads(cli(*TUNE, *words, *own, "--json").out)["tried"][-1] for own in ((), share)]
    assert [row["technique"]["labels"] for row in rows] == [0.2, 0.02]
    assert len({bare["loss"], *(row["loss"] for row in rows)}) == 3
    (plain / "task.py").write_text(text + more.replace("targets)\n", "wrong)\n"))
    assert "training_loss failed: NameError" in refused(*TUNE, *words, "--json", early=False)


def test_training_that_was_killed_goes_on(plain, cli, monkeypatch):
    words = ("--method", "full", "--steps", "60", "--rate", "10")
    assert cli(*TUNE, *words, "-o", "whole.yaml").done
    step, steps = Trainer.step, []

    def killed(self):
        if self.done == 32 and len(steps) < 40:
            raise KeyboardInterrupt
        steps.append(self.done)
        step(self)

    monkeypatch.setattr(Trainer, "step", killed)
    assert cli(*TUNE, *words).status != 0
    assert (plain / "tuned.training.safetensors").exists()
    steps += [0] * 40
    again = len(steps)
    assert cli(*TUNE, *words).done
    assert steps[again] == 30
    ours, whole = (load(plain / f"{name}.yaml") for name in ("tuned", "whole"))
    assert dict(ours.sites) == dict(whole.sites)
    assert not list(plain.glob("*training*"))


def test_what_apply_writes_gives_them_too(tuned, cli):
    result = cli("apply", "tuned.yaml", *WORDS, "-o", "q.safetensors")
    assert result.done, result.err
    (architecture, (x, y)), evidence = net(), load(tuned / "tuned.yaml").evidence
    model = autoquant.load(tuned / "q.safetensors", architecture)
    with torch.no_grad():
        archived = model(x[80:])
    splits = (evidence.search, evidence.confirm)
    assert sum(s.samples for s in splits) == 320
    right = sum(round(s.quantized * s.samples) for s in splits)
    assert int((archived.argmax(1) == y[80:]).sum()) == right
    # The recipe with what was learned needs no data at all.
    mine, _ = net()
    mine.load_state_dict(torch.load("model.pt", weights_only=True))
    recipe = load(tuned / "tuned.yaml")
    with torch.no_grad():
        assert torch.equal(autoquant.apply(recipe, mine)(x[80:]), archived)
    # Nor does the archive need the file.
    (tuned / "tuned.learned.safetensors").unlink()
    with torch.no_grad():
        again = autoquant.load(tuned / "q.safetensors", net()[0])
        assert torch.equal(again(x[80:]), archived)


def test_a_recipe_that_was_moved_with_its_file(tuned, cli):
    before = evaluated(cli, "tuned.yaml")
    folder = tuned / "else where"
    folder.mkdir()
    (tuned / "tuned.yaml").rename(folder / "renamed.yaml")
    (tuned / "tuned.learned.safetensors").rename(folder / "tuned.learned.safetensors")
    assert evaluated(cli, folder / "renamed.yaml") == before
    assert evaluated(cli, "else where/renamed.yaml") == before


@pytest.mark.parametrize("how", ["missing", "cut off", "another's"])
def test_without_its_file_it_is_one_line(tuned, refused, how):
    path = tuned / "tuned.learned.safetensors"
    found = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(found[:-5] if how == "cut off" else found + b" ")
    for words in (
        ("evaluate", *WORDS, "--recipe", "tuned.yaml"),
        ("apply", "tuned.yaml", *WORDS, "-o", "q.safetensors"),
        # Under --json, what is done before is not said on standard output.
        ("tune", "tuned.yaml", *WORDS, "-o", "again.yaml", "--json"),
    ):
        line = refused(*words, early=False)
        assert "tuned.learned.safetensors: " in line


def test_a_task_that_changes_the_folder(tuned, cli):
    """Names are those of where the command began."""
    (tuned / "data").mkdir()
    text = (tuned / "task.py").read_text()
    (tuned / "task.py").write_text(f"import os\nos.chdir({str(tuned / 'data')!r})\n{text}")
    for words in (
        ("tune", "tuned.yaml", "model.pt", "--task", "task.py", "-o", "again.yaml"),
        ("evaluate", *WORDS, "--recipe", "tuned.yaml"),
        ("apply", "tuned.yaml", *WORDS, "-o", "q.safetensors"),
    ):
        os.chdir(tuned)
        result = cli(*words)
        assert result.status == 0, (words, result.err)
    names = {"again.yaml", "again.learned.safetensors", "q.safetensors"}
    assert names <= {p.name for p in tuned.iterdir()}


def test_a_second_run_writes_its_own_files_anew(tuned, cli):
    before = content(tuned)
    assert cli(*TUNE).status == 0
    assert content(tuned) == before
    assert cli(*TUNE, "--ridge", 3).status == 0
    recipe = load(tuned / "tuned.yaml")
    assert recipe.reconstruction.ridge == 3
    assert content(tuned)["tuned.learned.safetensors"] != before["tuned.learned.safetensors"]
    evaluated(cli, "tuned.yaml")


def test_a_recipe_that_was_edited_is_refused_before_anything_runs(tuned, refused):
    path = tuned / "tuned.yaml"
    path.write_text(path.read_text() + "# mine\n")
    assert "tuned.yaml: is there already and was edited" in refused(*TUNE)


@pytest.mark.parametrize("kind", ["text", "checkpoint"])
def test_a_foreign_file_beside_it_is_refused_before_anything_runs(plain, refused, kind):
    path = plain / "mine.learned.safetensors"
    if kind == "text":
        path.write_text("mine")
    else:
        save_file({"fc.weight": torch.zeros(3)}, path)
    line = refused(*TUNE, "-o", "mine.yaml")
    assert "mine.learned.safetensors: is there already" in line


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_is_read_is_not_written(tuned, refused, link):
    line = refused("tune", "tuned.yaml", *WORDS)
    assert "tuned.yaml: is the recipe, which is read; write to another file" in line
    link(tuned / "tuned.yaml", tuned / "linked.yaml")
    assert "is the recipe, which is read" in refused(
        "tune", "tuned.yaml", *WORDS, "-o", "linked.yaml"
    )


def test_what_a_recipe_learned_is_not_overwritten_under_it(tuned, cli, refused):
    """A copy of a tuned recipe names the same file, which only what it is a copy of may replace."""
    shutil.copy(tuned / "tuned.yaml", tuned / "copy.yaml")
    line = refused("tune", "copy.yaml", *WORDS, "-o", "tuned.yaml")
    assert "tuned.learned.safetensors: is " in line
    evaluated(cli, "copy.yaml")


def test_a_recipe_that_is_edited_while_it_is_tuned(tuned, cli, monkeypatch):
    """It stays as it is, and goes with what it learned."""
    confirm, mine = tuning.confirm_one, []

    def editing(*args, **kwargs):
        path = tuned / "tuned.yaml"
        path.write_text(path.read_text() + "# mine\n")
        mine.append(path.read_bytes())
        return confirm(*args, **kwargs)

    monkeypatch.setattr(tuning, "confirm_one", editing)
    result = cli(*TUNE, "--ridge", 3)
    assert result.status == 2
    assert "tuned.yaml: is there already and was edited" in result.err
    assert (tuned / "tuned.yaml").read_bytes() == mine[0]
    evaluated(cli, "tuned.yaml")


def test_a_tuned_recipe_can_be_tuned_again(tuned, cli):
    before = content(tuned)
    result = cli("tune", "tuned.yaml", *WORDS, "-o", "made/again.yaml", "--json")
    assert result.status == 0, result.err
    assert before.items() <= content(tuned).items()
    found = json.loads(result.out)
    first, again = load(tuned / "tuned.yaml"), load(tuned / "made/again.yaml")
    assert found["after"] <= found["before"]
    if not found["gained"]:
        assert dict(again.sites) == dict(first.sites)
        assert again.reconstruction == first.reconstruction
    for name in ("tuned.yaml", "tuned.learned.safetensors"):
        (tuned / name).unlink()
    evidence = again.evidence
    confirm = evaluated(cli, "made/again.yaml")["splits"]["confirm"]
    assert confirm["quantized"] == evidence.confirm.quantized


WITHOUT = """

def evaluate(model):
    x, y = data()
    with torch.no_grad():
        return (model(x[80:]).argmax(1) == y[80:]).float().mean().item()
"""


def test_a_task_without_calibration_data(plain, refused):
    head = TASK.partition("def calibration_data")[0]
    (plain / "task.py").write_text(head.rstrip() + "\n" + WITHOUT)
    (plain / "r.yaml").write_text(
        "autoquant_recipe: 2\nlayers: {'0': {weight: {bits: 3}}, '2': {}, '4': {}}\n"
    )
    line = refused(*TUNE, "--json", early=False)
    assert "gives no calibration data" in line
    assert "task.py" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ridge", "-1"), "-1"),
        (("--ridge", "nan"), "nan"),
        (("--ridge", "inf"), "inf"),
        (("--ridge", "much"), "much"),
        (("-o", "x.txt"), "x.txt"),
        (("-o", "x.safetensors"), "x.safetensors"),
        (("-o", "gone.yaml/x.yaml"), ""),
        (("--steps", "10"), "--steps is of training: give --method block or full too"),
        (("--rate", "2"), "--rate is of training: give --method block or full too"),
        (("--method", "blocks"), "blocks"),
        (("--method", "block", "--rivals", "2"), "--rivals is of training: give --method full too"),
        (("--layer-rates", "alike"), "--layer-rates is of training: give --method full too"),
        (("--method", "full", "--layer-rates", "both"), "both"),
        (("--method", "full", "--most", "2"), "--most is of training: give --method block too"),
        (("--drop", "0.5"), "--drop is of training: give --method block too"),
        (("--method", "block", "--drop", "2"), "2"),
        (("--method", "block", "--most", "0"), "0"),
        (("--method", "full", "--steps", "0"), "0"),
        (("--method", "full", "--rate", "0"), "0"),
        (("--method", "full", "--rate", "-1"), "-1"),
        (("--method", "full", "--estimator", "lsk"), "did you mean 'lsq'?"),
        (("--method", "full", "--gradient-bits", "int5"), "--gradient-bits: unknown gradients"),
        (
            ("--gradient-bits", "int4"),
            "--gradient-bits is of training: give --method block or full too",
        ),
    ],
)
def test_wrong_options(plain, cli, words, said):
    (plain / "gone.yaml").write_text("a file, no folder")
    before = content(plain)
    result = cli(*TUNE, *words)
    assert (result.status, result.out) == (2, ""), result
    assert "Traceback" not in result.err
    assert said in result.err
    assert content(plain) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune", "gone.yaml", *WORDS), "gone.yaml"),
        (("tune", "task.py", *WORDS), "task.py"),
        (("tune", "r.yaml", "gone.pt", "--task", "task.py"), "gone.pt"),
        (("tune", "r.yaml", "model.pt", "--task", "gone.py"), "gone.py"),
    ],
)
def test_files_that_are_not_there(refused, words, said):
    assert said in refused(*words, early=False)


def test_a_recipe_of_another_model(tuned, cli, refused):
    state = torch.load("model.pt", weights_only=True)
    torch.save({key: value + 0.001 for key, value in state.items()}, "model.pt")
    words = ("tune", "tuned.yaml", *WORDS, "-o", "again.yaml")
    assert "the recipe is for model (sha256" in refused(*words, early=False)
    assert cli(*words, "--accept-changes").status == 0


def test_json_is_one_document(plain, cli):
    result = cli(*TUNE, "--json", "--ridge", 20, "--ridge", 0)
    assert result.status == 0, result.err
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert set(found) == {"before", "after", "gained", "tried", "path"}
    assert [row["technique"]["ridge"] for row in found["tried"]] == [20.0, 0.0]
    losses = [row["loss"] for row in found["tried"]]
    assert found["after"] == min(losses) < found["before"]
    assert found["gained"] is True
    assert found["path"] == str(plain / "tuned.yaml")
    best = found["tried"][losses.index(min(losses))]["technique"]
    assert load(plain / "tuned.yaml").reconstruction.plain() == best


def worse(applier, sites, *_):
    """Return weights of the coarsest grid, whatever the recipe says."""
    coarse = WeightScheme(2, "per_tensor")
    return applier.apply({name: replace(site, weight=coarse) for name, site in sites.items()})


@pytest.mark.parametrize("as_json", [False, True])
def test_where_nothing_is_gained_the_recipe_is_as_it_was(plain, cli, monkeypatch, as_json):
    (plain / "r.yaml").write_text(
        RECIPE.replace("bits: 2", "bits: 8").replace("bits: 3", "bits: 8")
    )
    before = evaluated(cli, "r.yaml")
    monkeypatch.setattr(fitting, "reconstruct", worse)
    result = cli(*TUNE, *(["--json"] * as_json))
    assert result.status == 0, result.err
    if as_json:
        found = json.loads(result.out)
        assert found["gained"] is False
        assert found["after"] == found["before"]
        assert all(row["loss"] > found["before"] for row in found["tried"])
    else:
        assert "nothing gained" in result.out
    recipe, first = load(plain / "tuned.yaml"), load(plain / "r.yaml")
    assert {n: s.uncalibrated() for n, s in recipe.sites.items()} == {
        n: s.canonical() for n, s in first.sites.items()
    }
    assert (recipe.learned, recipe.reconstruction) == (None, None)
    assert not (plain / "tuned.learned.safetensors").exists()
    assert evaluated(cli, "tuned.yaml") == before


def test_outputs_that_are_no_numbers_are_as_bad_as_can_be(plain, cli, monkeypatch):
    original = fitting.reconstruct

    def broken(applier, sites, *args):
        done = original(applier, sites, *args)
        old = applier.learned[done["4"].learned]
        huge = LearnedWeight(old.q, torch.full_like(old.scale, 3e38), old.zero_point, old.shift)
        applier.learned[huge.digest] = huge
        return done | {"4": replace(done["4"], learned=huge.digest)}

    monkeypatch.setattr(fitting, "reconstruct", broken)
    result = cli(*TUNE, "--json")
    assert result.status == 0, result.err

    def no_number(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(result.out, parse_constant=no_number)
    assert found["gained"] is False
    assert math.isfinite(found["after"])


def test_it_is_callable_from_python(plain):
    source = Source("model.pt", "task.py", None, None)
    task = source.load_task()
    loaded = source.load(task)
    said = []
    found = tuning.tune(
        loaded, task, load(plain / "r.yaml"), plain / "t.yaml", ridges=(20.0,), say=said.append
    )
    assert found.gained
    assert found.after < found.before
    assert load(plain / "t.yaml").sites == found.recipe.sites
    assert "confirming" in said


def test_code_of_the_task_that_fails_is_one_line(plain, refused):
    text = (plain / "task.py").read_text()
    fails = """
calls = []


def forward(model, x):
    calls.append(0)
    if len(calls) > 14:
        raise ValueError("mine")
    return model(x)
"""
    (plain / "task.py").write_text(text + fails)
    line = refused(*TUNE, "--json", early=False)
    assert "mine" in line
    assert "task.py" in line
