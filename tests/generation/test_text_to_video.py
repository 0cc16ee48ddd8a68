"""From prompts to videos, and the exported folder."""

import json
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from t2v import TextToVideo
from t2v.errors import UserError
from t2v.generation import Cosine, Interval, Linear, Sampler
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.model import to_model_range, to_uint8

PROMPTS = ["a red circle", "one large blue square moves", ""]


def clips(count: int, frames: int) -> torch.Tensor:
    """Return random clips of the toy VQ-VAE's size."""
    return torch.randint(256, (count, frames, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether pixels differ by at most 1: kernels for other batch sizes sum in another order."""
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


def test_one_prompt_and_several(model):
    videos = model.generate(PROMPTS, seed=4)
    assert videos.dtype == torch.uint8
    assert videos.shape == (3, 5, 3, 16, 16)
    for i, prompt in enumerate(PROMPTS):
        assert close(model.generate(prompt, seed=4 + i), videos[i : i + 1])
    assert close(model.generate(PROMPTS, seed=[6, 5, 4])[1], videos[1])
    assert not close(model.generate(PROMPTS[0], seed=5), videos[:1])


def test_arguments_of_a_call_override_the_models_settings(transformer, vqvae, model):
    sampler, guidance = Sampler(temperature=Cosine(0.5, 1.0)), Linear(5.0, 2.0)
    set_up = TextToVideo(transformer, vqvae, model.text_encoder, 8.0, sampler, guidance, frames=3)
    asked = model.generate(PROMPTS, frames=3, guidance=guidance, sampler=sampler)
    assert torch.equal(set_up.generate(PROMPTS), asked)
    assert not torch.equal(model.generate(PROMPTS, frames=3), asked)
    assert torch.equal(set_up.generate(PROMPTS, guidance=1.0, sampler=Sampler()), model.generate(PROMPTS, frames=3))


def test_prompts_can_be_embedded_before(model):
    assert torch.equal(model.generate(model.embed(PROMPTS)), model.generate(PROMPTS))


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_stream_yields_frames_as_they_are_generated(model):
    endless = model.stream(PROMPTS, frames=100_000)
    assert next(endless).shape == next(endless).shape == (3, 1, 3, 16, 16)
    assert torch.equal(torch.cat(list(model.stream(PROMPTS)), dim=1), model.generate(PROMPTS))


@pytest.mark.parametrize(
    "start", [clips(1, 1)[0, 0], clips(1, 3)[0], clips(1, 3), clips(3, 2)], ids=["picture", "clip", "batch 1", "batch"]
)
def test_a_video_begins_with_the_reconstruction_of_start(model, vqvae, start):
    videos = model.generate(PROMPTS, start=start)
    assert videos.shape == (3, 5, 3, 16, 16)
    batch = start[(None,) * (5 - start.ndim)].expand(3, -1, -1, -1, -1)
    with torch.inference_mode():
        expected = to_uint8(vqvae.decode(vqvae.encode(to_model_range(batch))))
    assert close(videos[:, : batch.shape[1]], expected)
    assert not close(videos, model.generate(PROMPTS, start=start, seed=9))
    # The generated frames depend on the start frames.
    assert not close(videos[:, batch.shape[1] :], model.generate(PROMPTS, start=255 - start)[:, batch.shape[1] :])


@pytest.mark.usefixtures("unchecked_shapes")
def test_negative_prompts(model):
    plain = model.generate(PROMPTS, guidance=3.0)
    no_guidance = model.generate(PROMPTS)
    # Guidance away from the prompt itself cancels out; away from no text it is the usual one.
    assert close(model.generate(PROMPTS, guidance=3.0, negative_prompt=PROMPTS)[:2], no_guidance[:2])
    assert torch.equal(model.generate(PROMPTS, guidance=3.0, negative_prompt=""), plain)
    mixed = model.generate(PROMPTS, guidance=3.0, negative_prompt=["a blue circle moves", "", "small"])
    assert close(mixed[1:2], plain[1:2])
    assert not close(mixed[:1], plain[:1])
    alone = model.generate(PROMPTS[2], seed=2, guidance=3.0, negative_prompt="small", parallel=1)
    assert close(mixed[2:], alone)
    start = clips(1, 1)[0, 0]
    one = model.generate(PROMPTS, start=start, guidance=Linear(4.0, 1.0), negative_prompt=PROMPTS)
    assert close(one[:2], model.generate(PROMPTS, start=start)[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "There are no prompts"),
        ({"negative_prompt": "grey"}, "The negative prompt has no effect with guidance=1"),
        ({"negative_prompt": ["grey"], "guidance": 2.0}, "1 negative prompts for 3 prompts"),
        (
            {"negative_prompt": "x", "guidance": Interval(3.0, 0.0, 0.2), "start": clips(1, 2)},
            "has no effect with guidance=1",
        ),
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"seed": [1, 2]}, "2 seeds for 3 texts"),
        ({"start": clips(1, 5)}, "number of start frames, 5, must be .* less than frames=5"),
        ({"start": clips(1, 0)}, "start has no frames"),
        ({"start": clips(2, 1)}, "start has 2 clips for 3 prompts"),
        (
            {"start": clips(1, 1)[..., :8]},
            r"shape \(1, 1, 3, 16, 8\), but must be uint8 with last dim",
        ),
        ({"start": clips(1, 1).float()}, "start is float32"),
        ({"start": clips(1, 1)[0, 0, 0]}, r"shape \(16, 16\)"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_generated(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.stream(**{"prompts": PROMPTS, **arguments})


def test_parts_that_do_not_fit_are_refused(model, transformer, vqvae):
    with pytest.raises(UserError, match=r"The text encoder words-9 has width 9, but the transformer has text\.dim=8"):
        TextToVideo(transformer, vqvae, type(model.text_encoder)(9), 8.0)
    finer = type(vqvae)(image_size=32, base_channels=8, channel_multipliers=(1,), quantizer=vqvae.quantizer)
    with pytest.raises(
        UserError, match="has 16 codes on a grid of 4×4, but the transformer has vocab_size=16 and grid"
    ):
        TextToVideo(transformer, finer, model.text_encoder, 8.0)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A saved model without default settings."""
    model.sampler = Sampler(temperature=Linear(0.9, 0.6), top_k=9, min_p=0.01)
    model.guidance = Interval(3.0, 0.0, 0.5, outside=1.5)
    model.frames, model.candidates = 4, 3
    model.save_pretrained(tmp_path / "deep" / "model")
    return tmp_path / "deep" / "model"


def test_a_loaded_model_generates_what_the_saved_one_generates(model, folder):
    loaded = TextToVideo.from_pretrained(folder)
    assert (loaded.fps, loaded.frames, loaded.candidates) == (8.0, 4, 3)
    assert not any(parameter.requires_grad for parameter in loaded.vqvae.parameters())
    assert torch.equal(loaded.generate(PROMPTS, seed=3), model.generate(PROMPTS, seed=3))
    # No temporary files, and no code.
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "text_to_video.json",
        *(
            f"{part}/{name}"
            for part in ("transformer", "vqvae")
            for name in ("config.json", "model.safetensors", "model.safetensors.sha256")
        ),
    }


def test_a_folder_with_files_is_not_overwritten(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not an empty folder"):
        model.save_pretrained(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="Cannot write"):
        model.save_pretrained(tmp_path / "notes.txt" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    TextToVideo.from_pretrained(tmp_path / "empty")


def test_a_failed_save_leaves_nothing(model, tmp_path):
    model.sampler = Sampler()
    model.sampler.top_k = object()  # not a JSON type
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "text_to_video.json",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vqvae/config.json",
        "vqvae/model.safetensors",
    ],
)
def test_a_missing_or_damaged_file_is_an_error(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged") as damaged:
        TextToVideo.from_pretrained(folder)
    assert name.split("/")[0] in str(damaged.value)
    assert "\n" not in str(damaged.value)
    path.unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        TextToVideo.from_pretrained(folder)


@pytest.mark.parametrize("part", ["transformer", "vqvae"])
def test_damage_in_the_middle_of_the_weights_is_found(folder, part):
    path = folder / part / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{part}/model.safetensors' is damaged: its sha256 is not that in model"):
        TextToVideo.from_pretrained(folder)
    if part == "vqvae":
        with pytest.raises(UserError, match="is damaged: its sha256"):
            load_vqvae(str(folder / part))
    (folder / part / "model.safetensors.sha256").unlink()  # as in folders of earlier versions
    TextToVideo.from_pretrained(folder)


def rewrite(folder: Path, **changes) -> None:
    path = folder / "text_to_video.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, r"has format 3, written by t2v .*, which reads format 4"),
        (
            {"sampler": {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}},
            "Popen is not a known",
        ),
        ({"sampler": {"class_path": "t2v.generation.Linear", "init_args": {}}}, "Linear is not a known Sampler"),
        ({"text_encoder": {"class_path": "t2v.text.TextEncoder"}}, "t2v.text.MiniLMTextEncoder"),
        (
            {"guidance": {"class_path": "os.system", "init_args": {"command": "ls"}}},
            "os.system is not a known",
        ),
        ({"guidance": "strong"}, "is damaged"),
        ({"sampler": {"class_path": "t2v.generation.Sampler", "init_args": {"warmth": 1}}}, "is damaged.*warmth"),
        ({"sampler": {"class_path": "t2v.generation.Sampler", "init_args": {"top_p": 2.0}}}, r"top_p=2.0 must lie in"),
        ({"fps": None}, "is damaged"),
    ],
)
def test_invalid_settings_are_refused_and_name_no_code(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=message):
        TextToVideo.from_pretrained(folder)


