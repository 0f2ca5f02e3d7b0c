"""Valid bundles for tests, made in milliseconds: numpy functions, the same ones as ONNX graphs.

The goldens come from the numpy functions below and the files from `onnx.helper`, so a runtime
that reads the files and agrees with the goldens has been compared with an independent
implementation. Sizes: 12 tokens of width 32, latents (1, 4, 8, 8), pictures 16x16.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from mobile_runtime import vocabulary
from mobile_runtime.bundle import Bundle, BundleWriter
from mobile_runtime.manifest import (
    ComponentEntry,
    Gates,
    Generation,
    Golden,
    GoldenPrompt,
    Manifest,
    ScheduleRow,
    ScheduleTable,
    TensorSpec,
    TokenizerFiles,
)
from mobile_runtime.noise import Noise
from mobile_runtime.sketches import sketch
from mobile_runtime.tokenizer import ClipTokenizer

TOKENS, WIDTH, CHANNELS, SIDE = 12, 32, 4, 8
SCALING_FACTOR = 0.5
BOS, EOS = 522, 523
Arrays = dict[str, np.ndarray]


def weights(seed: int = 0) -> Arrays:
    """The float32 weights of the three components, seeded."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    return {
        "embedding": normal(524, WIDTH, scale=1.0),
        "position": normal(1, TOKENS, WIDTH, scale=0.3),
        "conv": normal(CHANNELS, CHANNELS, 1, 1, scale=0.4),
        "time": normal(1, CHANNELS, 1, 1, scale=0.5),
        "context": normal(WIDTH, CHANNELS * SIDE * SIDE, scale=0.25),
        "decode": normal(3, CHANNELS, 1, 1, scale=0.5),
    }


def text_encoder(w: Arrays, feeds: Arrays) -> Arrays:
    return {"last_hidden_state": w["embedding"][feeds["input_ids"]] + w["position"]}


def unet(w: Arrays, feeds: Arrays) -> Arrays:
    sample, context = feeds["sample"], feeds["encoder_hidden_states"]
    mixed = np.einsum("oi,bihw->bohw", w["conv"][:, :, 0, 0], sample)
    told = (context.mean(axis=1) @ w["context"]).reshape(sample.shape)
    time = w["time"] * (feeds["timestep"].reshape(1, 1, 1, 1) * np.float32(0.001))
    return {"out_sample": np.tanh(mixed + told + time).astype(np.float32)}


def vae_decoder(w: Arrays, feeds: Arrays) -> Arrays:
    pixels = np.einsum("oi,bihw->bohw", w["decode"][:, :, 0, 0], feeds["latent_sample"])
    return {"sample": np.tanh(pixels.repeat(2, axis=2).repeat(2, axis=3)).astype(np.float32)}


