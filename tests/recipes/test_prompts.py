"""Prompt files: what is read of them, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_runtime.errors import UserError
from recipes import adapters, features, prompts
from recipes.paths import user_path
from recipes.settings import Lora
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


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    file.write_text("a tent\n")
    prompts.check("~/prompts.txt")
    assert user_path("~/prompts.txt") == file
