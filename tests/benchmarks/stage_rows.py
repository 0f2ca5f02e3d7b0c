"""The rows of full_size_stages.py: each runs one stage, or one conversion, in this process.

    python -m tests.benchmarks.stage_rows fold --folder scratch

A row gives figures, and `faults` says which of them are not as they should be.
"""

if __name__ == "__main__":
    # Before the imports below, which would chatter.
    from recipes.quiet import import_torch

    import_torch("torch", "measuring")

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_post_hook

from converters import cli
from mobile_runtime.bundle import Bundle
from recipes import drawn, schema, stages
from recipes.losses import snr_db
from recipes.measure import count_parameters, latent_size
from recipes.schema import Recipe
from recipes.sources import open_source

REAL = "random:sd_turbo"
PUBLISHED = {"bk_base": 583_480_964, "bk_small": 485_787_524, "bk_tiny": 326_825_604}
FOLDED = 27_855_360
"""Parameters of SD-Turbo's time path, less those of a table of one step."""
TAESD = 1_222_531
"""Parameters of TAESD's decoder."""
ROUNDING_DB = 100.0
"""What float32 leaves at least of a sum in another order."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a row runs on. folder: for what it writes, also the results of training."""

    model: str
    resolution: int
    folder: Path
    iterations: int = 20

    def recipe(self, *chosen: dict[str, Any]) -> Recipe:
        """One step without guidance, as SD-Turbo's recipes have it."""
        data = {
            "name": "stages",
            "source": {"model": self.model},
            "resolution": self.resolution,
            "schedule": {"steps": 1, "guidance_scale": 0.0},
        }
        return schema.parse({**data, "stages": list(chosen)})

    def shipped(self, name: str, changes: dict[str, Any]) -> Recipe:
        """A recipe of the package on this source, at this size."""
        own = {"source.model": self.model, "resolution": self.resolution}
        return schema.load(name, {**own, **changes})

    def part_of(self, name: str, wanted: Set[str], changes: dict[str, Any]) -> Recipe:
        """A recipe of the package, of whose stages only some are wanted."""
        data = self.shipped(name, changes).resolved()
        stages = [stage for stage in data["stages"] if wanted & stage.keys()]
        return schema.parse({**data, "name": "part", "stages": stages})

    def open(self) -> Any:
        """The pipeline, with weights."""
        return open_source(self.model).pipeline

    def apply(self, pipeline: Any, recipe: Recipe) -> stages.Applied:
        """Run all stages of a recipe."""
        return stages.apply(pipeline, recipe, cache=self.folder / "cache")


@torch.no_grad()
def _output(pipeline: Any, run: Run, timestep: float = 999.0) -> torch.Tensor:
    """The UNet's output for a prompt and seeded noise."""
    size = latent_size(pipeline, run.resolution, run.resolution)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, pipeline.unet.config.in_channels, *size, generator=generator)
    states = drawn.text_states(pipeline, ["a red fox in the snow"])
    return pipeline.unet(noise, torch.tensor([timestep]), states).sample


def prune(run: Run) -> Figures:
    """The three presets of BK-SDM, and that what is left computes."""
    pipeline, figures = run.open(), {}
    for preset in PUBLISHED:
        pruned = run.apply(pipeline, run.recipe({"prune": {"blocks": preset}})).pipeline
        figures[preset] = count_parameters(pruned.unet)
        figures[f"{preset}_finite"] = bool(_output(pruned, run).isfinite().all())
    return figures


def channels(run: Run) -> Figures:
    """Inner widths, by Taylor importance over two pictures, to 40 % fewer multiply-adds."""
    settings = {"macs": 0.4, "importance": "taylor", "samples": 2}
    applied = run.apply(run.open(), run.recipe({"prune": {"channels": settings}}))
    before, after = (applied.records[0][key]["unet"] for key in ("before", "after"))
    return {
        "parameters": after["parameters"],
        "macs_gone": round(1 - after["macs"] / before["macs"], 4),
        "finite": bool(_output(applied.pipeline, run).isfinite().all()),
    }


