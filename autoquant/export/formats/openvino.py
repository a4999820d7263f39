"""OpenVINO's own files, NAME.xml and NAME.bin, made of the ONNX that ``onnx`` writes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import ModelFileError
from autoquant.export.exporter import EXPORTERS, Example, Runtime
from autoquant.export.formats.onnx import write_onnx
from autoquant.export.pt2 import one_line
from autoquant.export.qdq import unfit
from autoquant.libraries import library

MARK = "written_by_autoquant"
LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""What OpenVINO calls products, in the program that it runs."""
INTEGERS = ("u8", "i8")


class OpenVinoRuntime(Runtime):
    """An OpenVINO file, run on the CPU; what is not in integers is in float32."""

    def __init__(self, path: Path, example: Example, threads: int) -> None:
        super().__init__(example)
        core = library("openvino").Core()
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self._model = core.compile_model(core.read_model(str(path)), "CPU", options)
        self._request = self._model.create_infer_request()

    @property
    def integers(self) -> tuple[int, int]:
        """Products computed in integers, of all: those of activations with each other are too."""
        found = []
        for node in self._model.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if "layerType" in info and info["layerType"].astype(str) in LAYERS:
                found.append(info["runtimePrecision"].astype(str) in INTEGERS)
        return sum(found), len(found)

    def compute(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the outputs."""
        found = self._request.infer([x.numpy() for x in inputs])
        return [torch.from_numpy(found[y].copy()) for y in self._model.outputs]


class OpenVino:
    """OpenVINO's intermediate representation, run by OpenVINO."""

    suffix = ".xml"
    runtime = "OpenVINO"
    needs = ("onnx", "onnxscript", "openvino")

    def unfit(self, module: nn.Module) -> list[str]:
        """Return what of a deployed model it can't express, a line each."""
        return unfit(module)

    def write(self, module: nn.Module, example: Example, path: Path) -> None:
        """Write a deployed model, whole or not at all."""
        openvino = library("openvino")
        parts = [path.with_name(f".{path.stem}.part{end}") for end in (".xml", ".bin")]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "model.onnx"
                write_onnx(module, example, source)
                model: Any = openvino.convert_model(str(source))
            model.set_rt_info("1", [MARK])
            # Where weights alone are quantized it would round activations to 8 bits by itself.
            model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
            openvino.save_model(model, str(parts[0]), compress_to_fp16=False)
            os.replace(parts[1], path.with_suffix(".bin"))
            os.replace(parts[0], path)
        except (OSError, RuntimeError) as error:
            raise ModelFileError(f"{path}: cannot write: {one_line(error)}") from error
        finally:
            for part in parts:
                with contextlib.suppress(OSError):
                    part.unlink()

    def ours(self, path: Path) -> bool:
        """Return whether it wrote the file."""
        try:
            return MARK in path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False

    def open(self, path: Path, example: Example, threads: int) -> Runtime:
        """Return the file's model, run by OpenVINO."""
        return OpenVinoRuntime(path, example, threads)


EXPORTERS.register("openvino")(OpenVino())
