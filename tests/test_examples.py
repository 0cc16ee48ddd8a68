"""The commands of the tutorial and the cells of the notebook run, in order, as a reader runs them."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.documents import ROOT, blocks, commands

pytestmark = pytest.mark.slow

SMALLER = {
    "-m data.examples.shapes": ["--train_clips", "24", "--val_clips", "6"],
    "cli.py fit": ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "1"],
    "cli.py fit --config configs/vqvae": ["--model.quantize_from_step", "2"],
}
"""Flags by the beginning of the commands that get them."""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Return a folder with the code, in which a run writes nothing to the repository."""
    for name in ("callbacks", "configs", "data", "t2v", "cli.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_the_commands_of_the_tutorial(checkout):
    lines = [words for script in blocks(ROOT / "docs/tutorial.md", "sh") for words in commands(script)]
    lines = [words for words in lines if words[0] == "python"]
    assert len(lines) >= 7
    for _, *words in lines:
        flags = [flag for start, added in SMALLER.items() if " ".join(words).startswith(start) for flag in added]
        result = subprocess.run([sys.executable, *words, *flags], cwd=checkout, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(words)}: {result.stderr[-2000:]}"
    assert len(list((checkout / "runs/demo/videos").glob("*.mp4"))) == 2


def test_the_notebook(checkout):
    notebook = nbformat.read(ROOT / "docs/examples/two_clips.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)  # `make docs` runs it
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(checkout)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert any("torch.Size([3, 16, 3, 32, 32])" in str(output) for output in outputs)
