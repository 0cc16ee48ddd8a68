"""Remote shards: over HTTP from a server that counts bytes and requests, and in fsspec's memory."""

import functools
import io
import os
import pickle
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import fsspec
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data.index import remote
from data.shards import ShardSet
from t2v.errors import UserError
from t2v.video import encode_mp4

CLIPS = 4


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, with range requests; counts bytes and requests, and fails `server.failures` times."""

    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self):
        if self.path.endswith("/"):
            return super().do_GET()
        server, path = self.server, self.translate_path(self.path)
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                content = file.read()
        except OSError:
            return self.send_error(404)
        with server.lock:
            server.requests[self.path] += 1
            failing = server.failures > 0
            server.failures -= failing
        if failing:
            return self.send_error(503)
        part = self.headers.get("Range") if server.ranges else None
        if part:
            start, stop = part.removeprefix("bytes=").split("-")
            content = content[int(start) : int(stop) + 1]
        self.send_response(206 if part else 200)
        self.send_header("Content-Type", "application/x-tar")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with server.lock:
            server.bytes[self.path] += len(content)
        return self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of `server.folder` at `server.address`; the test has its own cache of indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    server.folder, server.address = folder, f"http://127.0.0.1:{server.server_port}"
    server.requests, server.bytes, server.lock = Counter(), Counter(), threading.Lock()
    server.failures, server.ranges = 0, True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def large():
    """Two mp4s of noise, of about 300 KB: with the description before and after the pictures."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (12, 3, 128, 128), dtype=torch.uint8, generator=generator)
    front, file = encode_mp4(frames, fps=8.0, crf=1), io.BytesIO()
    with av.open(io.BytesIO(front)) as source, av.open(file, "w", format="mp4") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    behind = file.getvalue()
    assert len(front) > 250_000
    assert front.index(b"moov") < front.index(b"mdat")
    assert behind.index(b"mdat") < behind.index(b"moov")
    return front, behind


def write_tar(path, *samples):
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for name in ("mp4", "txt"):
                member = tarfile.TarInfo(f"{sample['__key__']}.{name}")
                content = sample[name] if isinstance(sample[name], bytes) else sample[name].encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path.stat().st_size


def large_samples(large, prefix=""):
    return [{"__key__": f"{prefix}{i}", "mp4": large[i % 2], "txt": f"caption {i}"} for i in range(CLIPS)]


def test_indexing_and_reading_fetch_only_parts_of_the_tar(server, large):
    size = write_tar(server.folder / "0.tar", *large_samples(large))
    shards = ShardSet(f"{server.address}/0.tar")
    assert [tuple(sample)[3:] for sample in shards.samples] == [(12, 8.0, 128, 128, "", 1, "")] * CLIPS
    assert server.bytes["/0.tar"] < size / 3
    assert server.requests["/0.tar"] <= 2 * CLIPS + 1
    before = server.bytes["/0.tar"]
    assert shards.read(shards.samples[1], "mp4", "txt") == {"mp4": large[1], "txt": b"caption 1"}
    assert 0 < server.bytes["/0.tar"] - before - len(large[1]) < 1536  # and the two headers
    before = server.bytes["/0.tar"]
    assert shards.read(shards.samples[2], "txt") == {"txt": b"caption 2"}
    assert server.bytes["/0.tar"] - before == 512 + len(b"caption 2")


@pytest.mark.parametrize("path", ["", "/", "/clips-{0..2}.tar", "/clips-*.tar"])
def test_shards_over_http(path, server, make):
    for i in range(3):
        write_tar(server.folder / f"clips-{i}.tar", make.video(f"{i}"))
    (server.folder / "notes.txt").write_text("no tar")
    shards = ShardSet(server.address + path)
    assert [sample.key for sample in shards.samples] == ["0", "1", "2"]
    assert shards.read(shards.samples[2], "txt") == {"txt": b"caption of 2"}


def test_a_missing_shard_among_braces_is_named(server, make):
    write_tar(server.folder / "clips-0.tar", make.video("0"))
    with pytest.raises(UserError, match=r"there is no http.*/clips-1\.tar"):
        ShardSet(f"{server.address}/clips-{{0..1}}.tar")


