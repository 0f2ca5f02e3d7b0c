"""Every shipped recipe fits its source, at its real size, and its header says what it gives."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from converters.cli import main
from mobile_runtime.errors import UserError, run_cli
from recipes import quantize, schema, stages
from recipes.sources import open_source
from recipes.sources.tiny_autoencoder import open_tiny

# What stands here, without weights or network, for what recipes name on the hub.
SOURCES = {
    "embedded": "embedded",
    "stabilityai/sd-turbo": "random:sd_turbo",
    "stabilityai/stable-diffusion-2-1-base": "random:sd21",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "random:sd15",
}
NEW = ("sd_turbo_small_int8", "sd_turbo_taesd_int8", "sd_turbo_tiny_384_w8a8", "sd_turbo_w8a8")
WITH_TAESD = NEW[:3]
GIVES = re.compile(
    r"Gives: ([\d,.]+) M parameters, ([\d,.]+) GMACs a picture, ([\d,.]+) MB of models"
)
ROW = re.compile(r"^(text_encoder|unet|vae_decoder) +([\d,]+) +([\d.]+) .* ([\d.]+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders and files in place of the hub ids that stages name."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("hub")
    tiny: Any = AutoencoderTiny()  # its defaults are TAESD's configuration
    tiny.save_pretrained(folder / "taesd")
    layer = "unet.down_blocks.0.resnets.0.conv1"
    lora = {f"{layer}.lora_A.weight": torch.ones(1, 320, 3, 3)}
    lora[f"{layer}.lora_B.weight"] = torch.ones(320, 1, 1, 1)
    save_file(lora, folder / "lora.safetensors")
    return {
        "madebyollin/taesd": str(folder / "taesd"),
        "latent-consistency/lcm-lora-sdv1-5": str(folder / "lora.safetensors"),
    }


def changes(name: str, stand_ins: dict[str, str]) -> dict[str, Any]:
    """What makes the recipe run here: its source and its stages' models by others of their size."""
    recipe = schema.load(name)
    changed: dict[str, Any] = {"source.model": SOURCES[recipe.source.model]}
    for index, stage in enumerate(recipe.stages):
        key = f"stages.{index}.{stage.name}"
        if stage.decoder and stage.decoder.model:
            changed[f"{key}.model"] = stand_ins[stage.decoder.model]
        if stage.adapters:
            for number, lora in enumerate(stage.adapters.loras):
                changed[f"{key}.loras.{number}.model"] = stand_ins[lora.model]
                changed[f"{key}.loras.{number}.weight_name"] = None
    return changed


def header(name: str) -> str:
    """The opening comment as one line."""
    text = schema.find(name).read_text()
    return " ".join(line[1:].strip() for line in text[: text.index("\n\n")].splitlines())


def dry_run(name: str, *more: str) -> int:
    """The command's exit code."""
    return run_cli(lambda argv: main("onnx", argv), ["--recipe", name, *more, "--dry-run"])


def checked(name: str, stand_ins: dict[str, str]) -> tuple[schema.Recipe, Any]:
    """The recipe on its stand-ins, and the pipeline that its stages would leave; no weights."""
    recipe = schema.load(name, changes(name, stand_ins))
    return recipe, stages.check(open_source(recipe.source.model, weights=False).pipeline, recipe)


@pytest.mark.parametrize("name", schema.names())
def test_its_header_says_what_it_needs_and_gives(name: str) -> None:
    told = header(name)
    assert " Needs: " in told
    assert " Gives: " in told
    if any(stage.distill for stage in schema.load(name).stages) and "sd_turbo" in name:
        assert " GPU hours: " in told
        assert "BK-SDM's authors" in told


