"""``autoquant demo``."""

from __future__ import annotations

import shlex
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

    Writes DIR/model.pt and DIR/task.py, prints the search command that you would type, and runs
    it. Needs no network, and no GPU unless --device says so. The exit status is 0 whatever the
    verdict is: it only shows how a search goes.
    """
    from autoquant.cli.search import run
    from autoquant.errors import UserError
    from autoquant.search.ledger import names
    from autoquant.search.options import Options
    from autoquant.search.session import choose_device
    from autoquant.spec.recipe_file import write_text

    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    choose_device(device)
    task, model = folder / "task.py", folder / "model.pt"
    write_text(task, TASK)
    click.echo(f"training a digit classifier: {model}, {task}", err=True)
    train(task, model)
    study = next(
        n for i in range(1, 10_000) if (n := f"demo-{i}" if i > 1 else "demo") not in names(None)
    )
    line = ["autoquant", "search", str(model), "--task", str(task), "--trials", str(TRIALS)]
    line += ["--study", study, "--out", str(folder)]
    line += [] if device == "auto" else ["--device", device]
    click.echo(f"$ {shlex.join(line)}", err=True)
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
    torch.save(model.eval().state_dict(), path)
