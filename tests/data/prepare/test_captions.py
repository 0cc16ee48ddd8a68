import unicodedata

import ftfy.bad_codecs  # noqa: F401  (registers the sloppy encodings)
import pytest

from data.prepare.captions import clean_caption
from data.prepare.filters import Filters

CLEAN = [
    "A dog runs.",
    "l’été, “quoted”, it's a well-known 'fact' – isn't it?",
    "Ein Mädchen läuft über die Straße",
    "一只红色的猫在跑",
    "собака бежит по снегу",
    "می\u200cروم",
    "a family 👨\u200d👩\u200d👧 waves 🏳️\u200d🌈",
    "x < 5 and y > 3, i <3 you",
    "fish & chips at Q&notes",
    "a 4K TV in a shop that sells stock footage",
    "The HD television (a big one)",
    "#1 fan, 100% happy [laughs]",
    "½ of 5 m² … ™",
    "SÃO PAULO, ÃNGELA & 5 Å",
    "“it’s ‘fine’” – ‚so‘ «là» 「です」",
    "猫が走る、速い！（二匹）",
]


@pytest.mark.parametrize("caption", CLEAN)
def test_a_clean_caption_is_unchanged(caption):
    assert clean_caption(caption, Filters()) == (caption, None)


@pytest.mark.parametrize(
    ("found", "cleaned"),
    [
        ("  two\n\tlines\u00a0here \r\n", "two lines here"),
        ("AT&amp;T &amp;amp; friends &lt;b&gt;walk&lt;/b&gt; &#128021;", "AT&T & friends walk 🐕"),
        ("<p>A <b>red</b>, big ball</p><p>rolls<br/>away</p>", "A red, big ball rolls away"),
        ('a <a href="http://x.org/?a=1">cat</a> sleeps', "a cat sleeps"),
        ("a cat (https://x.org/a?b=1&amp;c=2) sleeps www.x.org", "a cat sleeps"),
        ("\ufeffze\u200bro\u00ad wi\x00dth \ud83d\u202e", "zero width"),
        ("Cafe\u0301", unicodedata.normalize("NFC", "Cafe\u0301")),
        ("A dog runs, 4K, stock footage.", "A dog runs"),
        ("Aerial view of a city. Royalty-free stock video.", "Aerial view of a city."),
        ("Waves (HD) | Shutterstock", "Waves"),
        ("Stock footage of a red panda", "a red panda"),
        ("4K video: waves at sunset", "waves at sunset"),
        ("CafÃ© in MÃ¼nchen", "Café in München"),
        ("â€œhelloâ€\x9d â€“ a dogâ€™s life", "“hello” – a dog’s life"),
        ("cafÃƒÂ© encoded twice", "café encoded twice"),
        ("caf&Atilde;&copy; &#xc3;&#xa9;t&eacute;", "café été"),
        ("\ud83d\udc15 runs", "🐕 runs"),
        ("\x93quoted\x94 and it\x92s fine", "“quoted” and it’s fine"),
        ("ï»¿a byte order mark", "a byte order mark"),
        ("ti\x00me\x07 \x1b[31mred\x1b[0m \x7f", "time red"),
        ("ﬁsh and coﬀee", "fish and coffee"),
    ],
)
def test_captions_are_cleaned(found, cleaned):
    assert clean_caption(found, Filters()) == (cleaned, None)


@pytest.mark.parametrize("encoding", ["latin-1", "sloppy-windows-1252"])
@pytest.mark.parametrize("caption", ["кошка спит на снегу", "日本の海", "🐕 runs", "Größe – “très” déjà vu", "mañana"])
def test_text_decoded_with_a_wrong_encoding_is_repaired(caption, encoding):
    wrong = caption.encode("utf-8").decode(encoding)
    assert wrong != caption
    assert clean_caption(wrong, Filters()) == (caption, None)


@pytest.mark.parametrize("caption", ["", " \n", "...", "🐕", "https://x.org/video", "<b></b>", "Stock footage"])
def test_text_without_words_is_no_caption(caption):
    assert clean_caption(caption, Filters()) == ("", "no caption")


def test_captions_outside_the_limits_are_dropped_with_a_reason():
    filters = Filters(min_words=3, max_words=6)
    assert clean_caption("a dog – !", filters)[1] == "caption too short (2 words; min_words is 3)"
    assert clean_caption("a dog runs and jumps", filters)[1] is None
    assert (
        clean_caption("one two three four five six seven", filters)[1] == "caption too long (7 words; max_words is 6)"
    )
    assert clean_caption("猫在跑", filters)[1] is None
    assert clean_caption("一只红色的猫在跑", filters)[1].startswith("caption too long (8 words")


@pytest.mark.parametrize("part", ["<!--", "<a =", ", 4k", " - ", "(", "&amp;", "amp;", "stock ", "Ã", "â€", "ÃƒÂ"])
def test_cleaning_takes_linear_time(part):
    clean_caption(f"&{part * 20_000}", Filters())  # would take minutes in quadratic time
