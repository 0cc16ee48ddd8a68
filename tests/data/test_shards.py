import gzip
import io
import os
import re
import struct
import tarfile
import time
import tracemalloc
from fractions import Fraction

import av
import fsspec
import pytest
import torch

from data.shards import ShardSet, ShardWriter
from t2v.errors import UserError
from t2v.video import encode_mp4, probe
from tests.data import corpus
from tests.support import forked
from tests.support.corpus import corrupted_corpus


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def video2dataset_tar(samples):
    """Return a tar as other tools write it: with extra members and without an index."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for sample in samples:
            for name in ("mp4", "txt", "json", "jpg"):
                content = sample.get(name, "{}")
                content = content if isinstance(content, bytes) else str(content).encode()
                member = tarfile.TarInfo(f"{sample['__key__']}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def tar_of(path, *members, kind=tarfile.USTAR_FORMAT):
    """Write a tar of members (name, content); a type instead of the content for links, devices and folders."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
                member.type, member.linkname = content, "a.txt"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def keys(shards):
    return [sample.key for sample in shards.samples]


def skipped(shards):
    """Return key and reason of the skipped samples."""
    return [(sample.key, sample.reason) for sample in shards.skipped]


def test_shards_are_read_as_written(videos, make):
    shards = ShardSet(videos)
    assert [sample.key for sample in shards.samples] == [f"{i:03d}" for i in range(10)]
    assert names(videos) == [f"shard-00000{i}.{end}" for i in range(3) for end in ("index.json", "tar")]
    for sample in shards.samples:
        assert (sample.frames, sample.fps, sample.height, sample.width) == (6, 8, 32, 32)
        expected = make.video(sample.key)
        assert shards.read(sample, "mp4", "txt") == {"mp4": expected["mp4"], "txt": expected["txt"].encode()}


