"""The harness itself, tested: each kind of damage is caught, and its place inside is named.

An undamaged bundle passes, also over many pipelines (`python -m tests.benchmarks.mutations` takes
fifty). The bundle is a small pipeline's with INT8 weights, converted by the commands.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from converters import cli
from mobile_runtime import taps, vocabulary
from mobile_runtime.backends.mil.package import Package
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError
from mobile_runtime.on_devices import Asked, validate_on
from mobile_runtime.report import Report
from mobile_runtime.validate import validate
from tests.converters.small import make_small_pipeline
from tests.damages import (
    Damage,
    Graph,
    damaged,
    dropped,
    in_golden,
    in_manifest,
    on_graph,
    on_input,
    on_package,
    on_weight,
    one_nan,
    scaled_output,
    swap_inputs,
    swap_weights,
)

RECIPE = """
name: small
source: {{model: {model}}}
resolution: 16
schedule: {{steps: 3, guidance_scale: 3.0}}
stages: [{{quantize: {{weights: int8}}}}]
golden_prompts: [a red tent, the rat]
"""

POSITIONS = "text_encoder.text_model.embeddings.position_embedding"
TOKEN_ROWS = "text_encoder.text_model.embeddings.token_embedding"
TEXT = "text_encoder.text_model.encoder.layers"
MID = "unet.mid_block"
ATTENTION = f"{MID}.attentions.0.transformer_blocks.0"
DECODER = "vae_decoder.decoder"
CONV = f"{DECODER}.mid_block.resnets.0.conv1"


def shift_rows(manifest: dict[str, Any]) -> None:
    """Each step takes the row of the next one."""
    rows = manifest["schedules"][0]["rows"]
    rows[:] = [rows[min(k + 1, len(rows) - 1)] for k in range(len(rows))]


def other_scaling(manifest: dict[str, Any]) -> None:
    manifest["generation"]["scaling_factor"] *= 0.9


def weaker_guidance(manifest: dict[str, Any]) -> None:
    manifest["generation"]["guidance_scale"] -= 0.5
    for prompt in manifest["golden"]["prompts"]:
        prompt["guidance_scale"] -= 0.5


def off_by_one(folder: Path) -> None:
    """Every token gets its neighbour's id."""
    path = folder / "tokenizer/vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({token: max(0, k - 1) for token, k in vocabulary.items()}))


def unused_ids(folder: Path) -> list[int]:
    """The tokens, not whole words, that no golden prompt has."""
    cases = load_file(folder / "golden/text_encoder.safetensors")
    used = {int(i) for name, ids in cases.items() if name.endswith("input_ids") for i in ids.flat}
    known = json.loads((folder / "tokenizer/vocab.json").read_text()).values()
    return sorted(set(known) - used)


def unused_rows_zeroed(folder: Path) -> None:
    def zeroed(array: np.ndarray) -> np.ndarray:
        array[unused_ids(folder)] = 0
        return array

    on_weight(TOKEN_ROWS, zeroed)(folder)


def two_unused_rows_swapped(folder: Path) -> None:
    def swapped(array: np.ndarray) -> np.ndarray:
        first, *_, last = unused_ids(folder)
        array[[first, last]] = array[[last, first]]
        return array

    on_weight(TOKEN_ROWS, swapped)(folder)


def two_tokens_exchanged(folder: Path) -> None:
    """Of those that end a word, so that a user's prompt has them."""
    path = folder / "tokenizer/vocab.json"
    ids = json.loads(path.read_text())
    unused = set(unused_ids(folder))
    first, *_, last = [t for t, k in ids.items() if k in unused and t.endswith("</w>")]
    path.write_text(json.dumps(ids | {first: ids[last], last: ids[first]}))


def a_merge_dropped(folder: Path) -> None:
    path = folder / "tokenizer/merges.txt"
    path.write_text("\n".join(path.read_text().rstrip().split("\n")[:-1]) + "\n")


