"""Choices of stage 2's recipe on captioned data: `python -m tests.benchmarks.recipe two_digits runs/recipe`.

Stage 1 of `configs/vqvae/two_digits.yaml` or `configs/vqvae/flare.yaml` has written tokens to `runs/`. A small
transformer is trained on them, with one choice of the recipe changed at a time, and measured on held-out clips without
drawing a token. A choice of stage 1 trains a tokenizer of its own before, and writes its tokens; the likelihoods of
tokens of different tokenizers cannot be compared. The measures are:

- the negative log-likelihood of a token in nats, in clips of 16 frames;
- for each attribute, the fraction of clips whose caption has the largest likelihood among all captions that differ in
  this attribute alone, and the nats of the caption's posterior probability among these, which vary less with the seed.

All are trained for as many steps on as many clips; the column `seconds` has the processor time of one thread, which
other programs change little. Results are stored in one folder for each choice, number of steps and seed, so that the
command can be interrupted, repeated, and run for several choices at once; the table has all that the folder holds.
"""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple, get_type_hints
from unittest.mock import patch

import torch

from cli import main
from data.captions import read_metadata
from data.datasets.tokens import TokenClip, TokenClips
from data.examples import flare, moving_digits
from data.examples.flare import FlareClip
from data.examples.moving_digits import DigitsClip
from data.shards import ShardSet
from t2v.errors import UserError, run_tool
from t2v.generation.text_to_video import TextToVideo
from t2v.transformer.layers import PreviousFrame
from tests.benchmarks.combinations import load, log_likelihood
from tests.benchmarks.report import print_table, write

SIZE = {
    "model.model.dim": 128,
    "model.model.hidden_dim": 384,
    "model.model.spatial_layers": 2,
    "model.model.temporal_layers": 2,
    "model.model.attention.heads": 4,
    "model.model.attention.kv_heads": 2,
}
"""The sizes at which all are trained."""
BUCKETS = {
    "two_digits": "[{frames: 1, batch_size: 36, probability: 8}, {frames: 2, batch_size: 36, probability: 8}, "
    "{frames: 16, batch_size: 4}]",
    "flare": "[{frames: 2, batch_size: 36, start: first, probability: 4}, {frames: 16, batch_size: 4}]",
}


class Choice(NamedTuple):
    """Settings that a choice changes in the recipe."""

    stage2: dict[str, Any]
    stage1: dict[str, Any] | None = None
    """With these, a tokenizer of its own is trained."""


_ADAMW = {
    "model.optimizer": "torch.optim.AdamW",
    "model.optimizer.betas": "[0.9, 0.95]",
    "model.optimizer.weight_decay": 0.1,
}
_CODEBOOK_SIZE, _KERNEL_SIZE = "model.model.quantizer.codebook_size", "model.model.encoder_kernel_size"
CHOICES = {
    "recipe": Choice({}),
    "AdamW, lr 1e-3": Choice({**_ADAMW, "model.optimizer.lr": 1e-3}),
    "AdamW, lr 3e-3": Choice({**_ADAMW, "model.optimizer.lr": 3e-3}),
    **{f"embedding_lr {rate}": Choice({"model.optimizer.embedding_lr": rate}) for rate in (1, 8)},
    "without corruption": Choice({"model.objective.corruption": 0}),
    "without PreviousFrame": Choice({}),
    **{f"text convolution of {size}": Choice({"model.model.text.kernel_size": size}) for size in (1, 9)},
    "with the gate": Choice({"model.model.text.gate": True}),
    "rope_theta 10000": Choice({"model.model.attention.rope_theta": 10000}),
    "without caption dropout": Choice({"model.objective.caption_dropout": 0}),
    **{
        f"codebook of {size}": Choice({"model.model.vocab_size": size}, {_CODEBOOK_SIZE: size})
        for size in (256, 1024, 4096, 16384)
    },
    **{f"encoder kernel {size}": Choice({}, {_KERNEL_SIZE: size}) for size in (1, 3)},
    "windows of 2 and 16 frames": Choice(
        {"data.buckets": "[{frames: 2, batch_size: 36}, {frames: 16, batch_size: 4}]"}
    ),
    "windows of 1, 2 and 16 frames": Choice(  # as Flare's clips begin
        {
            "data.buckets": "[{frames: 1, batch_size: 36, probability: 24, start: first}, "
            "{frames: 2, batch_size: 36, probability: 6, start: first}, {frames: 16, batch_size: 4, probability: 3}]"
        }
    ),
    "one temporal layer": Choice({"model.model.temporal_layers": 1}),
    "eight layers": Choice({"model.model.spatial_layers": 5, "model.model.temporal_layers": 3}),
    "256 tokens a frame": Choice(  # as many tokens a step; batches and codebook are for two digits
        {
            "model.model.grid_size": 16,
            "model.model.vocab_size": 256,
            "data.buckets": "[{frames: 1, batch_size: 9, probability: 8}, {frames: 2, batch_size: 9, probability: 8}, "
            "{frames: 16, batch_size: 1}]",
        },
        {"model.model.latent_patch_size": 1, _CODEBOOK_SIZE: 256},
    ),
}
_CLIPS = 180
"""Least number of held-out clips, evenly spread."""
_BATCH = 20


