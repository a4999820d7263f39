"""What is done to a model is held against the model as the user gave it, number by number.

The untouched model runs first, on all data: its outputs, and its metric, are the baseline. Then
the model is prepared for quantization, in float, and must give the same on every batch. What
doesn't is taken back: channels-last memory, or the BatchNorms that were folded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoquant.errors import TaskError, TrialError, UserError
from autoquant.measure.divergence import KEEP_BYTES, bytes_of
from autoquant.measure.evaluator import FEW, Evaluator
from autoquant.models.data import batch_size, take, to_device
from autoquant.models.task import outputs_of
from autoquant.nn.agreement import Scales, disagreement, tolerance_of
from autoquant.nn.convert import Prepared, use_channels_last, uses_channels_last
from autoquant.nn.untouched import Confirming, Seen, look
from autoquant.session.repeats import first_to_differ

ROUNDING = 1e-5
"""Differences, relative to the largest number of an output, that are none where there is nothing
to take back: other operators of torch round otherwise."""
LOOSE = 10.0
"""Factor of the tolerance there."""

FLIPS = 0.02
"""Share of decisions, words or classes, that may flip there."""

Run = Callable[[nn.Module, Any], Any]
"""Runs a model on inputs, None for all that ``evaluate`` reads; UserError where that fails."""

Batch = tuple[str, int, Any]
"""Split, number and inputs of a batch that outputs are compared on."""


class Untouched:
    """A model before surgery: what it gives on the data, and what was seen of its layers.

    ``pairs`` are the BatchNorms that may be folded: norm → layer. ``few`` are some samples.
    """

    def __init__(self, evaluator: Evaluator, run: Run, model: nn.Module) -> None:
        self.evaluator = evaluator
        self.task = evaluator.task
        self.run = run
        self.few = evaluator.few(model)
        self.pairs: dict[str, str] = {}
        self._tolerance = tolerance_of(model)
        self._scales = Scales()
        self._kept: dict[tuple[str, int], Any] = {}
        self._room = KEEP_BYTES

    def measure(
        self, model: nn.Module, splits: tuple[str, ...], folded: Mapping[str, str] | None
    ) -> None:
        """Run ``model`` on the calibration data, and measure the baseline of ``splits``.

        ``folded`` are the folds of a recipe, None where those are found. Raises TaskError where the
        user's code fails, UserError where a recipe's folds do not hold on these data.
        """
        seen = self._look(model)
        if seen.order:
            self.evaluator.scorer = _owner(model, seen.order[-1])
        known = seen.pairs if folded is None else folded
        paths = dict(model.named_modules())
        confirming = Confirming(
            model, {n: p for n, p in known.items() if n in paths and p in paths}
        )
        whole = self.task.evaluate is not None
        for batch in self._data("calibrate"):
            if batch[2] is None and "search" in splits:
                continue
            with confirming.watching():
                held = self._keep(batch, self.outputs(model, batch[2]))
            del held  # only now: nobody else may hold what a norm reads
        for split in splits:
            returned: list[Any] = []
            with confirming.watching(), _listening(model, returned, on=whole):
                try:
                    reading = self.evaluator.baseline(model, split)
                except TrialError as error:
                    raise TaskError(f"{self.task.source}: on the float model: {error}") from error
            if whole and split == "search":
                self._keep(("search", 0, None), _heard(reading.value, returned))
        for outputs in self.evaluator.kept_outputs("search"):
            self._scales.add(outputs)
        self.pairs = confirming.pairs if folded is None else dict(folded)
        for norm, layer in known.items():
            if folded is not None and norm in paths and norm not in confirming.pairs:
                raise UserError(
                    f"the recipe folds {norm} into {layer}, but on these data something else reads "
                    "or gives what is between them: search again with data like these"
                )

    def tour(self, model: nn.Module) -> None:
        """Run a model on a few samples of each batch of calibration data."""
        for _, _, inputs in self._data("calibrate"):
            self._few_of(model, inputs)

    def _few_of(self, model: nn.Module, inputs: Any) -> Any:
        small = inputs is not None and batch_size(inputs) > FEW and batch_size(self.few) <= FEW
        if small:
            with contextlib.suppress(UserError, TrialError):
                return self.run(model, take(inputs, range(FEW)))
        return self.run(model, inputs)

    def _look(self, model: nn.Module) -> Seen:
        """Watch the layers on these samples."""
        data = [inputs for _, _, inputs in self._data("calibrate")]
        return look(model, [functools.partial(self._few_of, inputs=inputs) for inputs in data])

    def _data(self, *splits: str) -> Iterator[Batch]:
        """Yield the batches of splits; all that a task's own ``evaluate`` reads is one."""
        data, whole = self.evaluator.splits, self.task.evaluate is not None
        if "calibrate" in splits:
            yield from (("calibrate", i, x) for i, x in enumerate(data.calibrate))
        if whole and ("search" in splits or not data.calibrate):
            yield "search", 0, None
        elif "search" in splits:
            yield from (("search", i, x) for i, (x, _) in enumerate(data.search))

    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        """Return what a model gives on one batch, in the CPU's memory.

        Of all that ``evaluate`` reads: what the model returned on the way, else the value.
        """
        with torch.no_grad():
            if inputs is not None:
                return to_device(outputs_of(self.run(model, inputs)), "cpu")
            returned: list[Any] = []
            with _listening(model, returned, on=True):
                return _heard(self.run(model, None), returned)

    def _keep(self, batch: Batch, outputs: Any) -> Any:
        """Keep what was given on a batch, as long as there is room; return it."""
        self._scales.add(outputs)
        self._room -= bytes_of(outputs)
        if self._room >= 0:
            self._kept[batch[:2]] = _copied(outputs)
        return outputs

    # --- surgery ---------------------------------------------------------------------------------

    def check(self, prepared: Prepared, *, fixed: bool, splits: tuple[str, ...]) -> None:
        """Hold a prepared model against the untouched one on every batch of ``splits``.

        What changes outputs is taken back; folds that are ``fixed``, by a recipe, can't be. Raises
        UserError where outputs change all the same.
        """
        prepared.reset()
        for batch in self._data(*splits):
            wrong = self._wrong(prepared, batch)
            if wrong is None:
                continue
            if self._mended(prepared, batch, fixed=fixed):
                continue
            self._fail(prepared, batch, wrong)
        # Outputs on what the search must not see are not looked at; that there are some is.
        for i, (inputs, _) in enumerate(self.evaluator.splits.confirm):
            if uses_channels_last(prepared.model):
                try:
                    self._few_of(prepared.model, inputs)
                except (UserError, TrialError):
                    if not self._needs_contiguous(prepared, ("confirm", i, inputs)):
                        raise

    def _expected(self, batch: Batch) -> Any:
        split, index, inputs = batch
        kept = self.evaluator.kept_outputs(split) if inputs is not None else []
        return kept[index] if index < len(kept) else self._kept.get((split, index))

    def _wrong(self, prepared: Prepared, batch: Batch, *, loose: bool = False) -> str | None:
        """Return what differs on a batch from what the untouched model gave, or None."""
        expected = self._expected(batch)
        if expected is None:
            return None
        try:
            found = self.outputs(prepared.model, batch[2])
        except (UserError, TrialError):
            if not self._needs_contiguous(prepared, batch):
                raise
            found = self.outputs(prepared.model, batch[2])
        if not loose:
            return disagreement(expected, found, self._scales, self._tolerance)
        return _loosely(expected, found, self._scales, LOOSE * self._tolerance)

    def _needs_contiguous(self, prepared: Prepared, batch: Batch) -> bool:
        """Return whether code fails on channels-last memory alone; from here on there is none."""
        fails = []
        for on in (False, True) if uses_channels_last(prepared.model) else ():
            use_channels_last(prepared.model, on=on)
            try:
                self.outputs(prepared.model, batch[2])
                fails.append(False)
            except (UserError, TrialError):
                fails.append(True)
        if fails == [False, True]:
            use_channels_last(prepared.model, on=False)
        return fails == [False, True]

    def _mended(self, prepared: Prepared, batch: Batch, *, fixed: bool) -> bool:
        """Take back what changes the outputs on a batch, and nothing else, where that is found."""
        if uses_channels_last(prepared.model):
            use_channels_last(prepared.model, on=False)
            if self._wrong(prepared, batch) is None:
                return True
            use_channels_last(prepared.model)
        if fixed:
            return False
        folds = list(prepared.folded)
        for norm in folds:
            prepared.turn_fold(norm, on=False)
        mended = bool(folds) and self._wrong(prepared, batch) is None
        for norm in folds:
            prepared.turn_fold(norm, on=True)
            if mended and self._wrong(prepared, batch) is not None:
                prepared.turn_fold(norm, on=False)
        return mended

    def _fail(self, prepared: Prepared, batch: Batch, wrong: str) -> None:
        """Raise UserError, unless it is rounding alone."""
        if self._wrong(prepared, batch, loose=True) is None:
            return
        split, index, inputs = batch
        where = "what evaluate reads" if inputs is None else f"batch {index} of the {split} data"
        first, second = (_copied(self.outputs(prepared.model, inputs)) for _ in range(2))
        again = disagreement(first, second, self._scales, self._tolerance)
        if again is not None:
            parted = first_to_differ(
                prepared.model, lambda: self.run(prepared.model, inputs), self._tolerance
            )
            raise TaskError(
                f"{self.task.source}: the float model gives different outputs for the same inputs: "
                f"{again}, on {where}; {parted}"
            )
        raise UserError(
            f"made ready for quantization the float model gives other outputs ({wrong}, on "
            f"{where}); does it keep state between calls, or look into its layers?"
        )


