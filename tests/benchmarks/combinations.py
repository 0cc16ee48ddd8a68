"""What stage 2 of the moving shapes learns about combinations that it has not seen.

`python -m tests.benchmarks.combinations RUN` reads the run folder of `make demo`, or another with the same folders, and
prints

- how much the token of a place varies where the drawing is the same, in nats per frame: the conditional entropy of the
  tokens given the drawn pixels of their patches, for the background and for the rest, and how many codes occur;
- the negative log-likelihood of a frame in nats, for training clips and for the held-out combinations;
- the strict judge and the oracle (data/examples/oracle.py) on reconstructions of drawings, and on generated videos, for
  held-out combinations and for those of training, in percent.
"""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from data.datasets.tokens import TokenClip, TokenClips
from data.examples.oracle import Answer, passes, recognize
from data.examples.shapes import FRAMES, ShapeClip, draw, held_out_prompts, render
from data.plan import Bucket
from data.shards import ShardSet
from t2v.batch import TextEmbedding
from t2v.errors import run_tool
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule
from t2v.generation.text_to_video import TextToVideo
from t2v.vqvae.model import VQVAE, to_model_range, to_uint8

_CLIPS = 600
"""Training clips whose tokens are counted."""
_LIKELIHOOD_CLIPS = 180
_BATCH = 30
_DRAWINGS = 120
"""Drawings that are encoded and decoded."""


def load(folder: Path, numbers: range) -> list[TokenClip]:
    """Load clips without random choices."""
    clips = TokenClips(ShardSet(str(folder)), [Bucket(FRAMES, 1)])
    return [clips.load(number, clips.buckets[0], rng=None) for number in numbers]  # type: ignore[misc]


def token_noise(folder: Path) -> None:
    """Print the conditional entropy of tokens given the drawing."""
    drawn = [clip for clip, _ in draw(held_out=False, clips=3600, seed=0)]
    tokens_of: dict[bytes, Counter[int]] = defaultdict(Counter)
    for clip in load(folder, range(_CLIPS)):
        video = render(drawn[int(clip.key.split("_")[0])])
        grid = clip.tokens.shape[-1]
        patches = video.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5)
        for patch, token in zip(patches.flatten(0, 2).numpy(), clip.tokens.flatten().tolist(), strict=True):
            tokens_of[patch.tobytes()][token] += 1
    background = max(tokens_of.values(), key=Counter.total)
    others = sum(entropy(counts) for counts in tokens_of.values() if counts is not background)
    codes = set().union(*tokens_of.values())
    frames = _CLIPS * FRAMES
    print(f"Tokens given the drawing: background {entropy(background) / frames:.3f}, rest {others / frames:.3f} nats")
    print(f"Codes that occur: {len(codes)}")


def entropy(counts: Counter[int]) -> float:
    """Return the entropy of the drawn values times their number, in nats."""
    total = counts.total()
    return -sum(count * math.log(count / total) for count in counts.values())


@torch.no_grad()
def likelihood(model: TextToVideo, folder: Path) -> list[float]:
    """Return the mean negative log-likelihood of the first four frames, and of the frames after them."""
    count = len(TokenClips(ShardSet(str(folder)), [Bucket(FRAMES, 1)]))
    clips = load(folder, range(0, count, max(1, count // _LIKELIHOOD_CLIPS)))
    losses: list[Tensor] = []
    for start in range(0, len(clips), _BATCH):
        batch = TokenClips.collate(clips[start : start + _BATCH])
        losses.append(-log_likelihood(model, batch.tokens, batch.text))
    frames = torch.cat(losses).mean(0)
    return [*frames[:4].tolist(), float(frames[4:].mean())]


def log_likelihood(model: TextToVideo, tokens: Int[Tensor, "b t h w"], text: TextEmbedding) -> Float[Tensor, "b t"]:
    """Return the log-likelihood of each frame in nats, given the frames before it and the text."""
    logits = model.transformer(tokens, text).float().log_softmax(dim=-1)
    return logits.gather(-1, tokens[..., None])[..., 0].sum(dim=(2, 3))


def judge(videos: UInt8[Tensor, "b t 3 height width"], clips: list[ShapeClip]) -> dict[str, float]:
    """Return the percentages of videos that the strict judge and the oracle find right."""
    right: dict[str, list[bool]] = defaultdict(list)
    for clip, video in zip(clips, videos.permute(0, 1, 3, 4, 2).numpy(), strict=True):
        answer, truth = recognize(video), Answer.of(clip)
        right["strict"].append(passes(video, truth))
        for name in Answer._fields:
            right[name].append(getattr(answer, name) == getattr(truth, name))
    return {name: round(100 * float(np.mean(each)), 1) for name, each in right.items()}


@torch.no_grad()
def reconstruct(vqvae: VQVAE, clips: list[ShapeClip]) -> UInt8[Tensor, "b t 3 height width"]:
    """Return what the VQ-VAE makes of drawings: what the transformer would generate if it made no error."""
    return torch.cat([to_uint8(vqvae.decode(vqvae.encode(to_model_range(render(clip)[None])))) for clip in clips])


def main(
    run: Path,
    per_combination: int = 3,
    seed: int = 1,
    guidance: float | Schedule | None = None,
    sampler: Sampler | None = None,
    candidates: int = 1,
) -> None:
    """Print all tables.

    Args:
        run: Folder with tokens/ and transformer/checkpoints/last.ckpt.
        per_combination: Held-out prompts of each combination.
        seed: Equal seeds give equal held-out prompts; 1 those of the demo.
        guidance: Guidance scale; the model's own by default.
        sampler: Draws the tokens; the model's own by default.
        candidates: Videos of each prompt, of which the best one is judged.
    """
    token_noise(run / "tokens/train")
    model = TextToVideo.from_checkpoint(run / "transformer/checkpoints/last.ckpt")
    for split in ("train", "val"):
        print(f"nats per frame, frames 1 to 4, then the mean of the others, {split}:", end=" ")
        print(*(f"{value:.2f}" for value in likelihood(model, run / "tokens" / split)))
    for held_out in (True, False):
        drawn = [clip for clip, _ in draw(held_out, _DRAWINGS, seed=3)]
        name = "held-out" if held_out else "training"
        print(
            f"reconstructions of {_DRAWINGS} drawings of {name} combinations:",
            judge(reconstruct(model.vqvae, drawn), drawn),
        )
    prompts = {
        "held-out": held_out_prompts(per_combination, seed),
        "training": list(draw(held_out=False, clips=72, seed=5)),
    }
    for name, each in prompts.items():
        texts = [prompt for _, prompt in each]
        videos = model.generate(
            texts, FRAMES, seed=range(len(each)), guidance=guidance, sampler=sampler, candidates=candidates
        )
        print(f"{len(each)} prompts of {name} combinations:", judge(videos, [clip for clip, _ in each]))


if __name__ == "__main__":
    run_tool(main)