def merges_in_another_order(folder: Path) -> None:
    path = folder / "tokenizer/merges.txt"
    first, *lines = path.read_text().rstrip().split("\n")
    path.write_text("\n".join([first, *lines[:-2], lines[-1], lines[-2]]) + "\n")


def letters_exchanged(folder: Path) -> None:
    """The ids of all tokens that are a single byte of a letter beyond ASCII."""
    path = folder / "tokenizer/vocab.json"
    ids = json.loads(path.read_text())
    bytes_ = [token for token in ids if len(token) == 1 and not token.isascii()]
    moved = dict(zip(bytes_, [ids[t] for t in bytes_[1:] + bytes_[:1]], strict=True))
    path.write_text(json.dumps(ids | moved))


def other_format(folder: Path) -> None:
    """A format whose values inside nobody looks at, over a damage that only they show."""
    on_weight(f"{MID}.resnets.1.conv2", np.zeros_like)(folder)
    in_manifest(lambda manifest: manifest["components"][1].update(format="ort"))(folder)


def cut(folder: Path) -> None:
    path = folder / "unet/model.onnx"
    path.write_bytes(path.read_bytes()[:-1000])


def other_component(folder: Path) -> None:
    (folder / "vae_decoder/model.onnx").write_bytes((folder / "unet/model.onnx").read_bytes())


