"""The results of a comparison: `report.json`, a printed table, and a picture of held-out frames."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from t2v.files import atomic_path

COLUMNS = {
    "parameters": "{:,}",
    "steps": "{:,}",
    "seconds": "{:.0f}",
    "tokens_per_frame": "{:.0f}",
    "bits_per_pixel": "{:.4f}",
    "psnr": "{:.2f} dB",
    "ssim": "{:.3f}",
    "lpips": "{:.4f}",
    "mobilenet": "{:.4f}",
    "flicker": "{:.4f}",
    "codebook_usage": "{:.1%}",
}
"""Columns of the table and their format."""


def write_report(out: Path, models: Sequence[str]) -> None:
    """Write `report.json` and `frames.png` with all results found, and print the table.

    Args:
        out: Folder that contains a folder for each result, and the original frames.
        models: First parts of the folders' names, in the order of the rows.
    """
    found = [path for name in models for path in sorted(out.glob(f"{name}*/result.json"))]
    results = [json.loads(path.read_text()) for path in found]
    write(out / "report.json", json.dumps(results, indent=1))
    print_table({"model": "{}", **COLUMNS}, [{**result, "model": result["name"]} for result in results])
    _draw_frames(out / "frames.png", [out, *(path.parent for path in found)])


def print_table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table.

    Args:
        columns: Keys of the rows and the format of their values.
        rows: Values by key; one that is missing is printed as a dash.
    """
    print("|".join(["", *(name.replace("_", " ") for name in columns), ""]))
    print("|---" * len(columns) + "|")
    for row in rows:
        print("|".join(["", *(form.format(row[name]) if name in row else "–" for name, form in columns.items()), ""]))


def middle_frames(clips: UInt8[Tensor, "b t c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Return the middle frame of the first four clips."""
    return clips[:4, clips.shape[1] // 2]


def save_frames(folder: Path, frames: UInt8[Tensor, "n c h w"]) -> None:
    """Save frames for the picture.

    Args:
        folder: Folder of the result; for the original frames, the folder of the comparison.
        frames: The frames, as `middle_frames` returns them.
    """
    with atomic_path(folder / "frames.pt") as temporary:
        torch.save(frames.clone(), temporary)


def write(path: Path, text: str) -> None:
    """Write a text file that appears only when it is complete."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _draw_frames(path: Path, folders: Sequence[Path]) -> None:
    """Draw the held-out frames in one column per folder, the original frames first."""
    columns = [torch.load(folder / "frames.pt") for folder in folders]
    names = ["original", *(folder.name for folder in folders[1:])]
    rows = torch.stack(columns, dim=1)  # (n, columns, c, h, w)
    grid = to_pil_image(make_grid(rows.flatten(0, 1), nrow=len(columns), padding=2))
    picture = Image.new("RGB", (grid.width, grid.height + 14))
    picture.paste(grid, (0, 14))
    for i, name in enumerate(names):
        ImageDraw.Draw(picture).text((4 + i * (rows.shape[-1] + 2), 1), name, fill="white")
    with atomic_path(path) as temporary:
        picture.save(temporary)
