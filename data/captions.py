"""The captions and metadata of a sample, read from its txt and json members: one rule for every part of the program.

- The json is an object. NaN and infinity, which JSON does not have, are read as null.
- A caption is text. `caption` and `captions` may each be one text or a list of texts; null is no caption, and any other
  value is an error, never turned into text.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

_KINDS = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list in a list"}
"""Names of the types that are no text."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"its key '{twice}' occurs twice")
    return content


_DECODER, _UNIQUE_DECODER = (
    json.JSONDecoder(parse_constant=lambda _: None, object_pairs_hook=hook) for hook in (None, _unique)
)


def parse_json(content: str | bytes, unique_keys: bool = False) -> Any:
    """Return the content of a JSON text in UTF-8, with or without a byte order mark; NaN and infinity become None.

    Args:
        content: The text, or its bytes.
        unique_keys: Refuse objects in which a key occurs twice, instead of taking the last value.

    Raises:
        ValueError: If it is not valid JSON, or nested too deeply to be read.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
    try:
        return (_UNIQUE_DECODER if unique_keys else _DECODER).decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_metadata(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the object in a sample's json member, or an empty one if there is no such member.

    Args:
        members: The members' bytes by their extension.

    Raises:
        ValueError: If the json member is not valid JSON or not an object.
    """
    if "json" not in members:
        return {}
    try:
        metadata = parse_json(members["json"])
    except ValueError as error:
        raise ValueError("its json is invalid") from error
    if not isinstance(metadata, dict):
        raise ValueError("its json is not an object")
    return metadata


def read_captions(members: Mapping[str, bytes]) -> list[str]:
    """Return all captions of a video sample, each once and without surrounding white space.

    The first is the txt member, or `caption` in the json member; the others are `captions` in the json member.

    Args:
        members: The members' bytes by their extension.

    Returns:
        The captions; an empty list if there is none.

    Raises:
        ValueError: If the txt member is not UTF-8, the json member is not a JSON object, or a caption is not text.
    """
    metadata = read_metadata(members)
    try:
        text = members.get("txt", b"").decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError("caption is not UTF-8") from error
    first = texts(text or metadata.get("caption"), "caption")
    captions = [*first, *texts(metadata.get("captions"), "captions")]
    return list(dict.fromkeys(stripped for stripped in (caption.strip() for caption in captions) if stripped))


def read_embedded_captions(metadata: Mapping[str, Any], text_tokens: int) -> tuple[list[str], list[int]]:
    """Return the captions of a token sample and the number of text tokens of each, in the order of its embeddings.

    Args:
        metadata: The object in the sample's json member.
        text_tokens: Number of rows in its text.npy, which holds the embeddings of all captions one after the other.

    Raises:
        ValueError: If a caption is not text, or the numbers of text tokens do not fit the captions and the embeddings.
    """
    captions = texts(metadata.get("captions"), "captions") or texts(metadata.get("caption"), "caption") or [""]
    lengths = metadata.get("text_lengths") or [text_tokens]
    if not (isinstance(lengths, list) and all(type(length) is int and length >= 0 for length in lengths)):
        raise ValueError("its text_lengths are not a list of numbers")
    if len(lengths) != len(captions) or sum(lengths) != text_tokens:
        raise ValueError(
            f"its text.npy has {text_tokens} text tokens, but {len(captions)} captions have the lengths {lengths}"
        )
    return [caption.strip() for caption in captions], lengths


def texts(value: Any, name: str) -> list[str]:
    """Return the texts in a value that is one text or a list of texts; None gives, and is, no text.

    Args:
        value: The value.
        name: Its name, for the error.

    Raises:
        ValueError: If the value is, or contains, anything else.
    """
    values = value if isinstance(value, list) else [value]
    found = [each for each in values if each is not None]
    for each in found:
        if not isinstance(each, str):
            raise ValueError(f"its {name} is {_KINDS.get(type(each), type(each).__name__)}, not text")
        if not each.isascii() and any("\ud800" <= character <= "\udfff" for character in each):
            raise ValueError(f"its {name} has half of a surrogate pair, which is not text")
        if "\0" in each:
            raise ValueError(f"its {name} has characters of code 0, as a damaged file has")
    return found
