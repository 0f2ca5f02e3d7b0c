"""The scenes that the embedded model draws: what there is, how it is sampled, how it looks.

A scene holds one object in a place, or two objects in a relation, on a background. One scene in
five is held out: a hash of its whole combination of attributes decides, so training can never
see it, whatever the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recipes.pocket.shapes import SHAPES, SIDE, coverage

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 52),
    "orange": (247, 140, 30),
    "yellow": (252, 212, 48),
    "green": (56, 178, 72),
    "cyan": (30, 190, 212),
    "blue": (40, 92, 232),
    "purple": (142, 62, 202),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "cream": (252, 243, 224),
    "mint": (188, 236, 210),
    "gray": (130, 136, 148),
    "navy": (24, 32, 78),
    "plum": (86, 26, 62),
}
SIZES: dict[str, float] = {"small": 9.0, "large": 13.5}
"""Radius in pixels."""
PLACES: dict[str, tuple[int, int]] = {
    "center": (32, 32),
    "top left": (19, 19),
    "top right": (45, 19),
    "bottom left": (19, 45),
    "bottom right": (45, 45),
}
"""Centre (x, y) in pixels."""
RELATIONS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "left of": ((16, 32), (48, 32)),
    "right of": ((48, 32), (16, 32)),
    "above": ((32, 16), (32, 48)),
    "below": ((32, 48), (32, 16)),
}
"""Centres (x, y) of the first and of the second object, in pixels."""
PLACE_JITTER_PX = 1.5
SIZE_JITTER = 0.04

_MIRRORED = {"right of": "left of", "below": "above"}


@dataclass(frozen=True)
class Object:
    """One drawn thing. None stands for what a caption leaves open."""

    shape: str
    colour: str
    size: str | None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """One object, or two in a relation (first `relation` second), on a background."""

    objects: tuple[Object, ...]
    background: str | None
    relation: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every attribute is given, so that the scene can be drawn."""
        sized = all(o.size for o in self.objects)
        placed = bool(self.relation) if len(self.objects) == 2 else bool(self.objects[0].place)
        return bool(self.background) and sized and placed


def held_out(scene: Scene) -> bool:
    """Whether this combination is kept from training. "A left of B" equals "B right of A"."""
    objects, relation = scene.objects, scene.relation
    if relation in _MIRRORED:
        objects, relation = objects[::-1], _MIRRORED[relation]
    words = [f"{o.size} {o.colour} {o.shape} {o.place}" for o in objects]
    key = "|".join([*words, str(relation), str(scene.background)])
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def _pick(rng: np.random.Generator, options: Sequence[str] | dict) -> str:
    names = list(options)
    return names[int(rng.integers(len(names)))]


def sample_scene(rng: np.random.Generator, split: str = "train", pairs: bool = False) -> Scene:
    """A complete scene from one split ("train" or "held_out"). Pairs differ in colour."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    while True:
        first = Object(
            _pick(rng, SHAPES),
            _pick(rng, COLOURS),
            _pick(rng, SIZES),
            None if pairs else _pick(rng, PLACES),
        )
        scene = Scene((first,), _pick(rng, BACKGROUNDS))
        if pairs:
            others = [colour for colour in COLOURS if colour != first.colour]
            second = Object(_pick(rng, SHAPES), _pick(rng, others), _pick(rng, SIZES))
            scene = Scene((first, second), scene.background, _pick(rng, RELATIONS))
        if held_out(scene) == (split == "held_out"):
            return scene


def leave_open(scene: Scene, rng: np.random.Generator, share: float) -> Scene:
    """Forget each of size, place and background with this probability, as captions may."""

    def keep(value: str | None) -> str | None:
        return None if rng.random() < share else value

    objects = tuple(replace(o, size=keep(o.size), place=keep(o.place)) for o in scene.objects)
    return replace(scene, objects=objects, background=keep(scene.background))


def draw_many(scenes: Sequence[Scene], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw complete scenes, with a slight jitter of place and size: (N, SIDE, SIDE, 3)."""
    if not all(scene.complete for scene in scenes):
        raise ValueError("only a complete scene can be drawn: give size, place and background")
    canvas = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32)  # type: ignore[index]
    canvas = np.broadcast_to(canvas[:, None, None], (len(scenes), SIDE, SIDE, 3)).copy()
    groups: dict[str, list[tuple[int, float, float, float, tuple[int, int, int]]]] = {}
    for row, scene in enumerate(scenes):
        centres = RELATIONS[scene.relation] if scene.relation else None
        for slot, thing in enumerate(scene.objects):
            x, y = centres[slot] if centres else PLACES[thing.place]  # type: ignore[index]
            dx, dy = rng.uniform(-PLACE_JITTER_PX, PLACE_JITTER_PX, 2)
            radius = SIZES[thing.size] * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)  # type: ignore[index]
            entry = (row, x + dx, y + dy, radius, COLOURS[thing.colour])
            groups.setdefault(thing.shape, []).append(entry)
    for shape, entries in groups.items():
        rows = np.array([e[0] for e in entries])
        placed = [np.array([e[i] for e in entries], np.float32) for i in (1, 2, 3)]
        ink = np.array([e[4] for e in entries], np.float32)[:, None, None]
        alpha = coverage(shape, *placed)[..., None]
        # A scene can hold the same shape twice: add the change instead of assigning.
        np.add.at(canvas, rows, alpha * (ink - canvas[rows]))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one complete scene: (SIDE, SIDE, 3)."""
    return draw_many([scene], rng)[0]
