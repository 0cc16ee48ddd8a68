import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.shards import ShardWriter
from t2v.video import encode_mp4

FINGERPRINT = {"tokenizer": "abc", "size": 32, "fps": 8.0, "text_encoder": "small"}


def frame_indices(video):
    """Return the index that each frame has in `numbered`."""
    return (video.float().mean(dim=(1, 2, 3)) / 8).round().int().tolist()


def numbered(frames, size=32):
    """Return frames of one grey level each: 8 t for frame t."""
    return (torch.arange(frames, dtype=torch.uint8) * 8).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def video_sample(key, frames=6, fps=8.0, size=32):
    mp4 = encode_mp4(numbered(frames, size), fps, crf=4)
    return {"__key__": key, "mp4": mp4, "txt": f"caption of {key}", "json": {"source": key}}


def token_sample(key, frames=6, text_tokens=3, fingerprint=None):
    rng = np.random.default_rng(text_tokens)
    return {
        "__key__": key,
        "tokens.npy": np.arange(frames, dtype=np.uint16)[:, None, None] + np.zeros((1, 2, 2), np.uint16),
        "text.npy": rng.normal(size=(text_tokens, 8)).astype(np.float16),
        "json": {"caption": f"caption of {key}", "fps": 8.0, "fingerprint": fingerprint or FINGERPRINT},
    }


def write_shards(folder, samples, samples_per_shard=4):
    with ShardWriter(folder, samples_per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def damage(folder, key):
    """Overwrite a video's bytes in its shard without a change to the index."""
    for path in folder.glob("*.index.json"):
        entry = json.loads(path.read_text())["samples"].get(key)
        if entry:
            offset, size = entry["members"]["mp4"]
            tar = path.with_name(path.name.replace(".index.json", ".tar"))
            content = tar.read_bytes()
            tar.write_bytes(content[:offset] + b"x" * size + content[offset + size :])
            path.touch()


@pytest.fixture(scope="session")
def make():
    """Functions that make samples and shards."""
    return SimpleNamespace(
        numbered=numbered,
        frame_indices=frame_indices,
        video=video_sample,
        tokens=token_sample,
        shards=write_shards,
        damage=damage,
        fingerprint=FINGERPRINT,
    )


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Ten intact clips in three shards, for tests that only read."""
    return write_shards(tmp_path_factory.mktemp("videos"), [video_sample(f"{i:03d}") for i in range(10)])


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """Six token clips in two shards, for tests that only read."""
    samples = [token_sample(f"{i:03d}", text_tokens=i % 3 + 1) for i in range(6)]
    return write_shards(tmp_path_factory.mktemp("tokens"), samples)
