"""A folded UNet computes what it computed, at every step of the schedules, and nowhere else."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import components, rewrites
from converters.components import Component
from converters.schedule import compile_schedule
from mobile_runtime.errors import UserError
from recipes import fold, measure, schedulers, schema, stages
from recipes.schema import Recipe
from recipes.sources import open_source
from tests.conftest import make_tiny_pipeline
from tests.converters.small import build, make_small_pipeline


def recipe(*other: dict[str, Any], **schedule: Any) -> Recipe:
    """A recipe whose last stage folds, after the others, for a schedule."""
    data = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}
    return schema.parse({**data, "stages": [*other, {"fold": {}}], "schedule": schedule})


def folded(pipeline: Any, **schedule: Any) -> Any:
    return stages.apply(pipeline, recipe(**schedule)).pipeline


def call(unet: Any, timestep: Any, batch: int = 2, dtype: Any = torch.float32) -> torch.Tensor:
    """The UNet's output for inputs that are always the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(batch, 16, 32, generator=generator).to(dtype)
    with torch.no_grad():
        return unet(x, timestep, text, return_dict=False)[0]


def configured(unet: Any, config: dict[str, Any]) -> Any:
    """A new UNet of the same configuration but for some keys."""
    same = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    return type(unet)(**(same | config))


def assert_equal_at_every_step(original: Any, unet: Any, timesteps: Any) -> None:
    for timestep in timesteps:
        t = torch.tensor([timestep])
        torch.testing.assert_close(call(unet, t), call(original, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "schedule",
    [
        {"steps": 1},
        {"steps": 4, "other_steps": [1, 7]},
        {"steps": 7, "scheduler": "euler"},  # fractional timesteps
        {"steps": 3, "scheduler": "lcm"},
        {"steps": 5, "scheduler": "dpm_solver_pp_2m"},
    ],
    ids=str,
)
def test_the_outputs_at_every_step_of_the_tables_stay(schedule: dict[str, Any]) -> None:
    pipeline = make_tiny_pipeline()
    spacing = "linspace" if schedule.get("scheduler") == "euler" else "trailing"
    config = {**pipeline.scheduler.config, "timestep_spacing": spacing}
    config |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    pipeline.scheduler = type(pipeline.scheduler).from_config(config)
    wanted = recipe(**schedule)
    applied = stages.apply(pipeline, wanted)
    scheduler = schedulers.choose_scheduler(pipeline.scheduler, wanted.schedule.scheduler)
    tables = [compile_schedule(scheduler, steps) for steps in wanted.schedule.every_steps]
    rows = [row.timestep for table in tables for row in table.rows]
    assert sorted(set(rows), reverse=True) == pytest.approx(
        applied.records[0]["timesteps"], rel=1e-7
    )
    assert_equal_at_every_step(pipeline.unet, applied.pipeline.unet, rows)


@pytest.mark.parametrize(
    "config",
    [
        {"flip_sin_to_cos": False, "freq_shift": 1},
        {"act_fn": "gelu", "timestep_post_act": "silu"},
        {"resnet_skip_time_act": True},
        {"time_embedding_dim": 40, "norm_num_groups": 4},
        {"use_linear_projection": False, "attention_head_dim": 4},  # as Stable Diffusion 1.5
    ],
    ids=str,
)
def test_every_detail_of_a_plain_time_path_is_kept(config: dict[str, Any]) -> None:
    pipeline = make_small_pipeline()
    torch.manual_seed(0)
    pipeline.unet = configured(pipeline.unet, config).eval().requires_grad_(False)
    unet = folded(pipeline, steps=2).unet
    assert_equal_at_every_step(pipeline.unet, unet, (999.0, 499.0))


@given(st.one_of(st.floats(0, 1000, width=32), st.sampled_from([999.0, 749.25, 499.5, 0.0])))
@settings(max_examples=200, deadline=None)
def test_a_timestep_is_found_if_and_only_if_it_is_in_the_table(timestep: float) -> None:
    table = (999.0, 749.25, 499.5, 0.0)
    chosen = fold.ChosenStep(table)(torch.tensor([timestep]))
    assert chosen.tolist() == [[float(timestep == known) for known in table]]


@pytest.mark.parametrize("timestep", [500.0, 998.9999, 1e9, -1.0, float("nan"), float("inf")])
def test_off_the_schedule_everything_is_nan(timestep: float) -> None:
    unet = folded(make_small_pipeline(), steps=2).unet
    assert call(unet, torch.tensor([timestep])).isnan().all()


def test_a_timestep_may_come_in_every_form_that_diffusers_takes() -> None:
    pipeline = make_small_pipeline()
    unet = folded(pipeline, steps=2).unet
    expected = call(pipeline.unet, torch.tensor([999.0]))
    scalars = (999, 999.0, torch.tensor(999), torch.tensor(999.0, dtype=torch.float64))
    for timestep in (*scalars, torch.tensor([999]), torch.tensor([999.0, 999.0])):
        torch.testing.assert_close(call(unet, timestep), expected, rtol=1e-5, atol=1e-5)
    mixed = call(unet, torch.tensor([999.0, 7.0]))
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-5, atol=1e-5)
    assert mixed[1].isnan().all()


