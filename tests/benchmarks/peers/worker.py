"""One run of one tool in a process of its own: a tool that patches torch spoils no other.

``python -m tests.benchmarks.peers.worker ARGUMENTS.json RESULT.json``
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from autoquant.heap import keep_freed_memory
from tests.benchmarks.peers.cases import load_case
from tests.benchmarks.peers.score import score
from tests.benchmarks.peers.tools import BY_NAME, Found
from tests.benchmarks.peers.version import commit, package_version


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row."""
    tool = BY_NAME[arguments["tool"]]
    folder = Path(arguments["folder"])
    said = package_version(tool.package)
    if not said:
        return {"error": f"not installed ({tool.package})"}
    module, function = tool.place.split(":")
    case = load_case(arguments["model"], folder)
    call = getattr(importlib.import_module(f"tests.benchmarks.peers.{module}"), function)
    bits = arguments["budget"]
    found: Found
    if tool.sampler is not None:
        counted = arguments["seed"], arguments["trials"], arguments["limit"]
        found = call(case, bits, tool.sampler, *counted)
    elif module == "ours":
        found = call(case, bits, folder)
    else:
        found = call(case, bits)
    return {
        "bits": found.bits,
        "seconds": found.seconds,
        "evaluations": found.evaluations,
        "proposals": found.proposals,
        "curve": found.curve,
        "version": said,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        **score(case, found.model, folder),
    }


def main() -> None:
    """Run what the first file asks for and write the second."""
    keep_freed_memory()  # as ``autoquant search`` does
    arguments = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        found = run(arguments)
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines()
        line = f": {text[0]}" if text else ""
        found = {"error": f"{type(error).__name__}{line}"[:200]}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