def fold(run: Run) -> Figures:
    """The time path as a table of one step: what goes, and the output beside the whole UNet's."""
    pipeline = run.open()
    applied = run.apply(pipeline, run.recipe({"fold": {}}))
    (timestep,) = applied.records[0]["timesteps"]
    figure = snr_db(_output(pipeline, run, timestep), _output(applied.pipeline, run, timestep))
    before, after = (count_parameters(part.unet) for part in (pipeline, applied.pipeline))
    return {
        "parameters_less": before - after,
        # No difference at all has no decibels, and JSON no infinity.
        "snr_db": round(figure, 1) if math.isfinite(figure) else "no difference",
    }


def _quantized(run: Run, changes: dict[str, Any]) -> Figures:
    changes = {f"stages.quantize.{key}": value for key, value in changes.items()}
    recipe = run.shipped("sd_turbo_w8a8", changes)
    pipeline = run.open()
    before = _output(pipeline, run)
    applied = run.apply(pipeline, recipe)
    record = applied.records[-1]
    return {
        "layers_static": record["layers_int8_static"],
        "layers_kept": record["layers_kept_by_sensitivity"],
        "int8_macs": record["int8_macs"],
        "int8_macs_of_layers": record["int8_macs_of_layers"],
        "unet_snr_db": round(snr_db(before, _output(applied.pipeline, run)), 1),
    }


def w8a8(run: Run) -> Figures:
    """sd_turbo_w8a8 without its measuring of layers, calibrated on two prompts."""
    return _quantized(run, {"calibration.samples": 2, "keep": None})


def w8a8_keep(run: Run) -> Figures:
    """sd_turbo_w8a8 with every layer measured alone, on one picture."""
    return _quantized(run, {"calibration.samples": 1, "keep.samples": 1})


def taesd(folder: Path) -> Path:
    """An AutoencoderTiny of TAESD's size with seeded weights, as a folder."""
    from diffusers import AutoencoderTiny

    place = folder / "taesd"
    if not (place / "config.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny: Any = AutoencoderTiny()  # its defaults are TAESD's configuration
        tiny.save_pretrained(place)
    return place


def decoder(run: Run) -> Figures:
    """A decoder of TAESD's size, opened, and one picture by both decoders."""
    stage = {"decoder": {"model": str(taesd(run.folder)), "held_out": 1}}
    record = run.apply(run.open(), run.recipe(stage)).records[0]
    before, after = (record[key]["vae_decoder"] for key in ("before", "after"))
    return {
        "parameters": after["parameters"],
        "times_fewer_macs": round(before["macs"] / after["macs"], 1),
        "psnr_db_of_seeded_weights": record["held_out_psnr_db"],
    }


def small_recipe(run: Run) -> Path:
    """sd_turbo_small_int8 without its training, with a decoder that is here; as a file."""
    changes = {"stages.decoder.model": str(taesd(run.folder)), "stages.decoder.held_out": 0}
    wanted = {"prune", "decoder", "fold", "quantize"}
    recipe = run.part_of("sd_turbo_small_int8", wanted, changes)
    path = run.folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False))
    return path


def convert(run: Run) -> Figures:
    """BK-Small, TAESD's size, fold and INT8 weights as a validated bundle for ONNX Runtime."""
    output = run.folder / "small-onnx"
    argv = ["--recipe", str(small_recipe(run)), "--output", str(output), "--force"]
    code = cli.main("onnx", argv)
    bundle = Bundle.open(output)
    report = json.loads((output / "report.json").read_text())
    figures = {
        "exit_code": code,
        "verdict": report["verdict"],
        "unet_parameters": bundle.component("unet").parameters,
        "models_mb": round(sum(part.bytes for part in bundle.manifest.components) / 1e6, 1),
    }
    shutil.rmtree(output)
    return figures


def _trained(run: Run, recipe: Recipe, chosen: int, figures: Sequence[str] = ()) -> Figures:
    """Run the first stages of a recipe, of which the last trains; the seconds of a step.

    figures: of the last stage's record, told besides.
    """
    times: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    pipeline = run.open()
    try:
        applied = stages.apply(pipeline, recipe, recipe.stages[:chosen], cache=run.folder / "cache")
    finally:
        hook.remove()
    shutil.rmtree(run.folder / "cache")
    return {
        "optimizer_steps": len(times),
        "seconds_a_step": round(float(np.median(np.diff(times))), 2),
        "unet_parameters": count_parameters(applied.pipeline.unet),
        "finite": bool(_output(applied.pipeline, run).isfinite().all()),
        **{key: applied.records[-1][key] for key in figures},
    }


