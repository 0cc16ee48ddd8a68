"""Cleaned captions: without markup, URLs, encoding errors, invisible characters and the phrases of stock libraries."""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

from data.prepare.filters import Filters
from t2v.errors import UserError

_BLOCK_TAG = re.compile(r"</?(?:br|div|h[1-6]|li|ol|p|table|td|tr|ul)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z](?:[^<>\s]*>|[^<>=/\"']*[=/\"'][^<>]*>)|<!--[^<>]*-->", re.IGNORECASE)
_URL = re.compile(r"(?:\bhttps?://|\bwww\.)[^\s<>()\[\]\"]+", re.IGNORECASE)
_EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]")

_JOINERS = "\u200c\u200d"
"""Zero-width characters that emoji, Persian and the scripts of India are spelt with."""
_REPLACEMENT_CHARACTER = "\ufffd"
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Co", "Cs")
"""Unicode categories: control, format, private use, surrogate."""

_STOCK = r"(?:royalty[- ]free )?stock (?:video|footage|clip|photo)s?(?: (?:video|footage|clip)s?)?"
_PHRASES = (
    rf"(?:{_STOCK}|royalty[- ]free|full hd|u?hd|[48]k|shutterstock|getty images|i?stock ?photo|pond5|adobe stock)"
)
_STOCK_SUFFIX = re.compile(
    rf"(?:^|(?<=[.!?])\s+|\s*[,;:|(\[]\s*|\s+[-–—]\s+){_PHRASES}(?: (?:{_PHRASES}|video))*[\s.!)\]]*$", re.IGNORECASE
)
_STOCK_PREFIX = re.compile(rf"^(?:{_STOCK} of\s+|{_PHRASES}(?: video)?\s*(?:[:|]|\s[-–—])\s*)", re.IGNORECASE)

_CHARACTER_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Kana and Chinese characters, which are written without spaces."""


def clean_caption(text: str, filters: Filters) -> tuple[str, str | None]:
    """Return a caption in one line without markup, URLs, encoding errors and the phrases of stock libraries.

    Args:
        text: The caption as found.
        filters: The limits.

    Returns:
        The cleaned caption, and why it is dropped, or None.
    """
    text = _text_fixer()(text)
    text = "".join(" " if character.isspace() else character for character in text if _is_visible(character))
    text = _TAG.sub("", _BLOCK_TAG.sub(" ", text))
    text = _EMPTY_BRACKETS.sub("", _URL.sub("", text))
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for _ in range(4):  # "…, 4K, stock footage"
        text = _STOCK_PREFIX.sub("", _STOCK_SUFFIX.sub("", text))
    words = count_words(text)
    if words == 0:
        return "", "no caption"
    if words < filters.min_words:
        unit = "word" if words == 1 else "words"
        return text, f"caption too short ({words} {unit}; min_words is {filters.min_words})"
    if filters.max_words is not None and words > filters.max_words:
        return text, f"caption too long ({words} words; max_words is {filters.max_words})"
    return text, None


def count_words(text: str) -> int:
    """Return the number of words; a Chinese or Japanese character is a word, punctuation and emoji are none."""
    words = (word for word in text.split() if any(character.isalnum() for character in word))
    return sum(max(len(_CHARACTER_WORD.findall(word)), 1) for word in words)


@cache
def _text_fixer() -> Callable[[str], str]:
    """Return a function that decodes HTML entities and repairs text that was decoded with a wrong encoding."""
    try:
        import ftfy
        from ftfy.fixes import unescape_html
    except ImportError as error:
        raise UserError('Captions are cleaned with ftfy: run pip install -e ".[prepare]".') from error
    config = ftfy.TextFixerConfig(
        unescape_html=False,  # ftfy would repeat it without limit
        uncurl_quotes=False,
        fix_character_width=False,  # full-width punctuation is correct in Chinese and Japanese
        normalization=None,  # done after invisible characters are removed
    )

    def fix(text: str) -> str:
        for _ in range(2):  # captions from the web are often escaped twice
            text = unescape_html(text)
        return ftfy.fix_text(text, config)

    return fix


def _is_visible(character: str) -> bool:
    """Return whether a character is part of the text: no control, format, private-use or replacement character."""
    if character in _JOINERS or character.isspace():
        return True
    return character != _REPLACEMENT_CHARACTER and unicodedata.category(character) not in _INVISIBLE_CATEGORIES
