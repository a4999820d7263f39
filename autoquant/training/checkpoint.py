"""Training that survives its process: all that the next step depends on, in one file.

The file is safetensors, so reading it runs nothing; what is no tensor is JSON in its header. It is
written whole or not at all, and holds what it is a checkpoint of: one of anything else is no use
and is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from autoquant.spec.outputs import write_bytes

STATE, IDENTITY = "state", "identity"


def write_checkpoint(path: Path, state: Mapping[str, Any], identity: str) -> None:
    """Write ``state``, whose ``tensors`` are by name; UserError where it can't be."""
    tensors = {k: v.cpu().contiguous() for k, v in state["tensors"].items()}
    plain = {k: v for k, v in state.items() if k != "tensors"}
    header = {STATE: json.dumps(plain), IDENTITY: identity}
    write_bytes(path, save(tensors, metadata=header))


def read_checkpoint(path: Path, identity: str, device: torch.device) -> dict[str, Any] | None:
    """Return the state that was written of the same ``identity``, None where there is none.

    A file that is damaged is none: training begins anew.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get(IDENTITY) != identity:
                return None
            state: dict[str, Any] = json.loads(header[STATE])
            state["tensors"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return state
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
