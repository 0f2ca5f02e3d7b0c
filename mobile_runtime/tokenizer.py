"""CLIP's byte-pair tokenizer, from `vocab.json` and `merges.txt` alone.

Equal to the slow `CLIPTokenizer` of transformers 4.57, which diffusers loads, as it behaves where
`ftfy` is not installed: the text is cleaned as BERT's BasicTokenizer does it, with accents and
punctuation kept. Where `ftfy` is installed, transformers repairs broken encodings (mojibake)
instead, and differs on such text. The byte-pair scheme is that of Sennrich et al.
(arXiv:1508.07909) over bytes, as in GPT-2 and CLIP (arXiv:2103.00020).
"""

import hashlib
import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import regex

from mobile_runtime.errors import BundleError

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle

END_OF_WORD = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's vocabulary has 49152 - 256 - 2 merges at most; a longer file's rest is not used.
MAX_MERGES = 48_894
# What CLIP calls a word: a special token, an English contraction's end, letters, one digit, or
# a run of anything else but space.
WORDS = regex.compile(
    rf"{regex.escape(BEGIN)}|{regex.escape(END)}"
    r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# The CJK blocks whose characters are words of their own (first and last code point).
CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def byte_letters() -> list[str]:
    """For each byte, the printable character that stands for it in the vocabulary.

    Printable Latin-1 bytes stand for themselves; the others, in order, for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


class ClipTokenizer:
    """Text to token ids, padded and cut to `max_length`."""

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        max_length: int,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
    ) -> None:
        """`merges` come best first; ids are those of `vocabulary`."""
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._letters = byte_letters()
        self._tokens = {index: token for token, index in vocabulary.items()}
        # Special tokens are cut out of the raw text first, the padding too: SD 2.1 pads with "!".
        special = [self._tokens[index] for index in {bos_token_id, eos_token_id, pad_token_id}]
        special.sort(key=len, reverse=True)
        self._special = set(special)
        self._split = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")

    @classmethod
    def from_files(
        cls,
        vocab: Path,
        merges: Path,
        *,
        max_length: int,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
    ) -> "ClipTokenizer":
        """Read a tokenizer's two files; raises BundleError where they do not fit together."""
        try:
            vocabulary = json.loads(vocab.read_text(encoding="utf-8"))
            lines = merges.read_text(encoding="utf-8").strip().split("\n")
        except (OSError, ValueError) as error:
            raise BundleError(f"the tokenizer in {vocab.parent} cannot be read: {error}") from error
        pairs = [tuple(line.split()) for line in lines[1 : MAX_MERGES + 1]]
        if any(len(pair) != 2 for pair in pairs):
            raise BundleError(f"{merges} holds a line that is not a pair of tokens")
        known = set(vocabulary.values())
        for name, index in (
            ("bos_token_id", bos_token_id),
            ("eos_token_id", eos_token_id),
            ("pad_token_id", pad_token_id),
        ):
            if index not in known:
                raise BundleError(f"{vocab} has no token for {name} = {index}")
        return cls(
            vocabulary,
            pairs,  # type: ignore[arg-type]  # every tuple has two words, checked above
            max_length=max_length,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )

    @classmethod
    def from_bundle(cls, bundle: "Bundle") -> "ClipTokenizer":
        """The tokenizer of a bundle."""
        files = bundle.manifest.tokenizer
        return cls.from_files(
            bundle.file(files.vocab),
            bundle.file(files.merges),
            max_length=files.max_length,
            bos_token_id=files.bos_token_id,
            eos_token_id=files.eos_token_id,
            pad_token_id=files.pad_token_id,
        )

    def encode(self, text: str) -> np.ndarray:
        """The ids, (1, max_length) int32: begin, the text cut to fit, end, padding."""
        ids = [self.bos_token_id, *self.ids(text)[: self.max_length - 2], self.eos_token_id]
        ids += [self.pad_token_id] * (self.max_length - len(ids))
        return np.array([ids], dtype=np.int32)

    @property
    def digest(self) -> str:
        """SHA-256 of both tables: each token's id, and the merges in their order."""
        tables = [sorted(self.vocabulary.items()), list(self._ranks)]
        return hashlib.sha256(json.dumps(tables).encode()).hexdigest()

    def dropped(self, text: str) -> str:
        """What `encode` cuts off a prompt that is too long, as text; empty if nothing."""
        lost = "".join(self._tokens[index] for index in self.ids(text)[self.max_length - 2 :])
        return self._bytes_of(lost).decode("utf-8", errors="replace")

    def text_of(self, token: str) -> str:
        """What a token of the vocabulary says; empty where its bytes alone are no text."""
        try:
            return self._bytes_of(token).decode("utf-8")
        except UnicodeDecodeError:
            return ""

    def _bytes_of(self, tokens: str) -> bytes:
        bytes_of = {letter: byte for byte, letter in enumerate(self._letters)}
        return b"".join(
            bytes([bytes_of[letter]]) if letter in bytes_of else letter.encode()
            for letter in tokens.replace(END_OF_WORD, " ").strip()
        )

    def ids(self, text: str) -> list[int]:
        """All ids of a text: not cut, without begin, end and padding."""
        ids: list[int] = []
        for piece in self._split.split(text):
            if piece in self._special:
                ids.append(self.vocabulary[piece])
                continue
            for word in WORDS.findall(_clean(piece)):
                ids += [self.vocabulary.get(part, self.eos_token_id) for part in self._parts(word)]
        return ids

    def _parts(self, word: str) -> list[str]:
        """A word's tokens: its bytes, the best-ranked pair merged until none is left."""
        if word in (BEGIN, END):
            return [word]
        parts = [self._letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += END_OF_WORD
        while len(parts) > 1:
            ranked = [(self._ranks[pair], pair) for pair in pairwise(parts) if pair in self._ranks]
            if not ranked:
                break
            parts = _merged(parts, min(ranked)[1])
        return parts


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with every occurrence of `pair`, from the left, made one."""
    merged = []
    index = 0
    while index < len(parts):
        if tuple(parts[index : index + 2]) == pair:
            merged.append(pair[0] + pair[1])
            index += 2
        else:
            merged.append(parts[index])
            index += 1
    return merged


def _clean(text: str) -> str:
    """Lower case, NFC, no control characters, CJK characters apart, single spaces."""
    kept = []
    for char in text:
        if char in "\t\n\r":
            kept.append(" ")
        elif char == "\ufffd" or unicodedata.category(char).startswith("C"):
            continue
        elif any(first <= ord(char) <= last for first, last in CJK):
            kept.append(f" {char} ")
        else:
            kept.append(char)
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).lower().split())
