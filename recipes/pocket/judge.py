"""The judge: reads objects, colours, sizes, places and relations back from a picture.

Plain computer vision with no learning. The background is the palette colour that most pixels
show; what differs from it falls into connected blobs; each blob's colour is its palette colour,
its shape the drawn template that overlaps it best, its size the template's radius. An attribute
that the caption left open is not demanded, but a picture must always hold exactly as many objects
as the scene and nothing else. A picture of another size than 64x64 is first resized to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes.pocket.scenes import BACKGROUNDS, COLOURS, PLACES, SIZES, Object, Scene
from recipes.pocket.shapes import SHAPES, SIDE, coverage, unit_moments

COLOUR_TOLERANCE = 60.0
"""The RGB distance up to which a pixel counts as a palette colour."""
BACKGROUND_TOLERANCE = 40.0
BLOB_PIXELS = 9
"""Smaller specks are noise; a blob of this many pixels counts as an object."""
SOLID_SHARE = 0.8
"""The share of a blob's inner pixels, and of the background's, that must have their colour."""
MIN_OVERLAP = 0.72
"""Intersection over union with the best template, below which a blob has no shape."""
SIZE_BOUND_PX = float(np.sqrt(SIZES["small"] * SIZES["large"]))
SIZE_RANGE_PX = (0.72 * SIZES["small"], 1.25 * SIZES["large"])
PLACE_TOLERANCE_PX = 6.5
ATTRIBUTES = ("count", "shape", "colour", "size", "place", "relation", "background")


@dataclass(frozen=True)
class Blob:
    """One thing that was found. `shape`, `colour` and `size` are None where nothing fits."""

    shape: str | None
    colour: str | None
    size: str | None
    x_px: float
    y_px: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str | None
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class Verdict:
    """What of the scene is in the picture, by attribute; `relation` and `place` where asked."""

    count: bool
    shape: bool
    colour: bool
    size: bool
    place: bool
    relation: bool
    background: bool

    @property
    def ok(self) -> bool:
        return all(getattr(self, name) for name in ATTRIBUTES)


def _nearest(rgb: NDArray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    names = list(palette)
    distances = np.linalg.norm(np.array([palette[n] for n in names], float) - rgb, axis=1)
    return names[int(distances.argmin())], float(distances.min())


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its 4-neighbours."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 4-connected parts of a mask, in reading order."""
    left = mask.copy()
    parts: list[NDArray[np.bool_]] = []
    while left.any():
        part = np.zeros_like(mask)
        part[np.unravel_index(int(left.argmax()), mask.shape)] = True
        size = 0
        while size != int(part.sum()):
            size = int(part.sum())
            part = _grow(part) & left
        parts.append(part)
        left &= ~part
    return parts


def _fit_shape(alpha: NDArray) -> tuple[str, float, float]:
    """The template that overlaps a soft mask best: (shape, radius in pixels, overlap)."""
    axis = np.arange(SIDE) + 0.5
    area = float(alpha.sum())
    x, y = float((alpha.sum(0) * axis).sum()) / area, float((alpha.sum(1) * axis).sum()) / area
    best = ("", 0.0, -1.0)
    for shape in SHAPES:
        unit_area, off_x, off_y = unit_moments(shape)
        radius = float(np.sqrt(area / unit_area))
        template = coverage(
            shape,
            np.array([x - off_x * radius]),
            np.array([y - off_y * radius]),
            np.array([radius]),
        )[0]
        overlap = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
        if overlap > best[2]:
            best = (shape, radius, overlap)
    return best


