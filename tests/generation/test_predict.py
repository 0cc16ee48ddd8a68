"""Generation inside a trainer: precision, streaming, start frames."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from t2v import LitVideoTransformer, TextToVideo
from t2v.batch import PromptBatch
from t2v.errors import UserError
from t2v.generation import Interval, Linear, Sampler
from t2v.generation.settings import GenerationSettings
from t2v.video import read_frames, write_mp4

PROMPTS = ["a red circle", "one large blue square moves"]
BATCH = PromptBatch(PROMPTS, seeds=[3, 4], names=["a", "b"])


class Keep(Callback):
    """Reads the frames as a writer does, outside the step that returned them."""

    def __init__(self) -> None:
        self.videos: list[Tensor] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        assert not torch.is_autocast_enabled("cpu")
        frames = []
        for frame in outputs.frames:
            assert not torch.is_autocast_enabled("cpu")
            frames.append(frame)
        self.videos.append(torch.cat(frames, dim=1))


class Dtypes(Sampler):
    """Records the dtypes of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __call__(self, logits: Tensor, *args: Any) -> Tensor:
        self.seen.add(logits.dtype)
        return super().__call__(logits, *args)


@pytest.fixture
def tokenizer(vqvae, tmp_path) -> str:
    """The folder of the toy VQ-VAE."""
    vqvae.save_pretrained(tmp_path / "vqvae")
    return str(tmp_path / "vqvae")


def build(model: TextToVideo, tokenizer: str, **changes: Any) -> LitVideoTransformer:
    generation = GenerationSettings(**{"sampler": Sampler(), "frames": 6, **changes})
    lit = LitVideoTransformer(model.transformer, tokenizer, model.text_encoder, generation)
    lit.fingerprint = {"fps": 8.0}  # comes with a checkpoint
    return lit


def predict(lit: LitVideoTransformer, folder: Path, precision: str = "32-true") -> Tensor:
    return run([BATCH], lit, folder, Keep(), precision)[0]


def run(batches: list[PromptBatch], lit: LitVideoTransformer, folder: Path, keep: Keep, precision: Any) -> list[Tensor]:
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    flags: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, precision=precision, callbacks=[keep], **flags)
    trainer.predict(lit, loader, return_predictions=False)
    return keep.videos


@pytest.mark.parametrize("candidates", [1, 3])
def test_predict_generates_what_the_model_generates(candidates, model, tokenizer, tmp_path):
    options: dict[str, Any] = {"guidance": Linear(4.0, 1.0), "candidates": candidates}
    videos = predict(build(model, tokenizer, **options), tmp_path)
    assert torch.equal(videos, model.generate(PROMPTS, 6, seed=[3, 4], **options))


def test_frames_are_generated_in_the_trainers_precision(model, tokenizer, tmp_path):
    sampler = Dtypes()
    videos = predict(build(model, tokenizer, sampler=sampler), tmp_path, "bf16-mixed")
    assert sampler.seen == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(videos, model.generate(PROMPTS, 6, seed=[3, 4]))


def test_prompts_are_embedded_in_full_precision(model):
    plain = model.embed(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(model.embed(PROMPTS), plain, strict=True))


def test_videos_begin_with_the_first_frames_of_a_file(model, tokenizer, tmp_path):
    footage = torch.randint(256, (9, 3, 32, 48), dtype=torch.uint8)
    write_mp4(tmp_path / "footage.mp4", footage, fps=16)
    videos = predict(build(model, tokenizer, start=str(tmp_path / "footage.mp4"), start_frames=3), tmp_path)
    taken = read_frames(tmp_path / "footage.mp4", [0, 2, 4])  # at 8 frames a second
    start = torch.nn.functional.interpolate(taken, (16, 24), mode="bilinear", antialias=True)[..., 4:20]
    assert torch.equal(videos, model.generate(PROMPTS, 6, seed=[3, 4], start=start))


def test_without_guidance_after_the_start_frames_there_is_one_candidate(model, tokenizer, tmp_path):
    write_mp4(tmp_path / "footage.mp4", torch.randint(256, (9, 3, 16, 16), dtype=torch.uint8), fps=8)
    options: dict[str, Any] = {"guidance": Interval(2.0, 0.0, 0.4), "start_frames": 3}
    options["start"] = str(tmp_path / "footage.mp4")
    one, several = (predict(build(model, tokenizer, candidates=n, **options), tmp_path) for n in (1, 4))
    assert torch.equal(one, several)
    with pytest.raises(UserError, match="no effect with guidance=1 in all generated frames"):
        predict(build(model, tokenizer, negative_prompt="grey", **options), tmp_path)


@pytest.mark.parametrize("start_frames", [0, 6])
def test_start_frames_leave_frames_to_generate(model, tokenizer, start_frames):
    limits = "must be at least 1 and less than generation.frames=6"
    with pytest.raises(UserError, match=f"start_frames={start_frames} {limits}"):
        build(model, tokenizer, start="picture.png", start_frames=start_frames)


def test_a_missing_start_file_is_refused_before_generation(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read '.*none.png'"):
        predict(build(model, tokenizer, start=str(tmp_path / "none.png")), tmp_path)


def test_an_invalid_schedule_is_refused_before_training(model, tokenizer):
    with pytest.raises(UserError, match=r"temperature=0.0 at frame 4 of 6"):
        build(model, tokenizer, sampler=Sampler(Linear(4.0, -1.0)))


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"negatives": [None, "grey"]}, {}, "The negative prompt has no effect with guidance=1"),
        ({"starts": ["a.png", "b.png"]}, {"start_frames": 6}, "start_frames=6 must be at least 1 and less than"),
    ],
)
def test_a_later_prompt_is_checked_before_the_first_video(model, tokenizer, tmp_path, options, settings, message):
    keep = Keep()
    with pytest.raises(UserError, match=message):
        run([BATCH, BATCH._replace(**options)], build(model, tokenizer, **settings), tmp_path, keep, "32-true")
    assert keep.videos == []
