"""A killed run continues, and its shards equal those of an uninterrupted run, with any engine."""

import signal
import tarfile

import pytest
import torch

from data.prepare import Filters, prepare
from t2v.errors import UserError
from t2v.video import write_mp4
from tests.support import forked

OPTIONS = {"size": 32, "fps": 8.0, "frames": 4, "samples_per_shard": 1, "videos_per_job": 2}
FLAGS = [f"--{name}={value}" for name, value in OPTIONS.items()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve videos of three clips each; the last is a copy of the first, and one does not decode."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        generator = torch.Generator().manual_seed(number % 11)
        picture = torch.randint(0, 256, (1, 3, 8, 8), generator=generator, dtype=torch.uint8)
        picture = picture.repeat_interleave(6, -1).repeat_interleave(6, -2)
        clip = torch.cat([picture.roll(2 * t, -1) for t in range(12)])
        write_mp4(folder / f"{number:02d}.mp4", clip, fps=8, crf=10)
        (folder / f"{number:02d}.txt").write_text(f"number {number}")
    (folder / "05.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    prepare_all(source, out, num_workers=1)
    return files(out)


def prepare_all(source, out, **options):
    prepare(source, out, filters=Filters(max_hash_distance=16), **OPTIONS, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_run_when(pattern, source, out):
    """Start a run, kill it when a file of this pattern exists, and return the times of its complete files."""
    flags = [*FLAGS, "--filters.max_hash_distance=16", "--num_workers=1"]
    fork = forked.Fork("-m", "data.prepare", source, out, *flags)
    partial = out.with_name(f"{out.name}.partial")
    fork.wait_until(lambda: list(partial.glob(pattern)))
    fork.process.kill()
    assert fork.wait().returncode == -signal.SIGKILL
    assert not out.exists()
    complete = [path for pattern in ("clips/[!.]*.json", "shards/[!.]*.tar") for path in partial.glob(pattern)]
    return {path.relative_to(partial): path.stat().st_mtime_ns for path in complete}


def test_a_killed_run_continues(source, uninterrupted, tmp_path, capsys):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    first = kill_run_when("clips/000002-*.json", source, out)
    second = kill_run_when("shards/shard-000001.tar", source, out)
    assert first.items() <= second.items(), "complete jobs were repeated"
    shards = {path.name: time for path, time in second.items() if path.suffix == ".tar"}
    assert shards
    for name in shards:
        with tarfile.open(partial / "shards" / name) as tar:
            assert len(tar.getnames()) == 3
    with pytest.raises(
        UserError, match=r"out\.partial' holds an interrupted run with other settings; .*: frames \(4, now 3\)\."
    ):
        prepare(source, out, filters=Filters(max_hash_distance=16), **(OPTIONS | {"frames": 3}))
    prepare_all(source, out, num_workers=2)
    assert "Continuing" in capsys.readouterr().out
    assert files(out) == uninterrupted
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == shards
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_ray_writes_equal_shards(source, uninterrupted, tmp_path):
    import ray

    prepare_all(source, tmp_path / "out", num_workers=2, engine="ray")
    assert files(tmp_path / "out") == uninterrupted
    assert not ray.is_initialized()


def test_an_unknown_engine_is_rejected(source, tmp_path):
    result = forked.run("-m", "data.prepare", source, tmp_path / "out", "--engine=spark")
    assert result.returncode == 2
    assert 'Parser key "engine"' in result.stderr
    assert "'process', 'ray']. Got value: spark" in result.stderr
    assert not list(tmp_path.iterdir())
