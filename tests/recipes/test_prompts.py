"""Prompt files: what is read of them, and what is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_runtime.errors import UserError
from recipes import adapters, features, prompts, schema
from recipes.paths import user_path
from recipes.settings import DistillSettings, Lora
from recipes.sources import open_source
from recipes.sources.tiny_autoencoder import open_tiny

BOM = "\ufeff"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_does_not_stick_to_what_comes_first(file: Path, end: str) -> None:
    file.write_bytes(f"{BOM}a tent{end}a stone{end}".encode())
    assert prompts.read(file) == ["a tent", "a stone"]
    file.write_bytes(f"{BOM}# a comment{end}a stone".encode())
    assert prompts.read(file) == ["a stone"]


@pytest.mark.parametrize("text", ["", BOM, f"{BOM}\n", f"{BOM}# nothing\n", " \t\n\r\n"])
def test_a_file_without_a_prompt_is_refused(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    with pytest.raises(UserError, match=r"prompts\.txt holds no prompt"):
        prompts.read(file)


@pytest.mark.parametrize("letter", ["\0", "\x1b", "\x07"])
def test_a_control_character_is_refused_with_its_line(file: Path, letter: str) -> None:
    file.write_bytes(f"a tent\na {letter} stone\n".encode())
    with pytest.raises(UserError, match="control character in line 2"):
        prompts.read(file)


def test_text_of_another_encoding_is_refused(file: Path) -> None:
    file.write_text("a tent\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"prompts\.txt cannot be read"):
        prompts.read(file)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("a tent\n")
    size = file.stat().st_size
    monkeypatch.setattr(prompts, "MOST_BYTES", size)
    assert prompts.read(file) == ["a tent"]
    monkeypatch.setattr(prompts, "MOST_BYTES", size - 1)
    monkeypatch.setattr(Path, "read_text", None)
    with pytest.raises(UserError, match="has more than 0 MB"):
        prompts.read(file)


lines = st.lists(
    st.text(st.characters(categories=["L", "N", "P", "Zs"], exclude_characters="#"), min_size=1)
)


@given(lines, st.booleans())
def test_what_was_written_a_line_each_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], marked: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "written.txt"
    file.write_bytes(("\ufeff" * marked + "\n".join(words)).encode())
    wanted = [word.strip() for word in words if word.strip()]
    if wanted:
        assert prompts.read(file) == wanted
    else:
        with pytest.raises(UserError, match="holds no prompt"):
            prompts.read(file)


NOWHERE = "~nobody-of-this-name/prompts.txt"


def test_a_home_folder_that_there_is_not_is_told_wherever_a_path_is_named() -> None:
    told = "~nobody-of-this-name.*: there is no such home folder"
    with pytest.raises(UserError, match=told):
        user_path(NOWHERE)
    with pytest.raises(UserError, match=told):
        prompts.check(NOWHERE)
    with pytest.raises(UserError, match=told):
        open_source(NOWHERE)
    with pytest.raises(UserError, match=told):
        open_tiny(NOWHERE)
    with pytest.raises(UserError, match=told):
        features.open_clip(NOWHERE)
    with pytest.raises(UserError, match=told):
        adapters.find(Lora(model=NOWHERE))


def test_a_name_that_no_file_can_have_is_told() -> None:
    name = "x" * 5000
    for ask in (
        lambda: user_path(name),
        lambda: open_source(name),
        lambda: open_tiny(name),
        lambda: adapters.find(Lora(model=name)),
    ):
        with pytest.raises(UserError, match=r"xxx\.\.\. cannot be looked at"):
            ask()


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    file.write_text("a tent\n")
    prompts.check("~/prompts.txt")
    assert user_path("~/prompts.txt") == file


def training(named: Path | None = None, **emphasis: Any) -> tuple[DistillSettings, schema.Recipe]:
    settings = {"method": "output", "steps": 1, "iterations": 1, "warmup": 0}
    settings |= {"prompts": str(named)} if named else {}
    settings |= {"emphasis": emphasis} if emphasis else {}
    recipe = schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 64,
            "schedule": {"steps": 1, "guidance_scale": 0.0},
            "stages": [{"distill": settings}],
        }
    )
    found = recipe.stages[0].distill
    assert found is not None
    return found, recipe


@given(st.floats(0.01, 1), st.integers(0, 9))
def test_emphasized_prompts_take_their_share_and_the_others_stay_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, share: float, seed: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "sized.txt"
    file.write_text("a small star\na large star\na small red star\na tent\na small tent\n")
    settings, recipe = training(file, matching="SMALL .*star", share=share)
    rngs = [np.random.default_rng(seed) for _ in range(3)]
    usual = prompts.drawer(str(file), recipe)(rngs[0], 300)
    drawn, again = (prompts.emphasized(settings, recipe)(rng, 300) for rng in rngs[1:])
    assert drawn == again
    pattern = re.compile("small .*star")
    kept = [one for one, other in zip(drawn, usual, strict=True) if one == other]
    changed = [one for one, other in zip(drawn, usual, strict=True) if one != other]
    assert all(map(pattern.search, changed))
    # Of those that matched already, none is drawn again.
    natural = sum(bool(pattern.search(one)) for one in usual)
    assert sum(bool(pattern.search(one)) for one in kept) == natural
    expected = share * (300 - natural)
    assert abs(len(changed) - expected) < 5 * (expected * (1 - share) + 1) ** 0.5


def test_the_embedded_models_captions_are_emphasized_too() -> None:
    settings, recipe = training(matching="(small|little|tiny) .*star", share=1.0)
    prompts.check_training(settings, recipe)
    drawn = prompts.emphasized(settings, recipe)(np.random.default_rng(0), 8)
    assert all("star" in one for one in drawn)
    plain, _ = training()
    usual = prompts.emphasized(plain, recipe)(np.random.default_rng(0), 8)
    assert usual == prompts.drawer(None, recipe)(np.random.default_rng(0), 8) != drawn
