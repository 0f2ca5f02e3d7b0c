"""The tokenizer equals transformers' CLIPTokenizer, on any text."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mobile_runtime.errors import BundleError
from mobile_runtime.tokenizer import ClipTokenizer, byte_letters
from tests.bundles import PROMPT_IDS, make_bundle

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ftfy") is not None,
    reason="transformers cleans text differently where ftfy is installed",
)

# Merges that reach into words, digits, accents (two bytes of UTF-8) and across letters.
MERGES = ["t h", "th e</w>", "r e", "re d</w>", "o n", "i n", "in g</w>", "a n", "an d</w>"]
MERGES += ["1 2</w>", "Ã ©", "c a", "ca f", "caf Ã©</w>", "Ã ©</w>", "' s</w>", "! !", "! !</w>"]
MERGES += ["f o", "fo x</w>", "l l", "ä ¸", "ä¸ Ń</w>", "o o", "oo o", "ooo o", "' t</w>"]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 24


def write_files(folder: Path) -> dict[str, int]:
    letters = byte_letters()
    tokens = sorted(letters) + [letter + "</w>" for letter in sorted(letters)]
    tokens += [merge.replace(" ", "") for merge in MERGES] + [BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *MERGES]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    return vocabulary


@pytest.fixture(scope="module", params=[END, "!"], ids=["pads with end", "pads with !"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ours, transformers') over the same files; SD 1.5 pads with the end token, SD 2.1 with !"""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = write_files(folder)
    theirs = CLIPTokenizer(
        vocab_file=str(folder / "vocab.json"),
        merges_file=str(folder / "merges.txt"),
        model_max_length=LENGTH,
        pad_token=request.param,
    )
    ours = ClipTokenizer.from_files(
        folder / "vocab.json",
        folder / "merges.txt",
        max_length=LENGTH,
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[request.param],
    )
    return ours, theirs


def expected(theirs: Any, text: str) -> list[int]:
    return (
        theirs(text, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np")
        .input_ids[0]
        .tolist()
    )


PIECES = [
    BEGIN, END, BEGIN.upper(), "<|end", "oftext|>", "!", "!!!", "the red fox", "café", "cafe\u0301",
    "CAFÉ", "İstanbul", "ſ's", "it'S", "don't", "we'll", "123", "½ ² Ⅷ", "中国", "\U00020000", "豈",
    "日本語", "한국어", "नमस्ते", "👩‍🚀🏽", "\u200b", "\u00ad", "\ufffd", "\x00", "\x85", "\u2028",
    "\u3000", "\xa0", "\t\n\r", "oooooo", "{\\}", "_a_b", "\ue000", "\ud7a3", "ﬁ", "Å", "A\u030a",
]  # fmt: skip
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=4) | st.just(" "), max_size=16).map(
        "".join
    ),
    st.text(alphabet="theradonigfx '!12<|>", max_size=80),
)


@settings(max_examples=250, deadline=None)
@given(text=texts)
@example(text=" ".join(PIECES))
@example(text="".join(PIECES))
@example(text="")
def test_any_text_gives_transformers_ids(pair: Any, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (1, LENGTH)
    assert ids[0].tolist() == expected(theirs, text)


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_each_hard_piece_gives_transformers_ids(pair: Any, piece: str) -> None:
    ours, theirs = pair
    for text in (piece, f"a {piece} b", f"a{piece}b", piece * 3):
        assert ours.encode(text)[0].tolist() == expected(theirs, text)


def test_a_token_that_the_vocabulary_lacks_becomes_the_end_token(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    vocabulary = write_files(tmp_path)
    del vocabulary["the</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    files = (tmp_path / "vocab.json", tmp_path / "merges.txt")
    theirs = CLIPTokenizer(*map(str, files), model_max_length=LENGTH)
    ids = {"bos_token_id": vocabulary[BEGIN], "eos_token_id": vocabulary[END]}
    ours = ClipTokenizer.from_files(*files, max_length=LENGTH, pad_token_id=vocabulary[END], **ids)
    assert ours.encode("in the red")[0].tolist() == expected(theirs, "in the red")


def test_what_a_long_prompt_loses_is_told(pair: Any) -> None:
    ours, _ = pair
    assert ours.dropped("the red fox") == ""
    kept = "red " * (LENGTH - 2)
    assert ours.dropped(kept) == ""
    assert ours.dropped(f"{kept} the café, 中 and foxes") == "the café , 中 and foxes"


def test_a_bundles_tokenizer_reads_its_own_files(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer.from_bundle(make_bundle(tmp_path / "bundle"))
    for prompt, ids in PROMPT_IDS.items():
        np.testing.assert_array_equal(tokenizer.encode(prompt), ids)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("vocab.json", "{", "cannot be read"),
        ("merges.txt", "#version: 0.2\na b c\n", "not a pair of tokens"),
        ("vocab.json", "{}", "no token for bos_token_id"),
    ],
)
def test_broken_files_are_told_in_one_sentence(
    tmp_path: Path, file: str, text: str, complaint: str
) -> None:
    write_files(tmp_path)
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=complaint):
        ClipTokenizer.from_files(
            tmp_path / "vocab.json",
            tmp_path / "merges.txt",
            max_length=LENGTH,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )


@pytest.mark.parametrize("pad_token", ["!", END])
def test_clips_own_vocabulary_gives_the_published_ids(tmp_path: Path, pad_token: str) -> None:
    from transformers import CLIPTokenizer

    from recipes.sources.architectures import write_clip_tokenizer

    write_clip_tokenizer(tmp_path, pad_token)
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    ours = ClipTokenizer.from_files(
        tmp_path / "vocab.json",
        tmp_path / "merges.txt",
        max_length=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0 if pad_token == "!" else 49407,
    )
    ids = ours.encode("a photo of an astronaut riding a horse on mars")[0].tolist()
    assert ids[:12] == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    for text in [*PIECES, " ".join(PIECES), "Hyper-realistic 8K!!! (masterpiece:1.2), naïve café"]:
        told = theirs(text, padding="max_length", truncation=True).input_ids
        assert ours.encode(text)[0].tolist() == told
