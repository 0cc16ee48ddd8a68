"""What a comparison leaves behind: `report.json`, a table, and held-out frames side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

COLUMNS = {
    "parameters": "{:,}",
    "steps": "{:,}",
    "seconds": "{:.0f}",
    "tokens_per_frame": "{:.0f}",
    "bits_per_pixel": "{:.4f}",
    "psnr": "{:.2f} dB",
    "ssim": "{:.3f}",
    "mobilenet": "{:.4f}",
    "flicker": "{:.4f}",
    "codebook_usage": "{:.1%}",
}
"""What the table shows of a result, and how."""


def write_report(out: Path, models: Sequence[str]) -> None:
    """Write `report.json` and `frames.png` of all results there are, and print the table.

    Args:
        out: folder with a folder of each result, and with the frames of the footage.
        models: how the folders' names begin, in the order of the rows.
    """
    found = [path for name in models for path in sorted(out.glob(f"{name}*/result.json"))]
    results = [json.loads(path.read_text()) for path in found]
    write(out / "report.json", json.dumps(results, indent=1))
    print("|".join(["", "model", *(name.replace("_", " ") for name in COLUMNS), ""]))
    print("|---" * (1 + len(COLUMNS)) + "|")
    for result in results:
        cells = (form.format(result[name]) if name in result else "–" for name, form in COLUMNS.items())
        print("|".join(["", result["name"], *cells, ""]))
    _draw_frames(out / "frames.png", [out, *(path.parent for path in found)])


def middle_frames(clips: UInt8[Tensor, "b t c h w"]) -> UInt8[Tensor, "n c h w"]:
    """The middle frame of the first few clips."""
    return clips[:4, clips.shape[1] // 2]


def save_frames(folder: Path, frames: UInt8[Tensor, "n c h w"]) -> None:
    """Keep frames for the picture.

    Args:
        folder: of the result, or of the comparison for the footage.
        frames: as `middle_frames` chooses them.
    """
    partial = folder / "frames.pt.partial"
    torch.save(frames.clone(), partial)
    partial.replace(folder / "frames.pt")


def write(path: Path, text: str) -> None:
    """Write a file that appears only when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _draw_frames(path: Path, folders: Sequence[Path]) -> None:
    """The same held-out frames in a column a folder, the footage first."""
    columns = [torch.load(folder / "frames.pt") for folder in folders]
    names = ["footage", *(folder.name for folder in folders[1:])]
    rows = torch.stack(columns, dim=1)  # (n, columns, c, h, w)
    grid = to_pil_image(make_grid(rows.flatten(0, 1), nrow=len(columns), padding=2))
    picture = Image.new("RGB", (grid.width, grid.height + 14))
    picture.paste(grid, (0, 14))
    for i, name in enumerate(names):
        ImageDraw.Draw(picture).text((4 + i * (rows.shape[-1] + 2), 1), name, fill="white")
    partial = path.with_name(f"{path.name}.partial")
    picture.save(partial, "PNG")
    partial.replace(path)
