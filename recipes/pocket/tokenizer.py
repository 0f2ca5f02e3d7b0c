"""The tokenizer's files: CLIP's byte-level byte-pair encoding with a vocabulary of our own words.

The merges are learned on our captions until each of their words is one token; any other text
falls back to pieces and bytes, as in CLIP.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from recipes.pocket.captions import caption
from recipes.pocket.scenes import leave_open, sample_scene

MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"
CORPUS_CAPTIONS = 4000


def byte_letters() -> list[str]:
    """CLIP's printable letter for each of the 256 bytes, in CLIP's order of the vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(spare))]


def word_counts(seed: int) -> Counter[str]:
    """How often each word and each mark of punctuation stands in our captions."""
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for index in range(CORPUS_CAPTIONS):
        scene = leave_open(sample_scene(rng, pairs=index % 2 == 1), rng, 0.1)
        counts.update(re.findall(r"[a-z]+|[^\sa-z]+", caption(scene, rng)))
    return counts


def learn_merges(counts: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, commonest first, until every word is one token."""
    words = {(*word[:-1], word[-1] + "</w>"): n for word, n in counts.items()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, n in words.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += n
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for pieces, n in words.items():
            out: list[str] = []
            for piece in pieces:
                if out and (out[-1], piece) == best:
                    out[-1] += piece
                else:
                    out.append(piece)
            merged[tuple(out)] = n
        words = merged


def build_tokenizer(folder: Path, seed: int = 0) -> CLIPTokenizer:
    """Write vocab.json and merges.txt into `folder` and open them."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_letters()
    merges = learn_merges(word_counts(seed))
    entries = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> np.ndarray:
    """Captions -> int64 (N, MAX_TOKENS), padded. A caption that does not fit is an error."""
    ids = tokenizer(captions, padding="max_length", return_tensors="np").input_ids
    if ids.shape[1] != MAX_TOKENS:
        raise ValueError(f"a caption has {ids.shape[1]} tokens, and {MAX_TOKENS} fit")
    return ids
