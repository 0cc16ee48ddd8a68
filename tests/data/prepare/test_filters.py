import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.examples.shapes import SIZES, SPEEDS, ShapeClip, render
from data.prepare.filters import (
    HASH_BITS,
    Duplicates,
    Filters,
    clean_caption,
    perceptual_hash,
    refuse_clip,
    refuse_video,
)
from t2v.errors import UserError
from t2v.video import VideoInfo, encode_mp4, read_frames

LIMITS = Filters(min_seconds=1, max_seconds=10, min_height=100, min_fps=5, max_aspect=2)
ASKED = Filters(min_motion=0.5)


def scene(seed, frames=8, height=96, width=128):
    """Something like footage: smooth random blobs over which a camera pans, not far."""
    blobs = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    wide = F.interpolate(blobs, (height, 2 * width), mode="bicubic").clamp(0, 1) * 255
    return torch.cat([wide[..., 2 * t : 2 * t + width] for t in range(frames)]).byte()


def recode(frames, crf, size=None):
    """The clip as it comes out of another encoder run, of another size."""
    if size:
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    return read_frames(encode_mp4(frames, 8, crf), range(len(frames)))


def distance(one, other):
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (VideoInfo(40, 8, 100, 200), None),
        (VideoInfo(8, 8, 200, 100), None),
        (VideoInfo(7, 8, 100, 200), "too short (0.9 s; min_seconds is 1)"),
        (VideoInfo(81, 8, 100, 200), "too long (10.1 s; max_seconds is 10)"),
        (VideoInfo(40, 8, 100, 99), "too small (99x100 pixels; min_height is 100)"),
        (VideoInfo(9, 4.5, 100, 200), "too few frames a second (4.5; min_fps is 5)"),
        (VideoInfo(40, 8, 201, 100), "too wide or too tall (100x201 pixels; max_aspect is 2)"),
    ],
)
def test_a_video_outside_a_limit_is_refused_with_the_reason(info, reason):
    assert refuse_video(info, LIMITS) == reason


def test_a_limit_that_no_footage_can_meet_is_an_error_that_names_all_of_them():
    with pytest.raises(
        UserError, match=r"min_fps=-1 .*min_words=5 is above max_words=4; max_aspect=0.5 .*distance=150"
    ):
        Filters(min_fps=-1, min_words=5, max_words=4, max_aspect=0.5, max_hash_distance=150)


def test_the_defaults_keep_every_kind_of_moving_shape_still_ones_too():
    for colour in ("red", "blue"):
        for direction in ("still", "right"):
            clip = render(ShapeClip(colour, "triangle", direction, min(SIZES), min(SPEEDS), 0, 8))
            assert refuse_clip(clip, Filters()) is None


def test_a_still_clip_is_refused_when_asked_however_it_is_compressed():
    still = scene(0)[:1].expand(8, -1, -1, -1)
    for crf in (18, 28, 40):
        assert refuse_clip(recode(still, crf), ASKED).startswith("near-static (")
        assert refuse_clip(recode(still, crf), Filters()) is None


def test_noise_of_a_sensor_is_no_motion_but_the_slowest_shape_is():
    still = scene(0, height=256, width=256)[:1].expand(8, -1, -1, -1)
    noisy = (still + 3 * torch.randn(still.shape)).clamp(0, 255).byte()
    assert (noisy[1:].float() - noisy[:-1].float()).abs().mean() > 2
    assert refuse_clip(noisy, ASKED).startswith("near-static (")
    slowest = render(ShapeClip("blue", "triangle", "right", "small", "slow", 0, 8))
    assert refuse_clip(recode(slowest, 28), ASKED) is None


def test_one_frame_is_not_refused_for_standing_still():
    assert refuse_clip(scene(0)[:1], ASKED) is None


