import numpy as np
import torch

from data.prepare.duplicates import HASH_BITS, HashSearch, perceptual_hash


def distance(one, other):
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def test_copies_have_near_hashes_and_different_clips_far_ones(draw):
    clips = [draw.scene(seed) for seed in range(4)]
    for clip in clips:
        copies = [
            draw.recode(clip, 18),
            draw.recode(clip, 36),
            draw.recode(clip, 23, (48, 64)),
            draw.recode(clip, 23, (144, 192)),
            (clip * 1.05 + 6).clamp(0, 255).byte(),
        ]
        assert max(distance(clip, copy) for copy in copies) <= 16
    apart = [distance(clips[i], clips[j]) for i in range(4) for j in range(i)]
    assert min(apart) > 48
    assert distance(clips[0], clips[0].flip(-1)) > 48


def test_a_clip_with_another_ending_is_no_duplicate(draw):
    clip, other = draw.scene(0), draw.scene(1)
    assert distance(clip, torch.cat([clip[:4], other[4:]])) > 16


def test_hashes_are_deterministic_and_in_range(draw):
    hash_ = perceptual_hash(draw.scene(0))
    assert hash_ == perceptual_hash(draw.scene(0))
    assert 0 < hash_ < 2**HASH_BITS


def test_the_search_equals_an_exhaustive_search():
    rng = np.random.default_rng(0)
    hashes = [int.from_bytes(rng.bytes(HASH_BITS // 8), "big") for _ in range(40)]
    while len(hashes) < 1500:  # the search must grow; the distances are around the largest allowed
        flips = rng.choice(HASH_BITS, rng.integers(0, 16), replace=False)
        hashes.append(hashes[rng.integers(len(hashes))] ^ sum(1 << int(bit) for bit in flips))
    search, seen, answers = HashSearch(6), [], []
    for hash_ in hashes:
        distances = [(hash_ ^ earlier).bit_count() for earlier in seen]
        nearest = min(distances, default=HASH_BITS)
        expected = str(distances.index(nearest)) if nearest <= 6 else None
        assert search.find(hash_) == expected
        answers.append(expected)
        search.add(hash_, str(len(seen)))
        seen.append(hash_)
    assert 200 < answers.count(None) < 1300


def test_distance_zero_finds_equal_hashes_only():
    search = HashSearch(0)
    search.add(5, "a")
    assert search.find(5) == "a"
    assert search.find(4) is None
    assert search.find(5 ^ 1 << 191) is None
