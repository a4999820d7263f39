"""Every way through the package on a GPU: tensors of the model and the CPU's never meet."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

import autoquant
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.models.files import load, of_module
from autoquant.nn.archive import save_archive
from autoquant.optimize.evaluate import measure_recipe
from autoquant.session.apply import write
from autoquant.session.session import open_session
from tests.devices.models import KINDS, Case, make

SMALL = autoquant.SearchSpace.parse(
    """
autoquant_space: 1
name: small
rules:
  - weight_bits: [8, 4]
    weight_calibration: [output_mse, max]
    weight_scheme: [symmetric, asymmetric]
    correction: [bias]
    activation_bits: [8]
    activation_granularity: [per_tensor, per_token]
    activation_calibration: [mse]
""",
    "small",
)


def search(case: Case, **options: Any) -> Any:
    return autoquant.search(
        case.model, case.task, device="cuda", **{"trials": 3, "space": SMALL} | options
    )


def on_gpu(module: nn.Module) -> bool:
    return {t.device.type for t in module.state_dict().values()} == {"cuda"}


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x)
    return y


def alike(a: Tensor, b: Tensor) -> bool:
    """Return whether outputs of two devices are the same, but for what rounding decides."""
    if not a.is_floating_point():
        return (a == b).double().mean().item() > 0.9
    return ((a - b).norm() / b.norm()).item() < 0.03


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", KINDS)
def test_from_the_search_to_files(name, tmp_path):
    case = make(name)
    result = search(case)
    evidence = result.recipe.evidence
    assert all(p.device.type == "cpu" for p in case.model.parameters())

    again = measure_recipe(of_module(case.model), case.task, result.recipe, "cuda")
    assert again.splits["search"].quantized == evidence.search.quantized
    assert again.splits["confirm"].quantized == evidence.confirm.quantized

    there = copy.deepcopy(case.model).to("cuda")
    applied = autoquant.apply(result.recipe, there, case.task)
    assert on_gpu(applied)
    assert on_gpu(there)
    expected = outputs(applied, case.example.cuda())
    assert expected.device.type == "cuda"

    archive = tmp_path / "quantized.safetensors"
    save_archive(applied, result.recipe, archive)
    loaded = autoquant.load(archive, make(name).model.cuda())
    assert on_gpu(loaded)
    assert torch.equal(outputs(loaded, case.example.cuda()), expected)

    loaded = autoquant.load(archive, make(name).model)
    assert alike(outputs(loaded, case.example), expected.cpu())
    written = write(applied, result.recipe, case.task, tmp_path / "quantized.pt2")
    assert written.kind == case.written, written.reason
    if written.kind == "pt2":
        program = torch.export.load(written.path).module()
        assert alike(outputs(program, case.example), expected.cpu())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["convolutional", "plain"])
def test_everything_that_can_be_chosen(name):
    search(make(name), space=autoquant.SearchSpace.load("full"), trials=4, sampler="random")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rounding", [LearnedRounding(0.02), GPTQ()], ids=str)
def test_roundings(rounding):
    case = make("convolutional")
    result = search(case, trials=1)
    sites = {
        name: replace(site, weight=site.weight and replace(site.weight, rounding=rounding))
        for name, site in result.recipe.sites.items()
    }
    rounded = result.recipe.with_sites(sites)
    assert on_gpu(autoquant.apply(rounded, case.model.cuda(), case.task))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("options", [{"objective": "latency"}, {"objective": "bitops"}])
def test_costs_that_are_measured(options):
    search(make("plain"), **options)


@pytest.mark.usefixtures("gpu")
def test_results_that_are_kept():
    plain, kept = (
        search(make("convolutional"), memory=memory, study=f"memory-{memory}", trials=5)
        for memory in ("0", "64MB")
    )
    assert kept.recipe == plain.recipe


class Random(nn.Module):
    """Draws on whichever device it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + 1e-5 * torch.rand(h.shape, device=h.device))