@pytest.mark.parametrize("name", schema.names())
def test_it_fits_its_source_and_gives_what_its_header_says(
    name: str, stand_ins: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = changes(name, stand_ins).items()
    sets = [f"--set={key}={'null' if value is None else value}" for key, value in changed]
    assert dry_run(name, *sets) == 0
    rows = {
        component: (int(parameters.replace(",", "")), float(gmacs), float(size))
        for component, parameters, gmacs, size in ROW.findall(capsys.readouterr().out)
    }
    assert len(rows) == 3
    said = GIVES.search(header(name))
    if said is None:
        assert name not in NEW
        return
    recipe = schema.load(name)
    calls = {"text_encoder": 2 if recipe.guided else 1, "unet": recipe.schedule.steps}
    parameters, gmacs, megabytes = (float(figure.replace(",", "")) for figure in said.groups())
    assert parameters == pytest.approx(sum(row[0] for row in rows.values()) / 1e6, abs=0.051)
    work = sum(calls.get(component, 1) * row[1] for component, row in rows.items())
    # The dry run rounds to two digits, and its UNet counts once a step.
    assert gmacs == pytest.approx(work, abs=0.06 + 0.005 * recipe.schedule.steps)
    assert megabytes == pytest.approx(sum(row[2] for row in rows.values()), abs=0.16)


def test_those_of_the_issue_are_shipped_with_figures() -> None:
    assert set(NEW) <= set(schema.names())
    assert all(GIVES.search(header(name)) for name in NEW)
    for name in NEW:
        recipe = schema.load(name)
        assert recipe.source.model == "stabilityai/sd-turbo"
        assert (recipe.schedule.steps, recipe.schedule.guidance_scale) == (1, 0.0)


@pytest.mark.parametrize("name", WITH_TAESD)
def test_taesd_that_cannot_be_downloaded_is_told_with_the_ways_out(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert dry_run(name, "--set=source.model=random:sd_turbo") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "decoder: madebyollin/taesd is no folder here and not in the local cache" in told
    assert "name the folder as the model" in told


def test_a_stand_in_has_the_size_of_taesd(stand_ins: dict[str, str]) -> None:
    taesd = open_tiny(stand_ins["madebyollin/taesd"], weights=False)
    assert sum(tensor.numel() for tensor in taesd.decoder.parameters()) == 1_222_531


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd_turbo_small_int8", 485_787_524), ("sd_turbo_tiny_384_w8a8", 326_825_604)],
)
def test_the_pruned_ones_have_the_published_parameters_less_the_time_path(
    name: str, parameters: int, stand_ins: dict[str, str]
) -> None:
    recipe = schema.load(name, changes(name, stand_ins))
    source = open_source(recipe.source.model, weights=False).pipeline
    pruned, folded = (
        dict(
            stages.check(
                source, recipe.model_copy(update={"stages": chosen})
            ).unet.named_parameters()
        )
        for chosen in (recipe.stages[:1], tuple(s for s in recipe.stages if s.prune or s.fold))
    )
    sizes = {key: tensor.numel() for key, tensor in pruned.items()}
    assert sum(sizes.values()) == parameters
    time = sum(size for key, size in sizes.items() if "time_emb" in key)
    row = sum(size for key, size in sizes.items() if key.endswith("time_emb_proj.bias"))
    assert sum(tensor.numel() for tensor in folded.values()) == parameters - time + row


@pytest.mark.parametrize("name", ["sd_turbo_w8a8", "sd_turbo_tiny_384_w8a8"])
def test_the_w8a8_ones_keep_in_float_what_mixdq_found(name: str, stand_ins: dict[str, str]) -> None:
    recipe, pipeline = checked(name, stand_ins)
    plans = {plan.layer: plan for plan in stages.plan(pipeline, recipe)}
    assert {layer for layer, plan in plans.items() if plan.weights == "float32"} >= {
        "unet.conv_in",
        "unet.conv_out",
    }
    text = [layer for layer in plans if re.search(r"^unet\..*attn2\.to_[kv]$", layer)]
    assert len(text) == 2 * sum(layer.endswith("attn2.to_q") for layer in plans) > 0
    assert {plans[layer].activations for layer in text} == {"none"}
    assert {plans[layer].weights for layer in text} == {"int8"}
    static = [layer for layer, plan in plans.items() if plan.activations == "int8_static"]
    assert not [layer for layer in static if layer.startswith("text_encoder")]
    # What the rules leave in float is far from the tenth that `keep` may leave there.
    macs = {
        layer: module.weight.numel()
        for layer, module in quantize.quantizable_layers(pipeline, ["unet"]).items()
    }
    settings = recipe.stages[-1].quantize
    assert settings is not None
    assert settings.keep is not None
    assert settings.keep.macs == 0.9
    assert sum(macs[layer] for layer in macs if layer in static) > 0.9 * sum(macs.values())


def test_an_overridden_decoder_that_does_not_fit_is_refused(
    tmp_path: Path, stand_ins: dict[str, str]
) -> None:
    from diffusers import AutoencoderTiny

    sixteen: Any = AutoencoderTiny(latent_channels=16)
    sixteen.save_pretrained(tmp_path / "flux")
    changed = changes("sd_turbo_taesd_int8", stand_ins)
    changed["stages.0.decoder.model"] = str(tmp_path / "flux")
    recipe = schema.load("sd_turbo_taesd_int8", changed)
    with pytest.raises(UserError, match=r"stages\.0\.decoder: .* 16 latent channels.* and this"):
        stages.check(open_source("random:sd_turbo", weights=False).pipeline, recipe)
