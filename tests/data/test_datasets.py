import json
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.datasets import TokenClips, VideoClips, WholeClips
from data.plan import Batch, Bucket, Draw, Plan, TrainSampler
from data.shards import ShardSet
from t2v.errors import UserError
from t2v.video import encode_mp4


def video_clips(shards, size=32, frames=3, fps=8.0, **options):
    return VideoClips(shards, [Bucket(frames, 4, height=size, width=size)], fps, **options)


def token_clips(shards, frames):
    return TokenClips(shards, [Bucket(frames, 4)])


def draw(clips, sample, *seed, bucket=0):
    """Return one clip, as a batch of one."""
    return clips[Batch(bucket, [Draw(sample, seed)])]


def load_whole(clips, index):
    return clips.load(index, clips.buckets[0], rng=None)


def batches(clips, workers=0, epoch=0):
    sampler = TrainSampler(Plan(clips.shard_sizes, 0, clips.buckets, clips.fits))
    sampler.set_epoch(epoch)
    return list(
        DataLoader(clips, batch_size=None, sampler=sampler, collate_fn=lambda batch: batch, num_workers=workers)
    )


def test_a_clip_is_a_random_window_of_consecutive_frames(videos, make):
    clips = video_clips(ShardSet(videos), size=32, frames=4, fps=8.0)
    starts = set()
    for position in range(20):
        clip = draw(clips, 3, 0, 0, position)
        assert (clip.video.shape, clip.video.dtype) == ((1, 4, 3, 32, 32), torch.uint8)
        assert (clip.captions, clip.keys) == ([["caption of 003"]], ["003"])
        first, *rest = make.frame_indices(clip.video[0])
        assert rest == [first + 1, first + 2, first + 3]
        starts.add(first)
    assert starts == {0, 1, 2}


