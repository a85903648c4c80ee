"""A contact sheet of edits: a row a pair, a column a setting, the true edit among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from forgedit.world.score import to_images

CELL = 96  # pixels
CAPTION = 380
HEADER = 18


def contact_sheet(columns: Mapping[str, Tensor], labels: Sequence[str], path: Path) -> None:
    """Write the sheet as PNG.

    columns: pictures by title, each [rows, 3, S, S] in [-1, 1]; labels: text beside each row
    """
    sheet = Image.new("RGB", (CELL * len(columns) + CAPTION, HEADER + CELL * len(labels)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pixels) in enumerate(columns.items()):
        draw.text((column * CELL + 3, 3), title[:16], fill="black")
        for row, image in enumerate(to_images(pixels)):
            cell = image.resize((CELL - 2, CELL - 2), Image.Resampling.NEAREST)
            sheet.paste(cell, (column * CELL, HEADER + row * CELL))
    for row, label in enumerate(labels):
        draw.multiline_text((CELL * len(columns) + 8, HEADER + row * CELL + 30), label, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