def rolled(key: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[key] = np.roll(tensors[key], 1, axis=-1)

    return change


def drop_mask(graph: Any) -> None:
    """The text encoder's causal mask becomes zero."""
    masks = [
        one.name
        for one in graph.graph.initializer
        if one.data_type == 1 and (graph.constant(one.name) < -1e3).any()
    ]
    assert masks
    for name in masks:
        graph.set_constant(name, np.zeros_like(graph.constant(name)))


def doubled(array: np.ndarray) -> np.ndarray:
    return array * 2


def one_channel_negated(array: np.ndarray) -> np.ndarray:
    array[0] = -array[0]
    return array


def first_channels_up(array: np.ndarray) -> np.ndarray:
    array[: array.size // 2] += 1
    return array


DAMAGES = [
    # Inside a component: the layer has to be named.
    Damage(
        "a weight tensor zeroed",
        on_weight(f"{MID}.resnets.0.conv1", np.zeros_like),
        f"{MID}.resnets.0.conv1",
    ),
    Damage(
        "biases that are wrong alike at every token",
        on_input(f"{ATTENTION}.attn1.to_out.0", 1, first_channels_up),
        f"{ATTENTION}.attn1.to_out.0",
    ),
    Damage("a layer gone", dropped(f"{MID}.resnets.1.norm2"), f"{MID}.resnets.1.norm2"),
    Damage(
        "a scale doubled",
        on_weight(f"{ATTENTION}.ff.net.2", doubled, part=1),
        f"{ATTENTION}.ff.net.2",
    ),
    Damage(
        "one channel's scale doubled",
        on_weight(f"{DECODER}.conv_out", lambda a: a * np.r_[2, np.ones(a.size - 1)], part=1),
        f"{DECODER}.conv_out",
    ),
    Damage(
        "the integers of one channel negated",
        on_weight(f"{MID}.resnets.1.conv2", one_channel_negated),
        f"{MID}.resnets.1.conv2",
    ),
    Damage(
        "two layers swapped",
        swap_weights(f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn1.to_k"),
        f"{ATTENTION}.attn1.to_q",
    ),
    Damage(
        "two layers of different blocks swapped",
        swap_weights(
            f"{DECODER}.mid_block.resnets.0.conv1", f"{DECODER}.mid_block.resnets.1.conv2"
        ),
        f"{DECODER}.mid_block.resnets.0.conv1",
    ),
    Damage(
        "a transposed kernel",
        on_weight("unet.down_blocks.1.resnets.0.conv1", lambda a: a.swapaxes(2, 3)),
        "unet.down_blocks.1.resnets.0.conv1",
    ),
    Damage(
        "a transposed matrix",
        on_weight(f"{TEXT}.1.self_attn.out_proj", lambda a: a.T),
        f"{TEXT}.1.self_attn.out_proj",
    ),
    Damage(
        "the input's channels in another order",
        on_weight("unet.conv_in", lambda a: a[:, ::-1]),
        "unet.conv_in",
    ),
    Damage(
        "the picture's channels in another order",
        on_weight(f"{DECODER}.conv_out", lambda a: a[::-1]),
        f"{DECODER}.conv_out",
    ),
    Damage("a wrong mask", on_graph("text_encoder", drop_mask), f"{TEXT}.0.self_attn"),
    Damage(
        "a bias dropped",
        on_input(f"{MID}.resnets.0.conv2", 2, np.zeros_like),
        f"{MID}.resnets.0.conv2",
    ),
    Damage(
        "NaN in one element of a bias",
        on_input("unet.up_blocks.1.resnets.0.conv2", 2, one_nan),
        "unet.up_blocks.1.resnets.0.conv2",
    ),
    Damage(
        "the attention's scale lost",
        scaled_output(f"{ATTENTION}.attn1.to_q", 4.0),
        f"{ATTENTION}.attn1.to_q",
    ),
    Damage(
        "the text ignored",
        scaled_output(f"{ATTENTION}.attn2", 0.0, op="scaled_dot_product_attention"),
        f"{ATTENTION}.attn2",
    ),
    Damage(
        "a norm's result a tenth too large",
        scaled_output(f"{DECODER}.mid_block.resnets.1.norm1", 1.1),
        f"{DECODER}.mid_block.resnets.1.norm1",
    ),
    Damage(
        "a skip concatenated in the other order",
        swap_inputs("unet.up_blocks.1.resnets.0.norm1", "Concat"),
        "unet.up_blocks.1.resnets.0.norm1",
    ),
    Damage(
        "positions shifted by one",
        on_weight(POSITIONS, lambda a: np.roll(a, 1, axis=0)),
        POSITIONS,
    ),
    # Outside the models: caught, with no layer to name.
    Damage("schedule rows shifted", in_manifest(shift_rows)),
    Damage("a wrong scaling factor", in_manifest(other_scaling)),
    Damage("another guidance scale", in_manifest(weaker_guidance)),
    Damage("the tokenizer off by one", off_by_one),
    Damage("the rows of all tokens that no golden prompt has zeroed", unused_rows_zeroed),
    Damage("two rows that no golden prompt has swapped", two_unused_rows_swapped),
    Damage("two tokens that no golden prompt has exchanged", two_tokens_exchanged),
    Damage("a merge of the tokenizer dropped", a_merge_dropped),
    Damage("the tokenizer's merges in another order", merges_in_another_order),
    Damage("letters beyond ASCII exchanged", letters_exchanged),
    Damage("a truncated file", cut),
    Damage("another component's file", other_component),
    Damage("a reference of another case", in_golden("unet", rolled("1/out/out_sample"))),
    Damage("noise of another seed", in_golden("pipeline", rolled("0/noise"))),
    Damage("the picture of another seed", in_golden("pipeline", rolled("1/picture"))),
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mutations")
    make_small_pipeline().save_pretrained(folder / "model")
    (folder / "small.yaml").write_text(RECIPE.format(model=folder / "model"))
    made = {}
    for target in ("onnx", "coreml"):
        made[target] = folder / target
        argv = ["--recipe", str(folder / "small.yaml"), "--output", str(made[target])]
        assert cli.main(target, [*argv, "--no-validate"]) == 0
    return made


def checked(folder: Path) -> Report:
    return validate(Bundle.open(folder), repeats=0, progress=False)


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_an_undamaged_bundle_passes_and_nothing_inside_diverges(bundles, target, capsys):
    from mobile_runtime.__main__ import main

    assert checked(bundles[target]).verdict == "pass"
    assert main(["layers", str(bundles[target])]) == 0
    told = capsys.readouterr().out
    assert f"{MID}.resnets.0.conv1 (conv2d)" in told
    assert "DIVERGES" not in told


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_caught_and_its_place_named(bundles, damage, tmp_path):
    report = checked(damaged(bundles["onnx"], damage, tmp_path / "bundle"))
    assert report.verdict == "fail"
    named = [check for check in report.checks if check.kind == "inside" and check.status == "fail"]
    if damage.layer is None:
        assert named == []
    else:
        assert named[0].component == damage.layer.split(".")[0]
        assert named[0].details["layer"] == damage.layer
        assert damage.layer in report.summary


@pytest.mark.parametrize(
    "name",
    [
        "a weight tensor zeroed",
        "two layers swapped",
        "the attention's scale lost",
        "a wrong scaling factor",
    ],
)
def test_a_device_changes_nothing_about_what_is_caught(bundles, name, tmp_path, monkeypatch):
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    (damage,) = (one for one in DAMAGES if one.name == name)
    bundle = Bundle.open(damaged(bundles["onnx"], damage, tmp_path / "bundle"))
    report = validate_on(bundle, ["local"], Asked(repeats=0))
    assert report.verdict == "fail"
    if damage.layer is not None:
        assert damage.layer in report.summary


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.update({"0/out_sample": tensors["0/out_sample"][:1]}), "shape"),
        (lambda tensors: tensors.update({"0/sample": tensors["0/sample"][:, :3]}), "shape"),
        (lambda tensors: tensors.pop("0/timestep"), "has no tensor"),
    ],
    ids=["fewer calls", "another sketch", "a tensor less"],
)
def test_a_stored_run_that_is_not_whole_is_one_sentence(bundles, tmp_path, change, sentence):
    damage = Damage("run", in_golden("pipeline", change))
    folder = damaged(bundles["onnx"], damage, tmp_path / "bundle")
    with pytest.raises(BundleError, match=sentence):
        checked(folder)


def test_a_sampler_that_asks_more_often_than_it_did_fails(bundles, tmp_path):
    def shorter(tensors: dict[str, np.ndarray]) -> None:
        for name in ("out_sample", "timestep", "sample"):
            tensors[f"0/{name}"] = tensors[f"0/{name}"][:-1]

    damage = Damage("run", in_golden("pipeline", shorter))
    report = checked(damaged(bundles["onnx"], damage, tmp_path / "bundle"))
    (told,) = [c for c in report.checks if c.kind == "sampler" and c.status == "fail"]
    assert "more often than PyTorch did" in told.reason


def test_noise_that_a_last_step_adds_fails(tmp_path):
    """Golden cases hold zeros for the steps that add none, so nothing else would show it."""
    make_small_pipeline().save_pretrained(tmp_path / "model")
    text = RECIPE.format(model=tmp_path / "model")
    text = text.replace(
        "{steps: 3, guidance_scale: 3.0}", "{scheduler: lcm, steps: 2, guidance_scale: 1}"
    )
    (tmp_path / "small.yaml").write_text(text)
    argv = ["--recipe", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "bundle")]
    assert cli.main("onnx", [*argv, "--no-validate"]) == 0
    assert checked(tmp_path / "bundle").verdict == "pass"

    def noisy(manifest: dict[str, Any]) -> None:
        rows = manifest["schedules"][0]["rows"]
        assert [row["d"] != 0 for row in rows] == [True, False]
        rows[-1]["d"] = 0.5

    report = checked(damaged(tmp_path / "bundle", Damage("d", in_manifest(noisy)), tmp_path / "d"))
    assert report.verdict == "fail"
    assert "step 2 of 2 adds fresh noise, and PyTorch added none" in report.summary