class Question(NamedTuple):
    """Captions that differ in what is asked for; the first describes a clip."""

    attribute: str
    captions: list[str]
    frames: int
    """Number of first frames whose likelihood counts."""


def _clip(kind: type[Any], metadata: dict[str, Any]) -> Any:
    """Return the attributes of a clip, which its metadata has as text."""
    types = get_type_hints(kind)
    return kind(**{name: types[name](metadata[name]) for name in types})


def digits_questions(metadata: dict[str, Any]) -> list[Question]:
    """Ask for the pair of digits, which the first frame shows, for their motions, which the second does, and whose.

    The last question, which digit has which of two different motions, is one that half of the clips have.
    """
    clip = _clip(DigitsClip, metadata)
    others = [
        replace(clip, digit=first, second_digit=second)
        for first, second in itertools.combinations(range(10), 2)
        if {first, second} != {clip.digit, clip.second_digit}
    ]
    motions = [
        replace(clip, motion=first, second_motion=second)
        for first, second in itertools.product(moving_digits.MOTIONS, repeat=2)
        if (first, second) != (clip.motion, clip.second_motion)
    ]
    asked = [("digits", others, 1), ("motions", motions, 2)]
    if clip.motion != clip.second_motion:
        asked.append(("whose motion", [replace(clip, motion=clip.second_motion, second_motion=clip.motion)], 2))
    return [
        Question(name, [moving_digits.captions_of(each)[0] for each in (clip, *those)], frames)
        for name, those, frames in asked
    ]


def flare_questions(metadata: dict[str, Any]) -> list[Question]:
    """Ask for who, facing and ground, which the first frame shows, and for the action."""
    clip = _clip(FlareClip, metadata)
    is_person = clip.who in flare.people()
    others = {
        "who": (flare.people() if is_person else flare.CREATURES.values(), 1),
        "action": (flare.ACTIONS if is_person else flare.CREATURE_ACTIONS, 6),
        "facing": (flare.FACINGS, 1),
        "ground": (flare.GROUNDS, 1),
    }
    return [
        Question(
            name,
            [
                flare.captions_of(replace(clip, **{name: value}))[0]
                for value in (getattr(clip, name), *(value for value in values if value != getattr(clip, name)))
            ],
            frames,
        )
        for name, (values, frames) in others.items()
    ]


QUESTIONS: dict[str, Callable[[dict[str, Any]], list[Question]]] = {
    "two_digits": digits_questions,
    "flare": flare_questions,
}


def compare(
    data: Literal["two_digits", "flare"],
    out: Path,
    steps: int = 500,
    tokenizer_steps: int = 2400,
    seeds: tuple[int, ...] = (0, 1),
    only: tuple[str, ...] = tuple(CHOICES),
    precision: str = "bf16-mixed",
) -> None:
    """Train with each choice, measure on held-out clips and print a table.

    Args:
        data: The recipe, of which `runs/DATA` has the shards, the tokens and the tokenizer.
        out: Folder for checkpoints and results.
        steps: Training steps of stage 2.
        tokenizer_steps: Training steps of the tokenizers of choices of stage 1.
        seeds: Seeds of the trainings of each choice; with none, only the table is printed.
        only: Choices to train.
        precision: Precision of training, a value of `trainer.precision`.

    Raises:
        UserError: If there is no such choice.
    """
    if unknown := set(only) - set(CHOICES):
        raise UserError(f"only={unknown} are no choices: give some of {', '.join(CHOICES)}.")
    torch.set_num_threads(1)
    out = out.absolute() / data
    for seed, name in itertools.product(seeds, only):
        _run(data, out, name, steps, tokenizer_steps, seed, precision)
    _print_table(out)


def _run(data: str, out: Path, name: str, steps: int, tokenizer_steps: int, seed: int, precision: str) -> None:
    """Train and measure one choice, unless that is complete."""
    stage1, label, choice = Path(f"runs/{data}"), name.replace(" ", "_"), CHOICES[name]
    if choice.stage1:
        label += f"-tokenizer{tokenizer_steps}"
        stage1 = out / label
    folder = out / f"{label}-steps{steps}-seed{seed}"
    if (folder / "result.json").exists():
        return
    folder.mkdir(exist_ok=True, parents=True)
    if choice.stage1:
        _tokenize(data, stage1, {"trainer.max_steps": tokenizer_steps, **choice.stage1}, precision)
    settings = {
        "seed_everything": seed,
        "trainer.default_root_dir": folder,
        "trainer.max_steps": steps,
        "trainer.precision": precision,
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": False,
        "model.tokenizer": stage1 / "vqvae/checkpoints/last.ckpt",
        "model.compiled": True,
        **SIZE,
        "data.train": stage1 / "tokens/train",
        "data.val": stage1 / "tokens/val",
        "data.buckets": BUCKETS[data],
        **choice.stage2,
    }
    start = time.process_time()
    with without_previous_frame() if name == "without PreviousFrame" else nullcontext():
        main(["fit", f"--config=configs/transformer/{data}.yaml", "--ckpt_path=last", *_flags(settings)])
        seconds = time.process_time() - start
        measured = _measure(data, folder / "transformer/checkpoints/last.ckpt", stage1 / "tokens/val")
    result = {"choice": name, "steps": steps, "seed": seed, "seconds": seconds, **measured}
    write(folder / "result.json", json.dumps(result, indent=1))


