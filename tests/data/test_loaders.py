import subprocess
import sys

import pytest
import torch

from data.datasets import TokenClips, VideoClips
from data.loaders import TrainLoader
from data.plan import Bucket, Plan, TrainSampler
from data.shards import ShardSet
from tests.support.documents import ROOT


def train_loader(clips, num_workers, epoch=0):
    plan = Plan(clips.shard_sizes, 0, clips.buckets, clips.fits)
    return TrainLoader(clips, TrainSampler(plan), lambda: (epoch, 0), 0.0, num_workers)


@pytest.fixture
def clips(make, tmp_path):
    """Function that makes forty clips of a kind, enough for every slot to be used several times."""

    def open_clips(kind, buckets):
        if kind == "video":
            shards = make.shards(tmp_path, [make.video(f"{i:03d}", size=16) for i in range(40)])
            return VideoClips(ShardSet(shards), buckets, fps=8.0)
        shards = make.shards(tmp_path, [make.tokens(f"{i:03d}", text_tokens=i % 5 + 1) for i in range(40)])
        return TokenClips(ShardSet(shards), buckets)

    return open_clips


BUCKETS = {
    "video": [Bucket(4, 2, height=16, width=16), Bucket(2, 3, height=8, width=24)],
    "tokens": [Bucket(4, 2), Bucket(2, 3)],
}


@pytest.mark.parametrize("kind", BUCKETS)
def test_workers_deliver_the_batches_of_one_process(clips, kind):
    clips = clips(kind, BUCKETS[kind])
    expected, loaded = (
        list(train_loader(clips, workers)) for workers in (0, 2)
    )  # all kept, so that a batch in a reused slot would differ
    assert len(loaded) > 12
    assert_same(loaded, expected)
    if kind == "video":
        assert {batch.video.stride() for batch in loaded} == {batch.video.stride() for batch in expected}


def test_an_interrupted_epoch_does_not_affect_the_next(clips):
    clips = clips("tokens", BUCKETS["tokens"])
    expected, loader = list(train_loader(clips, 0)), train_loader(clips, 2)
    for steps in (1, 3, 4):
        for _, batch in zip(range(steps), loader, strict=False):
            assert batch.keys
    assert_same(list(loader), expected)


def test_a_batch_larger_than_its_slot_is_delivered(clips, monkeypatch):
    clips = clips("tokens", BUCKETS["tokens"])
    monkeypatch.setattr(TokenClips, "batch_bytes", 400)
    expected, loader = list(train_loader(clips, 0)), train_loader(clips, 1)
    loaded = list(loader)
    assert {batch.tokens.untyped_storage().nbytes() > batch.tokens.nbytes for batch in loaded} == {True, False}
    assert_same(loaded, expected)


@pytest.mark.parametrize("kind", BUCKETS)
def test_a_slot_holds_the_largest_batch(clips, kind):
    clips = clips(kind, BUCKETS[kind])
    sizes = [sum(t.nbytes for t in tensors(batch)) for batch in train_loader(clips, 0)]
    assert max(sizes) <= clips.batch_bytes <= 8 * max(sizes)  # of which much is headers, at this size


def tensors(batch):
    return [batch.video] if hasattr(batch, "video") else [batch.tokens, *batch.text]


def assert_same(loaded, expected):
    assert [(batch.keys, batch.captions) for batch in loaded] == [(batch.keys, batch.captions) for batch in expected]
    for one, other in zip(loaded, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_texts_of_every_length_are_delivered(clips):
    batches = list(train_loader(clips("tokens", [Bucket(6, 4)]), 1))
    assert {int(n) for batch in batches for n in batch.text.mask.sum(1)} == {1, 2, 3, 4, 5}
    assert all(torch.equal(batch.text.tokens.abs().sum(-1) > 0, batch.text.mask) for batch in batches)


FAILING = """
from torch.utils.data import DataLoader
from data.loaders import _outlive_signals

loader = DataLoader(range(64), num_workers=2, worker_init_fn=_outlive_signals, persistent_workers=True)
batches = iter(loader)
next(batches)
raise RuntimeError("while the workers are there")
"""


@pytest.mark.slow
def test_a_program_that_fails_with_workers_ends():
    run = subprocess.run([sys.executable, "-c", FAILING], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.strip().endswith("RuntimeError: while the workers are there")
