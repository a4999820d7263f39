"""``autoquant demo``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from autoquant.cli.options import device_option, json_option

TRIALS = 40

TASK = '''\
"""The task of the demo: a small convolutional network that reads handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn

TRAINED = 900  # the images from here on were not trained on


class DigitNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 48, 1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x):
        x = self.features(x).flatten(1)
        return self.classifier(torch.relu(self.hidden(x)))


def images():
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return x, torch.tensor(digits.target)


def load_model(path):
    model = DigitNet()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def calibration_data():
    x, _ = images()
    return x[:256].split(64)


def evaluation_data():
    x, y = images()
    return zip(x[TRAINED:].split(64), y[TRAINED:].split(64))


metric = "accuracy"
'''


@click.command(epilog="Example: autoquant demo /tmp/demo")
@click.argument("directory", metavar="[DIR]", default="autoquant-demo", type=click.Path())
@device_option
@json_option
def command(directory: str, device: str, as_json: bool) -> None:
    """Train a small CNN on handwritten digits in DIR (default: autoquant-demo) and search it.

    Writes DIR/model.pt and DIR/task.py, unless it did so before, prints the search command that you
    would type, and runs it. A file there that is not the demo's is not overwritten. Needs no
    network, and no GPU unless --device says so. The exit status is 0 whatever the verdict is: it
    only shows how a search goes.
    """
    from autoquant.cli.search import run
    from autoquant.errors import UserError
    from autoquant.session.session import choose_device
    from autoquant.spec.options import Options
    from autoquant.spec.outputs import check_target, is_signed, write_text
    from autoquant.study.ledger import names
    from autoquant.study.opening import RECIPE_FILE

    folder = Path(os.path.abspath(directory))  # the task may change the working directory
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{directory}: is a file; give a folder")
    choose_device(device)
    task, model = folder / "task.py", folder / "model.pt"
    check_target(task, lambda path: path.read_text(encoding="utf-8") == TASK)
    check_target(folder / RECIPE_FILE, is_signed)
    if not task.exists():
        check_target(model, lambda path: False)  # somebody's own: it was there before the demo
        write_text(task, TASK)
    if model.exists():
        say(f"trained before: {model}, {task}")
    else:
        say(f"training a digit classifier: {model}, {task}")
        train(task, model)
    study = next(
        n for i in range(1, 10_000) if (n := f"demo-{i}" if i > 1 else "demo") not in names(None)
    )
    line = ["autoquant", "search", str(model), "--task", str(task), "--trials", str(TRIALS)]
    line += ["--study", study, "--out", str(folder)]
    line += [] if device == "auto" else ["--device", device]
    say(f"$ {shlex.join(line)}")
    options = Options(trials=TRIALS, device=device)
    run(
        str(model),
        str(task),
        None,
        None,
        False,
        "default",
        options,
        study,
        None,
        str(folder),
        as_json,
    )


def say(line: str) -> None:
    """Print a line of progress on standard error."""
    print(line, file=sys.stderr)


def train(task_file: Path, path: Path) -> None:
    """Train the demo's network for a few seconds and save its state_dict."""
    import runpy

    import torch

    scope = runpy.run_path(str(task_file))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = scope["images"]()
        x, y = x[: scope["TRAINED"]], y[: scope["TRAINED"]]
        model = scope["DigitNet"]().train()
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for _ in range(12):
            for batch in torch.randperm(len(x)).split(50):
                loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    # Whole or not at all: a demo that is run again takes what is there for trained.
    part = path.with_name(f".{path.name}.part")
    torch.save(model.eval().state_dict(), part)
    part.replace(path)