def test_diffusers_own_loop_draws_the_same_latents() -> None:
    pipeline = make_tiny_pipeline()
    changed = folded(pipeline, steps=3)

    def draw(drawing: Any) -> Any:
        drawing.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 3, "height": 64, "width": 64, "generator": seeded}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # diffusers 0.39 on numpy 2
            return drawing("a tent", output_type="latent", **arguments).images

    torch.testing.assert_close(draw(changed), draw(pipeline), rtol=1e-4, atol=1e-4)


def test_in_float16_fractional_timesteps_are_still_told_apart() -> None:
    """Float16 has no 998.75; the comparison stays in float32 whatever the weights are."""
    unet = fold.fold(make_small_pipeline().unet, (999.0, 998.75, 998.5)).half()
    outputs = [
        call(unet, torch.tensor([t]), dtype=torch.float16) for t in (999.0, 998.75, 998.5, 998.7)
    ]
    assert all(out.dtype == torch.float16 for out in outputs)
    assert [bool(out.isfinite().all()) for out in outputs] == [True, True, True, False]
    assert not torch.equal(outputs[0], outputs[1])


def test_the_source_unet_is_left_as_it_was_and_shares_its_weights() -> None:
    pipeline = make_tiny_pipeline()
    before = copy.deepcopy(pipeline.unet)
    unet = folded(pipeline, steps=2).unet
    assert [*map(type, pipeline.unet.modules())] == [*map(type, before.modules())]
    expected = before.state_dict()
    assert pipeline.unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in pipeline.unet.state_dict().items())
    assert unet.conv_in.weight is pipeline.unet.conv_in.weight
    assert not any("time_embedding" in name for name, _ in unet.named_parameters())


def test_the_record_counts_what_went_and_what_came() -> None:
    pipeline = make_tiny_pipeline()
    (record,) = stages.apply(pipeline, recipe(steps=4, other_steps=[3])).records
    path = {
        name: parameter.numel()
        for name, parameter in pipeline.unet.named_parameters()
        if "time_emb" in name
    }
    channels = sum(size for name, size in path.items() if name.endswith("time_emb_proj.bias"))
    assert record["timesteps"] == [999.0, 749.0, 666.0, 499.0, 332.0, 249.0]
    assert record["time_path_parameters"] == sum(path.values())
    assert record["table_parameters"] == 6 * channels
    before, after = (record[key]["unet"]["parameters"] for key in ("before", "after"))
    assert before - after == sum(path.values()) - 6 * channels
    assert json.loads(json.dumps(record)) == record