def _tokenize(data: str, folder: Path, changes: dict[str, Any], precision: str) -> None:
    """Train a tokenizer and write its tokens, unless they are there."""
    if (folder / "tokens/complete").exists():
        return
    settings = {
        "trainer.default_root_dir": folder,
        "trainer.precision": precision,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "data.train": f"runs/{data}/shards/train",
        "data.val": f"runs/{data}/shards/val",
        **changes,
    }
    for verb in ("fit", "predict"):
        main([verb, f"--config=configs/vqvae/{data}.yaml", "--ckpt_path=last", *_flags(settings)])
    (folder / "tokens/complete").touch()


def _flags(settings: dict[str, Any]) -> list[str]:
    """Return settings as arguments of `cli.py`."""
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


def without_previous_frame() -> AbstractContextManager[Any]:
    """Let the features of the previous frame be zero."""
    features = PreviousFrame.forward
    return patch.object(PreviousFrame, "forward", lambda self, tokens: 0 * features(self, tokens))


@torch.inference_mode()
def _measure(data: str, checkpoint: Path, tokens: Path) -> dict[str, float]:
    """Return the likelihood of held-out clips, and how often their captions are the most likely ones."""
    model = TextToVideo.from_checkpoint(checkpoint)
    videos = ShardSet(f"runs/{data}/shards/val")
    metadata = {sample.key: read_metadata(videos.read(sample, "json")) for sample in videos.samples}
    numbers = range(0, len(metadata), max(1, len(metadata) // _CLIPS))
    loaded = load(tokens, numbers)
    batches = [TokenClips.collate(loaded[start : start + _BATCH]) for start in range(0, len(loaded), _BATCH)]
    nats = [-log_likelihood(model, batch.tokens, batch.text) for batch in batches]
    questions = [(clip.tokens, each) for clip in loaded for each in QUESTIONS[data](metadata[clip.key])]
    embedded = _embed(model, sorted({caption for _, each in questions for caption in each.captions}))
    measured: dict[str, list[float]] = defaultdict(list)
    for clip_tokens, (attribute, captions, frames) in questions:
        text = TokenClips.collate([embedded[caption] for caption in captions]).text
        likelihoods = log_likelihood(model, clip_tokens[None, :frames].expand(len(captions), -1, -1, -1), text)
        posterior = likelihoods.sum(dim=1).double().log_softmax(dim=0)
        measured[attribute].append(float(posterior.argmax() == 0))
        measured[f"{attribute}, nats"].append(-float(posterior[0]))
    per_token = float(torch.cat(nats).mean()) / model.transformer.grid_size**2
    return {"nats": per_token} | {name: mean(each) for name, each in measured.items()}


def _embed(model: TextToVideo, captions: list[str]) -> dict[str, TokenClip]:
    """Return each caption as that of a clip without tokens."""
    none, embedded = torch.zeros(0, dtype=torch.long), {}
    for start in range(0, len(captions), _BATCH):
        some = captions[start : start + _BATCH]
        text = model.embed(some)
        for caption, tokens, mask in zip(some, text.tokens, text.mask, strict=True):
            embedded[caption] = TokenClip(none, tokens[mask], caption, "")
    return embedded


def _print_table(out: Path) -> None:
    """Print the mean over seeds for each choice, and the values of each seed."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    columns, rows = {"choice": "{}", "steps": "{}", "seconds": "{:.0f}", "nats": "{}"}, []
    for name, steps in itertools.product(CHOICES, sorted({each["steps"] for each in results})):
        runs = [each for each in results if (each["choice"], each["steps"]) == (name, steps)]
        if not runs:
            continue
        row = {"choice": name, "steps": steps, "seconds": mean(run["seconds"] for run in runs)}
        row["nats"] = ", ".join(f"{run['nats']:.4f}" for run in runs)
        for attribute in list(runs[0])[5:]:
            columns[attribute] = "{}"
            form = "{:.2f}" if attribute.endswith("nats") else "{:.1%}"
            row[attribute] = ", ".join(form.format(run[attribute]) for run in runs)
        rows.append(row)
    print_table(columns, rows)


if __name__ == "__main__":
    run_tool(compare)
