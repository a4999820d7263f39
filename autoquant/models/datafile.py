"""Data files: named arrays in .npz, .safetensors or a tensor-only .pt, read without unpickling."""

from __future__ import annotations

import difflib
import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoquant.errors import TaskError
from autoquant.models.batches import as_inputs, as_targets
from autoquant.models.trees import Tree, batch_size

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")


def read_data_file(path: Path) -> tuple[Tree, Tree, str]:
    """Return (inputs, targets or None, SHA-256) of a data file.

    ``inputs`` is one array, or a dict where the file has ``inputs.NAME`` for several; float64
    inputs become float32 and arrays of strings become lists. Raises TaskError in one line for a
    file that is missing, unreadable or pickled, and for arrays that are missing, empty or unequal.
    """
    if not path.is_file():
        raise TaskError(f"{path}: no such data file")
    if path.suffix not in SUFFIXES:
        raise TaskError(f"{path}: unknown kind of data file: expected {', '.join(SUFFIXES)}")
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        arrays = _load(path)
    except OSError as error:
        raise TaskError(f"{path}: can not be read: {error.strerror or error}") from error
    inputs = _inputs(path, arrays)
    targets = None
    if "targets" in arrays:
        targets = as_targets(_array(path, arrays, "targets"), f"{path}: 'targets'")
    _check_sizes(path, inputs, targets)
    return inputs, targets, sha256


def _load(path: Path) -> dict[str, Any]:
    """Return the arrays of a file by name."""
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise TaskError(f"{path}: is no safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise TaskError(
            f"{path}: is no tensor-only file of torch.save, and pickles are not loaded: "
            "save a dict of tensors, or use .npz or .safetensors"
        ) from error
    if not isinstance(content, Mapping):
        raise TaskError(
            f"{path}: holds a {type(content).__name__}: expected a dict with 'inputs' and 'targets'"
        )
    return {str(key): value for key, value in content.items()}


def _load_npz(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise TaskError(f"{path}: holds a single array: expected an .npz archive")
            return {name: _member(path, archive, name) for name in archive.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise TaskError(f"{path}: is no .npz archive, or a damaged one") from error


def _member(path: Path, archive: Any, name: str) -> np.ndarray:
    try:
        return archive[name]
    except ValueError as error:
        raise TaskError(
            f"{path}: array {name!r} holds Python objects, which are not loaded: "
            "save numbers or strings of one shape"
        ) from error


def _inputs(path: Path, arrays: dict[str, Any]) -> Tree:
    named = {key.removeprefix("inputs."): key for key in arrays if key.startswith("inputs.")}
    if "inputs" in arrays and named:
        raise TaskError(f"{path}: has both 'inputs' and {next(iter(named.values()))!r}: keep one")
    if "inputs" not in arrays and not named:
        near = difflib.get_close_matches("inputs", list(arrays), n=1)
        hint = f"; rename {near[0]!r}" if near else ""
        found = ", ".join(repr(key) for key in arrays) or "nothing"
        raise TaskError(f"{path}: has no 'inputs' (found {found}){hint}")
    if not named:
        return as_inputs(_array(path, arrays, "inputs"), f"{path}: 'inputs'")
    return {
        name: as_inputs(_array(path, arrays, key), f"{path}: {key!r}")
        for name, key in named.items()
    }


def _array(path: Path, arrays: dict[str, Any], key: str) -> Any:
    """Return one entry of the file, checked to be an array with samples."""
    value = arrays[key]
    if not isinstance(value, Tensor | np.ndarray | list):
        raise TaskError(f"{path}: {key!r} is a {type(value).__name__}: expected an array")
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        raise TaskError(f"{path}: {key!r} is a single number: the first dimension is the samples")
    return value


def _check_sizes(path: Path, inputs: Tree, targets: Tree) -> None:
    try:
        n = batch_size(inputs)
        given = n if targets is None else batch_size(targets)
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from None
    if not n:
        raise TaskError(f"{path}: 'inputs' is empty")
    if n != given:
        raise TaskError(f"{path}: {n} inputs but {given} targets")