def test_an_address_with_a_query_is_opened(server, make):
    write_tar(
        server.folder / "clips.tar?signed=yes", make.video("a")
    )  # for this server the query is part of the file name
    server.RequestHandlerClass = functools.partial(Signed, directory=str(server.folder))
    assert len(ShardSet(f"{server.address}/clips.tar?signed=yes")) == 1


class Signed(Handler):
    def translate_path(self, path):
        return f"{self.directory}{path}"


def test_the_index_is_cached(server, make, tmp_path):
    write_tar(server.folder / "0.tar", make.video("a"))
    first = ShardSet(server.address)
    requests = server.requests["/0.tar"]
    again = ShardSet(server.address)
    assert (again.samples, server.requests["/0.tar"]) == (first.samples, requests + 1)  # a byte, to test the server
    cached = list((tmp_path / "cache").rglob("*.*"))
    assert [path.suffix for path in cached] == [".json"]
    assert [path.name for path in server.folder.iterdir()] == ["0.tar"]
    write_tar(server.folder / "0.tar", make.video("b"), make.video("c"))
    os.utime(server.folder / "0.tar", (1, 1))  # dates over HTTP have whole seconds
    assert [sample.key for sample in ShardSet(server.address).samples] == ["b", "c"]


def test_an_index_beside_the_shard_is_used(server, videos):
    for path in videos.iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    shards = ShardSet(server.address)
    assert len(shards) == 10
    assert sum(server.bytes[name] for name in server.requests if name.endswith(".tar")) == 1  # to test the server


def test_a_server_that_serves_whole_files_is_refused_before_training(server, videos):
    for path in videos.iterdir():
        (server.folder / path.name).write_bytes(path.read_bytes())
    server.ranges = False
    with pytest.raises(UserError, match="its server does not serve parts of files"):
        ShardSet(server.address)


class Read(Dataset):
    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, number):
        return self.shards.read(self.shards.samples[number], "txt")["txt"].decode()


def test_workers_can_read_after_their_parent_did(server, make):
    for i in range(2):
        write_tar(server.folder / f"{i}.tar", *(make.video(f"{i}{j}") for j in range(4)))
    data = Read(ShardSet(server.address))
    expected = [f"caption of {i}{j}" for i in range(2) for j in range(4)]
    assert list(map(data.__getitem__, range(8))) == expected
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for _ in range(2):
        assert list(loader) == expected
        assert data[3] == expected[3]  # the parent's connection still works
    assert pickle.loads(pickle.dumps(data))[5] == expected[5]  # as workers that are not forked get it


def test_a_temporary_failure_is_retried(server, make):
    write_tar(server.folder / "0.tar", make.video("a"))
    server.failures = 2
    shards = ShardSet(f"{server.address}/0.tar")
    assert (len(shards), shards.skipped, server.failures) == (1, [], 0)
    server.failures = 3
    assert shards.read(shards.samples[0], "txt") == {"txt": b"caption of a"}
    server.failures = 1000
    with pytest.raises(OSError, match=r"0\.tar' after 4 attempts: 503"):
        shards.read(shards.samples[0], "txt")


def test_a_permanent_failure_is_reported(server, make):
    write_tar(server.folder / "0.tar", make.video("a"))
    server.failures = 1000
    with pytest.raises(UserError, match=r"after 4 attempts: 503"):
        ShardSet(f"{server.address}/0.tar")


def test_a_missing_server_is_reported():
    with pytest.raises(UserError, match="Cannot connect"):
        ShardSet("http://127.0.0.1:9/clips-{0..1}.tar")


def test_a_server_without_range_requests_is_reported(server, make):
    write_tar(server.folder / "0.tar", *(make.video(f"{i}") for i in range(40)))  # more than one request
    server.ranges = False
    with pytest.raises(UserError, match="does not serve parts of files"):
        ShardSet(f"{server.address}/0.tar")


def test_shards_in_memory(videos):
    memory = fsspec.filesystem("memory")
    for number in range(3):
        path = videos / f"shard-00000{number}.tar"
        memory.pipe_file(f"/clips/{path.name}", path.read_bytes())
    shards = ShardSet("memory://clips/shard-{000000..000002}.tar")
    assert shards.read(shards.samples[9], "txt") == {"txt": b"caption of 009"}
    assert ShardSet("memory://clips").samples == shards.samples
    assert memory.exists("/clips/shard-000002.index.json")
    memory.rm("/clips", recursive=True)