@pytest.mark.parametrize("what", ["input", "output", "no shape", "weights"])
def test_an_onnx_file_that_declares_itself_otherwise_is_refused(bundles, tmp_path, what):
    """The runtime computes the same: it mends what is declared wrongly."""

    def change(graph: Graph) -> None:
        (sample, *_), (output,) = graph.graph.input, graph.graph.output
        if what == "input":
            sample.type.tensor_type.shape.dim[2].dim_param = "height"
        elif what == "output":
            output.type.tensor_type.shape.dim[1].dim_value = 9
        elif what == "no shape":
            output.type.tensor_type.ClearField("shape")
        else:
            name, scale = graph.weight(f"{MID}.resnets.0.conv1")
            node = next(one for one in graph.graph.node if name in one.input)
            assert scale is not None
            floats = graph.constant(name) * graph.constant(scale).reshape(-1, 1, 1, 1)
            graph.graph.initializer.append(
                numpy_helper.from_array(floats.astype(np.float32), node.output[0])
            )
            graph.graph.node.remove(node)

    damage = Damage(what, on_graph("unet", change))
    report = checked(damaged(bundles["onnx"], damage, tmp_path / "bundle"))
    assert report.verdict == "fail"
    assert ("INT8 weights" if what == "weights" else "declares its") in report.summary


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("shape", "describes its inputs"),
        ("name", "describes its outputs"),
        ("version", "version 1"),
    ],
)
def test_a_package_that_describes_itself_otherwise_is_refused(bundles, tmp_path, what, told):
    """Core ML reads the description; the program in it is sound."""

    def change(folder: Path) -> None:
        package = Package(folder / "Unet.mlpackage")
        if what == "shape":
            package.spec.description.input[0].type.multiArrayType.shape[0] = 7
        elif what == "name":
            package.spec.description.output[0].name = "nonsense"
        else:
            package.spec.specificationVersion = 1
        package.model_file.write_bytes(package.spec.SerializeToString())

    report = checked(damaged(bundles["coreml"], Damage(what, change), tmp_path / "bundle"))
    assert report.verdict == "fail"
    assert told in report.summary


