"""The model as recorded programs: every candidate of one form at the cost of a launch a batch.

The outermost module that holds sites is recorded whole (``kernels.recording``): once for the shapes
that it is given and for the form of what its sites compute with (``nn.fixed``). Another recipe of
the same form is copied to where the recorded kernels read. A module that needs the host while it
runs is called as it is, and its parts are recorded instead. The first call of a kind is not
recorded, only the next: what comes once costs no recording.

Recorded, integers are handed from layer to layer where nobody can look at them. A number that they
can't carry, NaN or ∞, raises a flag on the device: then what was computed is not to be used, and
``doubted`` says so.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from autoquant.kernels.recording import CannotRecord, Recorded, Recorder
from autoquant.measure.calls import Call, find_calls
from autoquant.measure.signature import Given, Returned, given, returned
from autoquant.nn.convert import Prepared
from autoquant.nn.fixed import Use, load
from autoquant.nn.layer_output import as_real

MOST = 8
"""Most programs of one module: each keeps its inputs and outputs."""
CLOSE = 1e-4
"""Share of the largest output by which a replay may differ from a call, as sums in any order do."""

Say = Callable[[str], None]


@dataclass(eq=False)
class Program:
    """One module on inputs of one ``shape``, with sites of the forms of ``uses``.

    ``recorded`` is None until it is called a second time. ``round`` is when it was used last.
    """

    shape: object
    uses: tuple[Use, ...]
    round: int
    inputs: list[Tensor] = field(default_factory=list)
    recorded: Recorded | None = None
    returned: Returned | None = None


class Programs:
    """Runs a prepared model by recorded programs while ``with programs.batch():`` is around.

    ``say`` is told in one line, once, what can't be recorded and why.
    """

    def __init__(
        self,
        prepared: Prepared,
        recorder: Recorder,
        say: Say = lambda _: None,
        most: int = MOST,
    ) -> None:
        self.model: nn.Module = prepared.model
        self.recorder = recorder
        self.most = most
        self.on = True
        self.recordings = self.replays = 0
        self._say = say
        self._said: set[str] = set()
        self._engine = prepared.engine
        self._folds = prepared.folds
        self._slots = list(prepared.slots.values())
        self._fixed = [slot.make_fixed(self._tell) for slot in self._slots]
        self._calls = find_calls(prepared)
        self._programs: dict[Call, list[Program]] = {}
        self._blocked: set[Call] = set()
        self._parts = {call: _parts(call.module) for call in self._calls}
        self._names = {id(m): name for name, m in prepared.model.named_modules()}
        self._uses: dict[tuple[int, object], Use] = {}
        self._inside = self._paused = False
        self._thread = 0
        self._state: list[Any] = []
        self._round = 0
        self._current: dict[tuple[Call, object], Program] = {}
        self._addresses: list[int] = []
        # Walking all modules for every batch would take longer than a replay.
        self._holders = [
            those for m in self.model.modules() for those in (m._parameters, m._buffers)
        ]
        self._flag = torch.zeros(1, dtype=torch.int32, device=recorder.device)

    def switch_off(self, reason: str) -> None:
        """Record nothing from here on, and say why."""
        self.clear()
        self.on = False
        self._once(f"the model is not recorded: {reason}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Call everything as it is inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Run the model inside by programs."""
        fast = self.on and self._engine.fast and not self._paused
        if not fast or any(slot.is_watched for slot in self._slots):
            yield
            return
        self._begin()
        # A result that is replayed is not what its layer made just now.
        self._folds.trust(True)
        try:
            with self._engine.collecting(self._flag):
                yield
        finally:
            self._folds.trust(False)
            for call in self._calls:
                call.remove()
            for slot in self._slots:
                slot.fixed = None

    def doubted(self) -> bool:
        """Return whether results since the last time hold what integers can't; waits for them."""
        found = bool(self._flag.item())
        if found:
            self._flag.zero_()
        return found

    def clear(self) -> None:
        """Forget what was recorded: its memory is free."""
        self._programs.clear()
        self._current.clear()
        self._state = []
        for i, slot in enumerate(self._slots):
            self._fixed[i] = slot.make_fixed(self._tell)

    def _begin(self) -> None:
        held = (t for those in self._holders for t in those.values() if t is not None)
        addresses = [t.data_ptr() for t in held]
        if addresses != self._addresses:  # what was recorded reads the old ones
            self.clear()
            self._addresses = addresses
        state = [(slot.held, slot.activation) for slot in self._slots]
        if state != self._state:
            self._state = state
            self._round += 1
            self._current.clear()
        self._thread = threading.get_ident()
        for slot, fixed in zip(self._slots, self._fixed, strict=True):
            slot.fixed = fixed
        for call in self._calls:
            call.install(self._call)

    def _tell(self, use: Use) -> None:
        self._uses[id(use.fixed), use.key] = use

    # --- calls ---------------------------------------------------------------------------------

    def _call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside or call in self._blocked or _follows(call.module):
            return call.original(*args, **kwargs)
        if threading.get_ident() != self._thread or self._is_heard(call):
            return call.original(*args, **kwargs)
        what = given(args, kwargs, self.recorder.device)
        if isinstance(what, str):
            self._block(call, what)
            return call.original(*args, **kwargs)
        self._inside = True
        try:
            program = self._find(call, what.shape)
            if program is None:
                return self._first(call, what, args, kwargs)
            if program.recorded is None and not self._record(call, program, what):
                return call.original(*args, **kwargs)
            return self._replay(program, what)
        finally:
            self._inside = False

    def _is_heard(self, call: Call) -> bool:
        """Return whether a new hook waits for a part of a module: no replay would call it.

        Those that the model had before belong to what it computes, and are recorded with it.
        """
        parts, before = self._parts[call]
        return _hooks(parts) != before

    def _find(self, call: Call, shape: object) -> Program | None:
        """Return the program for a call under the present recipe, with the recipe in its memory."""
        key = (call, shape)
        program = self._current.get(key)
        if program is None:
            asked: dict[tuple[int, object], tuple[Any, object]] = {}

            def now(use: Use) -> tuple[Any, object]:
                name = id(use.fixed), use.key
                if name not in asked:
                    asked[name] = use.fixed.now(use.key)
                return asked[name]

            for known in self._programs.get(call, ()):
                if known.shape == shape and all(now(u)[1] == u.form for u in known.uses):
                    program = known
                    break
            if program is None:
                return None
            places = [(use.fixed.place(use), now(use)[0]) for use in program.uses]
            load([(place, value) for place, value in places if place is not None])
            self._current[key] = program
            program.round = self._round
        return program

    def _first(self, call: Call, what: Given, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module as it is, and note what of its sites it used."""
        self._uses.clear()
        result = call.original(*args, **kwargs)
        if what.changed():
            self._block(call, "writes into its arguments")
        elif isinstance(found := returned(result), str):
            self._block(call, found)
        elif self._room(call):
            program = Program(what.shape, tuple(self._uses.values()), self._round)
            self._programs.setdefault(call, []).append(program)
        else:
            self._once(f"{_name(call)} is given other shapes all the time: only some are recorded")
        return result

    def _room(self, call: Call) -> bool:
        """Return whether one more program of a call may be kept; one of other recipes goes."""
        programs = self._programs.get(call, [])
        if len(programs) < self.most:
            return True
        oldest = min(programs, key=lambda p: p.round)
        if oldest.round == self._round:
            return False
        programs.remove(oldest)
        return True

    def _record(self, call: Call, program: Program, what: Given) -> bool:
        """Record a program; return whether it gives what a call does."""
        inputs = what.fixed()
        args, kwargs = what.rebuilt(inputs)
        kept: list[Returned] = []

        def work() -> list[Tensor]:
            found = returned(call.original(*args, **kwargs))
            if isinstance(found, str):
                raise CannotRecord(found)
            kept.append(found)
            return [as_real(t) for t in found.tensors]

        where: list[nn.Module] = []
        try:
            expected = [t.clone() for t in work()]
            with _watching(where):
                recorded = self.recorder.record(work)
            recorded.replay()
        except CannotRecord as error:
            self._block(call, str(error), where)
            return False
        same = len(expected) == len(recorded.outputs)
        if not (same and all(map(_close, expected, recorded.outputs))):
            self._block(call, "draws random numbers, or keeps something between calls")
            return False
        program.inputs, program.recorded, program.returned = inputs, recorded, kept[-1]
        self.recordings += 1
        return True

    def _replay(self, program: Program, what: Given) -> Any:
        assert program.recorded is not None
        assert program.returned is not None
        if program.inputs:
            torch._foreach_copy_(program.inputs, what.tensors)
        program.recorded.replay()
        self.replays += 1
        return program.returned.rebuilt([t.clone() for t in program.recorded.outputs])

    def _block(self, call: Call, why: str, where: list[nn.Module] | None = None) -> None:
        """Record ``call`` no more, but its parts; say what stands in the way."""
        self._blocked.add(call)
        self._programs.pop(call, None)
        inner = self._names.get(id(where[-1])) if where else None
        self._once(f"{_name(call, inner)} is not recorded: {why}")

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def _name(call: Call, inner: str | None = None) -> str:
    return inner or call.path or "the model"


def _parts(module: nn.Module) -> tuple[list[nn.Module], list[int]]:
    """Return the modules in a module, and the numbers of the hooks that they have."""
    parts = [m for m in module.modules() if m is not module]
    return parts, _hooks(parts)


def _hooks(modules: list[nn.Module]) -> list[int]:
    return [n for m in modules for n in (*m._forward_hooks, *m._forward_pre_hooks)]


def _follows(module: nn.Module) -> bool:
    """Return whether torch follows what is computed here, or computes in another format."""
    if module.training or torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether a replay gave what a call did, whatever order its sums were added in."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a.nan_to_num(posinf=0.0, neginf=0.0), b.nan_to_num(posinf=0.0, neginf=0.0)
    return bool((a - b).abs().max() <= CLOSE * a.abs().max())


@contextlib.contextmanager
def _watching(inside: list[nn.Module]) -> Iterator[None]:
    """Keep in ``inside`` the modules that run, the innermost last; as they were where one fails."""

    def leave(*_: Any) -> None:
        inside.pop()

    before = global_hooks.register_module_forward_pre_hook(lambda m, _: inside.append(m))
    after = global_hooks.register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()
