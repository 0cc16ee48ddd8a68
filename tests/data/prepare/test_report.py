import base64
import io
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data.prepare.report import CAPTIONS, EXAMPLES, bars, histogram, write_report

EVIL = "<script>alert('x')</script> & \"more\""
DROPPED = [
    ("near-static (frames differ by 0.12 grey levels; min_motion is 0.5)", 3.5),
    ("near-static (frames differ by 0.31 grey levels; min_motion is 0.5)", 7.0),
    ("does not decode (Invalid data (twice))", None),
    ("too short", None),
    (f"strange {EVIL}", 0.0),
]


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.pictures, self.text, self.rows, self.in_cell = [], [], "", [], False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            kind, content = dict(attributes)["src"].split(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(content, validate=True))).convert("RGB"))
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


def row(number, **changes):
    told = {
        "caption": f"caption of clip {number}",
        "seconds": 2,
        "video_seconds": 2 + number % 7,
        "width": 64,
        "height": 48,
    }
    return {"key": f"{number:06d}", "source": f"{number // 2}.mp4", **told, **changes}


def drop(*reasons):
    return [{"source": f"bad{i}.mp4", "start": start, "reason": reason} for i, (reason, start) in enumerate(reasons)]


def test_the_report_counts_every_reason_and_shows_examples(tmp_path):
    path = write_report(tmp_path, [row(i) for i in range(30)], drop(*DROPPED), {"size": 64, "min_motion": 0.5})
    page = Page(path)
    assert path.name == "report.html"
    assert list(tmp_path.iterdir()) == [path]
    assert "30 clips kept, 5 clips or videos dropped" in page.text
    counts = {line[0]: line[1:3] for line in page.rows if len(line) == 4}
    assert counts["near-static"] == ["2", "40.0%"]
    assert {counts[name][0] for name in ("does not decode", "too short", f"strange {EVIL}")} == {"1"}
    assert "bad0.mp4 at 3.5 s: frames differ by 0.12 grey levels; min_motion is 0.5" in page.text
    assert "bad2.mp4: Invalid data (twice)" in page.text
    assert ["min_motion", "0.5"] in page.rows
    assert "15 sources" in page.text


def test_the_pictures_are_inside_and_show_something(tmp_path):
    page = Page(write_report(tmp_path, [row(i) for i in range(30)], [], {}))
    assert len(page.pictures) == 3
    for picture in page.pictures:
        assert min(picture.size) > 100
        assert len(picture.getcolors(1 << 24)) > 10
    assert "Nothing was dropped." in page.text


def test_text_from_elsewhere_is_escaped(tmp_path):
    kept = [row(0, caption=EVIL, source=f"{EVIL}.mp4", key=EVIL)]
    dropped = [{"source": EVIL, "start": 1.0, "reason": f"does not decode ({EVIL})"}]
    page = Page(write_report(tmp_path, kept, dropped, {EVIL: EVIL}))
    assert not {"script", "b", "i"} & set(page.tags)
    assert page.text.count(EVIL) == 7


def test_nothing_kept(tmp_path):
    page = Page(write_report(tmp_path, [], drop(*DROPPED), {"size": 64}))
    assert "0 clips kept" in page.text
    assert page.pictures == []
    assert "too short" in page.text


def test_a_large_corpus_makes_a_small_report(tmp_path):
    kept, dropped = [row(i) for i in range(5000)], drop(*[("too short (1 s)", None)] * 5000)
    path = write_report(tmp_path, kept, dropped, {})
    assert path.stat().st_size < 300_000
    page = Page(path)
    assert page.tags.count("li") == EXAMPLES
    assert sum("caption of clip" in line[2] for line in page.rows if len(line) == 5) == CAPTIONS
    assert "4999.mp4" not in page.text
    assert "caption of clip 4999" in page.text


def test_names_and_captions_of_any_script_and_broken_ones_are_written(tmp_path):
    page = Page(write_report(tmp_path, [row(0, source="a\udcff.mp4", caption="猫 🐕 é")], [], {}))
    assert "猫 🐕 é" in page.text
    assert "a?.mp4" in page.text


def height_of_bars(png):
    """How many pixels of each column are painted in the colour of the bars."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return (np.abs(pixels - [0x2F, 0x6F, 0x9F]).max(axis=-1) < 8).sum(axis=0)


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0 + 1e-9] * 50, [3, 4], list(range(200)), [0.5, 1e5], [0]])
def test_every_histogram_can_be_drawn(values):
    assert height_of_bars(histogram(values, "seconds")).max() > 100


def test_whole_numbers_as_often_as_each_other_make_bars_of_one_height():
    heights = height_of_bars(histogram(list(range(1, 101)) * 3, "words"))
    inside = np.flatnonzero(heights > 5)[5:-30]  # the last bar may hold fewer numbers
    assert np.quantile(heights[inside], 0.1) > 0.9 * heights.max()


def test_rare_sizes_share_a_bar():
    counts = Counter({f"{i}×{i}": 100 - i for i in range(30)})
    few, many = Image.open(io.BytesIO(bars(Counter(["64×64"]), "size"))), Image.open(io.BytesIO(bars(counts, "size")))
    assert 100 < few.height < many.height < 800
