"""Reading a torch.export archive (.pt2) from a stranger: nothing in it is run.

``torch.export.load`` unpickles what an archive marks as pickled, falls back to unsafe unpickling of
example inputs, evaluates shape expressions and input guards as Python, pastes names into generated
code, looks operators up by any path below ``torch``, and loads compiled libraries. So the archive
is never given to it: its parts are checked one by one and written into a new one, in memory, which
holds tensors, a graph of known operators and names, and no pickle that was not written here.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from autoquant.errors import ModelFileError
from autoquant.models.archive_graph import Unsafe, clean, clean_program
from autoquant.models.usercode import describe

_COPIED = re.compile(r"archive_format|archive_version|byteorder|\.data/[\w.]+")
_TENSOR = re.compile(r"data/(weights|constants)/(weight|tensor)_\d+")
_CONFIG = re.compile(r"data/(weights|constants)/model_(weights|constants)_config\.json")
_LEGACY = re.compile(r"data/(weights|constants)/model\.pt")
_GRAPH = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_DROPPED = re.compile(r"extra/.*|data/sample_inputs/.*")


def read_program(path: Path, *, trust: bool = False) -> ExportedProgram:
    """Return the program of a .pt2 file; ``trust`` leaves every check to torch, which has none.

    Raises ModelFileError where the archive holds anything that would run code, or is no archive
    that this torch can read.
    """
    try:
        source: Any = io.BytesIO(path.read_bytes() if trust else _rewritten(path))
        with _silent("torch.export"):
            return torch.export.load(source)
    except Unsafe as e:
        raise ModelFileError(
            f"{path}: refused, because the archive {e}: export the model again with "
            f"torch.export.save, or give --trust-pickle if you trust where the file came from"
        ) from e
    except Exception as e:
        # A schema of another torch version fails in as many ways as there are fields.
        raise ModelFileError(
            f"{path}: not a torch.export archive that torch {torch.__version__} can read "
            f"({describe(e)}): export it again with this version"
        ) from e


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger from printing what is raised as an error anyway."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _rewritten(path: Path) -> bytes:
    """Return a copy of the archive that holds only what is known to be harmless."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        records = _records(old)
        for name, info in records.items():
            content = _checked(name, old.read(info))
            if content is not None:
                new.writestr(f"model/{name}", content)
        if _INPUTS not in records:
            new.writestr(f"model/{_INPUTS}", b"")
    return target.getvalue()


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's records by their names below its one root folder."""
    records: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in records:
            raise Unsafe(f"has two records named {name!r}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Unsafe(f"has a compressed record, {name!r}, which torch never writes")
        records[name] = info
    if _GRAPH not in records:
        raise Unsafe("has no models/model.json (a file of torch 2.7 or older, or no single model)")
    return records


def _checked(name: str, content: bytes) -> bytes | None:
    """Return what the new archive has for a record, None to leave it out; raise Unsafe."""
    if _COPIED.fullmatch(name):
        return content
    if name == _GRAPH:
        return json.dumps(clean_program(json.loads(content))).encode()
    if name == _INPUTS:
        return b""  # only kept as an example, and the one record that is always a pickle
    if _CONFIG.fullmatch(name):
        return _checked_config(json.loads(content))
    if _LEGACY.fullmatch(name):
        return _repickled(name, content)
    if _TENSOR.fullmatch(name):
        return content
    if _DROPPED.fullmatch(name):
        return None
    if name.startswith("models/"):
        raise Unsafe("holds more than one model")
    if name.startswith(("data/weights/", "data/constants/")):
        raise Unsafe(f"holds an object that is no tensor ({name})")
    raise Unsafe(f"holds {name!r}, which is not part of an exported program")


def _checked_config(config: dict[str, Any]) -> bytes:
    """Return the table of a .pt2 file's tensors, all of which are to be plain numbers."""
    for name, payload in config["config"].items():
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise Unsafe(f"holds {name[:60]!r} as a pickle, which runs code when it is loaded")
    return json.dumps(clean(config)).encode()


def _repickled(name: str, content: bytes) -> bytes:
    """Return a table of tensors that an older torch pickled, pickled anew from what is safe."""
    try:
        tensors = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as e:
        raise Unsafe(f"holds a pickle of more than tensors ({name})") from e
    target = io.BytesIO()
    torch.save(tensors, target)
    return target.getvalue()