def test_weights_of_another_model_are_refused(folder, tmp_path):
    for name in ("model.safetensors", "model.safetensors.sha256"):
        shutil.copy(folder / "vqvae" / name, folder / "transformer" / name)
    with pytest.raises(UserError) as refused:
        TextToVideo.from_pretrained(folder)
    assert "transformer" in str(refused.value)


@pytest.mark.usefixtures("unchecked_shapes")
def test_numbers_of_numpy_are_numbers(transformer, vqvae, model, tmp_path):
    numbers = {"fps": np.float32(8), "frames": np.int64(3), "guidance": np.float32(2), "candidates": np.int64(1)}
    made = TextToVideo(transformer, vqvae, model.text_encoder, **numbers)
    made.save_pretrained(tmp_path / "model")
    loaded = TextToVideo.from_pretrained(tmp_path / "model", device="cpu")
    assert (loaded.fps, loaded.frames, loaded.guidance) == (8.0, 3, 2.0)
    for wrong in ({"top_p": np.float32(2)}, {"top_k": np.int64(0)}):
        with pytest.raises(UserError, match="must"):
            Sampler(**wrong)
    with pytest.raises(UserError, match="start is ndarray, but must be a tensor"):
        model.generate("a red circle", start=np.zeros((3, 16, 16), np.uint8))


def test_a_full_disk_is_one_sentence(model, tmp_path):
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        with pytest.raises(UserError, match=r"Cannot write '.*model' \(.*File too large"):
            model.save_pretrained(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
