"""The page of a run: its figures and videos, in a browser."""

import json
from pathlib import Path
from typing import NamedTuple

from jinja2 import Template

from t2v.errors import UserError
from t2v.files import atomic_path

TEMPLATE = Path(__file__).with_name("gallery.html.jinja")
STATE = "gallery.json"
REFRESH_SECONDS = 10


class Shown(NamedTuple):
    """A video on the page."""

    path: str
    """Path of the file, relative to the folder of the page."""
    caption: str
    name: str
    """Small text below the caption."""


def update_gallery(
    folder: Path, title: str, videos: list[Shown] | None = None, figures: dict[str, str] | None = None, *, final: bool
) -> Path:
    """Write ``index.html`` with a section in place of the one of the same title, and return its path.

    The sections are kept in ``gallery.json``, so that several commands share a page; the newest is the first.

    Args:
        folder: Folder of the page.
        title: Title of the section.
        videos: Videos of the section.
        figures: Table of the section.
        final: Whether nothing is to follow; otherwise the page reloads itself.
    """
    state = folder / STATE
    try:
        sections = json.loads(state.read_text()) if state.exists() else {}
    except ValueError as error:
        raise UserError(f"'{state}' is damaged ({error}): delete it to begin a new page.") from error
    sections.pop(title, None)
    sections = {title: {"videos": videos or [], "figures": figures or {}}, **sections}
    with atomic_path(state) as partial:
        partial.write_text(json.dumps(sections))
    page = folder / "index.html"
    with atomic_path(page) as partial:
        partial.write_text(render(sections, None if final else REFRESH_SECONDS), encoding="utf-8")
    return page


def render(sections: dict[str, dict[str, object]], refresh: int | None) -> str:
    """Return the page, which refers to no other files than the videos.

    Args:
        sections: For each title its `videos` and `figures`.
        refresh: Seconds after which the page reloads itself.
    """
    template = Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)
    return template.render(sections=sections, refresh=refresh)
