import io
import os
import subprocess
import sys
import tarfile
import time

import fsspec
import pytest

from data.shards import ShardSet, ShardWriter
from t2v.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def video2dataset_tar(samples):
    """A tar as other tools write it: their own order, headers and extra members, no index."""
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


def test_round_trip(videos, make):
    shards = ShardSet(videos)
    assert [sample.key for sample in shards.samples] == [f"{i:03d}" for i in range(10)]
    assert names(videos) == [f"shard-00000{i}.{end}" for i in range(3) for end in ("index.json", "tar")]
    for sample in shards.samples:
        assert (sample.frames, sample.fps, sample.height, sample.width) == (6, 8, 32, 32)
        wrote = make.video(sample.key)
        assert shards.read(sample, "mp4", "txt") == {"mp4": wrote["mp4"], "txt": wrote["txt"].encode()}


def test_webdataset_reads_what_we_write(videos):
    import webdataset

    samples = list(webdataset.WebDataset(f"{videos}/shard-000000.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000", "001", "002", "003"]
    assert samples[0]["txt"] == b"caption of 000"


def test_the_same_samples_make_the_same_bytes(videos, make, tmp_path):
    again = make.shards(tmp_path, [make.video(f"{i:03d}") for i in range(10)])
    for name in names(videos):
        assert (again / name).read_bytes() == (videos / name).read_bytes()


def test_one_tar_and_patterns(videos):
    assert len(ShardSet(videos / "shard-000002.tar")) == 2
    assert len(ShardSet(f"{videos}/shard-00000[12].tar")) == 6


def test_tokens_are_indexed_by_their_shape(tokens):
    sample = ShardSet(tokens).samples[0]
    assert (sample.frames, sample.height, sample.width) == (6, 2, 2)


def test_shards_of_other_tools(make, tmp_path):
    samples = [
        make.video("00012", frames=9, fps=25, size=48),
        {"__key__": "00013", "mp4": b"broken"},
        make.video("00014"),
    ]
    (tmp_path / "00000.tar").write_bytes(video2dataset_tar(samples))
    shards = ShardSet(tmp_path)
    assert [sample.key for sample in shards.samples] == ["00012", "00013", "00014"]
    assert [sample.frames for sample in shards.samples] == [9, 0, 6]
    assert shards.samples[0].fps == 25
    assert shards.read(shards.samples[2], "json", "mp4")["mp4"] == samples[2]["mp4"]
    assert names(tmp_path) == ["00000.index.json", "00000.tar"]
    assert ShardSet(tmp_path).samples == shards.samples  # from the index now


def test_remote_shards(make):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/clips/00000.tar", video2dataset_tar([make.video("a"), make.video("b")]))
    shards = ShardSet("memory://clips")
    assert shards.read(shards.samples[1], "txt") == {"txt": b"caption of b"}


def test_an_index_of_another_tar_is_remade(make, tmp_path):
    make.shards(tmp_path, [make.video("a")])
    path = tmp_path / "shard-000000.tar"
    size = path.stat().st_size
    path.write_bytes(video2dataset_tar([make.video("b")]))
    assert path.stat().st_size == size
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert [sample.key for sample in ShardSet(tmp_path).samples] == ["b"]


def test_a_member_that_is_not_there(videos):
    shards = ShardSet(videos)
    assert shards.read(shards.samples[0], "tokens.npy") == {}


def test_an_exception_leaves_no_half_shard(make, tmp_path):
    def write():
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for key in "abc":
                writer.write(make.tokens(key))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == ["shard-000000.index.json", "shard-000000.tar"]
    assert len(ShardSet(tmp_path)) == 2


def test_a_killed_writer_leaves_no_half_shard(tmp_path):
    script = (
        "import os, sys; from data.shards import ShardWriter\n"
        "with ShardWriter(sys.argv[1]) as writer:\n"
        "    writer.write({'__key__': 'a', 'txt': 'text'}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path], check=False).returncode == 9
    assert not list(tmp_path.glob("*.tar"))
    with pytest.raises(UserError, match="No shards"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("key", ["", "clip.v2"])
def test_keys_that_would_not_come_back(key, tmp_path):
    with pytest.raises(ValueError, match="dot"), ShardWriter(tmp_path) as writer:
        writer.write({"__key__": key, "txt": "text"})


@pytest.mark.parametrize("path", ["", "none", "none/*.tar"])
def test_no_shards(path, tmp_path):
    with pytest.raises(UserError, match=r"No shards \(\*\.tar\) in"):
        ShardSet(tmp_path / path)


@pytest.mark.parametrize("content", [b"no tar" * 200, b""])
def test_damaged_tar(content, tmp_path):
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"00000\.tar"):
        ShardSet(tmp_path)