@pytest.mark.usefixtures("gpu")
def test_a_model_that_draws_random_numbers_is_said_to():
    said: list[str] = []
    case = make("plain")
    session = open_session(of_module(Random()), case.task, torch.device("cuda"))
    session.baseline("search")
    assert session.reuse(1 << 20, said.append) is None
    assert "draws random numbers" in said[0]


@pytest.mark.usefixtures("gpu")
def test_a_search_is_resumed():
    case = make("plain")
    first = search(case, trials=2, study="s")
    result = autoquant.resume("s", model=case.model, task=case.task, trials=4)
    assert sum(result.trials.values()) > sum(first.trials.values())
    assert result.device == "cuda"


@pytest.mark.usefixtures("gpu")
def test_a_model_and_data_that_are_on_the_gpu_already():
    case = make("plain")
    model = case.model.cuda()
    batches = [x.cuda() for x in (case.example, case.example + 1, case.example - 1)]
    task = autoquant.Task(evaluation_data=lambda: batches)
    result = autoquant.search(model, task, device="cuda", trials=2)
    assert on_gpu(model)
    assert on_gpu(autoquant.apply(result.recipe, model, task))


@pytest.mark.usefixtures("gpu")
def test_a_program_makes_its_tensors_where_it_was_moved(tmp_path: Path):
    """An exported program says "on the CPU" wherever it makes a tensor, an LSTM's state say."""
    case = make("recurrent")
    path = tmp_path / "model.pt2"
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(
            case.model, (case.example,), dynamic_shapes={"ids": {0: batch}}, strict=False
        )
    torch.export.save(program, path)
    loaded = load(path)
    assert "device" in loaded.module.code
    result = search(replace(case, model=loaded.module), trials=1)
    assert result.recipe.evidence.confirm.drop < 0.3
    applied = autoquant.apply(result.recipe, loaded, case.task)
    written = write(applied, result.recipe, case.task, tmp_path / "quantized.pt2")
    assert written.kind == "pt2", written.reason


@pytest.mark.usefixtures("gpu")
def test_a_function_that_evaluates_a_model_of_its_own():
    case = make("plain")

    def evaluate(model: nn.Module) -> float:
        x = case.example.to(next(model.parameters()).device)
        return float(outputs(model, x).abs().mean())

    task = autoquant.Task(
        calibration_data=lambda: [case.example], evaluate=evaluate, higher_is_better=True
    )
    result = search(replace(case, task=task))
    assert measure_recipe(of_module(case.model), task, result.recipe, "cuda").splits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_written_program_is_moved_to_a_gpu(tmp_path):
    case = make("transformer")
    recipe = search(case, trials=1).recipe
    applied = autoquant.apply(recipe, case.model, case.task)
    written = write(applied, recipe, case.task, tmp_path / "quantized.pt2")
    program = move_to_device_pass(torch.export.load(written.path), "cuda:0")
    found = outputs(program.module(), case.example.cuda())
    assert found.device.type == "cuda"
    assert alike(found.cpu(), outputs(applied, case.example))


class Noting(nn.Linear):
    """Notes what it may be multiplied in."""

    def forward(self, x: Tensor) -> Tensor:
        SEEN.add(torch.backends.cudnn.allow_tf32)
        return super().forward(x)


SEEN: set[bool] = set()


@pytest.mark.usefixtures("gpu")
def test_convolutions_are_float32_while_a_model_is_measured():
    case = make("plain")
    model = nn.Sequential(Noting(10, 3), *case.model[1:2], nn.Linear(3, 3))
    before = torch.backends.cudnn.allow_tf32
    SEEN.clear()
    search(replace(case, model=model))
    assert True not in SEEN
    assert SEEN
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_the_demo():
    from autoquant.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["demo", "d", "--device", "cuda", "--json"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["apply", "d/recipe.yaml", "d/model.pt", "--task", "d/task.py", "--device", "cuda"])
    assert ended.value.code == 0
    assert torch.export.load("quantized.pt2")
