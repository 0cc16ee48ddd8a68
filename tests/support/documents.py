"""What the documentation contains: fenced code blocks, links, and the commands of its shell blocks."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "tests/benchmarks/README.md"]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def document_id(path: Path) -> str:
    """Return a document's path relative to the repository, for the name of a test."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """Return the contents of a document's fenced blocks of a language.

    Args:
        path: The document.
        language: The word after the opening fence.
    """
    return [body for kind, body in _FENCE.findall(path.read_text()) if kind == language]


def prose(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return _FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and MkDocs form them."""
    headings = re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip()) for heading in plain}


def commands(script: str) -> list[list[str]]:
    """Return the commands of a shell script as lists of words.

    Comments are left out, continued lines joined, and `for NAME in WORDS; do … done` is read once, with the first word.

    Args:
        script: Contents of a ``sh`` block; it uses no other variables and no pipes.
    """
    lines = re.sub(r"(^|\s)#.*$", "", script, flags=re.MULTILINE).replace("\\\n", " ")
    found = []
    for line in lines.splitlines():
        if loop := re.match(r"for (\w+) in (\S+).*; do$", line):
            lines = lines.replace(f"${loop[1]}", loop[2])
    for line in lines.splitlines():
        for command in line.split(" && "):
            words = shlex.split(command)
            while words and re.match(r"[A-Z_]+=", words[0]):  # environment variables
                del words[0]
            if words and words[0] not in ("for", "done"):
                found.append(words)
    return found


def shell_commands(word: str, documents: Sequence[Path] = DOCUMENTS) -> set[str]:
    """Return every command of the documentation that contains a word.

    Args:
        word: Such as ``make`` or ``cli.py``.
        documents: The documents.
    """
    scripts = [script for path in documents for script in blocks(path, "sh")]
    return {shlex.join(command) for script in scripts for command in commands(script) if word in command}