def test_sd_turbo_loses_the_published_number_of_parameters() -> None:
    pipeline = open_source("random:sd_turbo", weights=False).pipeline
    wanted = recipe(steps=1, guidance_scale=0.0)
    unet = stages.check(pipeline, wanted).unet
    table = 20_160  # one row: the sum of all resnets' channels
    assert measure.count_parameters(pipeline.unet) == 865_910_724
    assert measure.count_parameters(unet) == 865_910_724 - 27_875_520 + table


def test_a_saved_folder_is_an_ordinary_one_with_its_time_path(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipeline = make_tiny_pipeline()
    applied = stages.apply(pipeline, recipe(steps=2))
    stages.save(applied.pipeline, applied.plans, tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert type(loaded.unet) is UNet2DConditionModel
    for timestep in (999.0, 123.0):
        t = torch.tensor([timestep])
        torch.testing.assert_close(call(loaded.unet, t), call(pipeline.unet, t))
    assert call(applied.pipeline.unet, torch.tensor([123.0])).isnan().all()


def test_unfolding_gives_back_the_very_modules() -> None:
    pipeline = make_tiny_pipeline()
    unet: Any = fold.unfolded(folded(pipeline, steps=2).unet)
    theirs = dict(unet.named_parameters())
    for name, parameter in pipeline.unet.named_parameters():
        assert theirs.pop(name).data_ptr() == parameter.data_ptr(), name
    assert not theirs
    torch.testing.assert_close(call(unet, 77), call(pipeline.unet, 77), rtol=0, atol=0)
    assert fold.unfolded(pipeline.vae) is pipeline.vae


def test_quantization_follows_and_saving_undoes_both(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipeline = make_tiny_pipeline()
    wanted = recipe(steps=2).model_copy()
    both = [{"fold": {}}, {"quantize": {"components": ["unet"]}}]
    wanted = schema.parse({**wanted.resolved(), "stages": both})
    original = copy.deepcopy(pipeline.unet)
    applied = stages.apply(pipeline, wanted)
    planned = {plan.layer for plan in applied.plans}
    assert "unet.conv_in" in planned
    assert not [layer for layer in planned if "time" in layer]
    t = torch.tensor([999.0])
    out, expected = call(applied.pipeline.unet, t), call(original, t)
    assert 0 < (out - expected).norm() / expected.norm() < 0.05
    assert call(applied.pipeline.unet, torch.tensor([5.0])).isnan().all()
    stages.save(applied.pipeline, applied.plans, tmp_path / "saved")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet")
    torch.testing.assert_close(call(loaded, t), out, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        loaded.time_embedding.linear_1.weight, original.time_embedding.linear_1.weight
    )


def test_a_quantization_rule_for_the_time_layers_matches_nothing_and_is_told() -> None:
    rule = {"layers": "*time_emb_proj", "weights": "float32", "reason": "time"}
    both = [{"fold": {}}, {"quantize": {"rules": [rule]}}]
    wanted = schema.parse({**recipe(steps=2).resolved(), "stages": both})
    with pytest.raises(UserError, match=r"stages\.1\.quantize: .*time_emb_proj' matches no"):
        stages.apply(make_small_pipeline(), wanted)


def test_a_pruned_unet_folds_too() -> None:
    pipeline = make_tiny_pipeline()
    pruned = {"prune": {"attention_levels": [0]}}
    applied = stages.apply(pipeline, recipe(pruned, steps=2))
    unet: Any = fold.unfolded(applied.pipeline.unet)
    assert_equal_at_every_step(unet, applied.pipeline.unet, (999.0, 499.0))


@pytest.mark.parametrize(
    "config",
    [
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 3},
        {"time_cond_proj_dim": 8},
        {"resnet_time_scale_shift": "scale_shift"},
        {"time_embedding_act_fn": "silu"},
        {"addition_embed_type": "text", "encoder_hid_dim": 32},
    ],
    ids=str,
)
def test_a_time_path_with_more_in_it_is_refused(config: dict[str, Any]) -> None:
    pipeline = make_small_pipeline()
    pipeline.unet = configured(pipeline.unet, config)
    key = next(iter(config))
    with pytest.raises(UserError, match=rf"stages\.0\.fold: .*{key}.*leave the stage fold out"):
        stages.check(pipeline, recipe(steps=2))


def test_a_number_of_steps_that_the_scheduler_cannot_make_is_refused() -> None:
    pipeline = make_small_pipeline()
    pipeline.scheduler.register_to_config(num_train_timesteps=100)
    with pytest.raises(UserError, match=r"stages\.0\.fold: .*cannot make 101 steps"):
        stages.check(pipeline, recipe(steps=101))


def test_a_damaged_time_path_is_refused() -> None:
    pipeline = make_small_pipeline()
    pipeline.unet.time_embedding.linear_2.bias[3] = float("inf")
    with pytest.raises(UserError, match=r"NaN or Inf"):
        stages.apply(pipeline, recipe(steps=2))


TIMESTEPS = (999.0, 749.25)
OFF = (500.0, 749.0, 998.9999)
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def by_onnx(component: Component, folder: Path, precision: Any) -> Run:
    onnxruntime = pytest.importorskip("onnxruntime")
    from converters import onnx

    options = onnx.OnnxOptions(precision=precision)
    lowered = onnx.lower(component, components.export(component), folder, options)
    assert not lowered.details["op_kinds"].keys() & {"Sin", "Cos"}
    session = onnxruntime.InferenceSession(str(lowered.path))
    return lambda feeds: session.run(None, feeds)[0]


def by_coreml(component: Component, folder: Path, precision: Any) -> Run:
    pytest.importorskip("coremltools")
    from converters import coreml
    from mobile_runtime.backends.mil import Program

    options = coreml.CoreMLOptions(compute_precision=precision)
    lowered = coreml.lower(component, components.export(component), folder, options)
    assert not lowered.details["op_kinds"].keys() & {"sin", "cos"}
    program = Program.open(lowered.path)
    return lambda feeds: program.run(feeds, arithmetic=precision)["out_sample"]


def by_executorch(component: Component, folder: Path, precision: Any) -> Run:
    pytest.importorskip("executorch")
    from converters import executorch

    module = rewrites.apply(component.module, executorch.REWRITES)
    rewritten = replace(component, module=module)
    lowered = executorch.lower(rewritten, components.export(rewritten), folder)
    assert lowered.details["delegate_calls"] <= 2
    assert lowered.details["macs_delegated_fraction"] == 1.0
    assert sum(lowered.details["nondelegated"].values()) <= 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Python interface may change
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(lowered.path).load_method("forward")

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        (out,) = method.execute([torch.from_numpy(value) for value in feeds.values()])
        return out.clone().numpy()

    return run


@pytest.mark.parametrize(
    ("lower", "precision", "tolerance", "timesteps"),
    [
        (by_onnx, "float32", 1e-5, TIMESTEPS),
        (by_onnx, "float32", 1e-5, TIMESTEPS[:1]),
        (by_onnx, "float16", 1e-2, TIMESTEPS),
        (by_coreml, "float32", 1e-5, TIMESTEPS[:1]),
        (by_coreml, "float16", 1e-2, TIMESTEPS),
        (by_executorch, "float32", 1e-5, TIMESTEPS),
    ],
)
def test_every_target_computes_the_schedule_and_nan_off_it(
    lower: Any, precision: str, tolerance: float, timesteps: tuple[float, ...], tmp_path: Path
) -> None:
    pipeline = make_small_pipeline()
    original = build(pipeline, "unet")
    pipeline.unet = fold.fold(pipeline.unet, timesteps)
    component = build(pipeline, "unet")
    assert "NaN" in component.inputs[1].description
    run = lower(component, tmp_path, precision)
    inputs = original.example_inputs()
    for timestep in (*timesteps, *OFF):
        given = inputs | {"timestep": torch.tensor([timestep])}
        out = run({name: tensor.numpy() for name, tensor in given.items()})
        if timestep in OFF:
            assert np.isnan(out).all(), timestep
        else:
            expected = original.module(*given.values()).numpy()
            np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
