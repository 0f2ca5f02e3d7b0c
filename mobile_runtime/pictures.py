"""Pictures on disk: PNG files that say how they were made, contact sheets, comparisons."""

import errno
import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mobile_runtime.errors import UserError
from mobile_runtime.parity import picture_psnr_db

PAPER, INK = (255, 255, 255), (40, 40, 40)
MARGIN = 8
FONT_SIZE = 13
# Differences of one level in 255 are invisible; a comparison shows them this many times larger.
AMPLIFICATION = 10


def write_png(path: Path, picture: np.ndarray, text: dict[str, str] | None = None) -> None:
    """Write (H, W, 3) uint8, with `text` as the file's metadata; whole or not at all.

    Raises UserError, which names the file, where the system refuses it.
    """
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "png", pnginfo=info)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(stream.getvalue())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        hint = "; free space and run again" if error.errno == errno.ENOSPC else ""
        raise UserError(f"cannot write {path}: {error.strerror}{hint}") from error


def contact_sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int | None = None,
    scale: int = 1,
) -> np.ndarray:
    """Lay pictures of one size on a sheet, each above its caption; (H, W, 3) uint8.

    columns: None makes the sheet about square. scale: whole enlargement, without smoothing.
    """
    height, width = (scale * side for side in pictures[0].shape[:2])
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    font = ImageFont.load_default(FONT_SIZE)
    letters = max(8, int(width / font.getlength("n")))
    wrapped = [textwrap.wrap(caption, letters) or [""] for caption in captions]
    line = FONT_SIZE + 4
    text_height = line * max(len(lines) for lines in wrapped)
    cell_width, cell_height = width + MARGIN, height + text_height + 2 * MARGIN
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * cell_width, MARGIN + row * cell_height
        large = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (x, y))
        for number, words in enumerate(lines):
            draw.text((x, y + height + MARGIN // 2 + number * line), words, INK, font)
    return np.asarray(sheet)


def sheet_scale(height: int) -> int:
    """The enlargement that makes small pictures easy to see on a sheet."""
    return max(1, 192 // height)


def side_by_side(reference: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Reference, picture, and their difference around grey, amplified; with the PSNR."""
    difference = picture.astype(np.int16) - reference.astype(np.int16)
    shown = np.clip(128 + AMPLIFICATION * difference, 0, 255).astype(np.uint8)
    psnr = picture_psnr_db(reference, picture)
    told = "equal" if math.isinf(psnr) else f"{psnr:.1f} dB"
    return contact_sheet(
        [reference, picture, shown],
        ["reference", f"this: {told}", f"difference x{AMPLIFICATION}"],
        columns=3,
        scale=sheet_scale(reference.shape[0]),
    )
