"""Golden vectors: what the torch pipeline computes, stored for every runtime to be held against.

The inputs come from real runs of the source pipeline (its trajectory on the golden prompts), so
that a component is checked on values that it will see. They are run twice in torch: before the
stages (`source`) and after them (`out`, same function).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from converters.components import Component
from mobile_runtime import vocabulary
from mobile_runtime.errors import GateError, UserError
from mobile_runtime.manifest import ComponentName, Golden, GoldenPrompt
from mobile_runtime.parity import check_outputs
from mobile_runtime.pipeline import Pipeline, Result
from mobile_runtime.sketches import SKETCH_SIZE, sketch
from mobile_runtime.taps import CEILING_DB, open_taps
from mobile_runtime.tokenizer import ClipTokenizer
from mobile_runtime.vocabulary import Vocabulary

Arrays = dict[str, np.ndarray]
Runner = Callable[[Arrays], Arrays]

FEW_STEPS = 8
"""A schedule's steps of which each timestep has a golden case."""
EMBEDDING = "token_embedding"
"""What CLIP's text encoder calls the layer that looks tokens up."""


def path_of(component: str) -> str:
    """Where a component's golden cases lie in a bundle."""
    return f"golden/{component}.safetensors"


def torch_runner(component: Component) -> Runner:
    """A component's torch module as named arrays in, named arrays out."""

    def run(arrays: Arrays) -> Arrays:
        tensors = tuple(torch.from_numpy(arrays[spec.name]) for spec in component.inputs)
        with torch.no_grad():
            outputs = component.module(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {
            spec.name: tensor.numpy()
            for spec, tensor in zip(component.outputs, outputs, strict=True)
        }

    return run


def worst_snr_db(component: Component, cases: Sequence[Arrays], run: Runner, folder: Path) -> float:
    """How far what a final file gives for the golden cases is from PyTorch, in dB; at most 100.

    folder: the bundle's, where `write` has put what PyTorch gives. Zero where the file gives
    nothing that can be compared.
    """
    known = load_file(folder / path_of(component.name))
    wanted = [
        {spec.name: known[f"{k}/out/{spec.name}"] for spec in component.outputs}
        for k in range(len(cases))
    ]
    found = [check_outputs(out, run(case)) for out, case in zip(wanted, cases, strict=True)]
    figures = [verdict.figures for verdicts in found for verdict in verdicts]
    return min(min(one.snr_db, CEILING_DB) if one else 0.0 for one in figures)


@dataclass
class GoldenCases:
    """The inputs of every component's cases, and what the source made of them."""

    prompts: tuple[GoldenPrompt, ...]
    inputs: dict[str, list[Arrays]] = field(default_factory=dict)
    source: dict[str, list[Arrays]] = field(default_factory=dict)
    pairs: tuple[tuple[int, int], ...] = ()
    runs: list[Result] = field(default_factory=list)


def record_source(
    components: Mapping[str, Component],
    make_pipeline: Callable[[dict[str, Runner]], Pipeline],
    prompts: tuple[GoldenPrompt, ...],
    progress: Callable[[str], None],
) -> GoldenCases:
    """Run the source pipeline on the golden prompts; keep what each component saw and gave.

    A UNet gives the first, middle and last step of each prompt, each other timestep of a schedule
    of at most 8 steps, and the first step of the first prompt once more with the empty prompt (the
    conditioning pair); a text encoder each prompt and the empty one; a decoder each final latent;
    an encoder each picture.
    """
    cases = GoldenCases(prompts)
    for prompt in prompts:
        progress(f"source pipeline: {prompt.prompt!r}")
        seen: dict[str, list[tuple[Arrays, Arrays]]] = {name: [] for name in components}
        runners = {
            name: _recording(torch_runner(component), seen[name])
            for name, component in components.items()
        }
        try:
            result = run_prompt(make_pipeline(runners), prompt)
        except GateError as error:
            raise UserError(
                f"the source draws no picture of {prompt.prompt!r}: values are not finite; its "
                "weights overflow float32, or its files are damaged"
            ) from error
        cases.runs.append(result)
        for name in ("text_encoder", "unet", "vae_decoder"):
            for inputs, outputs in _spread(seen[name]):
                _add(cases, name, inputs, outputs)
        if len(seen["unet"]) <= FEW_STEPS:
            known = {float(one["timestep"][0]) for one in cases.inputs["unet"]}
            for inputs, outputs in seen["unet"]:
                if float(inputs["timestep"][0]) not in known:
                    _add(cases, "unet", inputs, outputs)
    _add_conditioning_pair(cases, components, make_pipeline)
    if "vae_encoder" in components:
        encode = torch_runner(components["vae_encoder"])
        for result in cases.runs:
            picture = result.picture.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
            inputs = {"sample": np.ascontiguousarray(picture)}
            _add(cases, "vae_encoder", inputs, encode(inputs))
    return cases


def run_prompt(pipeline: Pipeline, prompt: GoldenPrompt) -> Result:
    """Run one golden prompt from its seed."""
    return pipeline(
        prompt.prompt,
        seed=prompt.seed,
        **prompt.call,
    )


def _recording(run: Runner, seen: list[tuple[Arrays, Arrays]]) -> Runner:
    def recorded(arrays: Arrays) -> Arrays:
        outputs = run(arrays)
        seen.append((arrays, outputs))
        return outputs

    return recorded


def _spread(calls: list[tuple[Arrays, Arrays]]) -> list[tuple[Arrays, Arrays]]:
    chosen = sorted({0, len(calls) // 2, len(calls) - 1})
    return [calls[index] for index in chosen]


def _add(cases: GoldenCases, name: str, inputs: Arrays, outputs: Arrays) -> None:
    known = cases.inputs.setdefault(name, [])
    if any(all(np.array_equal(case[key], inputs[key]) for key in inputs) for case in known):
        return  # the negative prompt's embedding, say, is the same for every prompt
    known.append(inputs)
    cases.source.setdefault(name, []).append(outputs)


def _add_conditioning_pair(
    cases: GoldenCases,
    components: Mapping[str, Component],
    make_pipeline: Callable[[dict[str, Runner]], Pipeline],
) -> None:
    """Store the first UNet case again, with the empty prompt where the prompt was."""
    runners = {name: torch_runner(component) for name, component in components.items()}
    ids = make_pipeline(runners).tokenizer.encode("")
    empty = runners["text_encoder"]({"input_ids": ids})
    _add(cases, "text_encoder", {"input_ids": ids}, empty)
    inputs = dict(cases.inputs["unet"][0])
    states = inputs["encoder_hidden_states"].copy()
    states[-1] = empty["last_hidden_state"][0]  # under guidance the prompt is the last of two
    inputs["encoder_hidden_states"] = states
    _add(cases, "unet", inputs, runners["unet"](inputs))
    cases.pairs = ((0, len(cases.inputs["unet"]) - 1),)


def write(
    cases: GoldenCases,
    components: Mapping[str, Component],
    make_pipeline: Callable[[dict[str, Runner]], Pipeline],
    folder: Path,
    progress: Callable[[str], None],
) -> Golden:
    """Run the cases through the components after the stages; write `golden/*.safetensors`.

    folder: the bundle's root. Tensor names: see mobile_runtime/bundle.py.
    """
    (folder / "golden").mkdir()
    runners = {name: torch_runner(component) for name, component in components.items()}
    paths: dict[str, str] = {}
    for name in components:
        progress(f"golden vectors: {name}, {len(cases.inputs[name])} cases")
        tensors: Arrays = {}
        for k, (inputs, source) in enumerate(
            zip(cases.inputs[name], cases.source[name], strict=True)
        ):
            outputs = runners[name](inputs)
            for kind, arrays in (("in", inputs), ("out", outputs), ("source", source)):
                tensors |= {f"{k}/{kind}/{key}": value for key, value in arrays.items()}
        paths[name] = path_of(name)
        _save(tensors, folder / paths[name])
    tensors = {}
    for k, (prompt, source_run) in enumerate(zip(cases.prompts, cases.runs, strict=True)):
        progress(f"golden pipeline after the stages: {prompt.prompt!r}")
        seen: dict[str, list[tuple[Arrays, Arrays]]] = {name: [] for name in runners}
        watched = {name: _recording(run, seen[name]) for name, run in runners.items()}
        run = run_prompt(make_pipeline(watched), prompt)
        tensors |= {f"{k}/{name}": value for name, value in _between_models(seen).items()}
        tensors |= {
            f"{k}/noise": run.noise,
            f"{k}/trajectory": run.trajectory,
            f"{k}/picture": run.picture,
            f"{k}/source_picture": source_run.picture,
        }
        if run.fresh_noise is not None:
            tensors[f"{k}/fresh_noise"] = run.fresh_noise
    _save(tensors, folder / "golden/pipeline.safetensors")
    return Golden(
        components=cast(dict[ComponentName, str], paths),
        cases=cast(dict[ComponentName, int], {name: len(cases.inputs[name]) for name in paths}),
        conditioning_pairs=cases.pairs,
        pipeline="golden/pipeline.safetensors",
        prompts=cases.prompts,
    )


def every_token(component: Component, tokenizer: ClipTokenizer) -> Vocabulary:
    """What the tokenizer, the text encoder and its token embedding give for all tokens."""
    words, ids = vocabulary.words_of(tokenizer), vocabulary.rows_of(tokenizer)
    modules = dict(component.module.named_modules())
    layer = next((name for name in modules if name.endswith(EMBEDDING)), None)
    sketches = np.zeros((len(ids), SKETCH_SIZE), np.float32)
    if layer is not None:
        with torch.no_grad():
            for k, row in enumerate(ids):
                sketches[k] = sketch(modules[layer](torch.from_numpy(row[None])).numpy())
    run = torch_runner(component)
    (given,), (made, *_) = component.inputs, component.outputs
    rows = ids[vocabulary.sampled(len(ids))]
    outputs = np.stack([sketch(run({given.name: row[None]})[made.name]) for row in rows])
    word_ids = tuple(tuple(tokenizer.ids(word)) for word in words)
    return Vocabulary(words, word_ids, ids, sketches, outputs, tokenizer.digest, None)


def write_tokens(tokens: Vocabulary, taps: Mapping[ComponentName, str], folder: Path) -> str:
    """Write `golden/vocabulary.safetensors`, with the embedding's name as the taps found it."""
    found = open_taps(folder / taps["text_encoder"]).taps if "text_encoder" in taps else ()
    value = next((tap.value for tap in found if tap.layer.endswith(EMBEDDING)), None)
    vocabulary.write(replace(tokens, value=value), folder / vocabulary.PATH)
    return vocabulary.PATH


def _between_models(seen: Mapping[str, list[tuple[Arrays, Arrays]]]) -> Arrays:
    """What the sampler gave to the models in one run, and what it got from the UNet.

    n calls of the UNet: out_sample (n, B, C, h, w), timestep (n,), and sample as sketches (n, 67);
    latent_sample (1, C, h, w) of the decoder. All float32.
    """
    calls = seen["unet"]
    return {
        "out_sample": np.stack([outputs["out_sample"] for _, outputs in calls]),
        "timestep": np.concatenate([inputs["timestep"] for inputs, _ in calls]),
        "sample": np.stack([sketch(inputs["sample"]) for inputs, _ in calls]),
        "latent_sample": seen["vae_decoder"][-1][0]["latent_sample"],
    }


def _save(tensors: Arrays, path: Path) -> None:
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