def test_a_layer_that_is_gone_fails_though_every_gate_is_passed(bundles, tmp_path):
    """The gates are low, as those of INT8 activations."""
    layer = "unet.up_blocks.1.resnets.0.norm2"

    def low(manifest: dict[str, Any]) -> None:
        manifest["gates"] |= {"component_snr_db": 0.01, "trajectory_snr_db": 0.01}
        manifest["gates"]["picture_psnr_db"] = 1.0

    def apply(folder: Path) -> None:
        dropped(layer)(folder)
        in_manifest(low)(folder)

    report = checked(damaged(bundles["onnx"], Damage("gone", apply), tmp_path / "bundle"))
    assert report.verdict == "fail"
    (inside,) = [c for c in report.checks if c.kind == "inside" and c.component == "unet"]
    assert (inside.status, inside.gated, inside.details["layer"]) == ("fail", True, layer)
    assert "not in the file any more" in inside.reason


def other_taps(folder: Path) -> None:
    first, second = (folder / f"golden/{name}.taps.safetensors" for name in ("unet", "vae_decoder"))
    first.write_bytes(second.read_bytes())


def fewer_taps(folder: Path) -> None:
    path = folder / "golden/unet.taps.safetensors"
    found = taps.open_taps(path)
    taps.write(taps.Taps(found.taps[:3], found.sketches[:3], found.made_on), path)


def shifted_taps(folder: Path) -> None:
    path = folder / "golden/unet.taps.safetensors"
    found = taps.open_taps(path)
    taps.write(taps.Taps(found.taps, np.roll(found.sketches, 1, axis=0), found.made_on), path)


@pytest.mark.parametrize("change", [other_taps, fewer_taps])
def test_taps_that_are_not_those_of_the_conversion_are_refused(bundles, change, tmp_path):
    folder = damaged(bundles["onnx"], Damage("taps", change), tmp_path / "bundle")
    with pytest.raises(BundleError, match="taps, not the"):
        checked(folder)


def test_taps_of_other_values_fail(bundles, tmp_path):
    report = checked(damaged(bundles["onnx"], Damage("taps", shifted_taps), tmp_path / "bundle"))
    assert report.verdict == "fail"


