"""The tokenizer: CLIP's format, our words, any text."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from recipes.pocket import WEIGHTS
from recipes.pocket.captions import caption
from recipes.pocket.scenes import sample_scene
from recipes.pocket.tokenizer import MAX_TOKENS, build_tokenizer, tokenize


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)


def captions(count: int) -> list[str]:
    rng = np.random.default_rng(4)
    return [caption(sample_scene(rng, pairs=i % 2 == 1), rng) for i in range(count)]


def test_each_word_of_a_caption_is_one_token(tokenizer):
    for text in captions(300):
        assert len(tokenizer.tokenize(text)) == len(re.findall(r"[a-z]+|,", text)), text


def test_captions_come_back_and_fit(tokenizer):
    ids = tokenize(tokenizer, captions(300))
    assert ids.shape == (300, MAX_TOKENS)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [t.replace(" ,", ",") for t in texts] == captions(300)


@given(st.text(max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_text_has_tokens(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_the_shipped_files_are_what_the_code_builds(tokenizer, tmp_path):
    built = build_tokenizer(tmp_path)
    assert built.get_vocab() == tokenizer.get_vocab()
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text() == (WEIGHTS / "tokenizer" / name).read_text()


def test_a_caption_that_is_too_long_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="32 fit"):
        tokenize(tokenizer, ["red " * 40])
