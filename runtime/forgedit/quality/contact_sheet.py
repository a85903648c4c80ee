"""A sweep on one page: rows strategies, columns strengths, beside the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from forgedit.config import EditConfig
from forgedit.session import Edit

SHORT_SIDE = 192  # pixels of each picture on the sheet; a 64-pixel picture is enlarged by a whole factor
MARGIN = 12
LABEL_WIDTH = 150
TEXT_SIZE = 17
LINE = 22
INK, MARK = "black", "#d00000"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def strength(config: EditConfig) -> str:
    """The strength in words: what the sheet's columns are called."""
    if config.blend == "vs":
        return f"gamma {config.gamma:g}"
    return f"identity {config.identity_weight:g}, edit {config.edit_weight:g}"


def contact_sheet(
    edits: Sequence[Edit], original: Image.Image, caption: str, target: str, chosen: Edit | None = None
) -> Image.Image:
    """Draw the sheet, RGB on white; a cell without an edit stays empty.

    edits: of one size, at least one; original: the photo as edited
    chosen: shown again under the original, and framed where it stands in the grid
    """
    rows = list(dict.fromkeys(_row(edit.config) for edit in edits))
    columns = list(dict.fromkeys(strength(edit.config) for edit in edits))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    font = ImageFont.load_default(size=TEXT_SIZE)
    scale = SHORT_SIDE / min(original.size)
    width, height = (round(side * scale) for side in original.size)
    left = MARGIN + width + MARGIN + LABEL_WIDTH
    sheet_width = left + len(columns) * (width + MARGIN)
    header = _wrap(draw, f"Caption: {caption}", font, sheet_width - 2 * MARGIN)
    header += _wrap(draw, f"Target: {target}", font, sheet_width - 2 * MARGIN)
    titles = [_wrap(draw, title, font, width) for title in columns]
    top = MARGIN + (len(header) + max(map(len, titles))) * LINE + MARGIN
    panel = [("original", original)] if chosen is None else [("original", original), ("the edit", chosen.image)]
    cell_height = height + MARGIN
    bottom = top + max(len(rows) * cell_height, len(panel) * (cell_height + LINE) - LINE)
    sheet = Image.new("RGB", (sheet_width, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((MARGIN, MARGIN), "\n".join(header), INK, font, spacing=LINE - TEXT_SIZE)

    def put(image: Image.Image, x: int, y: int, framed: bool = False) -> None:
        sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        if framed:
            draw.rectangle((x - 4, y - 4, x + width + 3, y + height + 3), outline=MARK, width=3)

    for index, (title, image) in enumerate(panel):
        y = top + index * (cell_height + LINE)
        draw.text((MARGIN, y - LINE - 4), title, INK, font)
        put(image, MARGIN, y, framed=index == 1)
    for column, words in enumerate(titles):
        y = top - len(words) * LINE - 4
        draw.multiline_text((left + column * (width + MARGIN), y), "\n".join(words), INK, font)
    for index, row in enumerate(rows):
        words = _wrap(draw, _label(row, rows), font, LABEL_WIDTH - MARGIN)
        draw.multiline_text((left - LABEL_WIDTH, top + index * cell_height), "\n".join(words), INK, font)
    for edit in edits:
        x = left + columns.index(strength(edit.config)) * (width + MARGIN)
        put(edit.image, x, top + rows.index(_row(edit.config)) * cell_height, framed=edit is chosen)
    return sheet


def _row(config: EditConfig) -> EditConfig:
    """What edits of one row share: everything but the strength."""
    return replace(config, gamma=0.0, identity_weight=0.0, edit_weight=0.0)


def _label(row: EditConfig, rows: Sequence[EditConfig]) -> str:
    """The strategy, and whatever else the rows differ in."""
    names = ("keep", "blend", "num_steps", "guidance_scale", "seed")
    differing = [name for name in names if len({getattr(other, name) for other in rows}) > 1]
    return "\n".join([row.strategy, *(f"{name} {getattr(row, name)}" for name in differing)])


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels, between words where that is possible."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            while draw.textlength(word, font) > width and len(word) > 1:
                cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or draw.textlength(word[:n], font) <= width)
                lines += [line] * bool(line) + [word[:cut]]
                line, word = "", word[cut:]
            longer = f"{line} {word}".strip()
            if line and draw.textlength(longer, font) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
