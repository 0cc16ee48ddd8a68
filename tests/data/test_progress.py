"""Progress of long steps where the standard error is no terminal."""

import pytest

from data.progress import ProgressBar


def test_a_short_step_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in ProgressBar(range(1000), desc="drawing clips", unit="clip"):
        pass
    assert capsys.readouterr().err == ""


def test_lines_in_place_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(desc="packing", total=3, unit="shard", delay=0, mininterval=0) as bar:
        bar.update(2)
        bar.update(1)
    lines = capsys.readouterr().err.split("\n")
    assert lines[:2] == ["packing 0/3, ? left", "packing 2/3, 00:00 left"]
    assert "packing 3/3, 00:00 left" in lines
    assert not any("\r" in line for line in lines)
