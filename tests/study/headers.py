"""A study's header, made up, for tests that need no model."""

from __future__ import annotations

from typing import Any

from autoquant.study.header import FORMAT

SPACE = "autoquant_space: 1\nname: mine\nrules:\n  - {weight_bits: [8, 4], activation_bits: 8}\n"


def plain_header(**changes: Any) -> dict[str, Any]:
    """Return a header as a study keeps it, of one linear layer, with fields replaced."""
    return {
        "format": FORMAT,
        "created": "2026-01-02T03:04:05",
        "versions": {"autoquant": "0.1.0", "torch": "2.13.0"},
        "model": {"name": "net", "sha256": "ab", "trust_pickle": False},
        "task": {"sha256": "cd", "metric": None},
        "data": {},
        "space": {"name": "mine", "text": SPACE, "shipped": False},
        "options": {"seed": 0},
        "places": {"out": [".", "/project"], "home": None},
        "sites": [{"name": "a", "layer": "Linear", "matrix": [4, 8], "activation": True}],
        "folded": {},
        "float": {
            "samples": 40,
            "value": 0.9,
            "metric": "accuracy",
            "higher_is_better": True,
            "size_bytes": 1000,
        },
        "max_drop": 0.01,
    } | changes