def test_webdataset_reads_our_shards(videos):
    import webdataset

    samples = list(webdataset.WebDataset(f"{videos}/shard-000000.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000", "001", "002", "003"]
    assert samples[0]["txt"] == b"caption of 000"


def test_equal_samples_give_equal_bytes(videos, make, tmp_path):
    again = make.shards(tmp_path, [make.video(f"{i:03d}") for i in range(10)])
    for name in names(videos):
        assert (again / name).read_bytes() == (videos / name).read_bytes()


def test_a_path_can_be_one_tar_or_a_pattern(videos):
    assert len(ShardSet(videos / "shard-000002.tar")) == 2
    assert len(ShardSet(f"{videos}/shard-00000[12].tar")) == 6
    assert keys(ShardSet(f"{videos}/shard-{{000002,000000}}.tar")) == ["008", "009", "000", "001", "002", "003"]
    assert len(ShardSet(f"{videos}/shard-00000{{1..2}}.*")) == 6


def test_the_index_has_the_shape_of_tokens(tokens):
    sample = ShardSet(tokens).samples[0]
    assert (sample.frames, sample.height, sample.width) == (6, 2, 2)


def test_shards_of_other_tools_are_indexed(make, tmp_path):
    samples = [
        make.video("00012", frames=9, fps=25.0, size=48),
        {"__key__": "00013", "mp4": b"broken"},
        make.video("00014"),
    ]
    (tmp_path / "00000.tar").write_bytes(video2dataset_tar(samples))
    shards = ShardSet(tmp_path)
    assert [sample.key for sample in shards.samples] == ["00012", "00013", "00014"]
    assert [sample.frames for sample in shards.samples] == [9, 0, 6]
    assert [bool(sample.reason) for sample in shards.samples] == [False, True, False]
    assert shards.samples[0].fps == 25
    assert shards.read(shards.samples[2], "json", "mp4")["mp4"] == samples[2]["mp4"]
    assert names(tmp_path) == ["00000.index.json", "00000.tar"]
    assert ShardSet(tmp_path).samples == shards.samples  # from the stored index


def test_an_index_older_than_its_tar_is_remade(make, tmp_path):
    make.shards(tmp_path, [make.video("a")])
    path = tmp_path / "shard-000000.tar"
    size = path.stat().st_size
    path.write_bytes(video2dataset_tar([make.video("b")]))
    assert path.stat().st_size == size
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert [sample.key for sample in ShardSet(tmp_path).samples] == ["b"]


def test_a_missing_member_is_left_out(videos):
    shards = ShardSet(videos)
    assert shards.read(shards.samples[0], "tokens.npy") == {}


def test_an_exception_removes_the_incomplete_shard(make, tmp_path):
    def write():
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for key in "abc":
                writer.write(make.tokens(key))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == ["shard-000000.index.json", "shard-000000.tar"]
    assert len(ShardSet(tmp_path)) == 2


def test_a_killed_writer_leaves_no_shard(tmp_path):
    script = (
        "import os, sys; from data.shards import ShardWriter\n"
        "with ShardWriter(sys.argv[1]) as writer:\n"
        "    writer.write({'__key__': 'a', 'txt': 'text'}); os._exit(9)"
    )
    assert forked.run("-c", script, tmp_path).returncode == 9
    assert not list(tmp_path.glob("[!.]*"))
    with pytest.raises(UserError, match="No shards"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("key", ["", "clip.v2"])
def test_keys_that_cannot_be_read_back_are_refused(key, tmp_path):
    with pytest.raises(ValueError, match="dot"), ShardWriter(tmp_path) as writer:
        writer.write({"__key__": key, "txt": "text"})


@pytest.mark.parametrize("path", ["", "none", "none/*.tar", "none.tar", "shard-{0..1}.tar"])
def test_missing_shards_are_reported(path, tmp_path):
    with pytest.raises(UserError, match=r"No shards \(\*\.tar\) in"):
        ShardSet(tmp_path / path)


@pytest.mark.parametrize("path", ["nowhere://clips", "shard-{0..1.tar"])
def test_invalid_addresses_are_reported(path):
    with pytest.raises(UserError, match="correct the address"):
        ShardSet(path)


@pytest.mark.parametrize("content", [b"no tar" * 200, b""])
def test_a_file_that_is_not_a_tar_is_reported(content, tmp_path):
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"00000\.tar"):
        ShardSet(tmp_path)


def test_corrupt_and_skipped_samples_of_a_corrupted_corpus(tmp_path):
    shards = ShardSet(corrupted_corpus(tmp_path, good=2)[0])
    assert keys(shards)[-3:] == ["texts-behind", "names-0", "names-1"]
    corrupt = {sample.key: sample.reason for sample in shards.samples if not sample.frames}
    assert list(corrupt) == ["truncated", "truncated-head", "zero", "text"]
    assert all("truncated" in corrupt[key] for key in ("truncated", "truncated-head"))
    assert all("Invalid data" in corrupt[key] for key in ("zero", "text"))
    assert [(sample.key, sample.shard.rpartition("/")[-1]) for sample in shards.skipped] == [
        ("twice", "clips-00001.tar"),
        *((key, "clips-00002.tar") for key in ("../escape", "/absolute", "link", "cut")),
    ]
    assert "truncated" in shards.skipped[-1].reason
    again = ShardSet(tmp_path)
    assert (again.samples, again.skipped) == (shards.samples, shards.skipped)  # from the stored index
    first = next(sample for sample in shards.samples if sample.key == "twice")
    assert shards.read(first, "txt") == {"txt": b"a caption"}


def remux(mp4, skip=0, **options):
    """Return the same packets in a new container; the first `skip` frames are before its start and not shown."""
    file = io.BytesIO()
    with av.open(io.BytesIO(mp4)) as source, av.open(file, "w", format="mp4", options=options) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts -= skip * packet.duration
                packet.dts -= skip * packet.duration
                packet.stream = stream
                copy.mux(packet)
    return file.getvalue()


def vp9(frames):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libvpx-vp9", rate=8, options={"cpu-used": "8"})
        stream.height, stream.width = frames.shape[-2:]
        for frame in frames.permute(0, 2, 3, 1).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def test_the_index_describes_a_video_as_a_probe_of_the_whole_file(tmp_path):
    frames = torch.randint(0, 256, (12, 3, 64, 96), dtype=torch.uint8)
    mp4 = encode_mp4(frames, fps=8.0)
    longer = encode_mp4(frames.repeat(3, 1, 1, 1), fps=8.0)
    corpus.timed(tmp_path / "uneven.mp4", corpus.UNEVEN, options=corpus.B_FRAMES)
    corpus.steady(tmp_path / "ntsc.mp4", fps=Fraction(30000, 1001), options=corpus.B_FRAMES)
    corpus.encode(tmp_path / "turned.mp4", [corpus.card()] * 3, matrix=corpus.MATRICES["right"])
    corpus.encode(tmp_path / "wide.mp4", [corpus.card()] * 3, ratio=(2, 1))
    videos = {
        "front": mp4,
        "behind": remux(mp4),
        "longer": longer,
        "fragments": remux(mp4, movflags="frag_keyframe+empty_moov"),
        "cut": remux(mp4, skip=5, avoid_negative_ts="disabled", use_editlist="1"),
        "vp9": vp9(frames),
        **{path.stem: path.read_bytes() for path in tmp_path.glob("*.mp4")},
    }
    members = [(f"{name}-{copy}.mp4", content) for copy in range(2) for name, content in videos.items()]
    tar_of(tmp_path / "0.tar", *members)  # of the second copy only the tables are read
    found = {
        sample.key: (sample.frames, sample.fps, sample.height, sample.width) for sample in ShardSet(tmp_path).samples
    }
    assert found == {f"{name}-{copy}": tuple(probe(videos[name])) for name in videos for copy in range(2)}
    assert found["front-1"] == found["behind-1"] == (12, 8, 64, 96)
    assert found["longer-1"][0] == 36


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_are_indexed(kind, tmp_path):
    """Among ordinary members: times in fractions, long names, not only ASCII, folders, other extended headers."""
    stems = ["a", "ä" * 30, "f/b", f"{'folder/' * 18}c", "d", "e" * (90 if kind == tarfile.USTAR_FORMAT else 120), "g"]
    with tarfile.open(tmp_path / "0.tar", "w", format=kind) as tar:
        for number, stem in enumerate(stems):
            member = tarfile.TarInfo(stem.rpartition("/")[0] or "folder")
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
            for extension in ("cls", "txt"):
                member = tarfile.TarInfo(f"{stem}.{extension}")
                member.mtime, member.uname = number + 0.5 * (kind == tarfile.PAX_FORMAT), "ö" * (number % 2)
                if stem == "d" and kind == tarfile.PAX_FORMAT:
                    member.pax_headers = {"comment": "path=x\n9 path"}
                content = f"{extension} of {stem}".encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shards = ShardSet(tmp_path)
    assert keys(shards) == stems
    assert not shards.skipped
    for sample in shards.samples:
        assert shards.read(sample, "cls", "txt") == {
            name: f"{name} of {sample.key}".encode() for name in ("cls", "txt")
        }


def test_another_tar_of_the_same_size_under_the_old_name(tmp_path):
    path = tar_of(tmp_path / "0.tar", ("a.txt", b"x" * 100), ("b.txt", b"y" * 300))
    before = ShardSet(tmp_path)
    other = tar_of(tmp_path / "other", ("a.txt", b"x" * 300), ("b.txt", b"y" * 100))
    os.utime(other, (1, 1))
    assert other.stat().st_size == path.stat().st_size
    other.replace(path)
    with pytest.raises(ValueError, match="no longer the one that was indexed"):
        before.read(before.samples[1], "txt")
    after = ShardSet(tmp_path)
    assert after.read(after.samples[1], "txt") == {"txt": b"y" * 100}


def test_a_large_video_is_indexed_in_little_memory(tmp_path):
    mp4 = encode_mp4(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 8)
    at, more = mp4.index(b"mdat") - 4, 2**25
    large = mp4[:at] + struct.pack(">I", len(mp4) - at + more) + mp4[at + 4 :] + bytes(more)
    tar_of(tmp_path / "0.tar", ("a.mp4", large), ("b.mp4", mp4))
    tracemalloc.start()
    samples = ShardSet(tmp_path).samples
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples[0].frames == samples[1].frames == 4
    assert peak < more / 4


def samples_of(*names):
    return [
        (f"{name}.{extension}", f"{extension} of {name}".encode()) for name in names for extension in ("cls", "txt")
    ]


def test_a_tar_after_the_end_of_another_is_reported(tmp_path):
    first, second = (tar_of(tmp_path / f"{name}.tar", *samples_of(name)).read_bytes() for name in "ab")
    (tmp_path / "a.tar").unlink()
    (tmp_path / "b.tar").write_bytes(first + second)
    shards = ShardSet(tmp_path)
    assert keys(shards) == ["a"]
    assert ["data after its end mark" in bad.reason for bad in shards.skipped] == [True]


@pytest.mark.parametrize("size", range(0, 7 * 512 + 1, 128))
def test_a_tar_truncated_anywhere(size, tmp_path):
    """Each member is a block of header and a block of content: a, b and c with two members each."""
    path = tar_of(tmp_path / "0.tar", *samples_of("a", "b", "c"))
    path.write_bytes(path.read_bytes()[: 4 * 512 + size])  # after all of a
    shards = ShardSet(tmp_path)
    complete = [key for key, end in (("a", 0), ("b", 3 * 512 + 8), ("c", 7 * 512 + 8)) if size >= end]
    assert keys(shards) == complete
    starts = [("b", 512), ("c", 5 * 512)]
    named = [key for key, start in starts if size >= start and key not in complete]
    assert [bad.key for bad in shards.skipped] == (named or [""])
    assert all("truncated" in bad.reason for bad in shards.skipped)


@pytest.mark.parametrize("position", [0, 100, 148, 300])
@pytest.mark.parametrize(("member", "complete", "named"), [(2, "a", ""), (3, "a", "b"), (4, "ab", "")])
def test_a_tar_with_a_damaged_header(position, member, complete, named, tmp_path):
    path = tar_of(tmp_path / "0.tar", *samples_of("a", "b", "c"))
    content = bytearray(path.read_bytes())
    content[member * 1024 + position : member * 1024 + position + 4] = b"\xff\xfe\xfd\xfc"
    path.write_bytes(content)
    shards = ShardSet(tmp_path)
    assert keys(shards) == list(complete)
    assert [bad.key for bad in shards.skipped] == [named]
    assert "damaged" in shards.skipped[0].reason


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("/etc/b.txt", b"x", "leads out"),
        ("../b.txt", b"x", "leads out"),
        ("clips/../../b.txt", b"x", "leads out"),
        ("..\\b.txt", b"x", "leads out"),
        ("C:\\b.txt", b"x", "leads out"),
        ("/etc/passwd", b"x", "leads out"),
        ("b.txt", tarfile.SYMTYPE, "is a link"),
        ("b.txt", tarfile.LNKTYPE, "is a link"),
        ("b.txt", tarfile.CHRTYPE, "is a device"),
        ("b\udcff.txt", b"x", "not UTF-8"),
    ],
)
def test_members_that_must_not_be_read_are_skipped(name, kind, reason, tmp_path):
    tar_of(tmp_path / "0.tar", *samples_of("a"), (name, kind), *samples_of("c"))
    shards = ShardSet(tmp_path)
    assert keys(shards) == ["a", "c"]
    ((key, why),) = skipped(shards)
    assert reason in why
    key.encode()  # can be written to a file
    assert key.rpartition("/")[-1].rpartition("\\")[-1].startswith(("b", "passwd"))


