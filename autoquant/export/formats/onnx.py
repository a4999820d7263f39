"""ONNX with QuantizeLinear and DequantizeLinear, as ONNX Runtime and others read it.

Weights lie as int8 whatever their width, activations are rounded where the recipe says. What the
runtime fuses into integer layers is its own affair: ``Runtime.integers`` asks it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import ModelFileError
from autoquant.export.exporter import EXPORTERS, Example, Flat, Runtime
from autoquant.export.pt2 import NotExportable, at_least_two, free_leaf, one_line, quiet
from autoquant.export.qdq import translations, unfit, with_operators
from autoquant.libraries import library
from autoquant.models.usercode import guarded
from autoquant.nn.fold import without_norms

OPSET = 21
PRODUCER = "autoquant"
INTEGER = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulNBits")
"""Operators by which ONNX Runtime computes in integers."""
REAL = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def write_onnx(module: nn.Module, example: Example, path: Path) -> None:
    """Write a deployed model, or a float one, as ONNX, whole or not at all.

    Every dimension is free that can be. Raises NotExportable where the model's code can't be
    followed, ModelFileError where the file can't be written.
    """
    model = Flat(with_operators(module), example)
    inputs = tuple(at_least_two(example.tensors(example.call)))
    reason = "it is given no tensors"
    for shapes in [_free(inputs, tokens=True), _free(inputs, tokens=False), None]:
        try:
            with (
                guarded(NotExportable, passing=(Exception,)),
                without_norms(model),
                torch.no_grad(),
                quiet(),
            ):
                program = torch.onnx.export(
                    model,
                    inputs,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=example.names,
                    output_names=example.outputs,
                    dynamic_shapes=shapes,
                    custom_translation_table=translations(),
                    verbose=False,
                )
        except NotExportable as error:
            reason = str(error)
            continue
        except Exception as error:
            reason = one_line(_cause(error))
            continue
        assert program is not None
        program.model.producer_name = PRODUCER
        _save(program, path)
        return
    raise NotExportable(reason)


def _free(inputs: Sequence[Tensor], *, tokens: bool) -> dict[str, Any]:
    """Return dynamic shapes as torch.export takes them, by the rules of a ``.pt2``."""
    return {"tensors": tuple(free_leaf(x, tokens=tokens) for x in inputs)}


def _cause(error: BaseException) -> BaseException:
    """Return what an error comes from: torch.onnx wraps what it meets in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _save(program: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.part.onnx")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(temporary), external_data=False)
        temporary.replace(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot write: {one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_onnx(path: Path) -> bool:
    """Return whether ``write_onnx`` wrote the file."""
    onnx = library("onnx")
    try:
        return bool(onnx.load(str(path), load_external_data=False).producer_name == PRODUCER)
    except Exception:  # whatever it is, it is not ours
        return False


class OnnxRuntime(Runtime):
    """An ONNX file, run by ONNX Runtime."""

    def __init__(self, path: Path, example: Example, threads: int) -> None:
        super().__init__(example)
        runtime = library("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(optimized)
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            graph = library("onnx").load(str(optimized), load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        integers = sum(kind in INTEGER for kind in kinds)
        self._integers = integers, integers + sum(kind in REAL for kind in kinds)
        self._names = [given.name for given in self._session.get_inputs()]

    @property
    def integers(self) -> tuple[int, int]:
        """Products computed in integers, of all: those of activations with each other are too."""
        return self._integers

    def compute(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the outputs."""
        given = {n: x.numpy() for n, x in zip(self._names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in self._session.run(None, given)]


class Onnx:
    """ONNX, run by ONNX Runtime."""

    suffix = ".onnx"
    runtime = "ONNX Runtime"
    needs = ("onnx", "onnxscript", "onnxruntime")

    def unfit(self, module: nn.Module) -> list[str]:
        """Return what of a deployed model it can't express, a line each."""
        return unfit(module)

    def write(self, module: nn.Module, example: Example, path: Path) -> None:
        """Write a deployed model."""
        write_onnx(module, example, path)

    def ours(self, path: Path) -> bool:
        """Return whether it wrote the file."""
        return is_onnx(path)

    def open(self, path: Path, example: Example, threads: int) -> Runtime:
        """Return the file's model, run by ONNX Runtime."""
        return OnnxRuntime(path, example, threads)


EXPORTERS.register("onnx")(Onnx())