def _training(run: Run) -> dict[str, Any]:
    """Settings of a training of a few steps of one picture."""
    return {
        "iterations": run.iterations,
        "batch": 1,
        "accumulate": 1,
        "warmup": 0,
        "gradient_checkpointing": True,
    }


def _own_distillation(run: Run, name: str) -> Figures:
    """A shipped recipe's own pruning and distillation, for a few steps of one picture."""
    changes = {f"stages.distill.{key}": value for key, value in _training(run).items()}
    changes["stages.decoder.model"] = str(taesd(run.folder))
    return _trained(run, run.shipped(name, changes), 2)


def output(run: Run) -> Figures:
    """Output and features of the whole UNet, into BK-Small: sd_turbo_small_int8's own stages."""
    return _own_distillation(run, "sd_turbo_small_int8")


def output_tiny(run: Run) -> Figures:
    """The same into BK-Tiny: sd_turbo_tiny_384_w8a8's own stages, at its own resolution."""
    return _own_distillation(run, "sd_turbo_tiny_384_w8a8")


def _few_steps(run: Run, *before: dict[str, Any], **settings: Any) -> Figures:
    own = {"steps": 1, "pictures": 1, "draw_steps": 1, **_training(run)}
    recipe = run.recipe(*before, {"distill": {**own, **settings}})
    return _trained(run, recipe, len(recipe.stages))


def progressive(run: Run) -> Figures:
    """Two steps of the whole UNet under guidance, into one of BK-Small."""
    small = {"prune": {"blocks": "bk_small"}}
    return _few_steps(run, small, method="progressive", teacher_steps=2, guidance=2.0)


def lcm(run: Run) -> Figures:
    """Latent consistency by the whole UNet under guidance, into BK-Small."""
    small = {"prune": {"blocks": "bk_small"}}
    return _few_steps(run, small, method="lcm", guidance=[5.0, 15.0])


def lcm_lora(run: Run) -> Figures:
    """Latent consistency into a LoRA of rank 64 on the whole UNet."""
    return _few_steps(run, method="lcm", guidance=[5.0, 15.0], lora_rank=64, learning_rate=1e-4)


def finetune(run: Run) -> Figures:
    """Fine-tuning of BK-Tiny in the rounding of INT8 weights."""
    recipe = run.recipe(
        {"prune": {"blocks": "bk_tiny"}}, {"finetune": _training(run)}, {"quantize": {}}
    )
    return _trained(run, recipe, 2)


def finetune_w8a8(run: Run) -> Figures:
    """sd_turbo_tiny_384_w8a8's fine-tuning of BK-Tiny in the rounding of W8A8, keeping no layer."""
    changes = {f"stages.finetune.{key}": value for key, value in _training(run).items()}
    # As small as the first of its own warm-up: full steps at once lead away from the float UNet.
    own = run.shipped("sd_turbo_tiny_384_w8a8", {}).stages[3].finetune
    assert own is not None
    changes["stages.finetune.warmup"] = run.iterations - 1
    changes["stages.finetune.learning_rate"] = own.learning_rate * run.iterations / own.warmup
    changes |= {"stages.quantize.keep": None, "stages.quantize.calibration.samples": 2}
    wanted = {"prune", "finetune", "fold", "quantize"}
    recipe = run.part_of("sd_turbo_tiny_384_w8a8", wanted, _with_taesd(run, changes))
    figures = ("layers", "output_snr_db_before", "output_snr_db_after")
    return _trained(run, recipe, 2, figures)


def decoder_trained(run: Run) -> Figures:
    """sd_turbo_tiny_384_w8a8's training of TAESD on the features of the VAE encoder."""
    changes = {f"stages.decoder.{key}": value for key, value in _training(run).items()}
    changes |= {"stages.decoder.pictures": 2, "stages.decoder.held_out": 2}
    del changes["stages.decoder.gradient_checkpointing"]
    recipe = run.part_of("sd_turbo_tiny_384_w8a8", {"decoder"}, _with_taesd(run, changes))
    return _trained(run, recipe, 1, ("held_out_psnr_db",))