def _read_blob(image: NDArray, part: NDArray[np.bool_], ground: NDArray) -> Blob:
    body = part
    for _ in range(2):  # away from the soft edge, as far as the blob is thick enough
        inner = body & ~_grow(~body)
        body = inner if inner.sum() >= 6 else body
    ink = np.median(image[body], axis=0)
    colour, distance = _nearest(ink, COLOURS)
    true_ink = np.array(COLOURS[colour], float)
    solid = np.linalg.norm(image[body] - true_ink, axis=1) < COLOUR_TOLERANCE
    has_colour = distance < COLOUR_TOLERANCE and solid.mean() >= SOLID_SHARE
    # How far each pixel lies on the way from the background to the ink: its coverage.
    way = ink - ground
    alpha = np.clip((image - ground) @ way / max(float(way @ way), 1.0), 0, 1) * _grow(part)
    shape, radius, overlap = _fit_shape(alpha)
    axis = np.arange(SIDE) + 0.5
    _, off_x, off_y = unit_moments(shape)
    size = "small" if radius < SIZE_BOUND_PX else "large"
    sized = SIZE_RANGE_PX[0] <= radius <= SIZE_RANGE_PX[1]
    return Blob(
        shape if overlap >= MIN_OVERLAP else None,
        colour if has_colour else None,
        size if sized else None,
        float((alpha.sum(0) * axis).sum() / alpha.sum()) - off_x * radius,
        float((alpha.sum(1) * axis).sum() / alpha.sum()) - off_y * radius,
        overlap,
    )


def at_side(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) of any size as one of SIDE by SIDE, resized bicubically by Pillow.

    Drawn scenes of half the side are still judged right, but for one pair in some hundreds. A
    picture that is not square is stretched, and so are the shapes in it.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"a picture must be (H, W, 3), not {picture.shape}")
    if picture.shape[:2] == (SIDE, SIDE):
        return picture
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read a picture, uint8 (H, W, 3); one of another size than SIDE is resized (`at_side`)."""
    image = at_side(picture).astype(float)
    palette = {**BACKGROUNDS, **COLOURS}
    colours = np.array(list(palette.values()), float)
    nearest = np.linalg.norm(image[:, :, None] - colours, axis=-1).argmin(-1)
    counts = np.bincount(nearest.ravel(), minlength=len(palette))
    ground_index = int(counts.argmax())
    ground = np.median(image[nearest == ground_index], axis=0)
    name, distance = _nearest(ground, palette)
    away = np.linalg.norm(image - ground, axis=-1)
    parts = [p for p in components(away > BACKGROUND_TOLERANCE) if p.sum() >= BLOB_PIXELS]
    outside = ~np.any([_grow(_grow(p)) for p in parts], axis=0) if parts else away >= 0
    clean = not outside.any() or float((away[outside] < BACKGROUND_TOLERANCE).mean()) >= 0.97
    background = name if name in BACKGROUNDS and distance < BACKGROUND_TOLERANCE and clean else None
    return Reading(background, tuple(_read_blob(image, p, ground) for p in parts))


def _related(first: Blob, second: Blob, relation: str) -> bool:
    across, down = second.x_px - first.x_px, second.y_px - first.y_px
    far = SIDE / 4
    return {
        "left of": across > far and across > 2 * abs(down),
        "right of": -across > far and -across > 2 * abs(down),
        "above": down > far and down > 2 * abs(across),
        "below": -down > far and -down > 2 * abs(across),
    }[relation]


def _matches(thing: Object, blob: Blob) -> dict[str, bool]:
    place = True
    if thing.place:
        x, y = PLACES[thing.place]
        place = float(np.hypot(blob.x_px - x, blob.y_px - y)) <= PLACE_TOLERANCE_PX
    return {
        "shape": blob.shape == thing.shape,
        "colour": blob.colour == thing.colour,
        "size": blob.size is not None and thing.size in (None, blob.size),
        "place": place,
    }


def judge(picture: NDArray[np.uint8], scene: Scene) -> Verdict:
    """Does the picture show the scene? Attributes that the scene leaves open may be anything."""
    reading = read(picture)
    background = reading.background is not None and scene.background in (None, reading.background)
    if len(reading.blobs) != len(scene.objects):
        return Verdict(False, False, False, False, False, scene.relation is None, background)
    best: Verdict | None = None
    blobs = reading.blobs
    for order in (blobs,) if len(blobs) == 1 else (blobs, blobs[::-1]):
        found = [_matches(o, b) for o, b in zip(scene.objects, order, strict=True)]
        verdict = Verdict(
            count=True,
            relation=scene.relation is None or _related(order[0], order[1], scene.relation),
            background=background,
            **{name: all(f[name] for f in found) for name in found[0]},
        )
        score = sum(getattr(verdict, name) for name in ATTRIBUTES)
        if best is None or score > sum(getattr(best, name) for name in ATTRIBUTES):
            best = verdict
    assert best is not None
    return best
