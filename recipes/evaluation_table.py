"""The rows of an evaluation for people: a table, and a sheet of pictures."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mobile_runtime.pictures import FONT_SIZE, INK, MARGIN, PAPER
from recipes.features import Clip, Features

Row = dict[str, Any]
LINE = FONT_SIZE + 4


def _judged(figure: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in figure["interval_95"])
    return f"{100 * figure['value']:.1f} ({low:.1f} to {high:.1f})"


def _number(digits: int) -> Callable[[dict[str, Any]], str]:
    return lambda figure: f"{figure['value']:.{digits}f}"


# Figure: its heading, and how it is written.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "judged": ("judged %", _judged),
    "psnr_db": ("PSNR dB", _number(2)),
    "ssim": ("SSIM", _number(4)),
    "latent_snr_db": ("latent SNR dB", _number(2)),
    "clip_score": ("CLIP score", _number(2)),
    "cmmd": ("CMMD", _number(3)),
    "fid": ("FID", _number(3)),
    "kid": ("KID x1000", lambda figure: f"{1000 * figure['value']:.3f}"),
}
AGAINST = ("psnr_db", "ssim", "latent_snr_db")
"""The figures that compare a picture with the reference's."""


def as_table(rows: Sequence[Row], pictures: int, features: Features | None) -> str:
    """One line a row; the figures that no row has are told below, with why."""
    shown = [name for name in FIGURES if any("not_run" not in row["figures"][name] for row in rows)]
    table = [
        ["stage", "pixels", "steps", "guidance", "parameters M", "GMACs"]
        + [FIGURES[name][0] for name in shown]
    ]
    for row in rows:
        schedule = row["schedule"]
        table.append(
            [
                row["stage"],
                "x".join(map(str, row["size"])),
                f"{schedule['steps']}",
                f"{schedule['guidance_scale']:g}" if schedule["guidance_scale"] else "-",
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['macs_per_picture'] / 1e9:.2f}",
                *(_cell(row, name) for name in shown),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            # Words to the left, numbers to the right.
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return "\n".join([*lines, "", *_notes(rows, shown, pictures, features)])


def _cell(row: Row, name: str) -> str:
    figure = row["figures"][name]
    if "not_run" in figure:
        return "-"
    text = "equal" if figure.get("equal") else FIGURES[name][1](figure)
    return text if row["same_schedule"] or name not in AGAINST else f"{text}*"


def _notes(
    rows: Sequence[Row], shown: Sequence[str], pictures: int, features: Features | None
) -> list[str]:
    notes = [
        f"{pictures} pictures a row; GMACs: multiply-adds of one picture, in thousand millions"
    ]
    if not all(row["same_schedule"] for row in rows):
        notes.append(
            "* drawn by another schedule than the reference, so another picture is no fault"
        )
    if len({tuple(row["size"]) for row in rows}) > 1:
        notes.append("PSNR, SSIM and latent SNR are against the first row of the same size")
    if "cmmd" in shown:
        against = next(
            row["figures"]["cmmd"]["against"]
            for row in rows
            if "not_run" not in row["figures"]["cmmd"]
        )
        notes.append(
            f"CMMD against the {against}{'' if against == 'reference' else ' of the folder'}"
        )
    if "fid" in shown and features is not None:
        other = ", not comparable with Inception's" if isinstance(features, Clip) else ""
        notes.append(f"FID and KID on features of {features.info['id']}{other}")
    missing: dict[str, list[str]] = {}
    for name, (heading, _) in FIGURES.items():
        if name not in shown:
            reason = rows[-1]["figures"][name]["not_run"]
            missing.setdefault(reason, []).append(heading.removesuffix(" %").removesuffix(" dB"))
    return notes + [f"not run: {', '.join(names)} ({why})" for why, names in missing.items()]


def stage_sheet(
    rows: Sequence[np.ndarray], labels: Sequence[str], captions: Sequence[str], scale: int = 1
) -> np.ndarray:
    """Rows of pictures (N, H, W, 3), a label before each, and the captions above: (H, W, 3) uint8.

    scale: whole enlargement of the largest, without smoothing; smaller ones fill as much room.
    """
    height, width = (scale * max(row.shape[axis] for row in rows) for axis in (1, 2))
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [textwrap.wrap(text, max(8, int(width / font.getlength("n")))) for text in captions]
    top = MARGIN + LINE * max(len(lines) for lines in wrapped)
    left = 2 * MARGIN + int(max(font.getlength(label) for label in labels))
    cell_width, cell_height = width + MARGIN, height + MARGIN
    size = (left + len(captions) * cell_width, top + len(rows) * cell_height + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        for number, words in enumerate(lines):
            pen.text((left + column * cell_width, MARGIN // 2 + number * LINE), words, INK, font)
    for line, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + MARGIN // 2 + line * cell_height
        pen.text((MARGIN, y + height // 2 - LINE // 2), label, INK, font)
        for column, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (left + column * cell_width, y))
    return np.asarray(sheet)
