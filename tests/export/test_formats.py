"""Files of other runtimes: run there, they give what the model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.export.exporter import EXPORTERS, Example, Exporter, check_installed, difference
from autoquant.export.formats.onnx import OPSET
from autoquant.export.pt2 import NotExportable
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.export.test_qdq import deployed, session_of
from tests.training.models import inputs

KINDS = ("mlp", "images", "attentive")
FLIPS = 0.02
"""How far outputs may be off where integers lie between two, and sums round otherwise."""
LIBERTIES = 0.1
"""How far ONNX Runtime is off by what it does by itself: biases become integers of the step of
activations times that of weights, and activations of weights alone are rounded to 8 bits."""


def example_of(model: nn.Module, samples: int = 16) -> Example:
    return Example.of(model, ((inputs(samples, seed=5),), {}))


def written(name: str, model: nn.Module, folder: Path) -> tuple[Exporter, Path, Example]:
    exporter, example = EXPORTERS.get(name), example_of(model)
    path = folder / f"q{exporter.suffix}"
    exporter.write(model, example, path)
    assert exporter.ours(path)
    return exporter, path, example


@pytest.mark.parametrize("name", EXPORTERS.names())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weight", "activation", "off"),
    [
        (WeightScheme(8), ActivationScheme(8), FLIPS),
        (WeightScheme(4, "per_channel", "asymmetric"), ActivationScheme(5), FLIPS),
        (WeightScheme(3, "per_tensor"), ActivationScheme(8, "per_token"), FLIPS),
        (WeightScheme(2), None, 1e-5),
    ],
)
def test_a_file_gives_what_the_model_gives(
    tmp_path: Path, name: str, kind: str, weight: Any, activation: Any, off: float
) -> None:
    model = deployed(session_of(kind), SiteRecipe(weight, activation))
    exporter, path, example = written(name, model, tmp_path)
    own = LIBERTIES if name == "onnx" else off
    runtime = exporter.open(path, example, 1)
    assert difference(example.output, runtime(*example.call[0])) < own
    # Another number of samples, which is free.
    other = example_of(model, 7)
    assert difference(other.output, runtime(*other.call[0])) < own
    names = {file.name for file in tmp_path.iterdir()}
    assert names == ({"q.onnx"} if name == "onnx" else {"q.xml", "q.bin"})


def test_groups_are_blocks_of_onnx(tmp_path: Path) -> None:
    import onnx

    recipe = SiteRecipe(WeightScheme(4, "per_group_32", "asymmetric"))
    model = deployed(session_of("attentive"), recipe)
    exporter, path, example = written("onnx", model, tmp_path)
    found = onnx.load(str(path))
    onnx.checker.check_model(found, full_check=True)
    assert [entry.version for entry in found.opset_import if not entry.domain] == [OPSET]
    blocks = [
        attribute.i
        for node in found.graph.node
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "block_size"
    ]
    assert 32 in blocks
    assert difference(example.output, exporter.open(path, example, 1)(*example.call[0])) < LIBERTIES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (WeightScheme(8), ActivationScheme(8)),
        (WeightScheme(4, "per_channel", "asymmetric"), ActivationScheme(5)),
        (WeightScheme(3, "per_tensor"), ActivationScheme(8, "per_token")),
        (WeightScheme(2), None),
    ],
)
def test_what_an_onnx_file_says_is_the_recipe(
    tmp_path: Path, kind: str, weight: Any, activation: Any
) -> None:
    """Computed as it stands, operator by operator, without what the runtime makes of it."""
    import onnxruntime

    model = deployed(session_of(kind), SiteRecipe(weight, activation))
    _, path, _ = written("onnx", model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    example = example_of(model, 400)
    [given], [x] = session.get_inputs(), example.call[0]
    found = torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])
    off = (found - example.output).abs().amax(1) > 1e-4 * example.output.abs().max()
    assert float(off.float().mean()) <= 0.02  # samples with an integer that lies between two


def test_openvino_computes_all_products_in_integers(tmp_path: Path) -> None:
    model = deployed(session_of("mlp"), SiteRecipe(WeightScheme(8), ActivationScheme(8)))
    exporter, path, example = written("openvino", model, tmp_path)
    assert exporter.open(path, example, 1).integers == (3, 3)


def test_a_float_model_is_written_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    for name in EXPORTERS:
        exporter, path, example = written(name, model, tmp_path)
        assert difference(example.output, exporter.open(path, example, 1)(*example.call[0])) < 1e-5


@pytest.mark.parametrize("name", EXPORTERS.names())
def test_what_is_not_ours_is_told(tmp_path: Path, name: str) -> None:
    exporter = EXPORTERS.get(name)
    path = tmp_path / f"q{exporter.suffix}"
    for content in (b"", b"hello", bytes(range(256))):
        path.write_bytes(content)
        assert not exporter.ours(path)


def test_a_library_that_is_missing_is_one_line() -> None:
    class Foreign(type(EXPORTERS.get("onnx"))):  # type: ignore[misc]
        needs = ("onnx", "no_such_library")

    with pytest.raises(UserError, match=r"--to foreign needs .*: pip install no_such_library$"):
        check_installed("foreign", Foreign())


def test_the_difference_is_of_what_pairs_off() -> None:
    x = torch.randn(4, 3)
    assert difference(x, x) == 0
    assert difference((x, [x]), (x * 1.1, [x * 1.1])) == pytest.approx(0.1)
    assert difference(x, x[:2]) != difference(x, x[:2])


class Several(nn.Module):
    """Takes and gives more than one tensor, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float = 2.0, rest: Any = None) -> Any:
        y = self.one(a) * scale - self.two(b)
        if rest is not None:
            y = y * rest["mask"]
        return {"y": y, "kept": (y.relu(), 3)}


@pytest.mark.parametrize("name", EXPORTERS.names())
@pytest.mark.parametrize("how", ["names", "mixed", "nested", "places"])
def test_a_call_of_any_form_is_the_models(tmp_path: Path, name: str, how: str) -> None:
    import onnx

    model, draw = Several().eval(), torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    mask = torch.randn(5, 3, generator=draw)
    call: Any = {
        "names": ((), {"b": b, "a": a}),
        "mixed": ((a,), {"rest": {"mask": mask}, "b": b}),
        "nested": ((a, b, 3.0, {"mask": mask}), {}),
        "places": ((a, b), {}),
    }[how]
    exporter, example = EXPORTERS.get(name), Example.of(model, call)
    path = tmp_path / f"q{exporter.suffix}"
    exporter.write(model, example, path)
    found = exporter.open(path, example, 1)(*call[0], **call[1])
    assert difference(example.output, found) < 1e-6
    assert found["kept"][1] == 3
    if name == "onnx":
        graph = onnx.load(str(path)).graph
        given = ["a", "b", *(["rest.mask"] if how in ("mixed", "nested") else [])]
        assert [x.name for x in graph.input] == given
        assert [y.name for y in graph.output] == ["y", "kept.0"]


def test_what_can_not_be_followed_is_one_line(tmp_path: Path) -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(NotExportable) as failed:
        EXPORTERS.get("onnx").write(
            Deciding(), Example.of(Deciding(), ((torch.ones(3, 2),), {})), tmp_path / "q.onnx"
        )
    assert len(str(failed.value).splitlines()) == 1
    assert "\x1b" not in str(failed.value)
    assert not list(tmp_path.iterdir())
