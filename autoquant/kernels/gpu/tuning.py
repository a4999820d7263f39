"""Choosing how a kernel is cut, once for each kernel, shape and GPU, and remembering it on disk."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from autoquant.kernels.gpu.launch import Config, next_power_of_2
from autoquant.user_cache import cache_folder

VERSION = 1
"""Version of the file; choices of another version are measured again."""
MAX_BUCKET = 1 << 15
"""From this many rows on a kernel fills every GPU, and one choice serves them all."""


def cache_file() -> Path:
    """Return where choices are kept."""
    return cache_folder() / "triton.json"


def bucket(rows: int) -> int:
    """Return the number of rows that stands for ``rows``: the next power of 2, or the largest."""
    return min(next_power_of_2(rows), MAX_BUCKET)


class Tuner:
    """Remembers the fastest Config of every (GPU, kernel, shape), in memory and in one file.

    ``measure`` returns the milliseconds of a call. A file that cannot be read, or holds something
    else, counts as empty; a folder that cannot be written is no error, the choice is then made
    again in the next process.
    """

    def __init__(
        self, measure: Callable[[Callable[[], None]], float], path: Path | None = None
    ) -> None:
        self._measure = measure
        self._path = path
        self._choices: dict[str, dict[str, int]] | None = None

    def choose(
        self,
        gpu: str,
        kernel: str,
        shape: Sequence[int],
        configs: Sequence[Config],
        run: Callable[[Config], None],
    ) -> Config | None:
        """Return the fastest of ``configs``; None where the kernel runs with none of them."""
        key = " | ".join([gpu, kernel, "×".join(str(n) for n in shape)])
        if self._choices is None:
            self._choices = self._read()
        known = {_name(c): c for c in configs}.get(_name_of(self._choices.get(key)))
        if known is not None:
            return known
        times = [(self._time(run, c), n) for n, c in enumerate(configs)]
        best, n = min(times)
        if best == float("inf"):
            return None
        self._choices[key] = configs[n].arguments()
        self._write(key, configs[n].arguments())
        return configs[n]

    def _time(self, run: Callable[[Config], None], c: Config) -> float:
        # What does not compile, or asks for more shared memory than this GPU has, is no choice.
        with contextlib.suppress(Exception):
            return self._measure(lambda: run(c))
        return float("inf")

    def _file(self) -> Path:
        return self._path or cache_file()

    def _read(self) -> dict[str, dict[str, int]]:
        try:
            document = json.loads(self._file().read_text(encoding="utf-8"))
            choices = document["choices"] if document["version"] == VERSION else {}
            return {k: v for k, v in choices.items() if isinstance(v, dict)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self, key: str, choice: dict[str, int]) -> None:
        # Another process may have written since: its choices are kept.
        choices = self._read() | {key: choice}
        text = json.dumps({"version": VERSION, "choices": choices}, indent=1, sort_keys=True)
        path = self._file()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".triton-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(name, path)
            except OSError:
                Path(name).unlink(missing_ok=True)


def _name(c: Config) -> str:
    return _name_of(c.arguments())


def _name_of(choice: dict[str, int] | None) -> str:
    return json.dumps(choice, sort_keys=True)


def _milliseconds(call: Callable[[], None]) -> float:
    """Return the median milliseconds of ``call`` with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


_TUNER = Tuner(_milliseconds)


def tuned(
    kernel: str,
    shape: Sequence[int],
    configs: Sequence[Config],
    run: Callable[[Config], None],
    device: torch.device,
) -> Config | None:
    """Return the Config to launch ``kernel`` with on ``device``; None where none works.

    Nothing is measured on a CPU, where kernels are interpreted, nor while a CUDA graph is captured,
    where nothing runs: both take the first.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return configs[0]
    return _TUNER.choose(torch.cuda.get_device_name(device), kernel, shape, configs, run)