def test_members_without_an_extension_are_ignored(tmp_path):
    tar_of(
        tmp_path / "0.tar",
        ("clips", tarfile.DIRTYPE),
        ("README", b"x"),
        ("clips/.hidden", b"x"),
        *samples_of("clips/a"),
    )
    shards = ShardSet(tmp_path)
    assert keys(shards) == ["clips/a"]
    assert shards.skipped == []


def test_members_of_a_sample_may_be_far_apart(tmp_path):
    far = b"x" * 2**21
    tar_of(tmp_path / "0.tar", ("a.cls", b"11"), ("b.cls", b"22"), ("c.bin", far), ("b.txt", b"two"), ("a.txt", b"one"))
    shards = ShardSet(tmp_path)
    assert keys(shards) == ["a", "b", "c"]
    assert [shards.read(sample, "cls", "txt") for sample in shards.samples[:2]] == [
        {"cls": b"11", "txt": b"one"},
        {"cls": b"22", "txt": b"two"},
    ]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(kind, tmp_path):
    long = "clips/" + "ä" * 150
    tar_of(tmp_path / "0.tar", *samples_of("a", long, "b"), kind=kind)
    shards = ShardSet(tmp_path)
    assert keys(shards) == ["a", long, "b"]
    assert shards.read(shards.samples[1], "txt") == {"txt": f"txt of {long}".encode()}
    assert shards.skipped == []