def _loosely(expected: Any, found: Any, scales: Scales, tolerance: float) -> str | None:
    """Return what differs beyond rounding: of decisions some few may flip at a tie."""
    said = disagreement(expected, found, scales, tolerance, rounding=ROUNDING)
    both = (expected, found)
    if said is None or not all(_decides(outputs) for outputs in both):
        return said
    if len(expected) != len(found):
        return said
    flips = sum(disagreement(a, b) is not None for a, b in zip(*both, strict=True))
    return None if flips <= max(1, FLIPS * len(expected)) else said


def _decides(outputs: Any) -> bool:
    """Return whether outputs are decisions, one a sample: integers, or lists."""
    if isinstance(outputs, Tensor):
        return outputs.dim() > 0 and not outputs.is_floating_point()
    return isinstance(outputs, list)


def _copied(outputs: Any) -> Any:
    """Return outputs that nobody writes into: a model may, into what it returned before."""
    return pytree.tree_map_only(Tensor, Tensor.clone, outputs)


def _heard(value: Any, returned: list[Any]) -> Any:
    # A metric may flip with one sample at a tie; the outputs say more.
    return tuple(returned) if returned else value


def _owner(model: nn.Module, site: str) -> nn.Module | None:
    """Return the module that holds the weight of a site."""
    for path in (site, site.rpartition(".")[0]):
        with contextlib.suppress(AttributeError):
            return model.get_submodule(path)
    return None


@contextlib.contextmanager
def _listening(model: nn.Module, returned: list[Any], *, on: bool) -> Iterator[None]:
    """Gather what the model returns inside, call by call, as long as there is room."""
    room = KEEP_BYTES

    def hear(_: nn.Module, __: Any, outputs: Any) -> None:
        nonlocal room
        room -= bytes_of(outputs)
        if room >= 0:
            returned.append(to_device(outputs, "cpu"))

    handle = model.register_forward_hook(hear) if on else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
