"""New captions in existing video shards: `python -m data.recaption SHARDS TABLE`.

A row of the table names a sample by its key, by `SHARD.tar/KEY`, or by the `source` in its json, the path of the video
that it was cut from; then it names all samples of that video. Its captions replace those of the sample; other samples
and members stay as they are.

All shards are written under temporary names first, and renamed when the last one is complete: an interrupted run has
changed nothing, or is completed by the same command.
"""

import io
import json
import posixpath
import tarfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import fsspec

from data.captions import read_metadata
from data.index import is_unpacked, make_index
from data.prepare.captions import clean_caption
from data.prepare.dropped import Dropped, summarize
from data.prepare.filters import Filters
from data.prepare.sources import composed
from data.prepare.tables import CaptionTable, read_table
from data.progress import ProgressBar
from data.shards import Sample, ShardSet
from t2v.errors import UserError, run_tool
from t2v.files import atomic_path


class _Change(NamedTuple):
    sample: Sample
    captions: list[str]


def recaption(shards: str, table: Path, path_column: str | None = None, caption_column: str | None = None) -> None:
    """Replace captions in existing video shards by those of a table.

    Args:
        shards: A folder of shards, one tar or a pattern, on this machine.
        table: CSV, TSV, JSON-lines, JSON or Parquet file with a row per sample or per video.
        path_column: Column with the sample's key, SHARD.tar/KEY, or the video's path; by default `path`, or that of a
            known data set.
        caption_column: Column with the caption, or with a list of captions; by default `caption`, or that of a known
            data set.

    Raises:
        UserError: If the shards cannot be changed, or the table names none of their samples.
    """
    opened = ShardSet(shards)
    _check(opened)
    dropped: list[Dropped] = []
    captions = _read_captions(CaptionTable(table, path_column, caption_column), dropped)
    changes: defaultdict[str, list[_Change]] = defaultdict(list)
    used: set[str] = set()
    for sample in ProgressBar(opened.samples, "reading the samples", unit="sample", leave=False):
        names = [name for name in _names(opened, sample) if name in captions]
        if names:
            changes[sample.shard].append(_Change(sample, captions[names[0]]))
            used.update(names)
    dropped += (Dropped(name, None, "no such sample") for name in captions if name not in used)
    count = sum(len(of_shard) for of_shard in changes.values())
    if not count:
        raise UserError(f"'{table}' names no sample in '{opened.path}': {summarize(dropped)}.")
    try:
        with ExitStack() as complete:
            for shard, of_shard in ProgressBar(changes.items(), "writing", unit="shard", leave=False):
                _rewrite(shard, complete.enter_context(atomic_path(shard)), of_shard)
        for shard in changes:
            make_index(*fsspec.url_to_fs(shard))
    except OSError as error:
        raise UserError(
            f"The system reports at '{error.filename or opened.path}': {error.strerror or error}. The shards are as "
            "they were, or complete; the same command completes them."
        ) from error
    print(f"{opened.path}: new captions in {count} of {len(opened)} samples, in {len(changes)} shards.")
    if dropped:
        print(f"Left out {len(dropped)}: {summarize(dropped)}.")


def _check(shards: ShardSet) -> None:
    """Check that the shards can be rewritten without a loss."""
    remote = [sample.shard for sample in shards.samples if "://" in shards.address(sample)]
    if remote:
        raise UserError(f"'{remote[0]}' is not on this machine: copy the shards, change them, and copy them back.")
    if any(is_unpacked(sample.shard) for sample in shards.samples):
        raise UserError(f"'{shards.path}' is or has a compressed tar: unpack it, and change that.")
    if any("tokens.npy" in sample.members for sample in shards.samples):
        raise UserError(
            f"'{shards.path}' holds tokens with the embeddings of their captions: change the captions of the video "
            "shards, and run predict of stage 1 again."
        )
    if shards.skipped:
        bad = shards.skipped[0]
        raise UserError(
            f"'{bad.shard}' is damaged at {bad.key or 'its end'} ({bad.reason}), and would lose that: make it again."
        )


def _read_captions(table: CaptionTable, dropped: list[Dropped]) -> dict[str, list[str]]:
    """Return the cleaned captions by the name in the table."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row in read_table(table, dropped):
        if row.segments:
            raise UserError(f"'{table.path}' has captions for parts of videos: prepare the videos with it instead.")
        cleaned = [clean_caption(text, Filters(max_words=None)) for text in row.captions]
        captions = [text for text, reason in cleaned if reason is None]
        if captions:
            found[_spelling(row.name)] += captions
        else:
            dropped.append(Dropped(row.name, None, "no caption"))
    return {name: list(dict.fromkeys(captions)) for name, captions in found.items()}


def _names(shards: ShardSet, sample: Sample) -> list[str]:
    """Return what a table may call a sample, the most specific first."""
    names = [f"{Path(sample.shard).name}/{sample.key}", sample.key, f"{sample.key}.{sample.video}"]
    if not sample.flaw:
        source = read_metadata(shards.read(sample, "json")).get("source")
        names += [source] if isinstance(source, str) else []
    return [_spelling(name) for name in names]


def _spelling(name: str) -> str:
    """Return a name without "./", and with composed accents."""
    return composed(posixpath.normpath(name))


def _rewrite(shard: str, path: Path, changes: list[_Change]) -> None:
    """Write a copy of a shard with new captions; a new txt or json follows the last member of its sample."""
    texts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as old, path.open("wb") as file, tarfile.open(fileobj=file, mode="w") as new:
        members = {member.offset_data: member for member in old}
        for sample, captions in changes:
            where = {name: members[offset] for name, (offset, _) in sample.members.items()}
            content = old.extractfile(where["json"]).read() if "json" in where else b"{}"  # type: ignore[union-attr]
            new_texts = {"txt": captions[0].encode(), "json": _new_json(content, captions)}
            last = max(where.values(), key=lambda member: member.offset_data)
            for name, text in new_texts.items():
                place = where.get(name, last).name
                texts.setdefault(place, {})[where[name].name if name in where else f"{sample.key}.{name}"] = text
        for member in members.values():
            changed = texts.get(member.name, {})
            if member.name not in changed:
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
            for name, text in changed.items():
                info = tarfile.TarInfo(name)
                info.mode, info.mtime, info.size = member.mode, member.mtime, len(text)
                new.addfile(info, io.BytesIO(text))


def _new_json(content: bytes, captions: list[str]) -> bytes:
    """Return a sample's json with new captions and all else as it was; one that is not an object is replaced."""
    try:
        metadata = read_metadata({"json": content})
    except ValueError:
        metadata = {}
    metadata = {name: value for name, value in metadata.items() if name != "captions"} | {"caption": captions[0]}
    return json.dumps(metadata | ({"captions": captions} if len(captions) > 1 else {})).encode()


if __name__ == "__main__":
    run_tool(recaption)