def test_black_is_refused_and_a_dark_but_visible_clip_is_kept():
    black = (3 * torch.rand(8, 3, 64, 64)).byte()
    assert refuse_clip(black, Filters()).startswith("black (mean grey level ")
    night = black.clone()
    night[:, :, 20:40, 20:40] = 90
    assert refuse_clip(night, Filters()) is None
    assert refuse_clip((scene(0) // 12), Filters()) is None


def test_copies_are_near_and_different_clips_are_far():
    clips = [scene(seed) for seed in range(4)]
    for clip in clips:
        copies = [
            recode(clip, 18),
            recode(clip, 36),
            recode(clip, 23, (48, 64)),
            recode(clip, 23, (144, 192)),
            (clip * 1.05 + 6).clamp(0, 255).byte(),
        ]
        assert max(distance(clip, copy) for copy in copies) <= 16
    apart = [distance(clips[i], clips[j]) for i in range(4) for j in range(i)]
    assert min(apart) > 48
    assert distance(clips[0], clips[0].flip(-1)) > 48


def test_a_clip_that_goes_on_differently_is_not_a_copy():
    clip, other = scene(0), scene(1)
    assert distance(clip, torch.cat([clip[:4], other[4:]])) > 16


def test_a_hash_is_whole_and_the_same_each_time():
    hash_ = perceptual_hash(scene(0))
    assert hash_ == perceptual_hash(scene(0))
    assert 0 < hash_ < 2**HASH_BITS


def test_duplicates_are_found_as_an_exhaustive_search_finds_them():
    rng = np.random.default_rng(0)
    hashes = [int.from_bytes(rng.bytes(HASH_BITS // 8), "big") for _ in range(40)]
    while len(hashes) < 1500:  # more than the first room; near an earlier one, about as far as is allowed
        flips = rng.choice(HASH_BITS, rng.integers(0, 16), replace=False)
        hashes.append(hashes[rng.integers(len(hashes))] ^ sum(1 << int(bit) for bit in flips))
    duplicates, seen, answers = Duplicates(6), [], []
    for hash_ in hashes:
        distances = [(hash_ ^ earlier).bit_count() for earlier in seen]
        nearest = min(distances, default=HASH_BITS)
        expected = str(distances.index(nearest)) if nearest <= 6 else None
        assert duplicates.find(hash_) == expected
        answers.append(expected)
        duplicates.add(hash_, str(len(seen)))
        seen.append(hash_)
    assert 200 < answers.count(None) < 1300


def test_distance_zero_finds_equal_hashes_only():
    duplicates = Duplicates(0)
    duplicates.add(5, "a")
    assert duplicates.find(5) == "a"
    assert duplicates.find(4) is None
    assert duplicates.find(5 ^ 1 << 191) is None


FINE = [
    "A dog runs.",
    "l’été, “quoted”, it's a well-known 'fact' – isn't it?",
    "Ein Mädchen läuft über die Straße",
    "一只红色的猫在跑",
    "собака бежит по снегу",
    "می\u200cروم",
    "a family 👨\u200d👩\u200d👧 waves 🏳️\u200d🌈",
    "x < 5 and y > 3, i <3 you",
    "fish & chips at Q&notes",
    "a 4K TV in a shop that sells stock footage",
    "The HD television (a big one)",
    "#1 fan, 100% happy [laughs]",
    "½ of 5 m² … ™",
]


@pytest.mark.parametrize("caption", FINE)
def test_a_fine_caption_stays_as_it_is(caption):
    assert clean_caption(caption, Filters()) == (caption, None)


@pytest.mark.parametrize(
    ("found", "cleaned"),
    [
        ("  two\n\tlines\u00a0here \r\n", "two lines here"),
        ("AT&amp;T &amp;amp; friends &lt;b&gt;walk&lt;/b&gt; &#128021;", "AT&T & friends walk 🐕"),
        ("<p>A <b>red</b>, big ball</p><p>rolls<br/>away</p>", "A red, big ball rolls away"),
        ('a <a href="http://x.org/?a=1">cat</a> sleeps', "a cat sleeps"),
        ("a cat (https://x.org/a?b=1&amp;c=2) sleeps www.x.org", "a cat sleeps"),
        ("\ufeffze\u200bro\u00ad wi\x00dth \ud83d\u202e", "zero width"),
        ("Cafe\u0301", unicodedata.normalize("NFC", "Cafe\u0301")),
        ("A dog runs, 4K, stock footage.", "A dog runs"),
        ("Aerial view of a city. Royalty-free stock video.", "Aerial view of a city."),
        ("Waves (HD) | Shutterstock", "Waves"),
        ("Stock footage of a red panda", "a red panda"),
        ("4K video: waves at sunset", "waves at sunset"),
    ],
)
def test_what_nobody_says_is_taken_out(found, cleaned):
    assert clean_caption(found, Filters()) == (cleaned, None)


@pytest.mark.parametrize("caption", ["", " \n", "...", "🐕", "https://x.org/video", "<b></b>", "Stock footage"])
def test_what_holds_no_words_is_no_caption(caption):
    assert clean_caption(caption, Filters()) == ("", "no caption")


def test_captions_outside_the_limits_are_refused_with_the_reason():
    filters = Filters(min_words=3, max_words=6)
    assert clean_caption("a dog – !", filters)[1] == "caption too short (2 words; min_words is 3)"
    assert clean_caption("a dog runs and jumps", filters)[1] is None
    assert (
        clean_caption("one two three four five six seven", filters)[1] == "caption too long (7 words; max_words is 6)"
    )
    assert clean_caption("猫在跑", filters)[1] is None
    assert clean_caption("一只红色的猫在跑", filters)[1].startswith("caption too long (8 words")


@pytest.mark.parametrize("part", ["<!--", "<a =", ", 4k", " - ", "(", "&amp;", "stock "])
def test_a_caption_made_to_be_slow_is_not(part):
    clean_caption(part * 20_000, Filters())  # minutes, where a pattern tries every beginning with every end
