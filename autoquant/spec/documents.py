"""Reading YAML that a stranger may have written, and checking it field by field.

Only plain data are built; aliases are refused (a few of them can expand to gigabytes), and so are
keys given twice, which YAML would drop in silence. Every message names file, field, what was found
and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoquant.errors import SpecError
from autoquant.registry import unknown

MOST_BYTES = 64 << 20


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses aliases and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise SpecError(f"line {line}: aliases (*name) are not accepted; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # a tag such as !!map on something else
            return super().construct_mapping(node, deep)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise SpecError(f"line {key_node.start_mark.line + 1}: a key must be plain text")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise SpecError(f"line {line}: {show(key)} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in the YAML file ``path``; ``what`` names it in messages.

    Raises SpecError where the file can't be read, is no YAML, or holds no mapping.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SpecError(f"{path}: larger than {MOST_BYTES >> 20} MiB; not a {what}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: cannot read the {what}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not a {what}: it is not text") from None
    return parse_yaml(text, what, str(path))


def parse_yaml(text: str, what: str, where: str) -> dict[str, Any]:
    """Return the mapping in ``text``; see ``read_yaml``."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise SpecError(f"{where}:{line} not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise SpecError(f"{where}: nested too deeply for a {what}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What the library's own constructors raise on !!bool maybe, 2020-99-99 and the like.
        raise SpecError(f"{where}: not valid YAML: a value that does not fit its type") from error
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise SpecError(f"{where}: not a {what}: expected fields, found {found}")
    return data


class Fields:
    """The fields of one mapping in a document, taken one by one.

    ``where`` names file and place. ``close`` complains about what nobody took.
    """

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise SpecError(f"{where}: expected fields, found {show(data)}")
        self.where = where
        self._data = dict(data)
        self._known: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        self._known[name] = None
        return name in self._data

    def fail(self, name: str, found: Any, allowed: str) -> SpecError:
        """Return the error for field ``name``: what was found, and what is allowed."""
        return SpecError(f"{self.where}: {name}: found {show(found)}, allowed: {allowed}")

    def take(self, name: str, default: Any = ...) -> Any:
        """Return field ``name``; raise where it is missing and has no default."""
        self._known[name] = None
        if name in self._data:
            return self._data.pop(name)
        if default is ...:
            raise SpecError(f"{self.where}: {name} is missing")
        return default

    def choice(self, name: str, allowed: Sequence[Any], default: Any = ...) -> Any:
        """Return field ``name``, one of ``allowed``."""
        value = self.take(name, default)
        if not is_one_of(value, allowed):
            raise self.fail(name, value, ", ".join(map(str, allowed)))
        return value

    def number(
        self, name: str, default: Any = ..., *, low: float = float("-inf"), above: bool = False
    ) -> float:
        """Return field ``name`` as a finite number, at least (or above) ``low``."""
        value = self.take(name, default)
        number = as_number(value)
        if number is None or number < low or (above and number <= low):
            rule = "a number" if low == float("-inf") else f"a number {'>' if above else '≥'} {low}"
            raise self.fail(name, value, rule)
        return number

    def integer(self, name: str, default: Any = ..., *, low: int | None = None) -> int:
        """Return field ``name`` as an integer."""
        value = self.take(name, default)
        plain = isinstance(value, int) and not isinstance(value, bool)
        if not plain or (low is not None and value < low):
            raise self.fail(name, value, "an integer" + ("" if low is None else f" ≥ {low}"))
        return value

    def text(self, name: str, default: Any = ...) -> str:
        """Return field ``name`` as text."""
        value = self.take(name, default)
        if not isinstance(value, str):
            raise self.fail(name, value, "text")
        return value

    def flag(self, name: str, default: Any = ...) -> bool:
        """Return field ``name`` as true or false."""
        return bool(self.choice(name, (True, False), default))

    def close(self) -> None:
        """Raise SpecError on the first field that was not taken, with the nearest name."""
        for name in self._data:
            if not isinstance(name, str) or show(name) != repr(name):
                allowed = ", ".join(self._known)
                raise SpecError(f"{self.where}: {show(name)} is no field, allowed: {allowed}")
            raise SpecError(f"{self.where}: {unknown('field', name, list(self._known))}")


def is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Return whether ``value`` is in ``allowed``, telling True from 1."""
    return any(type(value) is type(a) and value == a for a in allowed)


def as_number(value: Any) -> float | None:
    """Return ``value`` as a finite float, or None. Text like 1e-3 counts: YAML 1.1 needs 1.0e-3."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if number - number == 0 else None


def show(value: Any) -> str:
    """Return ``value`` as one short line."""
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # Python refuses to write integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "…"


def label(name: str) -> str:
    """Return the name of a layer as a message has it: as it is, unless that is not one line."""
    return name if name.isprintable() and 0 < len(name) <= 200 else show(name)
