"""Task files as modules that can be imported by name, also in the processes that a task starts.

The workers of a data loader that are spawned unpickle the task's classes, and import for that the
module which these say they are from. Its name holds the file's path and digest: a new process
needs nothing else to find it. This module is a package without a folder: it holds task files.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

__path__: list[str] = []

DIGITS = 12
"""Digits of the digest that a name holds."""


def module_name(path: Path, sha256: str) -> str:
    """Return the name of the module that the task file ``path`` is, as its content is now."""
    stem = re.sub(r"\W", "_", path.stem)
    return f"{__name__}.{stem}_{sha256[:DIGITS]}_{os.fsencode(path.resolve()).hex()}"


def new_module(path: Path, sha256: str) -> ModuleType:
    """Return the module of a task file, which has not run yet, known by its name.

    Classes look up their module by name: dataclasses, and pickle.
    """
    module = ModuleType(module_name(path, sha256))
    module.__file__ = str(path.resolve())
    module.__package__ = ""
    sys.modules[module.__name__] = module
    return module


def run(module: ModuleType, content: bytes) -> None:
    """Run a task file in its module, without writing bytecode beside it; what it raises passes.

    Its folder is first on sys.path meanwhile, and stays at the end, for imports in its functions.
    """
    file = str(module.__file__)
    folder = str(Path(file).parent)
    sys.path.insert(0, folder)
    try:
        exec(compile(content, file, "exec", dont_inherit=True), module.__dict__)
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of task files, in processes that did not load the task themselves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return how a task file is imported; None for the name of anything else."""
        if not fullname.startswith(f"{__name__}."):
            return None
        _, _, place = fullname.rpartition("_")
        file = os.fsdecode(bytes.fromhex(place))
        return importlib.util.spec_from_loader(fullname, self, origin=file)

    def exec_module(self, module: ModuleType) -> None:
        """Run the file, if it still is what the name says."""
        assert module.__spec__ is not None
        file = Path(str(module.__spec__.origin))
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if module_name(file, digest) != module.__name__:
            raise ImportError(f"{file}: has changed since the task was loaded")
        module.__file__ = str(file)
        module.__package__ = ""
        run(module, content)


sys.meta_path.append(_Finder())
