"""What a model file is, told by its bytes and never by running it."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from autoquant.errors import ModelFileError
from autoquant.models.usercode import describe

EXPORT = "torch.export.save(torch.export.export(model, inputs), 'model.pt2')"
"""The line that makes the file that is always safe to load."""

_PICTURES = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF image"}

_PROTOCOLS = [bytes([n]) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)]


def sniff(path: Path) -> str:
    """Return what ``path`` holds: torch (of torch.save), pt2, torchscript, safetensors or other.

    Raises ModelFileError where it is missing, no file, empty or cut short.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelFileError(f"{path}: a folder, not a model file") from None
    except OSError as e:
        raise ModelFileError(f"{path}: can't be read ({e.strerror or e})") from e
    if not head:
        raise ModelFileError(f"{path}: empty")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in _PROTOCOLS:
        return "torch"
    for magic, name in _PICTURES.items():
        if head.startswith(magic):
            raise ModelFileError(f"{path}: {name}, not a model file")
    if path.suffix in (".pt2", ".safetensors"):
        raise ModelFileError(f"{path}: not a {path.suffix} file, or cut short")
    return "other"


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ModelFileError(
            f"{path}: a damaged archive, perhaps cut short: copy or download it again"
        ) from None
    if names & {"archive_format", "models/model.json", "serialized_exported_program.json"}:
        return "pt2"
    if "constants.pkl" in names and "data.pkl" in names:
        return "torchscript"
    return "torch" if "data.pkl" in names else "other"


def read_safely(path: Path) -> tuple[bool, Any]:
    """Return whether a file of torch.save holds tensors and plain values only, and if so, them.

    Raises ModelFileError where it is damaged.
    """
    try:
        with warnings.catch_warnings():
            # Files of long-gone versions are read all the same.
            warnings.simplefilter("ignore")
            return True, torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False, None
    except Exception as e:
        raise ModelFileError(f"{path}: a damaged model file ({describe(e)})") from e


def pickled_classes(path: Path) -> str:
    """Return " (it names …)" with what the pickle would import, where that can be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return ""
    names = sorted(names, key=lambda name: (name.startswith("torch."), name))
    return f" (it names {', '.join(names[:3])})" if names else ""
