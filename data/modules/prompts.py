"""Prompts to generate from: a list, a text file or a table, each with its seed, file name and options."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from data.captions import texts
from data.modules.base import SEEDS
from t2v.batch import PromptBatch
from t2v.errors import UserError, check_range

_HINT = (
    "give a prompt, a list such as '[\"a red circle moves left\"]', a text file with one prompt a line, or a table "
    "(.csv or .jsonl) with a column prompt."
)
_COLUMNS = ("prompt", "seed", "start", "negative_prompt")
_TABLES = (".csv", ".jsonl")
_NAME_BYTES = 60
"""Bytes of a prompt in the name of its file; file systems allow 255 for the whole name."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with its options.

    Attributes:
        prompt: The text.
        seed: Seed of the first sample; None to count up from the DataModule's.
        start: Picture or video that the video begins with; None for the setting of the model.
        negative: Negative prompt; None for the setting of the model, empty for none.
    """

    prompt: str
    seed: int | None = None
    start: str | None = None
    negative: str | None = None


@dataclass(frozen=True)
class PromptJob:
    """A video to generate."""

    prompt: Prompt
    seed: int
    name: str
    """Name of the file, without suffix."""


def read_prompts(source: list[str] | str) -> list[Prompt]:
    """Return the prompts of a list, of the lines of a text file or of the rows of a table; or a single prompt.

    Args:
        source: A list, in which an empty prompt counts; the path of a file in UTF-8, whose empty lines are left out; or
            a prompt. A table has the column `prompt`, and may have `seed`, `start`, a path relative to the table,
            and `negative_prompt`.

    Raises:
        UserError: If there are no prompts, or the file cannot be read.
    """
    if isinstance(source, str):
        path = Path(source)
        prompts = _read_file(path) if source and _is_path(path) else [Prompt(source.strip())]
    else:
        prompts = [Prompt(prompt.strip()) for prompt in source]
    if not any(each.prompt for each in prompts):
        raise UserError(f"There are no prompts in data.prompts={source!r}: {_HINT}")
    return prompts


def number_prompts(prompts: list[Prompt], seed: int, samples: int) -> list[PromptJob]:
    """Return the videos to generate.

    Args:
        prompts: The prompts.
        seed: Seed of the first video; those after it count up.
        samples: Videos of each prompt.
    """
    jobs = []
    for i, prompt in enumerate(prompts):
        first = seed + i * samples if prompt.seed is None else prompt.seed
        name = f"{i:04d}-{_slug(prompt.prompt)}".rstrip("-")
        for j in range(samples):
            jobs.append(PromptJob(prompt, first + j, f"{name}-{j:02d}" if samples > 1 else name))
    return jobs


def batch_jobs(jobs: Iterable[PromptJob], batch_size: int) -> list[list[PromptJob]]:
    """Return batches of successive jobs that all have start frames of their own, or none of which has."""
    batches = []
    for _, group in groupby(jobs, key=lambda job: job.prompt.start is not None):
        same = list(group)
        batches += [same[i : i + batch_size] for i in range(0, len(same), batch_size)]
    return batches


def collate_prompts(jobs: list[PromptJob]) -> PromptBatch:
    """Return a batch of prompts."""
    prompts = [job.prompt for job in jobs]
    return PromptBatch(
        [prompt.prompt for prompt in prompts],
        [job.seed for job in jobs],
        [job.name for job in jobs],
        [prompt.start for prompt in prompts],
        [prompt.negative for prompt in prompts],
    )


def _is_path(path: Path) -> bool:
    """Return whether a string is meant as a file rather than as a prompt."""
    try:
        if path.exists():
            return True
    except OSError:  # a long prompt is no valid path
        return False
    return path.suffix.lower() in (".txt", *_TABLES) or (len(path.parts) > 1 and " " not in str(path))


def _read_file(path: Path) -> list[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"No prompts in '{path}' ({error}): as data.prompts {_HINT}") from error
    if path.suffix.lower() in _TABLES:
        rows = _csv_rows(text, path) if path.suffix.lower() == ".csv" else _jsonl_rows(text, path)
        return [_prompt(row, path, f"'{path}', row {number}") for number, row in rows]
    return [Prompt(line.strip()) for line in text.split("\n") if line.strip()]  # other separators are in prompts


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(
                    f"'{path}', row {reader.line_num} has more cells than the header: put a prompt with commas in "
                    "quotes."
                )
            cells = {str(name).strip(): re.sub(r"\s*\n\s*", " ", value) for name, value in row.items() if value}
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(
            f"'{path}' is no CSV table after row {reader.line_num} ({error}): is a quotation mark not closed?"
        ) from error


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"'{path}', row {number} is not JSON ({error}): correct it.") from error
        if not isinstance(row, dict):
            raise UserError(f'\'{path}\', row {number} must be an object such as {{"prompt": "a red circle"}}.')
        yield number, {name: value for name, value in row.items() if value is not None}


def _prompt(row: dict[str, Any], path: Path, where: str) -> Prompt:
    """Return the prompt of a table's row, checked."""
    unknown = sorted(row.keys() - set(_COLUMNS))
    if unknown or "prompt" not in row:
        problem = f"has the unknown column {unknown[0]}" if unknown else "has no prompt"
        raise UserError(f"{where} {problem}: the columns are {', '.join(_COLUMNS)}.")
    if not isinstance(row["prompt"], str):
        raise UserError(f"{where} has prompt={row['prompt']!r}, which is not text: write one row for each prompt.")
    negative = row.get("negative_prompt")
    if not isinstance(negative, str | None):
        raise UserError(f"{where} has negative_prompt={negative!r}, which is not text: correct it.")
    try:
        texts([row["prompt"], negative], "prompt")
    except ValueError as error:
        raise UserError(f"{where} cannot be used, as {error}: correct it.") from error
    prompt = Prompt(
        row["prompt"], start=str(row["start"]) if "start" in row else None, negative=negative and negative.strip()
    )
    if "seed" in row:
        try:
            seed = int(str(row["seed"]))
        except ValueError as error:
            raise UserError(f"{where} has seed={row['seed']}, which is not a whole number: correct it.") from error
        check_range(where, SEEDS, seed=seed)
        prompt = replace(prompt, seed=seed)
    if prompt.start is not None:
        start = path.parent / prompt.start
        if not start.is_file():
            raise UserError(f"{where} has start={prompt.start}, but there is no file {start}: correct the path.")
        prompt = replace(prompt, start=str(start))
    return prompt


def _slug(text: str) -> str:
    """Return the words of a prompt as a part of a file name."""
    words = "-".join(re.findall(r"\w+", text.lower())).encode()
    return words[:_NAME_BYTES].decode(errors="ignore").rstrip("-")
