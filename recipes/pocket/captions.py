"""Scenes in words, and back: captions in free wording, and the parser that reads them.

A caption may leave size, place or background open (None in its scene); the parser returns the
scene with the same openings, so a judge demands only what was said.
"""

from __future__ import annotations

import re

import numpy as np

from mobile_runtime.errors import UserError
from recipes.pocket.scenes import BACKGROUNDS, COLOURS, PLACES, Object, Scene
from recipes.pocket.shapes import SHAPES

SHAPE_WORDS = {name: [name] for name in SHAPES} | {
    "circle": ["circle", "circle", "disc"],
    "ring": ["ring", "ring", "donut"],
    "cross": ["cross", "cross", "plus"],
}
SIZE_WORDS = {"small": ["small", "small", "little", "tiny"], "large": ["large", "large", "big"]}
BACKGROUND_WORDS = {name: [name] for name in BACKGROUNDS} | {"gray": ["gray", "grey"]}
PLACE_WORDS = {
    "center": ["center", "middle"],
    "top left": ["top left", "upper left", "top left corner"],
    "top right": ["top right", "upper right", "top right corner"],
    "bottom left": ["bottom left", "lower left", "bottom left corner"],
    "bottom right": ["bottom right", "lower right", "bottom right corner"],
}
RELATION_WORDS = {
    "left of": ["left of", "to the left of", "on the left of"],
    "right of": ["right of", "to the right of", "on the right of"],
    "above": ["above", "over"],
    "below": ["below", "under"],
}
LEADS = ["", "", "", "a picture of ", "a drawing of ", "there is "]
BACKGROUND_PHRASES = [
    "on a {} background",
    "on a {} background",
    "on {}",
    "against a {} background",
    "with a {} background",
]
ONE_TEMPLATES = [
    "{lead}{thing} {place} {ground}",
    "{lead}{thing} {place}, {ground}",
    "{lead}{thing} {ground}, {place}",
    "{ground}, {thing} {place}",
    "{place}, {thing} {ground}",
    "{ground}, {place}, {thing}",
]
PAIR_TEMPLATES = [
    "{lead}{thing} {ground}",
    "{lead}{thing}, {ground}",
    "{ground}, {thing}",
]


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _say_object(thing: Object, rng: np.random.Generator) -> str:
    shape = _pick(rng, SHAPE_WORDS[thing.shape])
    size = _pick(rng, SIZE_WORDS[thing.size]) + " " if thing.size else ""
    if rng.random() < 0.15:
        return _with_article(f"{size}{shape} in {thing.colour}")
    return _with_article(f"{size}{thing.colour} {shape}")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in words. What the scene leaves open is not said."""
    thing, place = _say_object(scene.objects[0], rng), ""
    if scene.relation:
        relation = _pick(rng, RELATION_WORDS[scene.relation])
        thing = f"{thing} {relation} {_say_object(scene.objects[1], rng)}"
    elif scene.objects[0].place:
        where = _pick(rng, PLACE_WORDS[scene.objects[0].place])
        place = ("at the " if rng.random() < 0.3 else "in the ") + where
    ground = ""
    if scene.background:
        ground = _pick(rng, BACKGROUND_PHRASES).format(
            _pick(rng, BACKGROUND_WORDS[scene.background])
        )
    template = _pick(rng, PAIR_TEMPLATES if scene.relation else ONE_TEMPLATES)
    text = template.format(lead=_pick(rng, LEADS), thing=thing, place=place, ground=ground)
    parts = [" ".join(part.split()) for part in text.split(",")]
    return ", ".join(part for part in parts if part)


def _readings(table: dict[str, list[str]]) -> dict[str, str]:
    return {word: name for name, words in table.items() for word in words}


_SHAPE_OF = _readings(SHAPE_WORDS)
_SIZE_OF = _readings(SIZE_WORDS)
_BACKGROUND_OF = _readings(BACKGROUND_WORDS)
_PLACE = re.compile(r"\b(?:(top|upper|bottom|lower) (left|right)|(center|centre|middle))\b")
_RELATION = re.compile(r"\b(?:(left|right) of|(above|over|below|under))\b")
_ROWS = {"upper": "top", "lower": "bottom"}
_SPOKEN_RELATION = {"over": "above", "under": "below"}
EXAMPLES = '"a small red star in the top left, on a navy background"'


def _read_object(text: str, place: str | None) -> Object:
    words = re.findall(r"[a-z]+", text)
    shapes = [_SHAPE_OF[w] for w in words if w in _SHAPE_OF]
    colours = [w for w in words if w in COLOURS]
    sizes = [_SIZE_OF[w] for w in words if w in _SIZE_OF]
    for what, found, known in (("shape", shapes, SHAPES), ("colour", colours, COLOURS)):
        if len(found) != 1:
            raise UserError(
                f"cannot read the caption part {text.strip()!r}: it names {len(found)} {what}s and "
                f"one is needed ({', '.join(known)}); write it like {EXAMPLES}"
            )
    if len(set(sizes)) > 1:
        raise UserError(f"cannot read the caption part {text.strip()!r}: it names two sizes")
    return Object(shapes[0], colours[0], sizes[0] if sizes else None, place)


def parse_caption(text: str) -> Scene:
    """Read a caption in any of our wordings. Raises UserError for one that it cannot read."""
    lowered = " ".join(text.lower().split())
    grounds = [_BACKGROUND_OF[w] for w in re.findall(r"[a-z]+", lowered) if w in _BACKGROUND_OF]
    if len(set(grounds)) > 1:
        raise UserError(f"cannot read the caption {text!r}: it names two backgrounds")
    background = grounds[0] if grounds else None
    relation = _RELATION.search(lowered)
    if relation:
        name = f"{relation[1]} of" if relation[1] else relation[2]
        first, second = lowered[: relation.start()], lowered[relation.end() :]
        things = (_read_object(first, None), _read_object(second, None))
        return Scene(things, background, _SPOKEN_RELATION.get(name, name))
    place = None
    if found := _PLACE.search(lowered):
        place = f"{_ROWS.get(found[1], found[1])} {found[2]}" if found[1] else "center"
        assert place in PLACES
    return Scene((_read_object(lowered, place),), background)