@pytest.mark.parametrize(
    ("file", "tensors"),
    [
        ("timesteps", {"timesteps": np.ones((3, 1), np.float32)}),
        ("timesteps", {"timesteps": np.full(3, np.nan, np.float32)}),
        ("vocabulary", {"lengths": np.ones(3, np.float32)}),
        ("vocabulary", {"words": np.frombuffer(b"5", np.uint8)}),
        ("vocabulary", {"words": np.frombuffer(b"[" * 100_000, np.uint8)}),
        ("vocabulary", {"ids": np.ones((0, 16), np.int32)}),
    ],
)
def test_a_damaged_file_of_what_golden_cases_do_not_show_is_one_sentence(
    bundles, tmp_path, file, tensors
):
    def apply(folder: Path) -> None:
        path = folder / f"golden/{file}.safetensors"
        with safe_open(path, "numpy") as opened:
            metadata = opened.metadata()
        save_file(load_file(path) | tensors, path, metadata)

    with pytest.raises(BundleError, match=f"{file}.safetensors.* make the bundle again"):
        checked(damaged(bundles["onnx"], Damage(file, apply), tmp_path / "bundle"))


def test_timesteps_of_another_schedule_fail(bundles, tmp_path):
    def apply(folder: Path) -> None:
        path = folder / taps.TIMESTEPS_PATH
        taps.write(replace(taps.open_taps(path), timesteps=(3.0, 2.0, 1.0)), path)

    report = checked(damaged(bundles["onnx"], Damage("other", apply), tmp_path / "bundle"))
    (told,) = [check for check in report.checks if check.kind == "timesteps"]
    assert told.status == "fail"
    assert "not of the schedules' timesteps" in told.reason


@pytest.mark.parametrize("change", [{"elements": 10**30}, {"snr_db": {"float32": float("nan")}}])
def test_a_tap_that_cannot_be_is_one_sentence(bundles, tmp_path, change):
    def apply(folder: Path) -> None:
        path = folder / taps.path_of("unet")
        found = taps.open_taps(path)
        one = replace(found.taps[0], **change)
        taps.write(replace(found, taps=(one, *found.taps[1:])), path)

    with pytest.raises(BundleError, match="holds no taps; make the bundle again"):
        checked(damaged(bundles["onnx"], Damage("tap", apply), tmp_path / "bundle"))


def test_other_session_options_than_those_that_were_validated_are_refused(bundles, tmp_path):
    def other(manifest: dict[str, Any]) -> None:
        options = manifest["components"][1]["details"]["session_options"]
        options["session.qdq_matmulnbits_accuracy_level"] = "4"

    damage = Damage("options", in_manifest(other))
    report = checked(damaged(bundles["onnx"], damage, tmp_path / "bundle"))
    assert report.verdict == "fail"
    assert "tells apps the session options" in report.summary


def test_a_format_that_hides_a_damage_is_refused(bundles, tmp_path):
    with pytest.raises(BundleError, match="no file of the format ort"):
        checked(damaged(bundles["onnx"], Damage("format", other_format), tmp_path / "bundle"))


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_a_specification_of_another_shape_is_refused(bundles, tmp_path, component):
    def larger(manifest: dict[str, Any]) -> None:
        (entry,) = [one for one in manifest["components"] if one["name"] == component]
        entry["outputs"][0]["shape"][-1] *= 2

    damage = Damage("shape", in_manifest(larger))
    with pytest.raises(BundleError, match="has shape"):
        checked(damaged(bundles["onnx"], damage, tmp_path / "bundle"))


def test_without_new_hashes_a_damaged_file_is_not_even_opened(bundles, tmp_path):
    folder = damaged(bundles["onnx"], Damage("none", lambda folder: None), tmp_path / "bundle")
    cut(folder)
    with pytest.raises(BundleError, match=r"unet/model\.onnx"):
        Bundle.open(folder)


