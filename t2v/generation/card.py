"""The model card of an exported folder: what the model is, what it was trained on, and how to use it.

It begins with the metadata of Hugging Face's Hub: https://huggingface.co/docs/hub/model-cards
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

if TYPE_CHECKING:
    import t2v.generation.text_to_video

CARD = "README.md"


def training_record(checkpoint: Mapping[str, Any], path: Path) -> dict[str, str | int | float]:
    """Return what a checkpoint of stage 2, and the report of `test` in its run's folder, say about its training.

    Args:
        checkpoint: Its content.
        path: The file or folder; the report is `test.json` in the folder above `checkpoints`. It is used only if it is
            about this step of this data.
    """
    data = checkpoint.get("datamodule_hyper_parameters") or {}
    arguments, fingerprint = checkpoint.get("hyper_parameters") or {}, checkpoint.get("fingerprint") or {}
    record: dict[str, str | int | float] = {
        "training data": _names_of(data.get("train")),
        "frames of a training clip": data.get("frames") or "",
        "optimizer steps": checkpoint.get("global_step") or "",
        "clips in a batch, per device": data.get("batch_size") or "",
        "optimizer": str((arguments.get("optimizer") or {}).get("class_path", "")).rpartition(".")[2],
        "weights": "moving average over the steps" if "current_model_state" in checkpoint else "",
    }
    report: Any = {}
    try:
        report = json.loads((path.absolute().parent.parent / "test.json").read_text(encoding="utf-8"))
        measured = report["protocol"]["step"], report["protocol"]["model"]
        if measured == (checkpoint.get("global_step"), fingerprint):
            figures = {name: float(value) for name, value in report["metrics"].items() if value is not None}
            record |= {name: value for name, value in figures.items() if math.isfinite(value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is no report, or one of another kind
    return {name: value for name, value in record.items() if value != ""}


def _names_of(data: Any) -> str:
    """Return the last folders of the paths of training data, since a card is read by others."""
    if isinstance(data, Mapping):
        return _names_of(list(data))
    if isinstance(data, Sequence) and not isinstance(data, str):
        return ", ".join(filter(None, map(_names_of, data)))
    parts = data.split("/") if isinstance(data, str) else []
    return "/".join([part for part in parts if part and not part.endswith(":")][-3:])


def model_card(model: "t2v.generation.text_to_video.TextToVideo", name: str) -> ModelCard:
    """Return the model card.

    Args:
        model: The model.
        name: Folder or repository, such as "user/name".
    """
    vqvae = model.vqvae
    facts = {
        "size": f"{vqvae.image_size}×{vqvae.image_size} pixels, {model.fps:g} frames per second",
        "length": f"{model.frames} frames by default",
        "transformer": f"{_millions(model.transformer)} M parameters",
        "VQ-VAE": f"{_millions(vqvae)} M parameters, {vqvae.codebook_size:,} codes, "
        f"{vqvae.grid_size}×{vqvae.grid_size} tokens a frame",
        "text encoder": model.text_encoder.name,
    }
    training = model.training
    prompts = [" ".join(prompt.split()) for prompt in model.prompts]
    tags = ["text-to-video", "video-generation", "vq-vae", "autoregressive"]
    widget: dict[str, Any] = {"widget": [{"text": prompt} for prompt in prompts]} if prompts else {}
    header = ModelCardData(library_name="t2v", pipeline_tag="text-to-video", tags=tags, **widget)
    figures = {key: f"{value:.4g}" for key, value in training.items() if "/" in key and isinstance(value, float)}
    trained = {key: value for key, value in training.items() if key not in figures}
    example = next(iter(prompts), "a prompt like the captions of the training data")
    shown = "\n".join(f"    {prompt}" for prompt in prompts) or "None were recorded."
    return ModelCard(
        f"""---
{header.to_yaml()}
---

# {name.rpartition("/")[2]}

Generates videos from text: a transformer predicts the tokens of a video one after the other, and a VQ-VAE decodes them.

{_table(facts)}

## Training

{_table(trained) or "Not recorded."}

## Figures

{_table(figures) or "Not recorded. `python cli.py test` measures them; `python -m t2v export` then writes them here."}

## Example prompts

{shown}

## Use

```sh
python -m t2v generate {shlex.quote(name)} {shlex.quote(example)} -o video.mp4
python -m t2v app {shlex.quote(name)}
```

```python
from t2v import TextToVideo
from t2v.video import write_mp4

model = TextToVideo.from_pretrained({json.dumps(name)})
videos = model.generate({json.dumps(example, ensure_ascii=False)}, seed=0)
write_mp4("video.mp4", videos[0], model.fps)
```

## Licence

Not stated. Who publishes the model states it here, and as `license:` in the header of this file.
"""
    )


def _table(rows: Mapping[str, str | int | float]) -> str:
    if not rows:
        return ""
    lines = [f"| {key} | {f'{value:,}' if isinstance(value, int) else value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f}"
