"""The wheel, installed alone, generates: no package that only training needs is required."""

from importlib.metadata import version

import pytest
import torch

from t2v import TextToVideo
from t2v.text import T5TextEncoder
from t2v.transformer.config import TextConfig
from t2v.video import probe
from t2v.vqvae.quantizer import FSQuantizer
from tests.support import environment
from tests.support.tiny_t5 import save_tiny_t5
from tests.support.toys import toy_transformer, toy_vqvae

PROMPT = "a red circle moves left"
ONLY_FOR_TRAINING = (
    "bitsandbytes",
    "decord",
    "lightning",
    "lpips",
    "omegaconf",
    "tensorboard",
    "torchao",
    "torchmetrics",
    "torchvision",
    "webdataset",
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return environment.install(environment.build_wheel(folder), folder / "environment")


def test_the_wheel_without_extras_generates_a_video(python, tmp_path):
    save_tiny_t5(tmp_path / "t5", [PROMPT])
    vqvae = toy_vqvae(FSQuantizer(levels=[4, 4]), channel_multipliers=(1, 1))
    transformer = toy_transformer(text=TextConfig(dim=16), vocab_size=16)
    model = TextToVideo(transformer, vqvae, T5TextEncoder(str(tmp_path / "t5")), fps=8.0, frames=3)
    model.save_pretrained(tmp_path / "model")

    script = f"""
import importlib.util, runpy, sys
sys.argv = ["t2v", "generate", "model", {PROMPT!r}, "-o", "out.mp4"]
runpy.run_module("t2v", run_name="__main__", alter_sys=True)
import t2v, torch
video = t2v.TextToVideo.from_pretrained("model").generate({PROMPT!r})
torch.save(video, "video.pt")
print([name for name in {ONLY_FOR_TRAINING!r} if importlib.util.find_spec(name)])
"""
    done = environment.run(python, "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Wrote        out.mp4", "[]"]
    assert probe(tmp_path / "out.mp4")[:2] == (3, 8.0)
    assert torch.equal(torch.load(tmp_path / "video.pt"), model.generate(PROMPT))


def test_the_wheel_is_typed_knows_its_version_and_names_the_extra_for_training(python, tmp_path):
    script = """
import pathlib, t2v
print(t2v.__version__, (pathlib.Path(t2v.__file__).parent / "py.typed").exists())
t2v.LitVQVAE
"""
    done = environment.run(python, "-c", script, cwd=tmp_path)
    assert done.stdout.split() == [version("t2v"), "True"], done.stderr
    assert done.returncode != 0
    assert 'pip install -e ".[train]"' in done.stderr
