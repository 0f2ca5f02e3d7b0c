"""Prompts to train on, to calibrate with and to judge by: a file, or what fits the source."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mobile_runtime.errors import UserError
from recipes.paths import user_path
from recipes.schema import Recipe
from recipes.settings import TrainingSettings

MOST_BYTES = 50_000_000
DEFAULT = Path(__file__).parent / "prompts.txt"
PAIR_SHARE = 0.3
"""Of the embedded model's captions, those of two objects."""
TRIED = 1000
"""Captions among which one that is emphasized has to be."""

Draw = Callable[[np.random.Generator, int], list[str]]


def read(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines and lines that begin with # are left out.

    Raises UserError where there is no such file, or no prompt in it.
    """
    try:
        if not path.is_file():
            raise UserError(f"there is no prompt file {path}; give one with a prompt a line")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"the prompt file {path} has more than {MOST_BYTES / 1e6:.0f} MB; give fewer"
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt file {path} cannot be read: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if any(ord(letter) < 32 and letter != "\t" for letter in line):
            raise UserError(
                f"the prompt file {path} has a control character in line {number}; give plain text"
            )
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt; give a prompt a line")
    return prompts


def check(named: str | None) -> None:
    """Refuse a prompt file that cannot be used."""
    if named is not None:
        read(user_path(named))


def check_training(settings: TrainingSettings, recipe: Recipe) -> None:
    """The same for a training, and refuse an emphasis that all prompts match, or none."""
    check(settings.prompts)
    emphasis = settings.emphasis
    if emphasis is None:
        return
    known = _listed(settings.prompts, recipe) or _captions(np.random.default_rng(0), TRIED)
    found = sum(emphasis.pattern.search(one) is not None for one in known)
    if found in (0, len(known)):
        raise UserError(
            f"emphasis.matching: {emphasis.matching!r} is found in "
            + ("every one" if found else "none")
            + f" of {len(known)} prompts; the first of them is {known[0]!r}"
        )


def default_of(recipe: Recipe) -> str:
    """Which prompts `drawer` gives without a file: the same text for the same prompts."""
    if recipe.source.model == "embedded":
        return "the captions of the embedded model"
    return "\n".join(read(DEFAULT))


def drawer(named: str | None, recipe: Recipe) -> Draw:
    """A function (random numbers, n) -> n prompts.

    named: a prompt file. Without one, the embedded model is asked for its training captions (never
    the held-out combinations), and every other source for the prompts that the package ships.
    """
    listed = _listed(named, recipe)
    if listed is None:
        return _captions
    return lambda rng, n: [listed[index] for index in rng.integers(len(listed), size=n)]


def emphasized(settings: TrainingSettings, recipe: Recipe) -> Draw:
    """The same for a training, with the share of its prompts that it shall learn from more."""
    draw = drawer(settings.prompts, recipe)
    emphasis = settings.emphasis
    if emphasis is None:
        return draw
    pattern, share = emphasis.pattern, emphasis.share
    listed = _listed(settings.prompts, recipe)
    if listed is not None:
        matching = [one for one in listed if pattern.search(one)]

    def more(rng: np.random.Generator, n: int) -> list[str]:
        said = draw(rng, n)
        for index in np.flatnonzero(rng.random(n) < share):
            while not pattern.search(said[index]):
                (said[index],) = (
                    draw(rng, 1) if listed is None else [matching[rng.integers(len(matching))]]
                )
        return said

    return more


def _listed(named: str | None, recipe: Recipe) -> list[str] | None:
    """All prompts there are; None for the embedded model's captions, which are made up."""
    if named is None and recipe.source.model == "embedded":
        return None
    return read(DEFAULT if named is None else user_path(named))


def _captions(rng: np.random.Generator, n: int) -> list[str]:
    from recipes.pocket.captions import caption
    from recipes.pocket.scenes import sample_scene

    scenes = [sample_scene(rng, "train", bool(rng.random() < PAIR_SHARE)) for _ in range(n)]
    return [caption(scene, rng) for scene in scenes]
