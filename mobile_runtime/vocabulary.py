"""Every token of a bundle: what the golden prompts, with their few words, never look at.

`golden/vocabulary.safetensors` holds, from the conversion, a hash of the tokenizer's tables and the
ids of words made of its entries, and, as sketches, what the text encoder's token embedding gives in
PyTorch for each id. Here the files are held against them: a vocabulary with two ids
exchanged, or a zeroed row of the embedding, changes no golden prompt that lacks the word. Where a
runtime does not show the embedding, the whole text encoder runs on some of the rows instead.

Tensors: `words` (a JSON list, as bytes), `word_ids` (N,) int32 with `lengths` (W,) int32, how many
of them each word has; `ids` (R, L) int32, the whole vocabulary as inputs of the text encoder;
`sketches` (R, 67) float32, and `outputs` (S, 67), the text encoder's for the rows `sampled(R)`.
Metadata: `tables`, the hash; `value`, the embedding's name in the target's file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mobile_runtime import backends
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError, UserError
from mobile_runtime.runs import NoRun, Runtime, brief
from mobile_runtime.sketches import SKETCH_SIZE, sketch, sketch_snr_db
from mobile_runtime.tokenizer import ClipTokenizer

PATH = "golden/vocabulary.safetensors"
# A lookup has no arithmetic: what is left is the rounding of its weights' scales, or to float16.
FLOAT32_DB, FLOAT16_DB = 60.0, 45.0
# Of SD's 642 rows each takes a text encoder some tenths of a second.
MOST_ROWS = 64


@dataclass(frozen=True)
class Vocabulary:
    """The words with their ids, the rows of ids, and their embeddings' sketches (module docstring).

    value: None where the embedding was not found in the target's file.
    """

    words: tuple[str, ...]
    word_ids: tuple[tuple[int, ...], ...]
    ids: np.ndarray
    sketches: np.ndarray
    outputs: np.ndarray
    tables: str
    value: str | None


def sampled(rows: int) -> list[int]:
    """The rows that the whole text encoder runs on: all, or MOST_ROWS over the vocabulary."""
    return np.linspace(0, rows - 1, min(rows, MOST_ROWS)).round().astype(int).tolist()


def words_of(tokenizer: ClipTokenizer) -> tuple[str, ...]:
    """Each token's own text, and the same with a letter behind it: then it ends no word."""
    texts = filter(None, map(tokenizer.text_of, sorted(tokenizer.vocabulary)))
    return tuple(word for text in texts for word in (text, f"{text}q"))


