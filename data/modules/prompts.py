"""Prompts to generate from: read from a list or a text file, and given seeds and file names."""

import re
from pathlib import Path

from t2v.batch import PromptBatch
from t2v.errors import UserError

_HINT = "give a text file with one prompt a line, or a list such as '[\"a red circle moves left\"]'."

PromptJob = tuple[str, int, str]
"""A prompt, its seed, and the name of its file without suffix."""


def read_prompts(source: list[str] | str) -> list[str]:
    """Return the prompts of a list, or of the lines of a text file, without empty ones.

    Args:
        source: The prompts, or the path of a text file in UTF-8.

    Raises:
        UserError: If there are no prompts, or the file cannot be read.
    """
    lines = source
    if isinstance(lines, str):
        try:
            lines = Path(lines).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"No prompts in '{source}' ({error}): as data.prompts {_HINT}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"There are no prompts in data.prompts={source!r}: {_HINT}")
    return prompts


def number_prompts(prompts: list[str], seed: int) -> list[PromptJob]:
    """Return the prompts with seeds, counted up from `seed`, and file names of a number and the prompt's words."""
    return [(prompt, seed + i, f"{i:04d}-{_slug(prompt)}".rstrip("-")) for i, prompt in enumerate(prompts)]


def collate_prompts(jobs: list[PromptJob]) -> PromptBatch:
    """Return a batch of prompts."""
    prompts, seeds, names = zip(*jobs, strict=True)
    return PromptBatch(list(prompts), list(seeds), list(names))


def _slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))[:60].rstrip("-")