@pytest.mark.parametrize(
    ("stored", "wanted", "whole"),
    [
        (8.0, 8.0, [0, 1, 2, 3, 4, 5]),
        (24.0, 8.0, [0, 3]),
        (16.0, 8.0, [0, 2, 4]),
        (12.0, 8.0, [0, 2, 3, 5]),
        (30.0, 29.97, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_videos_with_another_frame_rate_are_resampled(stored, wanted, whole, make, tmp_path):
    shards = ShardSet(make.shards(tmp_path, [make.video("a", fps=stored)]))
    clips = video_clips(shards, size=32, frames=1, fps=wanted)
    assert make.frame_indices(load_whole(clips, 0).video) == whole


def test_videos_of_another_size_are_resized(make, tmp_path):
    shards = ShardSet(make.shards(tmp_path, [make.video("a", size=48)]))
    clip = video_clips(shards, size=16, frames=6, fps=8.0)
    video = draw(clip, 0, 0, 0, 0).video[0]
    assert video.shape == (6, 3, 16, 16)
    assert make.frame_indices(video) == list(range(6))


def test_workers_load_the_same_batches(videos):
    clips = video_clips(ShardSet(videos), size=32, frames=3, fps=8.0)
    alone, shared = batches(clips), batches(clips, workers=2)
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert one.keys == other.keys
        assert one.video.equal(other.video)


def test_a_corrupt_clip_is_replaced_and_warned_of_once(make, tmp_path):
    folder = make.shards(tmp_path, [make.video(f"{i:03d}") for i in range(8)])
    make.damage(folder, "005")
    shards = ShardSet(folder)
    clips = video_clips(shards, size=32, frames=3, fps=8.0)
    with pytest.warns(UserWarning, match=r"Clip 005 in .*shard-000001.tar is corrupt") as warned:
        first = [batches(clips, epoch=epoch) for epoch in range(3)]
    assert len(warned) == 1
    assert clips.corrupt.nonzero().tolist() == [[5]]
    keys = [key for epoch in first for batch in epoch for key in batch.keys]
    assert len(keys) == 24
    assert "005" not in keys

    again = video_clips(shards, size=32, frames=3, fps=8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = [batches(again, workers=2, epoch=epoch) for epoch in range(3)]
    assert [batch.keys for epoch in second for batch in epoch] == [batch.keys for epoch in first for batch in epoch]
    assert again.corrupt.nonzero().tolist() == [[5]]  # what the workers found


def test_corrupt_clips_in_a_row_stop_the_run(make, tmp_path):
    folder = make.shards(tmp_path, [make.video(key) for key in "abc"])
    for key in "abc":
        make.damage(folder, key)
    clips = video_clips(ShardSet(folder), size=32, frames=3, fps=8.0)
    with pytest.warns(UserWarning, match="corrupt"), pytest.raises(UserError, match="8 clips in a row"):
        draw(clips, 0, 0, 0, 0)


def test_short_clips_are_left_out(make, tmp_path):
    shards = ShardSet(
        make.shards(tmp_path, [make.video("a", frames=5), make.video("b", frames=9), make.video("c", frames=7)])
    )
    with pytest.warns(UserWarning, match="1 of 3 clips .* shorter than 6 frames at 8 fps"):
        clips = video_clips(shards, size=32, frames=6, fps=8.0)
    assert [sample.key for sample in clips.samples] == ["b", "c"]
    with pytest.raises(UserError, match=r"All 3 clips .* shorter than 16 frames at 8 fps \(the longest has 9\)"):
        video_clips(shards, size=32, frames=16, fps=8.0)


def test_whole_clips_of_equal_length_in_a_shard_form_a_batch(make, tmp_path):
    lengths = [6, 9, 6, 6, 6, 6]
    folder = make.shards(tmp_path, [make.video(f"{i}", frames=length) for i, length in enumerate(lengths)])
    make.damage(folder, "4")
    whole = WholeClips(video_clips(ShardSet(folder), size=32, frames=1, fps=8.0), frames=17)
    with pytest.warns(UserWarning, match="Clip 4"):
        loaded = [whole[number] for number in range(len(whole))]
    assert [batch.keys for batch in loaded] == [["0", "2"], ["3"], ["1"], ["5"]]
    assert [batch.video.shape[1] for batch in loaded] == [6, 6, 9, 6]


def test_a_whole_clip_longer_than_a_batch_forms_its_own(videos):
    clips = video_clips(ShardSet(videos), size=32, frames=1, fps=8.0)
    assert WholeClips(clips, frames=5).batches == [[index] for index in range(10)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_ranks_get_equally_many_batches_of_whole_clips(videos, ranks):
    whole = WholeClips(video_clips(ShardSet(videos), size=32, frames=1, fps=8.0), frames=12, ranks=ranks)
    assert len(whole) % ranks == 0
    assert [index for batch in whole.batches for index in batch] == list(range(10))
    assert all(whole[number] is None for number, batch in enumerate(whole.batches) if not batch)


def ramp_sample(key, caption="", height=48, width=80):
    """Return a video whose even frames get brighter to the right, odd ones downwards, by two levels a pixel."""
    across, down = (
        2 * torch.arange(width).expand(height, width),
        2 * torch.arange(height)[:, None].expand(height, width),
    )
    video = torch.stack([across, down] * 3)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    return {"__key__": key, "mp4": encode_mp4(video, fps=8.0, crf=0), "txt": caption}


def edges(ramp):
    """Return the first and the last pixel of the video that a row of a ramp shows, and how many it shows."""
    first, last = float(ramp[0]) / 2, float(ramp[-1]) / 2
    return min(first, last), max(first, last), abs(last - first) * len(ramp) / (len(ramp) - 1)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory, make):
    """Clips whose pixels tell which part of the picture they are."""
    captions = ["a bright ball", "it moves LEFT.", "a right-handed man", "a cube drifts rightwards"]
    return make.shards(tmp_path_factory.mktemp("ramps"), [ramp_sample(f"{i}", text) for i, text in enumerate(captions)])


def test_a_training_clip_shows_a_random_square_of_the_picture(ramps):
    clips = video_clips(ShardSet(ramps), size=24, frames=4, fps=8.0, crop=0.5)
    lefts, tops, sides = [], [], []
    for position in range(60):
        video = draw(clips, 0, 0, 0, position).video[0].float().mean(1)  # (t, h, w)
        assert video.shape == (4, 24, 24)
        assert (video[0] - video[2]).abs().max() < 6  # the same square in every frame
        assert (video[1] - video[3]).abs().max() < 6
        frames = video[:2] if edges(video[0, 0])[2] > edges(video[0, :, 0])[2] else video[:2].flip(0)
        left, right, wide = edges(frames[0, 12])
        top, bottom, high = edges(frames[1, :, 12])
        assert 23 < wide < 50
        assert wide == pytest.approx(high, abs=3)  # a square, so it is within the picture
        lefts, tops, sides = [*lefts, left], [*tops, top], [*sides, wide]
        assert right < 80
        assert bottom < 48
    assert min(sides) < 28
    assert max(sides) > 44
    assert min(lefts) < 6
    assert max(lefts) > 40
    assert min(tops) < 4
    assert max(tops) > 15


def test_half_of_the_clips_are_mirrored_except_those_whose_caption_names_a_side(ramps):
    plain = video_clips(ShardSet(ramps), size=24, frames=6, fps=8.0)
    clips = video_clips(ShardSet(ramps), size=24, frames=6, fps=8.0, flip=True)
    mirrored = [0] * 4
    for sample in range(4):
        for position in range(40):
            one, other = (draw(some, sample, 0, 0, position).video for some in (clips, plain))
            if not one.equal(other):
                assert one.flip(-1).equal(other)
                mirrored[sample] += 1
    assert 12 <= mirrored[0] <= 28
    assert mirrored[1:] == [0, 0, 0]


def test_augmentation_depends_only_on_seed_epoch_and_position(ramps):
    def video(*seed):
        return draw(video_clips(ShardSet(ramps), size=24, frames=6, fps=8.0, crop=0.5, flip=True), 0, *seed).video

    assert video(1, 2, 3).equal(video(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not video(1, 2, 3).equal(video(*other))
    clips = video_clips(ShardSet(ramps), size=24, frames=2, fps=8.0, crop=0.5, flip=True)
    (alone,), (shared,) = batches(clips), batches(clips, workers=2)
    assert alone.video.equal(shared.video)


def test_whole_clips_are_not_augmented(ramps):
    plain = video_clips(ShardSet(ramps), size=24, frames=1, fps=8.0)
    clips = video_clips(ShardSet(ramps), size=24, frames=1, fps=8.0, crop=0.5, flip=True)
    assert all(load_whole(clips, i).video.equal(load_whole(plain, i).video) for i in range(4))


def test_crops_that_must_be_enlarged_are_warned_of(ramps):
    with pytest.warns(UserWarning, match=r"data\.crop=0\.5 .* down to 24 pixels .* data\.size=32: .* --size 64"):
        video_clips(ShardSet(ramps), size=32, frames=1, fps=8.0, crop=0.5)


def test_token_clips_have_tokens_and_padded_text(tokens, make):
    clips = token_clips(ShardSet(tokens), frames=4)
    batch = clips[Batch(0, [Draw(index, (0, 0, index)) for index in range(6)])]
    assert (batch.tokens.shape, batch.tokens.dtype) == ((6, 4, 2, 2), torch.int64)
    steps = batch.tokens[:, :, 0, 0]
    assert (steps.diff(dim=1) == 1).all()
    assert batch.captions[2] == "caption of 002"

    assert (batch.text.tokens.shape, batch.text.tokens.dtype) == ((6, 3, 8), torch.float32)
    assert batch.text.mask.sum(dim=1).tolist() == [1, 2, 3, 1, 2, 3]
    assert not batch.text.tokens[~batch.text.mask].any()
    expected = make.tokens("001", text_tokens=2)
    np.testing.assert_array_equal(batch.text.tokens[1, :2], expected["text.npy"])


def test_windows_of_longer_clips_differ_between_epochs_and_repeat_in_another_run(tokens):
    def starts(epoch, workers=0):
        loaded = batches(token_clips(ShardSet(tokens), frames=2), workers, epoch)  # of clips of 6 frames
        return {key: int(clip[0, 0, 0]) for batch in loaded for key, clip in zip(batch.keys, batch.tokens, strict=True)}

    epochs = [starts(epoch) for epoch in range(12)]
    assert {start for epoch in epochs for start in epoch.values()} == {0, 1, 2, 3, 4}
    assert all(len({epoch[key] for epoch in epochs if key in epoch}) > 1 for key in epochs[0])
    assert [starts(epoch, workers=2) for epoch in range(2)] == epochs[:2]


def test_token_clips_without_text_are_skipped(make, tmp_path):
    sample = make.tokens("a")
    del sample["text.npy"]
    shards = ShardSet(make.shards(tmp_path, [sample, make.tokens("b")]))
    with pytest.warns(UserWarning, match=r"1 samples .* such as 'a' in .*: it has no text\.npy"):
        clips = token_clips(shards, frames=2)
    assert [sample.key for sample in clips.samples] == ["b"]
    assert [(bad.key, bad.reason) for bad in clips.skipped] == [("a", "it has no text.npy")]


def test_each_epoch_takes_one_of_several_captions(make, tmp_path):
    sample = make.tokens("a", text_tokens=6)
    sample["json"] |= {"captions": ["one", "two words", "three words now"], "text_lengths": [1, 2, 3]}
    clips = token_clips(ShardSet(make.shards(tmp_path, [sample])), frames=2)
    seen = set()
    for epoch in range(20):
        batch = draw(clips, 0, 0, epoch, 0)
        i = sample["json"]["captions"].index(batch.captions[0])
        start = sum([1, 2, 3][:i])
        np.testing.assert_array_equal(batch.text.tokens[0], sample["text.npy"][start : start + i + 1])
        assert draw(clips, 0, 0, epoch, 0).captions == batch.captions
        seen.add(i)
    assert seen == {0, 1, 2}


def test_a_video_clip_has_all_captions_of_its_sample(make, tmp_path):
    several = {**make.video("a"), "json": {"captions": ["caption of a", "another"]}}
    other = {**make.video("b"), "json": {"caption": "only in json"}}
    clips = video_clips(ShardSet(make.shards(tmp_path, [several, other])))
    assert load_whole(clips, 0).captions == ["caption of a", "another"]
    assert load_whole(clips, 1).captions == ["caption of b"]


def test_buckets_set_length_and_size_of_clips(make, tmp_path):
    shards = make.shards(tmp_path, [make.video("a", frames=4, size=48), make.video("b", frames=12, size=48)])
    buckets = [Bucket(3, 2, height=16, width=16), Bucket(8, 1, height=16, width=32)]
    clips = VideoClips(ShardSet(shards), buckets, fps=8.0)
    assert clips.fits.tolist() == [[True, False], [True, True]]
    assert draw(clips, 0, 0, 0, 0).video.shape == (1, 3, 3, 16, 16)
    wide = draw(clips, 1, 0, 0, 0, bucket=1)
    assert wide.video.shape == (1, 8, 3, 16, 32)
    first, *rest = make.frame_indices(wide.video[0])
    assert rest == list(range(first + 1, first + 8))


def test_windows_can_start_at_the_first_frame(tokens):
    clips = TokenClips(ShardSet(tokens), [Bucket(2, 4, start="first")])
    assert all(draw(clips, 0, 0, 0, position).tokens[0, :, 0, 0].tolist() == [0, 1] for position in range(5))


def test_a_corrupt_clip_is_replaced_by_one_that_is_long_enough(make, tmp_path):
    folder = make.shards(tmp_path, [make.video(f"{i}", frames=12 if i in (0, 5) else 4) for i in range(8)])
    make.damage(folder, "0")
    buckets = [Bucket(3, 2, height=32, width=32), Bucket(8, 1, height=32, width=32)]
    clips = VideoClips(ShardSet(folder), buckets, fps=8.0)
    with pytest.warns(UserWarning, match="Clip 0"):
        assert {draw(clips, 0, 0, 0, position, bucket=1).keys[0] for position in range(5)} == {"5"}


def test_skipped_samples_are_listed_once(make, tmp_path):
    folder = make.shards(tmp_path / "shards", [make.video(f"{i}") for i in range(4)])
    make.damage(folder, "2")
    listed = tmp_path / "run/skipped_samples.jsonl"
    for _ in range(2):  # a run, and the same run resumed
        clips = video_clips(ShardSet(folder), skipped_samples=listed)
        with pytest.warns(UserWarning, match="Clip 2"):
            batches(clips)
        batches(clips, epoch=1)
        assert int(clips.failures) == 2
    (line,) = listed.read_text().splitlines()
    row = json.loads(line)
    assert (row["key"], row["shard"]) == ("2", str(folder / "shard-000000.tar"))
    assert row["reason"]


def test_shards_of_the_other_stage_are_refused(videos):
    with pytest.raises(UserError, match=r"has a tokens\.npy; they have json, mp4, txt"):
        token_clips(ShardSet(videos), frames=2)