def model(component: str, w: Arrays, batch: int) -> onnx.ModelProto:
    """The ONNX graph of one component, its weights inside."""
    node = helper.make_node
    if component == "text_encoder":
        nodes = [
            node("Gather", ["embedding", "input_ids"], ["tokens"]),
            node("Add", ["tokens", "position"], ["last_hidden_state"]),
        ]
        used = ["embedding", "position"]
    elif component == "unet":
        nodes = [
            node("Conv", ["sample", "conv"], ["mixed"]),
            node("ReduceMean", ["encoder_hidden_states", "axis"], ["mean"], keepdims=0),
            node("MatMul", ["mean", "context"], ["flat"]),
            node("Reshape", ["flat", "shape"], ["told"]),
            node("Mul", ["timestep", "thousandth"], ["t"]),
            node("Mul", ["time", "t"], ["bias"]),
            node("Add", ["mixed", "told"], ["both"]),
            node("Add", ["both", "bias"], ["sum"]),
            node("Tanh", ["sum"], ["out_sample"]),
        ]
        used = ["conv", "context", "axis", "shape", "time", "thousandth"]
    else:
        nodes = [
            node("Conv", ["latent_sample", "decode"], ["pixels"]),
            node("Resize", ["pixels", "", "scales"], ["large"], mode="nearest"),
            node("Tanh", ["large"], ["sample"]),
        ]
        used = ["decode", "scales"]
    constants = w | {
        "axis": np.array([1], np.int64),
        "shape": np.array([batch, CHANNELS, SIDE, SIDE], np.int64),
        "thousandth": np.array([0.001], np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    inputs, outputs = specs(component, batch)
    graph = helper.make_graph(
        nodes,
        component,
        [_value(spec) for spec in inputs],
        [_value(spec) for spec in outputs],
        [numpy_helper.from_array(constants[name], name) for name in used],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}[spec.dtype]
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def specs(component: str, batch: int) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of one component, named as the contract names them."""

    def spec(name: str, *shape: int, layout: str, dtype: Any = "float32") -> TensorSpec:
        return TensorSpec(
            name=name, shape=shape, dtype=dtype, layout=layout, range=None, description=name
        )

    latents = (CHANNELS, SIDE, SIDE)
    if component == "text_encoder":
        return (
            (spec("input_ids", 1, TOKENS, layout="NL", dtype="int32"),),
            (spec("last_hidden_state", 1, TOKENS, WIDTH, layout="NLD"),),
        )
    if component == "unet":
        return (
            (
                spec("sample", batch, *latents, layout="NCHW"),
                spec("timestep", 1, layout="N"),
                spec("encoder_hidden_states", batch, TOKENS, WIDTH, layout="NLD"),
            ),
            (spec("out_sample", batch, *latents, layout="NCHW"),),
        )
    return (
        (spec("latent_sample", 1, *latents, layout="NCHW"),),
        (spec("sample", 1, 3, 2 * SIDE, 2 * SIDE, layout="NCHW"),),
    )


def schedule(steps: int, stochastic: bool = False) -> ScheduleTable:
    """DDIM on a cosine schedule, epsilon prediction; stochastic adds fresh noise but at the end."""
    timesteps = 1000 * (np.arange(steps, 0, -1) / (steps + 1))
    alphas = [*np.cos(timesteps / 1000 * np.pi / 2), 1.0]
    rows = []
    for index, timestep in enumerate(timesteps):
        alpha, after = float(alphas[index]), float(alphas[index + 1])
        sigma, sigma_after = (1 - alpha**2) ** 0.5, (1 - after**2) ** 0.5
        fresh = 0.3 * sigma_after if stochastic else 0.0
        kept = (sigma_after**2 - fresh**2) ** 0.5
        rows.append(
            ScheduleRow(
                timestep=float(timestep),
                input_scale=1.0,
                u=1 / alpha,
                v=-sigma / alpha,
                a=kept / sigma,
                b=after - kept * alpha / sigma,
                c=0.0,
                d=fresh,
            )
        )
    return ScheduleTable(
        scheduler="DDIMScheduler",
        prediction_type="epsilon",
        steps=steps,
        init_noise_sigma=1.0,
        rows=tuple(rows),
    )


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of 524 tokens: the 512 byte tokens, 10 merges, and the two specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable]
    letters += [chr(256 + index) for index in range(256 - len(printable))]
    merges = [("r", "e"), ("re", "d</w>"), ("f", "o"), ("fo", "x</w>"), ("t", "h"), ("th", "e</w>")]
    merges += [("a", "t</w>"), ("i", "n</w>"), ("o", "n</w>"), ("e", "r</w>")]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    vocabulary += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(vocabulary)}), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_vocabulary(w: Arrays, folder: Path) -> None:
    """Every token's ids and embedding; the tokenizer's own tests compare it with transformers."""
    tokenizer = ClipTokenizer.from_files(
        folder / "tokenizer/vocab.json",
        folder / "tokenizer/merges.txt",
        max_length=TOKENS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    words, ids = vocabulary.words_of(tokenizer), vocabulary.rows_of(tokenizer)
    sketches = np.stack([sketch(w["embedding"][row]) for row in ids])
    rows = [{"input_ids": row[None]} for row in ids[vocabulary.sampled(len(ids))]]
    outputs = np.stack([sketch(text_encoder(w, row)["last_hidden_state"]) for row in rows])
    word_ids = tuple(tuple(tokenizer.ids(word)) for word in words)
    made = vocabulary.Vocabulary(
        words, word_ids, ids, sketches, outputs, tokenizer.digest, "tokens"
    )
    vocabulary.write(made, folder / vocabulary.PATH)


def make_bundle(
    path: Path,
    *,
    guidance_scale: float = 3.0,
    steps: tuple[int, ...] = (2, 4),
    stochastic: bool = False,
    change_model: Callable[[str, onnx.ModelProto], onnx.ModelProto] | None = None,
    change_golden: Callable[[str, Arrays], Arrays] | None = None,
    change_manifest: Callable[[Manifest], Manifest] | None = None,
    force: bool = False,
) -> Bundle:
    """Write a valid ONNX bundle to `path` and open it.

    guidance_scale: above 1 the UNet has batch 2, else 1. stochastic: schedules with fresh noise.
    change_model(component, model), change_golden(component or "pipeline", tensors) and
    change_manifest(manifest) replace what is written, before hashing, so that a test gets a whole
    bundle whose models, goldens or records are wrong in the way that it chooses.
    """
    w = weights()
    batch = 2 if guidance_scale > 1 else 1
    functions = {"text_encoder": text_encoder, "unet": unet, "vae_decoder": vae_decoder}
    tables = tuple(schedule(count, stochastic) for count in steps)
    with BundleWriter(path, force) as writer:
        write_tokenizer(writer.path / "tokenizer")
        (writer.path / "golden").mkdir()
        entries = []
        for name, function in functions.items():
            made = model(name, w, batch)
            if change_model is not None:
                made = change_model(name, made)
            file = writer.path / name / "model.onnx"
            file.parent.mkdir()
            onnx.save(made, file)
            cases = golden_feeds(name, w, batch)
            tensors = {}
            for index, feeds in enumerate(cases):
                tensors |= {f"{index}/in/{key}": value for key, value in feeds.items()}
                for key, value in function(w, feeds).items():
                    tensors[f"{index}/out/{key}"] = value
                    tensors[f"{index}/source/{key}"] = value
            _save(writer.path / f"golden/{name}.safetensors", name, tensors, change_golden)
            inputs, outputs = specs(name, batch)
            entries.append(
                ComponentEntry(
                    name=name,  # type: ignore[arg-type]
                    path=f"{name}/model.onnx",
                    format="onnx",
                    inputs=inputs,
                    outputs=outputs,
                    scheme="float32",
                    parameters=1000,
                    macs=1000,
                    bytes=file.stat().st_size,
                )
            )
        prompts = (
            GoldenPrompt(prompt="red fox", seed=7, steps=steps[-1], guidance_scale=guidance_scale),
            GoldenPrompt(prompt="the rat", seed=8, steps=steps[0], guidance_scale=guidance_scale),
        )
        pipeline = golden_pipeline(w, batch, tables, prompts)
        _save(writer.path / "golden/pipeline.safetensors", "pipeline", pipeline, change_golden)
        write_vocabulary(w, writer.path)
        manifest = Manifest(
            name="tiny",
            target="onnx",
            arithmetic="float32",
            tool_versions={"onnx": onnx.__version__},
            source={"model": "tests"},
            recipe={"name": "tiny"},
            components=tuple(entries),
            tokenizer=TokenizerFiles(
                max_length=TOKENS, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS
            ),
            generation=Generation(
                latent_channels=CHANNELS,
                latent_height=SIDE,
                latent_width=SIDE,
                height=2 * SIDE,
                width=2 * SIDE,
                scaling_factor=SCALING_FACTOR,
                guidance_scale=guidance_scale,
                default_steps=steps[-1],
            ),
            schedules=tables,
            golden=Golden(
                components={name: f"golden/{name}.safetensors" for name in functions},  # type: ignore[misc]
                cases=dict.fromkeys(functions, 3),  # type: ignore[misc]
                conditioning_pairs=((0, 1),),
                pipeline="golden/pipeline.safetensors",
                prompts=prompts,
                vocabulary=vocabulary.PATH,
            ),
            gates=Gates(
                component_snr_db=60.0,
                picture_psnr_db=40.0,
                source_component_snr_db=20.0,
                source_picture_psnr_db=20.0,
            ),
            files=writer.hash_files(),
        )
        if change_manifest is not None:
            manifest = change_manifest(manifest)
        return writer.commit(manifest)


def _save(
    file: Path, name: str, tensors: Arrays, change: Callable[[str, Arrays], Arrays] | None
) -> None:
    if change is not None:
        tensors = change(name, tensors)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file)


def token_ids(*tokens: int) -> np.ndarray:
    """A prompt's ids: start, the tokens, end, padding; (1, TOKENS) int32."""
    ids = [BOS, *tokens, EOS]
    return np.array([ids + [EOS] * (TOKENS - len(ids))], np.int32)


# The ids of the words that the golden prompts use, by the merges of `write_tokenizer`.
PROMPT_IDS = {
    "": token_ids(),
    "red fox": token_ids(513, 515),
    "the rat": token_ids(517, 81, 518),
}


def golden_feeds(component: str, w: Arrays, batch: int) -> list[Arrays]:
    """Three seeded inputs of a component; the UNet's first two differ in the prompt alone."""
    if component == "text_encoder":
        return [{"input_ids": ids} for ids in PROMPT_IDS.values()]
    rng = np.random.default_rng(1)

    def latents(count: int) -> np.ndarray:
        return rng.standard_normal((count, CHANNELS, SIDE, SIDE)).astype(np.float32)

    if component == "vae_decoder":
        return [{"latent_sample": latents(1)} for _ in range(3)]
    embeds = {
        prompt: text_encoder(w, {"input_ids": ids})["last_hidden_state"]
        for prompt, ids in PROMPT_IDS.items()
    }
    first = latents(batch)
    cases = [("red fox", first, 999.0), ("", first, 999.0), ("the rat", latents(batch), 250.0)]
    return [
        {
            "sample": sample,
            "timestep": np.array([timestep], np.float32),
            "encoder_hidden_states": np.concatenate([embeds[""], embeds[prompt]][-batch:]),
        }
        for prompt, sample, timestep in cases
    ]


def golden_pipeline(
    w: Arrays, batch: int, tables: tuple[ScheduleTable, ...], prompts: tuple[GoldenPrompt, ...]
) -> Arrays:
    """Whole runs, in numpy, from stored noise; the tensors that bundle.py names."""
    tensors: Arrays = {}
    for index, golden in enumerate(prompts):
        table = next(table for table in tables if table.steps == golden.steps)
        drawn = Noise(golden.seed)  # the noise's own tests compare it with another Philox
        shape = (1, CHANNELS, SIDE, SIDE)
        noise = np.concatenate([drawn.draw(shape) for _ in range(1 + table.steps)])
        both = [
            text_encoder(w, {"input_ids": PROMPT_IDS[prompt]})["last_hidden_state"]
            for prompt in ("", golden.prompt)
        ]
        x = noise[:1] * np.float32(table.init_noise_sigma)
        trajectory, x0_previous = [x], np.zeros_like(x)
        for row, fresh in zip(table.rows, noise[1:], strict=True):
            feeds = {
                "sample": np.concatenate([x * np.float32(row.input_scale)] * batch),
                "timestep": np.array([row.timestep], np.float32),
                "encoder_hidden_states": np.concatenate(both[-batch:]),
            }
            out = unet(w, feeds)["out_sample"]
            if batch == 2:
                out = out[:1] + np.float32(golden.guidance_scale) * (out[1:] - out[:1])
            x0 = np.float32(row.u) * x + np.float32(row.v) * out
            x = (row.a * x + row.b * x0 + row.c * x0_previous + row.d * fresh).astype(np.float32)
            x0_previous = x0
            trajectory.append(x)
        latent_sample = x / np.float32(SCALING_FACTOR)
        decoded = vae_decoder(w, {"latent_sample": latent_sample})["sample"][0]
        picture = np.round(np.clip(decoded / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
        tensors[f"{index}/noise"] = noise[:1]
        if any(row.d for row in table.rows):
            tensors[f"{index}/fresh_noise"] = noise[1:]
        tensors[f"{index}/trajectory"] = np.concatenate(trajectory)
        tensors[f"{index}/picture"] = picture.transpose(1, 2, 0)
        tensors[f"{index}/source_picture"] = picture.transpose(1, 2, 0)
    return tensors
