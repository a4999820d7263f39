"""A quantized model as a .pt2: a program of plain aten operators that torch alone can run."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autoquant.errors import ModelFileError
from autoquant.models.usercode import guarded
from autoquant.nn.agreement import disagreement
from autoquant.nn.fold import without_norms

MARK = "written_by_autoquant"
"""An extra file in a .pt2 that says where it came from, so that it may be replaced."""
ROUNDING = 1e-5
"""Difference of a program's outputs, relative to the largest, that other operators explain."""


class NotExportable(Exception):
    """The model can't be a .pt2; the message says why, in one line."""


def export_program(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    others: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = (),
) -> Any:
    """Return ``module`` as an exported program, with every dimension free that can be.

    ``others`` are calls with other shapes that the program must be able to answer too. Raises
    NotExportable where torch.export can't follow the model, or its program gives other outputs.
    """
    wide = at_least_two((args, kwargs))
    reason = "no example input"
    free = [free_dims(module, wide, tokens=tokens) for tokens in (True, False)]
    for shapes in (*free, None):
        try:
            # What the model's code does under torch.export, torch wraps in errors of its own.
            with (
                guarded(NotExportable, passing=(Exception,)),
                without_norms(module),
                torch.no_grad(),
                quiet(),
            ):
                program = torch.export.export(
                    module, wide[0], wide[1], dynamic_shapes=shapes, strict=False
                )
                answers = program.module()
                same = all(
                    _agree(module(*a, **k), answers(*a, **k)) for a, k in ((args, kwargs), *others)
                )
        except NotExportable as error:
            reason = str(error)
            continue
        except Exception as error:
            reason = one_line(error)
            continue
        if same:
            return program
        reason = "the exported program gives other outputs"
    raise NotExportable(reason)


def _agree(expected: Any, found: Any) -> bool:
    return disagreement(expected, found, rounding=ROUNDING) is None


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch.export says on its way (warnings, logs, whole graphs) off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as nowhere:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
    finally:
        logging.disable(before)


def at_least_two(tree: Any) -> Any:
    """Return inputs with two samples or more: a single one would be taken for a constant."""
    if any(
        isinstance(x, torch.Tensor) and x.dim() and x.shape[0] > 1 for x in pytree.tree_leaves(tree)
    ):
        return tree

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == 1:
            return torch.cat([leaf, leaf])
        return leaf

    return pytree.tree_map(widen, tree)


def free_dims(
    module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], *, tokens: bool
) -> dict[str, Any]:
    """Return dynamic shapes as torch.export takes them, by the names of forward's parameters.

    The first dimension is free and, for ``tokens``, every one of integer inputs. A free image size
    would take minutes to reason about.
    """

    leaf = functools.partial(free_leaf, tokens=tokens)
    bound = inspect.signature(module.forward).bind(*inputs[0], **inputs[1])
    return {name: pytree.tree_map(leaf, value) for name, value in bound.arguments.items()}


def free_leaf(value: Any, *, tokens: bool) -> Any:
    """Return which dimensions of one input are free: the first, and all of integers if wished."""
    if not isinstance(value, torch.Tensor):
        return None
    every = tokens and not value.is_floating_point()
    free = range(value.dim() if every else min(value.dim(), 1))
    return dict.fromkeys(free, torch.export.Dim.AUTO)


def save_program(program: Any, path: Path) -> None:
    """Write an exported program, whole or not at all; ModelFileError where it fails.

    Raises NotExportable where torch can't write down what the program holds or returns.
    """
    whole, small = path.with_name(f".{path.stem}.part.pt2"), path.with_name(f".{path.stem}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _strip(program)
        try:
            with quiet():
                torch.export.save(program, whole, extra_files={MARK: "1"})
        except NotImplementedError as error:  # a type of output that nobody has registered
            raise NotExportable(one_line(error)) from error
        _compress(whole, small, path.stem)
        small.replace(path)
    except (OSError, RuntimeError) as error:
        raise ModelFileError(f"{path}: cannot write: {one_line(error)}") from error
    finally:
        for temporary in (whole, small):
            with contextlib.suppress(OSError):
                temporary.unlink()


def is_program(path: Path) -> bool:
    """Return whether ``save_program`` wrote the file."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith(f"/{MARK}") for name in file.namelist())
    except zipfile.BadZipFile:
        return False


def _compress(source: Path, target: Path, folder: str) -> None:
    """Copy a .pt2, all in one ``folder``, with its texts deflated: most of a small file.

    torch reads either; weights stay as they are, for they are dense already.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            name = f"{folder}/{entry.filename.partition('/')[2]}"
            text = entry.filename.endswith(".json")
            kind = zipfile.ZIP_DEFLATED if text else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(name), old.read(entry), kind)


def _strip(program: Any) -> None:
    """Drop the example inputs and where each operator came from: most of a small file."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                    node.meta.pop(key, None)
