"""Choosing how a kernel is cut, once for each kernel, shape and GPU.

What was measured on this machine before comes first, then what ships (``defaults``). Nothing is
measured unless AUTOQUANT_TUNE_KERNELS=1 asks for it: some seconds for each kernel and shape, before
its first use, remembered on disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from autoquant.kernels.gpu.defaults import Gpu, preferred, table
from autoquant.kernels.gpu.launch import Config, next_power_of_2
from autoquant.user_cache import cache_folder

VERSION = 1
"""Version of the file; choices of another version are measured again."""
MAX_BUCKET = 1 << 15
"""From this many rows on a kernel fills every GPU, and one choice serves them all."""
ASK = "AUTOQUANT_TUNE_KERNELS"
"""The environment variable that has kernels measured."""


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

    def known(
        self, gpu: str, kernel: str, shape: Sequence[int], configs: Sequence[Config]
    ) -> Config | None:
        """Return which of ``configs`` was the fastest; None where that was not measured."""
        if self._choices is None:
            self._choices = self._read()
        choice = self._choices.get(_key(gpu, kernel, shape))
        return next((c for c in configs if c.arguments() == choice), None)

    def choose(
        self,
        gpu: str,
        kernel: str,
        shape: Sequence[int],
        configs: Sequence[Config],
        run: Callable[[Config], None],
    ) -> Config | None:
        """Return the fastest of ``configs``; None where the kernel runs with none of them."""
        known = self.known(gpu, kernel, shape, configs)
        if known is not None:
            return known
        times = [(self._time(run, c), n) for n, c in enumerate(configs)]
        best, n = min(times)
        if best == float("inf"):
            return None
        self._keep(_key(gpu, kernel, shape), configs[n].arguments())
        return configs[n]

    def _keep(self, key: str, choice: dict[str, int]) -> None:
        if self._choices is not None:
            self._choices[key] = choice
        self._write(key, choice)

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


def _key(gpu: str, kernel: str, shape: Sequence[int]) -> str:
    return " | ".join([gpu, kernel, "×".join(str(n) for n in shape)])


class Chooser:
    """Answers for every call of a kernel, and remembers its answers while the process lives.

    A Config that does not compile, or does not run, is followed by the next one. None is an answer
    too: a kernel that ran with no Config is not tried again.
    """

    def __init__(self, tuner: Tuner) -> None:
        self._tuner = tuner
        self._answers: dict[tuple[object, ...], tuple[tuple[Config, ...], Config | None]] = {}

    def choose(
        self,
        gpu: Gpu,
        kernel: str,
        shape: Sequence[int],
        configs: Sequence[Config],
        run: Callable[[Config], None],
        measures: bool = False,
        captures: bool = False,
    ) -> Config | None:
        """Return the Config to launch with; None where the kernel runs with none of them.

        ``measures`` says that all may be timed, and ``captures`` that nothing can run now.
        """
        key = (gpu, kernel, *shape)
        offered = tuple(configs)
        if (key, measures) in self._answers:
            before, answer = self._answers[key, measures]
            if before == offered:
                return answer
        if captures:
            return self._order(gpu, kernel, shape, offered)[0]
        if measures:
            answer = self._tuner.choose(gpu.name, kernel, shape, offered, run)
        else:
            answer = first_that_runs(self._order(gpu, kernel, shape, offered), run)
        self._answers[key, measures] = (offered, answer)
        return answer

    def _order(
        self, gpu: Gpu, kernel: str, shape: Sequence[int], configs: tuple[Config, ...]
    ) -> list[Config]:
        known = self._tuner.known(gpu.name, kernel, shape, configs)
        order = preferred(kernel, shape, configs, gpu)
        return order if known is None else [known, *(c for c in order if c != known)]


def first_that_runs(configs: Sequence[Config], run: Callable[[Config], None]) -> Config | None:
    """Return the first of ``configs`` that ``run`` takes; None where it takes none."""
    for c in configs:
        try:
            run(c)
        except torch.OutOfMemoryError:
            raise  # no fault of the config
        except Exception:
            continue
        return c
    return None


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return what a CUDA device says of itself."""
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    usual = table().architecture(capability).shared_memory
    shared = getattr(properties, "shared_memory_per_block_optin", usual)
    return Gpu(capability, properties.multi_processor_count, shared, properties.name)


def asked() -> bool:
    """Return whether the user wants kernels to be measured."""
    return os.environ.get(ASK, "").lower() in ("1", "true", "on", "yes")


def _milliseconds(call: Callable[[], None]) -> float:
    """Return the median milliseconds of ``call`` with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


_CHOOSER = Chooser(Tuner(_milliseconds))


def tuned(
    kernel: str,
    shape: Sequence[int],
    configs: Sequence[Config],
    run: Callable[[Config], None],
    device: torch.device,
) -> Config | None:
    """Run ``kernel`` with the Config chosen for ``device``, and return that; None where none works.

    On a CPU, where kernels are interpreted, it is the first. The first time that a kernel meets a
    shape, ``run`` is called to see that the choice runs; not while a CUDA graph is captured.
    """
    best: Config | None = configs[0]
    if device.type == "cuda":
        captures = torch.cuda.is_current_stream_capturing()
        best = _CHOOSER.choose(gpu_of(device), kernel, shape, configs, run, asked(), captures)
    if best is not None:
        run(best)
    return best
