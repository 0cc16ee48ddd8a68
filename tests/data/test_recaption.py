import gzip
import json

import pytest

from data.recaption import recaption
from data.shards import ShardSet
from t2v.errors import UserError


def texts(folder):
    """Return txt and json of each sample."""
    shards = ShardSet(folder)
    found = {}
    for sample in shards.samples:
        members = shards.read(sample, "txt", "json")
        found[sample.key] = (members.get("txt", b"").decode(), json.loads(members.get("json", b"null")))
    return found


def test_captions_are_replaced_and_all_else_stays(make, tmp_path, capsys):
    samples = [make.video(f"{i:03d}") for i in range(6)]
    samples[1]["json"] = {"source": "long.mp4", "captions": ["old", "older"]}
    samples[5]["json"] = {"source": "long.mp4"}
    del samples[2]["json"], samples[3]["txt"], samples[4]["txt"], samples[4]["json"]
    shards = make.shards(tmp_path / "shards", samples)
    before = {sample.key: ShardSet(shards).read(sample, "mp4") for sample in ShardSet(shards).samples}
    table = tmp_path / "table.jsonl"
    rows = [
        {"path": "long.mp4", "caption": "a new <b>caption</b>"},
        {"path": "002", "caption": ["one", "two"]},
        {"path": "shard-000000.tar/003", "caption": "three"},
        {"path": "004.mp4", "caption": "four"},
        {"path": "gone", "caption": "x"},
        {"path": "000", "caption": 5},
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    recaption(str(shards), table)
    assert texts(shards) == {
        "000": ("caption of 000", {"source": "000"}),
        "001": ("a new caption", {"source": "long.mp4", "caption": "a new caption"}),
        "002": ("one", {"caption": "one", "captions": ["one", "two"]}),
        "003": ("three", {"source": "003", "caption": "three"}),
        "004": ("four", {"caption": "four"}),
        "005": ("a new caption", {"source": "long.mp4", "caption": "a new caption"}),
    }
    assert {sample.key: ShardSet(shards).read(sample, "mp4") for sample in ShardSet(shards).samples} == before
    printed = capsys.readouterr().out
    assert "new captions in 5 of 6 samples, in 2 shards" in printed
    assert "1 invalid row: table.jsonl line 6 (its caption is a number, not text); 1 no such sample: gone" in printed
    content = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    recaption(str(shards), table)
    assert {path.name: path.read_bytes() for path in shards.iterdir() if path.suffix == ".tar"} == content


def test_nothing_changes_after_an_error(make, tmp_path, tokens):
    shards = make.shards(tmp_path / "shards", [make.video(key) for key in "abc"], 2)
    table = tmp_path / "table.csv"
    table.write_text("path,caption\nz,x\n")
    content = {path.name: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(UserError, match="names no sample"):
        recaption(str(shards), table)
    table.write_text("path,caption\na,x\nc,x\n")
    (shards / "shard-000001.tar").write_bytes(content["shard-000001.tar"][:-12000])
    with pytest.raises(UserError, match="would lose that"):
        recaption(str(shards), table)
    assert (shards / "shard-000000.tar").read_bytes() == content["shard-000000.tar"]
    with pytest.raises(UserError, match="run predict of stage 1 again"):
        recaption(str(tokens), table)
    with (shards / "shard-000000.tar").open("rb") as tar, gzip.open(tmp_path / "other.tar.gz", "wb") as compressed:
        compressed.write(tar.read())
    with pytest.raises(UserError, match=r"other\.tar\.gz' is or has a compressed tar: unpack it"):
        recaption(str(tmp_path / "other.tar.gz"), table)


def test_names_may_be_spelt_in_several_ways(make, tmp_path):
    samples = [{**make.video("./a"), "json": {}}, {**make.video("cafe\u0301"), "json": {}}]
    shards = make.shards(tmp_path / "shards", samples)
    table = tmp_path / "table.csv"
    table.write_text("path,caption\na,one\ncaf\u00e9.mp4,two\n")
    recaption(str(shards), table)
    assert [txt for txt, _ in texts(shards).values()] == ["one", "two"]
