"""A compiled table walks the path that diffusers' own scheduler walks, to float32 rounding."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.schedule import compile_schedule
from mobile_runtime.errors import UserError
from mobile_runtime.sampler import sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers warns about libraries of its own at import
    import diffusers
    from diffusers.schedulers import (
        scheduling_ddpm,
        scheduling_euler_ancestral_discrete,
        scheduling_lcm,
    )

# diffusers 0.39 makes numpy arrays of tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (1, 4, 4, 4)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = ("leading", "trailing", "linspace")
DRAWING_MODULES = (scheduling_ddpm, scheduling_euler_ancestral_discrete, scheduling_lcm)


def denoise(x: np.ndarray, timestep: float) -> np.ndarray:
    """A stand-in for the UNet: smooth, bounded, different at every place and time."""
    place = np.linspace(0, 3, x.size, dtype=np.float32).reshape(x.shape)
    return np.sin(0.3 * x + place + np.float32(timestep / 500)).astype(np.float32)


def walk_diffusers(
    scheduler: Any, steps: int, noise: np.ndarray, fresh: np.ndarray, patch: pytest.MonkeyPatch
) -> np.ndarray:
    """The trajectory of StableDiffusionPipeline's loop with `fresh` as the scheduler's noise."""
    drawn = iter(torch.from_numpy(fresh))
    for module in DRAWING_MODULES:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn)[None])
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    trajectory = [x]
    for t in scheduler.timesteps:
        model_in = scheduler.scale_model_input(x, t)
        model_out = torch.from_numpy(denoise(model_in.numpy(), float(t)))
        x = scheduler.step(model_out, t, x, return_dict=False)[0]
        trajectory.append(x)
    return torch.cat(trajectory).numpy()


def assert_same_walk(scheduler: Any, steps: int) -> None:
    rng = np.random.default_rng(steps)
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    fresh = rng.standard_normal((steps, *SHAPE[1:])).astype(np.float32)
    table = compile_schedule(scheduler, steps)
    with pytest.MonkeyPatch.context() as patch:
        expected = walk_diffusers(scheduler, steps, noise, fresh, patch)
    ours = [x for _, x in sample(table, noise, denoise, lambda step: fresh[step : step + 1])]
    actual = np.concatenate(ours)
    assert actual.dtype == np.float32
    error = np.abs(actual - expected).max(axis=(1, 2, 3))
    size = np.abs(expected).max(axis=(1, 2, 3))
    # diffusers takes differences of latents in float32, which round at the size of what came
    # before: with zero terminal SNR, Euler's latents start near 10,000.
    assert (error <= 1e-5 * size + 3e-7 * np.maximum.accumulate(size)).all()


SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 50), spacing=st.sampled_from(SPACINGS), offset=st.integers(0, 1))
def test_the_table_walks_where_diffusers_walks(
    name: str, prediction: str, steps: int, spacing: str, offset: int
) -> None:
    if name == "EulerAncestralDiscreteScheduler" and prediction == "sample":
        return  # diffusers has not implemented it
    options = {"prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": offset}
    scheduler = getattr(diffusers, name)(**BETAS, **SCHEDULERS[name], **options)
    assert_same_walk(scheduler, steps)


ZERO_SNR = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
DPM = "DPMSolverMultistepScheduler"
VARIANTS = [
    *[(name, options | ZERO_SNR) for name, options in SCHEDULERS.items()],
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small_log"}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 1.0}),
    (DPM, {"solver_order": 1}),
    (DPM, {"lower_order_final": False}),
    (DPM, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    (DPM, {"lower_order_final": True, "final_sigmas_type": "sigma_min"}),
    (DPM, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    (DPM, {"use_karras_sigmas": True}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{o}" for n, o in VARIANTS])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 14, 15, 25, 50])
def test_every_allowed_option_keeps_the_walk(
    name: str, options: dict[str, Any], steps: int
) -> None:
    assert_same_walk(getattr(diffusers, name)(**(BETAS | options)), steps)


SD_TURBO = BETAS | {"timestep_spacing": "trailing", "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("steps", "sigmas"),
    [
        (1, {999: 14.61464}),
        (2, {999: 14.61464, 499: 1.61289}),
        (4, {999: 14.61464, 749: 4.08173, 499: 1.61289, 249: 0.69320}),
    ],
)
def test_sd_turbos_published_sigmas_are_in_the_table(steps: int, sigmas: dict[int, float]) -> None:
    table = compile_schedule(diffusers.EulerDiscreteScheduler(**SD_TURBO), steps)
    assert [row.timestep for row in table.rows] == list(sigmas)
    # epsilon prediction: x0 = x - sigma eps
    assert [-row.v for row in table.rows] == pytest.approx(list(sigmas.values()), rel=1e-5)
    assert table.init_noise_sigma == pytest.approx(14.61464, rel=1e-5)
    assert (table.rows[-1].a, table.rows[-1].b) == (0, 1)


def test_compiling_leaves_the_scheduler_as_it_was() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SD_TURBO)
    scheduler.set_timesteps(7)
    compile_schedule(scheduler, 3)
    assert len(scheduler.timesteps) == 7


def test_an_unknown_scheduler_is_refused_with_the_list_of_those_that_work() -> None:
    with pytest.raises(UserError, match=r"PNDMScheduler cannot be compiled.*DDIMScheduler.*LCM"):
        compile_schedule(diffusers.PNDMScheduler(**BETAS), 4)


@pytest.mark.parametrize(
    ("name", "options", "advice"),
    [
        ("DDIMScheduler", {}, "set clip_sample to False"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding to False"),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned"}, "'fixed_small'"),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type to 'dpmsolver"),
        (DPM, {"solver_order": 3}, "solver_order to 1 or 2"),
        (DPM, {"solver_type": "heun"}, "solver_type to 'midpoint'"),
        (DPM, {"use_lu_lambdas": True}, "use_lu_lambdas to False"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type to 'discrete'"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "to 'linear'"),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "'epsilon' or 'v_"),
    ],
)
def test_an_option_that_no_table_can_hold_is_refused_with_what_can(
    name: str, options: dict[str, Any], advice: str
) -> None:
    with pytest.raises(UserError, match=advice):
        compile_schedule(getattr(diffusers, name)(**BETAS, **options), 4)


def test_epsilon_at_zero_terminal_snr_is_refused_with_the_way_out() -> None:
    options = {"clip_sample": False} | ZERO_SNR | {"prediction_type": "epsilon"}
    with pytest.raises(UserError, match=r"timestep 999 .zero terminal SNR.; use v_prediction"):
        compile_schedule(diffusers.DDIMScheduler(**BETAS, **options), 4)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(UserError, match="choose from 1 to 1000"):
        compile_schedule(diffusers.EulerDiscreteScheduler(**SD_TURBO), steps)


def test_more_lcm_steps_than_it_was_trained_for_are_refused() -> None:
    with pytest.raises(UserError, match="LCMScheduler cannot make 51 steps"):
        compile_schedule(diffusers.LCMScheduler(**BETAS), 51)
