"""Video shards with every kind of damage, and a few intact clips between."""

import io
import tarfile
from pathlib import Path

import torch

from t2v.video import encode_mp4


def corrupted_corpus(
    folder: Path, good: int = 4, frames: int = 6, size: int = 32, fps: float = 8.0
) -> tuple[Path, set[tuple[str, str]]]:
    """Write three shards without an index.

    Args:
        folder: Folder of the shards; created if it does not exist.
        good: Number of intact clips at the start of each shard; the first two shards have one more at the end.
        frames: Frames of each clip.
        size: Height and width of each clip in pixels.
        fps: Frames per second.

    Returns:
        The folder, and the key of each sample that cannot be used with the name of its shard. The key `twice` is also
        that of an intact sample.
    """
    number = iter(range(1000))

    def clip() -> bytes:
        generator = torch.Generator().manual_seed(next(number))
        shades = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
        return encode_mp4(torch.cat([shades.roll(2 * t, -1) for t in range(frames)]), fps)

    def sample(key: str, mp4: bytes | None = None, txt: bytes | None = b"a caption") -> dict[str, bytes]:
        members = {f"{key}.mp4": clip() if mp4 is None else mp4}
        return members if txt is None else members | {f"{key}.txt": txt}

    def good_samples(shard: str) -> list[dict[str, bytes]]:
        return [sample(f"{shard}-{i}") for i in range(good)]

    intact = clip()
    folder.mkdir(parents=True, exist_ok=True)
    videos = folder / "clips-00000.tar"
    _write(
        videos,
        *good_samples("videos"),
        sample("truncated", intact[: len(intact) * 2 // 3]),
        sample("truncated-head", intact[:200]),
        sample("zero", b""),
        sample("text", b"this is not a video " * 50),
        sample("videos-behind"),
    )
    texts = folder / "clips-00001.tar"
    _write(
        texts,
        *good_samples("texts"),
        sample("twice"),
        sample("twice", txt=b"another caption"),
        sample("silent", txt=None),
        sample("latin", txt="une caméra".encode("latin-1")),
        sample("texts-behind"),
    )
    names = folder / "clips-00002.tar"
    _write(
        names,
        *good_samples("names"),
        sample("../escape"),
        sample("/absolute"),
        {"link.mp4": "/etc/passwd"},
        sample("cut"),
    )
    content = names.read_bytes()
    with tarfile.open(names) as tar:
        member = tar.getmember("cut.mp4")
    names.write_bytes(content[: member.offset_data + member.size // 2])
    skipped = {
        videos: ("truncated", "truncated-head", "zero", "text"),
        texts: ("twice", "silent", "latin"),
        names: ("../escape", "/absolute", "link", "cut"),
    }
    return folder, {(key, shard.name) for shard, keys in skipped.items() for key in keys}


def _write(path: Path, *samples: dict[str, bytes | str]) -> None:
    """Write a tar of members; a string is the target of a link."""
    with tarfile.open(path, "w") as tar:
        for name, content in (member for sample in samples for member in sample.items()):
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