def test_the_rows_of_a_core_ml_package_are_held_too(bundles, tmp_path):
    def apply(folder: Path) -> None:
        def zeroed(array: np.ndarray) -> np.ndarray:
            rows = array.reshape(-1, 32)
            rows[unused_ids(folder)] = 0
            return array

        on_package(TOKEN_ROWS, "x", "quantized_data", zeroed)(folder)

    report = checked(damaged(bundles["coreml"], Damage("rows", apply), tmp_path / "bundle"))
    wrong = [check for check in report.checks if check.gated and check.status == "fail"]
    assert {check.kind for check in wrong} == {"vocabulary"}
    assert {check.runtime for check in wrong} == {"mil float32", "mil float16"}


PACKAGE_DAMAGES = [
    Damage("a scale doubled", on_package(CONV, "weight", "scale", doubled), CONV),
    Damage("integers shifted", on_package(CONV, "weight", "quantized_data", np.flip), CONV),
    Damage("NaN in one element of a bias", on_package(CONV, "bias", "val", one_nan), CONV),
]


@pytest.mark.parametrize("damage", PACKAGE_DAMAGES, ids=lambda damage: damage.name)
def test_damage_to_a_core_ml_package_is_caught_and_its_place_named(bundles, damage, tmp_path):
    report = checked(damaged(bundles["coreml"], damage, tmp_path / "bundle"))
    assert report.verdict == "fail"
    named = [check for check in report.checks if check.kind == "inside" and check.status == "fail"]
    assert {check.runtime for check in named} == {"mil float32", "mil float16"}
    assert {check.details["layer"] for check in named} == {damage.layer}


def test_a_number_that_leaves_float16s_range_is_no_number_in_float16(bundles, tmp_path):
    # The norm behind the convolution takes any factor out again, if it was finite.
    def large(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32) * 6e4

    def apply(folder: Path) -> None:
        on_package(CONV, "weight", "scale", large)(folder)
        on_package(CONV, "bias", "val", large)(folder)

    report = checked(damaged(bundles["coreml"], Damage("overflow", apply), tmp_path / "bundle"))
    failed = [c for c in report.checks if c.component == "vae_decoder" and c.status == "fail"]
    assert {c.runtime for c in failed if c.kind != "inside"} == {"mil float16"}
    # Inside it is another number in float32 too, and no number in float16.
    named = {c.runtime: c for c in failed if c.kind == "inside"}
    assert {check.details["layer"] for check in named.values()} == {CONV}
    assert "not finite" in named["mil float16"].reason
    assert "not finite" not in named["mil float32"].reason


def test_values_inside_are_told_where_they_cannot_be_looked_at(bundles, tmp_path):
    def forget(manifest: dict[str, Any]) -> None:
        manifest["golden"]["taps"] = {}

    def apply(folder: Path) -> None:
        DAMAGES[0].apply(folder)
        in_manifest(forget)(folder)

    report = checked(damaged(bundles["onnx"], Damage("old", apply), tmp_path / "bundle"))
    assert report.verdict == "fail"
    told = next(c for c in report.checks if c.kind == "inside" and c.component == "unet")
    assert told.status == "not_run"
    assert not told.gated
    assert "convert it again" in told.reason


def test_where_nothing_inside_is_shown_the_whole_encoder_runs_on_the_tokens(bundles, tmp_path):
    """As in ExecuTorch, and in `.ort` files."""

    known = vocabulary.read(Bundle.open(bundles["onnx"]))
    assert known is not None

    def unnamed(folder: Path) -> None:
        vocabulary.write(replace(known, value=None), folder / vocabulary.PATH)

    def apply(folder: Path) -> None:
        unused_rows_zeroed(folder)
        unnamed(folder)

    report = checked(damaged(bundles["onnx"], Damage("sound", unnamed), tmp_path / "sound"))
    (told,) = [check for check in report.checks if check.kind == "vocabulary"]
    assert (report.verdict, told.status) == ("pass", "pass")
    assert "the outputs for 600 of 600 ids" in told.reason
    report = checked(damaged(bundles["onnx"], Damage("rows", apply), tmp_path / "bundle"))
    (told,) = [check for check in report.checks if check.status == "fail"]
    assert told.kind == "vocabulary"
    assert "the outputs differ" in told.reason