def test_shards_of_webdataset_are_read(make, tmp_path):
    import webdataset

    with webdataset.ShardWriter(f"{tmp_path}/%05d.tar", maxcount=2, verbose=0) as writer:
        for key in "abc":
            writer.write(make.video(key))
    shards = ShardSet(f"{tmp_path}/{{00000..00001}}.tar")
    assert [(sample.key, sample.frames) for sample in shards.samples] == [("a", 6), ("b", 6), ("c", 6)]
    assert shards.read(shards.samples[2], "txt") == {"txt": b"caption of c"}


def test_an_index_of_an_earlier_version_is_remade(make, tmp_path):
    make.shards(tmp_path, [make.tokens("a")])
    path = tmp_path / "shard-000000.index.json"
    index = path.read_text()
    path.write_text(re.sub('"version": [0-9]+', '"version": 2', index).replace('"a"', '"z"'))
    assert keys(ShardSet(tmp_path)) == ["a"]
    assert path.read_text() == index


def test_a_repeated_key_starts_the_next_shard(make, tmp_path):
    make.shards(tmp_path, [{"__key__": key, "txt": key} for key in "abcabdd"])
    shards = ShardSet(tmp_path)
    assert [(sample.key, sample.shard[-5]) for sample in shards.samples] == list(zip("abcabdd", "0001112", strict=True))
    assert shards.skipped == []