def resolution(run: Run) -> Figures:
    """BK-Small adapted to half the size of the pictures that the whole UNet draws."""
    settings = {"drawn_at": 2 * run.resolution, "pictures": 2, "draw_steps": 1}
    stage = {"resolution": {**settings, **_training(run)}}
    recipe = run.recipe({"prune": {"blocks": "bk_small"}}, stage)
    return _trained(run, recipe, 2, ("vae_psnr_db",))


def _with_taesd(run: Run, changes: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "stages.decoder.model": str(taesd(run.folder))}


@dataclass(frozen=True)
class Row:
    """What runs, at which size, and how long that takes on two cores, about."""

    run: Callable[[Run], Figures]
    minutes: float
    resolution: int = 512

    @property
    def what(self) -> str:
        """One sentence."""
        return (self.run.__doc__ or "").strip()


ROWS: dict[str, Row] = {
    "prune": Row(prune, 2),
    "channels": Row(channels, 3, 256),
    "fold": Row(fold, 1),
    "decoder": Row(decoder, 2),
    "w8a8": Row(w8a8, 3),
    "w8a8-keep": Row(w8a8_keep, 48),
    "convert": Row(convert, 6),
    "output": Row(output, 6, 256),
    "output-tiny": Row(output_tiny, 7, 384),
    "progressive": Row(progressive, 7, 256),
    "lcm": Row(lcm, 6, 256),
    "lcm-lora": Row(lcm_lora, 6, 256),
    "finetune": Row(finetune, 7, 256),
    "finetune-w8a8": Row(finetune_w8a8, 10, 256),
    "decoder-trained": Row(decoder_trained, 10, 384),
    "resolution": Row(resolution, 10, 128),
}


def faults(name: str, figures: Figures, run: Run) -> list[str]:
    """What of a row's figures is not as it should be; published counts are SD-Turbo's."""
    real = run.model == REAL
    wanted: dict[str, Any] = {}
    if name == "prune" and real:
        wanted |= PUBLISHED
    if name == "fold" and real:
        wanted["parameters_less"] = FOLDED
    if name == "decoder":
        wanted["parameters"] = TAESD
    if name == "convert":
        wanted |= {"exit_code": 0, "verdict": "pass"}
    if "optimizer_steps" in figures:
        wanted["optimizer_steps"] = run.iterations
    wanted |= {key: True for key in figures if key.endswith("finite")}
    found = [
        f"{key} is {figures.get(key)}, should be {value}"
        for key, value in wanted.items()
        if figures.get(key) != value
    ]
    # `not >=`, so that NaN is a fault.
    snr = figures.get("snr_db", math.inf)
    if not isinstance(snr, str) and not snr >= ROUNDING_DB:
        found.append(f"snr_db is {snr}, should be {ROUNDING_DB} at least")
    least = {"w8a8": 0.95, "w8a8-keep": 0.9}.get(name)
    shares = figures.get("int8_macs_of_layers", {})
    if least and not shares.get("unet", 0) >= least:
        found.append(f"int8_macs_of_layers of the UNet are {shares.get('unet')}, below {least}")
    if name == "channels" and not abs(figures["macs_gone"] - 0.4) <= 0.03:
        found.append(f"macs_gone is {figures['macs_gone']}, should be near 0.4")
    return found


def main() -> int:
    """Run one row, and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("--model", default=REAL)
    parser.add_argument("--resolution", type=int, help="default: the row's own")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    row = ROWS[arguments.row]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    size = arguments.resolution or row.resolution
    run = Run(arguments.model, size, arguments.folder, arguments.iterations)
    # What an earlier run kept there would be found, and not be made.
    shutil.rmtree(arguments.folder / "cache", ignore_errors=True)
    figures = row.run(run)
    told = {"figures": figures, "faults": faults(arguments.row, figures, run)}
    print(json.dumps(told, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1))
    return 1 if told["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
