"""A recipe as data: what sites compute with, in memory that stays where it is.

What was recorded reads its weights at fixed addresses (``kernels.recording``). While a site has a
``Fixed``, whatever it is about to compute with is handed out as a stand-in that lies there, and who
records is told of it. Another recipe of the same form is copied in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from autoquant.nn.forms import form_of, same_memory, tensors_of, with_tensors

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Use:
    """One thing that a computation asked a site for: ``key`` names it, ``form`` is what it got."""

    fixed: Fixed
    key: Hashable
    form: Hashable


Tell = Callable[[Use], None]
Forms = dict[int, tuple[Any, Hashable]]
"""Forms by the identity of the values that have them, which are kept with them."""


class _Place:
    """Memory for one form of one thing: ``stand_in`` lies in it, ``source`` is what it holds."""

    def __init__(self, source: Any) -> None:
        self.tensors = [same_memory(t) for t in tensors_of(source)]
        self.stand_in = with_tensors(source, self.tensors)
        self.source: Any = None


class Fixed:
    """The fixed memory of one site.

    ``ask`` returns what the site computes with under the recipe that it has now, by key, and
    ``forms`` where the forms of such values are kept: no longer than the values themselves.
    """

    def __init__(
        self, ask: Callable[[Hashable], Any], tell: Tell, forms: Callable[[], Forms]
    ) -> None:
        self._ask = ask
        self._tell = tell
        self._forms = forms
        self._places: dict[tuple[Hashable, Hashable], _Place] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copy of the model computes with memory of its own."""

    def put(self, key: Hashable, value: T) -> T:
        """Return what stands for ``value``, with its data in fixed memory by now."""
        form = self._form(value)
        self._tell(Use(self, key, form))
        if not tensors_of(value):
            return value
        place = self._places.get((key, form))
        if place is None:
            place = self._places[key, form] = _Place(value)
        load([(place, value)])
        made: T = place.stand_in
        return made

    def now(self, key: Hashable) -> tuple[Any, Hashable]:
        """Return what ``key`` is under the site's present recipe, and its form."""
        value = self._ask(key)
        return value, self._form(value)

    def place(self, use: Use) -> _Place | None:
        """Return the memory of a use, None where it has no data."""
        return self._places.get((use.key, use.form))

    def _form(self, value: Any) -> Hashable:
        forms = self._forms()
        known = forms.get(id(value))
        if known is None or known[0] is not value:
            known = forms[id(value)] = value, form_of(value)
        return known[1]


def load(wanted: Sequence[tuple[_Place, Any]]) -> None:
    """Copy values to where they are read, those that are not there already, in few launches."""
    to: list[Tensor] = []
    of: list[Tensor] = []
    for place, value in wanted:
        if place.source is not value:
            to += place.tensors
            of += tensors_of(value)
            place.source = value
    if to:
        with torch.no_grad():
            torch._foreach_copy_(to, of)