def rows_of(tokenizer: ClipTokenizer) -> np.ndarray:
    """All ids in order, as inputs of the text encoder: (R, max_length) int32."""
    ids = np.array(sorted(tokenizer.vocabulary.values()), np.int32)
    rows = -(-ids.size // tokenizer.max_length)
    filled = np.full(rows * tokenizer.max_length, tokenizer.pad_token_id, np.int32)
    filled[: ids.size] = ids
    return filled.reshape(rows, tokenizer.max_length)


def write(vocabulary: Vocabulary, path: Path) -> None:
    """Keep it as the module's docstring says."""
    tensors: dict[str, np.ndarray] = {
        "words": np.frombuffer(json.dumps(vocabulary.words).encode(), np.uint8),
        "word_ids": np.array([index for ids in vocabulary.word_ids for index in ids], np.int32),
        "lengths": np.array([len(ids) for ids in vocabulary.word_ids], np.int32),
        "ids": vocabulary.ids,
        "sketches": np.ascontiguousarray(vocabulary.sketches, np.float32),
        "outputs": np.ascontiguousarray(vocabulary.outputs, np.float32),
    }
    named = {"value": vocabulary.value} if vocabulary.value else {}
    save_file(tensors, path, {"tables": vocabulary.tables, **named})


def read(bundle: Bundle) -> Vocabulary | None:
    """A bundle's; None where it was made without. BundleError where it is damaged."""
    if bundle.manifest.golden.vocabulary is None:
        return None
    path = bundle.file(bundle.manifest.golden.vocabulary)
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tables, value = metadata["tables"], metadata.get("value")
        words = tuple(json.loads(tensors["words"].tobytes()))
        ends = np.cumsum(tensors["lengths"])
        parts = np.split(tensors["word_ids"], ends[:-1])
        ids, sketches, outputs = (tensors[name] for name in ("ids", "sketches", "outputs"))
        (spec,) = bundle.component("text_encoder").inputs
        whole = (
            bool(words)
            and len(ids) > 0
            and all(isinstance(word, str) for word in words)
            and len(parts) == len(words)
            and ends[-1] == tensors["word_ids"].size
            and (ids.ndim, ids.dtype, ids.shape[1:]) == (2, np.int32, spec.shape[1:])
            and sketches.shape == (len(ids), SKETCH_SIZE)
            and outputs.shape == (len(sampled(len(ids))), SKETCH_SIZE)
        )
    except (
        *(AttributeError, KeyError, IndexError, OSError, RecursionError, SafetensorError),
        *(TypeError, ValueError),
    ) as error:
        raise BundleError(f"{path} holds no vocabulary; make the bundle again") from error
    if not whole:
        raise BundleError(f"{path}: its tensors do not fit together; make the bundle again")
    word_ids = tuple(tuple(part.tolist()) for part in parts)
    return Vocabulary(words, word_ids, ids, sketches, outputs, tables, value)


def tokenizer_fault(bundle: Bundle, vocabulary: Vocabulary) -> str | None:
    """What the tokenizer's files give otherwise than at conversion, in words; None if nothing."""
    try:
        tokenizer = ClipTokenizer.from_bundle(bundle)
    except BundleError as error:
        return str(error)
    wrong = [
        (word, given, list(wanted))
        for word, wanted in zip(vocabulary.words, vocabulary.word_ids, strict=True)
        if (given := tokenizer.ids(word)) != list(wanted)
    ]
    if not wrong and tokenizer.digest != vocabulary.tables:
        return "the tokenizer's entries, or its merges and their order, are not the conversion's"
    if not wrong:
        return None
    word, given, wanted = wrong[0]
    return (
        f"the tokenizer gives other ids than at conversion for {len(wrong)} of "
        f"{len(vocabulary.words)} words: {word!r} is {given}, and was {wanted}"
    )


@dataclass(frozen=True)
class RowFigures:
    """SNR of sketches, in dB, by row of ids; NaN where not finite.

    looked_up: the embedding's own rows; else the text encoder's outputs.
    """

    rows: tuple[int, ...]
    snr_db: tuple[float, ...]
    gate_db: float
    looked_up: bool

    @property
    def wrong(self) -> Sequence[int]:
        """The rows below the gate."""
        pairs = zip(self.rows, self.snr_db, strict=True)
        return [row for row, snr_db in pairs if not snr_db >= self.gate_db]


def measure(
    bundle: Bundle, vocabulary: Vocabulary, runtime: Runtime, output_gate_db: float
) -> RowFigures | NoRun:
    """Look up every id in the final file, or run it on the sampled rows, and hold the rows
    against PyTorch's.

    output_gate_db: for the text encoder's outputs, where the embedding is not shown.
    """
    entry, name = bundle.component("text_encoder"), vocabulary.value
    looked_up = name is not None and entry.format in backends.WATCHABLE.get(runtime.backend, ())
    rows = range(len(vocabulary.ids)) if looked_up else sampled(len(vocabulary.ids))
    cases = [{entry.inputs[0].name: vocabulary.ids[row][None]} for row in rows]
    gate_db = FLOAT16_DB if runtime.arithmetic == "float16" else FLOAT32_DB
    try:
        if name is not None and looked_up:
            path = bundle.file(entry.path)
            values = backends.some_values(path, runtime.backend, [name], cases, **runtime.options)
            given, wanted = [sketch(value[name]) for value in values], vocabulary.sketches
        else:
            run = backends.load(bundle, entry.name, backend=runtime.backend, **runtime.options)
            given = [sketch(run(case)[entry.outputs[0].name]) for case in cases]
            wanted, gate_db = vocabulary.outputs, output_gate_db
    except UserError as error:
        return NoRun("not_run", str(error))
    except Exception as error:  # the runtimes' own errors share no class
        return NoRun("fail", f"the text encoder cannot be run on every token: {brief(error)}")
    return RowFigures(tuple(rows), tuple(map(sketch_snr_db, wanted, given)), gate_db, looked_up)
