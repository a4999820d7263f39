"""What a terminal or a file can't encode is printed as ASCII, not refused."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Mapping

ASCII = {
    "≤": "<=",
    "≥": ">=",
    "…": "...",
    "×": "x",
    "−": "-",
    "–": "-",
    "—": "-",
    "±": "+/-",
    "→": "->",
    "µ": "u",
    "μ": "u",
    "√": "sqrt ",
    "’": "'",
    "“": '"',
    "”": '"',
}
"""What stands for a sign; any other loses its accents, or is a question mark."""
HANDLER = "autoquant.ascii"


def plain(text: str) -> str:
    """Return ``text`` in ASCII."""
    return "".join(_plain(sign) for sign in text)


def _plain(sign: str) -> str:
    if sign.isascii():
        return sign
    if sign in ASCII:
        return ASCII[sign]
    if "─" <= sign <= "╿":  # lines of tables
        return "-" if sign in "─━═╌╍╴╸╶╺╼╾" else "|"
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?"


def _handle(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


def says_ascii(environment: Mapping[str, str]) -> bool:
    """Return whether the user's locale is C, for all: Python prints UTF-8 there all the same."""
    told = "PYTHONIOENCODING" in environment or environment.get("PYTHONUTF8") == "1"
    return not told and environment.get("LC_ALL") in ("C", "POSIX")


def set_encoding() -> None:
    """Have standard output and error take every text, whatever their encoding is."""
    codecs.register_error(HANDLER, _handle)
    ascii_only = says_ascii(os.environ)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="ascii" if ascii_only else None, errors=HANDLER)
