"""Importing autoquant, or searching with it, changes nothing that belongs to the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

STATE = '''
import gc, json, locale, logging, os, random, signal, sys, threading, warnings

import numpy, optuna, torch, torch.random


def state():
    """Return what autoquant must leave as it is, by name, ready to be compared."""
    loggers = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict)]
    own = [x for x in loggers if not x.name.startswith("autoquant")]
    flags = [
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
    ]
    return {
        "torch's random state": torch.get_rng_state().sum().item(),
        "numpy's random state": str([numpy.random.get_state()[i].__repr__() for i in (1, 2)]),
        "random's state": hash(random.getstate()),
        "optuna's verbosity": optuna.logging.get_verbosity(),
        "warning filters": [str(f) for f in warnings.filters],
        "showwarning": warnings.showwarning.__name__,
        "log levels": {x.name: x.level for x in (logging.root, *own) if x.level},
        "log handlers": {x.name: len(x.handlers) for x in (logging.root, *own) if x.handlers},
        "disabled logs": logging.root.manager.disable,
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "module path": list(sys.path),
        "threads of torch": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "threads": sorted(t.name for t in threading.enumerate()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "anomalies": torch.is_anomaly_enabled(),
        "flags": flags,
        "denormals": (torch.tensor([1e-40]) * 1).item(),
        "numpy's errors": numpy.geterr(),
        "numpy's printing": str(numpy.get_printoptions()),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "garbage": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
        "hooks": [str(x) for x in (sys.excepthook, sys.displayhook, sys.gettrace())],
        "recursion": sys.getrecursionlimit(),
        "streams": [[x.encoding, x.errors, id(x)] for x in (sys.stdout, sys.stderr)],
        "umask": [os.umask(0o22), os.umask(0o22)][0],
        "hash seed": torch.initial_seed(),
    }


def difference(before, after):
    found = {}
    for name, old in before.items():
        new = after[name]
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list):
            old, new = [x for x in old if x not in new], [x for x in new if x not in old]
        if isinstance(old, dict):
            changed = {k for k in {*old, *new} if old.get(k) != new.get(k)}
            old, new = ({k: d.get(k) for k in changed} for d in (old, new))
        found[name] = f"{old} -> {new}"
    return found
'''

IMPORT = (
    STATE
    + """
import importlib, pkgutil
before = state()
import autoquant
first = difference(before, state())
found = {}
for module in pkgutil.walk_packages(autoquant.__path__, "autoquant."):
    if module.name.startswith("autoquant.kernels.gpu"):  # Triton's, where there is a GPU
        continue
    if module.name.endswith(("__main__", "_native", "_guard")):  # which run, or are no modules
        continue
    last = state()
    importlib.import_module(module.name)
    if changed := difference(last, state()):
        found[module.name] = changed
print(json.dumps({"autoquant": first, **found}))
"""
)

SEARCH = (
    STATE
    + """
import autoquant
from torch import nn

generator = torch.Generator().manual_seed(0)
x = torch.randn(200, 6, generator=generator)
y = (x[:, 0] > 0).long()
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
task = autoquant.Task(
    evaluation_data=lambda: zip(x.split(50), y.split(50)), metric="accuracy"
)
class Own(optuna.samplers.RandomSampler):
    pass
# Imports are another test's.
import autoquant.optimize.resume, autoquant.optimize.run, autoquant.session.apply
optuna.logging.set_verbosity(LEVEL)
before = state()
kind = SAMPLER
result = autoquant.search(model, task, trials=14, sampler=kind, study="s", storage=STORAGE)
own = None if isinstance(kind, str) else kind
autoquant.resume("s", model=model, task=task, trials=16, storage=STORAGE, sampler=own)
autoquant.apply(result.recipe, model, task)
print(json.dumps(difference(before, state())))
"""
)


def run(code: str, folder: Any) -> tuple[dict, str]:
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=300
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1]), child.stderr


def test_importing_any_module_changes_nothing(tmp_path):
    found, said = run(IMPORT, tmp_path)
    assert {name: changed for name, changed in found.items() if changed} == {}
    assert said == ""


@pytest.mark.parametrize(
    ("sampler", "storage", "level"),
    [
        ("'knapsack'", "None", "optuna.logging.INFO"),
        ("'tpe'", "'sqlite:///s.db'", "optuna.logging.DEBUG"),
        ("Own(seed=0)", "None", "optuna.logging.ERROR"),
    ],
)
def test_searching_changes_nothing(tmp_path, sampler, storage, level):
    code = SEARCH.replace("SAMPLER", sampler).replace("STORAGE", storage).replace("LEVEL", level)
    found, said = run(code, tmp_path)
    if "sqlite" in storage:  # what Optuna's own database says of its log is Optuna's
        kept = ("log handlers", "log levels")
        assert all("alembic" in found.pop(name, "alembic") for name in kept)
    assert found == {}
    assert said == ""
