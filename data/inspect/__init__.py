"""Report on a set of shards: `python -m data.inspect SHARDS`.

The command prints what the shards contain and what is wrong with them, and draws the first clips with their captions.
Captions and tokens of every sample are read; of the videos, some are decoded.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.inspect.checks import Check, TokenCheck, VideoCheck
from data.inspect.sheet import draw_sheet, sheet_path
from data.progress import ProgressBar
from data.shards import Sample, ShardSet, SkippedSample
from t2v.errors import UserError
from t2v.files import atomic_path

_MAX_LINES = 20
"""Problems to print; the others are counted."""


def inspect(shards: str, sheet: Path | None = None, clips: int = 12, frames: int = 8, decode: int = 64) -> None:
    """Print what a set of shards contains and what is wrong with it, and draw its first clips.

    The exit status is 0 if nothing is wrong, 1 if there are problems, and 2 if the shards cannot be opened.

    Args:
        shards: A folder of shards, one tar or a pattern, or their address; several are joined by `::`.
        sheet: PNG file for the first clips; by default `inspect-FOLDER-SHARDS.png` in the current folder.
        clips: Number of clips to draw; 0 for none.
        frames: Frames to draw of each clip, evenly from the first to the last.
        decode: Number of videos to decode from start to end, evenly among all; -1 for all.
    """
    if clips < 0 or frames < 1 or decode < -1:
        raise UserError(
            f"clips={clips} must be at least 0, frames={frames} at least 1, and decode={decode} at least -1."
        )
    if not clips and (sheet or frames != 8):
        raise UserError("--sheet and --frames have no effect with --clips 0, which draws nothing: leave them out.")
    opened = ShardSet(shards)
    file = sheet_path(shards, opened, sheet) if clips else None
    problems, drawn = list(opened.skipped), []
    captioned = any(sample.captions for sample in opened.samples if sample.video)
    checks: list[Check] = [VideoCheck(_select_videos(opened.samples, decode), captioned), TokenCheck()]
    for check in checks:
        samples = [sample for sample in opened.samples if check.has(sample)]
        if samples:
            problems += _run_check(check, opened, samples)
            _print_table(check, opened.path, samples)
            drawn += samples[:clips]
    for sample in opened.samples:
        if not any(check.has(sample) for check in checks):
            reason = f"it has {', '.join(sample.members)}, but no video and no tokens"
            problems.append(SkippedSample(sample.key, sample.shard, reason))
    if problems or not opened.samples:
        _print_problems(problems)
    else:
        print("\nNo problems found.")
    if file and drawn:
        try:
            with atomic_path(file) as temporary:
                draw_sheet(opened, drawn, frames).save(temporary, "PNG")
        except OSError as error:
            raise UserError(
                f"The report above is complete, but '{file}' cannot be written ({error.strerror or error}): name "
                "another place with --sheet, or give --clips 0."
            ) from error
        print(f"\n{file} shows the first clips.")
    if problems or not opened.samples:
        raise SystemExit(1)


def _select_videos(samples: Sequence[Sample], count: int) -> set[tuple[str, str]]:
    """Return key and shard of some of the videos whose description can be read, evenly among them; all with -1."""
    videos = [(sample.key, sample.shard) for sample in samples if sample.video and sample.frames]
    count = len(videos) if count < 0 else min(count, len(videos))
    return {videos[i * len(videos) // count] for i in range(count)}


def _run_check(check: Check, shards: ShardSet, samples: Sequence[Sample]) -> list[SkippedSample]:
    """Return what is wrong with the samples of one kind."""
    problems = []
    try:
        for sample in ProgressBar(samples, f"reading {check.name}", unit="sample", leave=False):
            reasons = check.problems_of(shards, sample)
            problems += [SkippedSample(sample.key, sample.shard, reason) for reason in reasons]
    except OSError as error:
        raise UserError(
            f"Cannot read the shards in '{shards.path}' ({error}): try again, or copy them again."
        ) from error
    return problems + [SkippedSample("", shards.path, reason) for reason in check.problems()]


def _print_table(check: Check, path: str, samples: Sequence[Sample]) -> None:
    members = Counter(name for sample in samples for name in sample.members)
    size = sum(size for sample in samples for _, size in sample.members.values())
    rows = [
        ("shards", f"{len({sample.shard for sample in samples}):,}"),
        ("samples", f"{len(samples):,}"),
        ("members", ", ".join(f"{name} {count:,}" for name, count in members.items())),
        ("bytes", f"{size:,} ({size / len(samples):,.0f} per sample)"),
        *check.rows(samples),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"\n{path}: {check.name}\n")
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))


def _print_problems(problems: Sequence[SkippedSample]) -> None:
    print(f"\n{len(problems)} problems found:" if problems else "\nThere are no samples.")
    for key, shard, reason in problems[:_MAX_LINES]:
        print(f"  {f'{key} in ' if key else ''}{shard}: {reason}")
    if len(problems) > _MAX_LINES:
        print(f"  … and {len(problems) - _MAX_LINES:,} more")
