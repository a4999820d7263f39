"""Files that are written whole or not at all, and never over one that is the user's.

A text that is written here begins with a line that holds the digest of the rest. So it is known,
whatever else is lost, whether a file is still what was written, or was edited since.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from autoquant.errors import UserError

SIGNATURE = "# written by autoquant, sha256 {}: never overwritten once it is edited\n"
_SIGNED = re.compile(re.escape(SIGNATURE).replace(r"\{\}", "([0-9a-f]{64})").encode())


def signed(text: str) -> str:
    """Return ``text`` with the line that lets it be known again."""
    return SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()) + text


def is_signed(path: Path) -> bool:
    """Return whether a file is as it was signed."""
    content = path.read_bytes()
    match = _SIGNED.match(content)
    if match is None:
        return False
    return hashlib.sha256(content[match.end() :]).hexdigest().encode() == match[1]


def check_folder(folder: Path) -> None:
    """Raise UserError where nothing could be written to ``folder`` after long work."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{folder}: nothing can be written there: {path} is no folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: nothing can be written there: {path} is not writable")


def check_target(
    path: Path, ours: Callable[[Path], bool], inputs: Mapping[str, str | Path | None] | None = None
) -> None:
    """Raise UserError where to write to ``path`` would take something from the user.

    That is: one of ``inputs`` (by what it is called), under whatever name; a folder; or a file that
    is not ``ours``, a recipe that was edited for instance.
    """
    if not os.path.lexists(path):
        return
    for name, file in (inputs or {}).items():
        both = file is not None and os.path.exists(file) and path.exists()
        if both and os.path.samefile(str(file), path):
            raise UserError(f"{path}: is the {name}, which is read; write to another file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file")
    if path.exists() and not _is_ours(path, ours):
        raise UserError(
            f"{path}: is there already and was edited, or not written by autoquant; move it, or "
            "write to another place"
        )


def _is_ours(path: Path, ours: Callable[[Path], bool]) -> bool:
    try:
        return path.is_file() and ours(path)
    except (OSError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all; UserError where it can't be."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; UserError where it can't be."""
    try:
        path = Path(os.path.realpath(path))  # what a link leads to, not the link
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from None
