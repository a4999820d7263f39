"""Model files: from a path to a module in eval mode on the CPU, running nothing unless told to.

| file | loaded by |
|---|---|
| ``.pt2``, of ``torch.export.save`` | ``archive`` and ``exported.lift`` |
| ``.pt``/``.pth``: a pickled ``nn.Module`` | ``torch.load``, only where pickles are trusted |
| TorchScript | ``torch.jit.load`` and torch's converter, only where pickles are trusted |
| a state_dict, ``.safetensors``, ``.npz``, anything else | the task file's ``load_model`` |

A file that holds a whole model is loaded here even where the task file has ``load_model``, so that
one task file serves a model as a state_dict, as a .pt2 and as a pickle.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from autoquant.errors import ModelFileError, TaskError
from autoquant.models.archive import read_program
from autoquant.models.exported import lift
from autoquant.models.file_kinds import EXPORT, pickled_classes, read_safely, sniff
from autoquant.models.usercode import describe, file_of, guarded
from autoquant.nn.intake import copied, take

LoadModel = Callable[[Path], nn.Module]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and where it came from.

    ``kind`` is pt2, pickle, torchscript or load_model; ``name`` is the file's name without its
    suffix; ``sha256`` the digest of the file, in hexadecimal digits.
    """

    module: nn.Module
    kind: str
    name: str
    sha256: str


def load(
    path: Path,
    *,
    load_model: LoadModel | None = None,
    trust_pickle: bool = False,
    example_inputs: tuple[Any, ...] | Callable[[], tuple[Any, ...]] | None = None,
) -> LoadedModel:
    """Return the model of the file ``path``, in eval mode on the CPU.

    ``trust_pickle`` allows what runs code of the file while it is loaded: a pickle, TorchScript, an
    archive with objects that are no tensors. ``example_inputs`` (or a function that returns them)
    are the positional inputs that a TorchScript model is converted with.

    Raises ModelFileError where the file is missing, is no model, or needs trust or a
    ``load_model`` that it was not given; TaskError where ``load_model`` fails.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "torch":
        module, kind = _load_torch(path, load_model, trust_pickle)
    elif kind == "pt2":
        module = lift(read_program(path, trust=trust_pickle))
    elif kind == "torchscript":
        module = _load_torchscript(path, trust_pickle, example_inputs)
    else:
        module, kind = _call_load_model(path, load_model, _contents(kind)), "load_model"
    try:
        module = take(module).to("cpu")
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    module.eval()
    return LoadedModel(module, kind, path.stem, sha256_of(path))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the file's bytes in hexadecimal digits, read a piece at a time."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise ModelFileError(f"{path}: can't be read ({e.strerror or e})") from e


def _contents(kind: str) -> str:
    return "tensors, not a model" if kind == "safetensors" else "no model that torch can read"


def _load_torch(
    path: Path, load_model: LoadModel | None, trust_pickle: bool
) -> tuple[nn.Module, str]:
    """Return the model of a file of ``torch.save``, and whether it was pickled."""
    safe, content = read_safely(path)
    if not safe and not trust_pickle:
        raise ModelFileError(
            f"{path}: a pickle of more than tensors{pickled_classes(path)}, and a pickle runs code "
            f"when it is loaded: save model.state_dict() and give load_model(path) in the task "
            f"file, or save a .pt2 ({EXPORT}), or give --trust-pickle if you trust where the file "
            f"came from"
        )
    if not safe:
        with guarded(lambda reason: ModelFileError(f"{path}: unpickling raised {reason}")):
            content = torch.load(path, map_location="cpu", weights_only=False)
    if isinstance(content, nn.Module):
        return content, "pickle"
    return _call_load_model(path, load_model, _holding(content)), "load_model"


def _holding(content: Any) -> str:
    """Return what a file that holds no module holds, for the user to recognize."""
    if isinstance(content, dict) and content:
        keys = ", ".join(str(key) for key in list(content)[:3])
        more = f" and {len(content) - 3} more" if len(content) > 3 else ""
        return f"a state_dict or another table, not a model (keys: {keys}{more})"
    return f"a {type(content).__name__}, not a model"


def _call_load_model(path: Path, load_model: LoadModel | None, contents: str) -> nn.Module:
    """Return what the task file's ``load_model`` makes of ``path``; TaskError where it fails."""
    if load_model is None:
        raise ModelFileError(
            f"{path}: holds {contents}: add load_model(path), which builds the model and loads "
            f"this file into it, to the task file"
        )
    where = _where(load_model)

    def failed(reason: str) -> TaskError:
        return TaskError(f"{where} raised {reason} for {path}, which holds {contents}")

    with guarded(failed, file_of(load_model)):
        module = load_model(path)
    if isinstance(module, ExportedProgram):
        return lift(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise TaskError(f"{where} returned TorchScript: return the nn.Module that it was made from")
    if not isinstance(module, nn.Module):
        raise TaskError(f"{where} returned a {type(module).__name__}: return an nn.Module")
    return module


def _where(function: Callable[..., Any]) -> str:
    """Return the function's name, and the file where it stands, if it has one."""
    name = getattr(function, "__name__", type(function).__name__)
    file = file_of(function)
    return f"{file}: {name}()" if file else f"{name}()"


def _load_torchscript(
    path: Path,
    trust_pickle: bool,
    example_inputs: tuple[Any, ...] | Callable[[], tuple[Any, ...]] | None,
) -> nn.Module:
    """Return the model of a TorchScript file, converted by torch and lifted."""
    advice = f"make a .pt2 of the original model ({EXPORT})"
    if not trust_pickle:
        raise ModelFileError(
            f"{path}: TorchScript, which can run code of its own when it is loaded: {advice}, or "
            f"give --trust-pickle if you trust where the file came from"
        )
    inputs = example_inputs() if callable(example_inputs) else example_inputs
    if inputs is None:
        raise ModelFileError(
            f"{path}: TorchScript can only be converted with inputs to try it on: {advice}, or "
            f"give calibration data"
        )
    try:
        # Not public, so its absence in another torch is one more way in which it can fail.
        from torch._export.converter import TS2EPConverter

        script = torch.jit.load(str(path), map_location="cpu").eval()
        with warnings.catch_warnings():
            # It remarks on every buffer that the model does not use.
            warnings.simplefilter("ignore")
            return lift(TS2EPConverter(script, inputs).convert())
    except Exception as e:
        raise ModelFileError(
            f"{path}: torch can't convert this TorchScript ({describe(e)}): {advice}"
        ) from e


def of_module(model: nn.Module) -> LoadedModel:
    """Return a copy of the user's own module to work on: it is folded and converted in place.

    Raises ModelFileError for a model that can't be searched or copied.
    """
    own = take(model)
    copy = copied(own)
    copy.eval()
    return LoadedModel(copy, "module", type(own).__name__, state_hash(own))


def state_hash(model: nn.Module) -> str:
    """Return a digest of a module's weights, for one that comes from no file."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            for part in _dense_parts(value.detach().cpu()):
                flat = part.contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors whose bytes tell ``tensor`` from others: itself, or a sparse one's two."""
    if tensor.layout is torch.strided:
        return (tensor.resolve_conj().resolve_neg(),)
    coordinates = tensor.to_sparse_coo().coalesce()
    return coordinates.indices(), coordinates.values()
