"""The captions and metadata of a sample, read from its txt and json members."""

import json
from collections.abc import Mapping
from typing import Any


def read_metadata(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the object in a sample's json member, or an empty one if there is no such member.

    Args:
        members: The members' bytes by their extension.

    Raises:
        ValueError: If the json member is not valid JSON or not an object.
    """
    metadata = json.loads(members.get("json", b"{}"))
    if not isinstance(metadata, dict):
        raise ValueError("it is not a JSON object")
    return metadata


def read_captions(members: Mapping[str, bytes]) -> list[str]:
    """Return all captions of a video sample, each once and without surrounding white space.

    The first is the txt member, or `caption` in the json member; the others are `captions` in the json member.

    Args:
        members: The members' bytes by their extension.

    Returns:
        The captions; an empty list if there is none.

    Raises:
        ValueError: If the json member is not a JSON object, or as `UnicodeDecodeError` if the txt member is not UTF-8.
    """
    metadata = read_metadata(members)
    text = members.get("txt", b"").decode("utf-8-sig").strip()
    captions = [text or metadata.get("caption"), *as_list(metadata.get("captions"))]
    return list(dict.fromkeys(stripped for stripped in (_strip(caption) for caption in captions) if stripped))


def read_embedded_captions(metadata: Mapping[str, Any], text_tokens: int) -> tuple[list[str], list[int]]:
    """Return the captions of a token sample and the number of text tokens of each, in the order of its embeddings.

    Args:
        metadata: The object in the sample's json member.
        text_tokens: Number of rows in its text.npy, which holds the embeddings of all captions one after the other.
    """
    captions = as_list(metadata.get("captions")) or [metadata.get("caption")]
    return [_strip(caption) for caption in captions], metadata.get("text_lengths") or [text_tokens]


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty list, and any other value as a list of one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _strip(caption: Any) -> str:
    return "" if caption is None else str(caption).strip()