def test_a_shard_that_has_become_shorter_is_reported(make, tmp_path):
    shards = ShardSet(make.shards(tmp_path, [make.tokens("a")]))
    os.truncate(tmp_path / "shard-000000.tar", 600)
    with pytest.raises(OSError, match="has become shorter"):
        shards.read(shards.samples[0], "tokens.npy")


def test_several_paths_compressed_tars_and_one_that_is_none(make, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, key in (("one", "a"), ("two", "b"), ("three", "c")):
        make.shards(tmp_path / name, [make.video(key)])
    one, two, three = (tmp_path / name / "shard-000000.tar" for name in ("one", "two", "three"))
    compressed = tmp_path / "two.tgz"
    compressed.write_bytes(gzip.compress(two.read_bytes()))
    three.with_name("zero.tar").touch()
    assert keys(ShardSet(f"{one}::{two}")) == ["a", "b"]
    assert keys(ShardSet(f"{one}::{tmp_path}/{{two,three}}/shard-000000.tar")) == ["a", "b", "c"]
    shards = ShardSet([one, compressed, three.parent])
    assert keys(shards) == ["a", "b", "c"]
    assert [shards.sources[sample.shard] for sample in shards.samples] == [0, 1, 2]
    assert shards.read(shards.samples[1], "txt") == {"txt": b"caption of b"}
    assert [(bad.shard, bad.reason) for bad in shards.skipped] == [
        (str(three.with_name("zero.tar")), "not a tar file (empty file)")
    ]
    compressed.write_bytes(compressed.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"two\.tgz' is truncated or damaged"):
        ShardSet(compressed)


def test_a_chain_of_file_systems_is_one_address(make, tmp_path):
    make.shards(tmp_path / "clips", [make.video("a")])
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/chain/a.tar", (tmp_path / "clips" / "shard-000000.tar").read_bytes())
    shards = ShardSet(f"simplecache::memory://chain/a.tar::{tmp_path}/clips")
    assert keys(shards) == ["a", "a"]
    assert [shards.read(sample, "txt")["txt"] for sample in shards.samples] == [b"caption of a"] * 2
