import base64
import io
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data.prepare.dropped import Dropped
from data.prepare.plots import bar_chart, histogram
from data.prepare.report import MAX_CLIPS, MAX_EXAMPLES, KeptRow, write_report

MARKUP = "<script>alert('x')</script> & \"more\""
DROPPED = [
    ("near-static (frames differ by 0.12 grey levels; min_motion is 0.5)", 3.5),
    ("near-static (frames differ by 0.31 grey levels; min_motion is 0.5)", 7.0),
    ("does not decode (Invalid data (twice))", None),
    ("too short", None),
    (f"strange {MARKUP}", 0.0),
]


class Page(HTMLParser):
    """The tags, text, images and table rows of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.text, self.rows, self.in_cell = [], [], "", [], False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            kind, content = dict(attributes)["src"].split(",")
            assert kind == "data:image/png;base64"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(content, validate=True))).convert("RGB"))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, text):
        self.text += text
        if self.in_cell:
            self.rows[-1][-1] += text


def kept_row(number, **changes):
    row = KeptRow(
        key=f"{number:06d}",
        source=f"{number // 2}.mp4",
        caption=f"caption of clip {number}",
        seconds=2.0,
        video_seconds=2.0 + number % 7,
        video_width=64,
        video_height=48,
    )
    return row._replace(**changes)


def drop(*reasons):
    return [Dropped(f"bad{i}.mp4", start, reason) for i, (reason, start) in enumerate(reasons)]


def test_the_report_counts_every_reason_and_shows_examples(tmp_path):
    path = write_report(tmp_path, [kept_row(i) for i in range(30)], drop(*DROPPED), {"size": 64, "min_motion": 0.5})
    page = Page(path)
    assert path.name == "report.html"
    assert list(tmp_path.iterdir()) == [path]
    assert "30 clips kept, 5 clips or videos dropped" in page.text
    counts = {line[0]: line[1:3] for line in page.rows if len(line) == 4}
    assert counts["near-static"] == ["2", "40.0%"]
    assert {counts[name][0] for name in ("does not decode", "too short", f"strange {MARKUP}")} == {"1"}
    assert "bad0.mp4 at 3.5 s: frames differ by 0.12 grey levels; min_motion is 0.5" in page.text
    assert "bad2.mp4: Invalid data (twice)" in page.text
    assert ["min_motion", "0.5"] in page.rows
    assert "15 sources" in page.text


def test_plots_are_embedded_and_not_empty(tmp_path):
    page = Page(write_report(tmp_path, [kept_row(i) for i in range(30)], [], {}))
    assert len(page.images) == 3
    for image in page.images:
        assert min(image.size) > 100
        assert len(image.getcolors(1 << 24)) > 10
    assert "Nothing was dropped." in page.text


def test_names_captions_reasons_and_settings_are_escaped(tmp_path):
    kept = [kept_row(0, caption=MARKUP, source=f"{MARKUP}.mp4", key=MARKUP)]
    dropped = [Dropped(MARKUP, 1.0, f"does not decode ({MARKUP})")]
    page = Page(write_report(tmp_path, kept, dropped, {MARKUP: MARKUP}))
    assert not {"script", "b", "i"} & set(page.tags)
    assert page.text.count(MARKUP) == 7


def test_nothing_kept(tmp_path):
    page = Page(write_report(tmp_path, [], drop(*DROPPED), {"size": 64}))
    assert "0 clips kept" in page.text
    assert page.images == []
    assert "too short" in page.text


def test_the_report_of_many_clips_is_small(tmp_path):
    kept, dropped = [kept_row(i) for i in range(5000)], drop(*[("too short (1 s)", None)] * 5000)
    path = write_report(tmp_path, kept, dropped, {})
    assert path.stat().st_size < 300_000
    page = Page(path)
    assert page.tags.count("li") == MAX_EXAMPLES
    assert sum("caption of clip" in line[2] for line in page.rows if len(line) == 5) == MAX_CLIPS
    assert "4999.mp4" not in page.text
    assert "caption of clip 4999" in page.text


def test_any_script_and_invalid_characters_are_written(tmp_path):
    page = Page(write_report(tmp_path, [kept_row(0, source="a\udcff.mp4", caption="猫 🐕 é")], [], {}))
    assert "猫 🐕 é" in page.text
    assert "a?.mp4" in page.text


def height_of_bars(png):
    """Return the number of pixels in the bars' colour, for each column of the image."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return (np.abs(pixels - [0x2F, 0x6F, 0x9F]).max(axis=-1) < 8).sum(axis=0)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0 + 1e-9] * 50, [3, 4], list(range(200)), [0.5, 1e5], [0]])
def test_every_histogram_can_be_drawn(values):
    assert height_of_bars(histogram(values, "seconds")).max() > 100


def test_equally_frequent_integers_have_bars_of_equal_height():
    heights = height_of_bars(histogram(list(range(1, 101)) * 3, "words"))
    inside = np.flatnonzero(heights > 5)[5:-30]  # the last bar may cover fewer integers
    assert np.quantile(heights[inside], 0.1) > 0.9 * heights.max()


def test_rare_names_are_combined_in_one_bar():
    counts = Counter({f"{i}×{i}": 100 - i for i in range(30)})
    few, many = (
        Image.open(io.BytesIO(bar_chart(Counter(["64×64"]), "size"))),
        Image.open(io.BytesIO(bar_chart(counts, "size"))),
    )
    assert 100 < few.height < many.height < 800
