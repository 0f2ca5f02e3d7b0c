"""Compiles a diffusers scheduler to a table of numbers, one row a step: a schedule is data.

The coefficients follow from each sampler's formula and the scheduler's own arrays (timesteps,
sigmas, alphas_cumprod), in float64. Where the formulas come from: DDPM arXiv:2006.11239, DDIM
arXiv:2010.02502, Euler arXiv:2206.00364, ancestral sampling as in k-diffusion, LCM
arXiv:2310.04378, DPM-Solver++ arXiv:2211.01095. Names: alpha and sigma with alpha^2 + sigma^2 = 1
are the variance-preserving pair of a timestep; `_next` is the timestep that the step leads to.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import ScheduleRow, ScheduleTable
from recipes.schedulers import with_steps

MAX_STEPS = 1000
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Prepared(NamedTuple):
    """A scheduler with its timesteps set, and its arrays in float64."""

    scheduler: Any
    timesteps: np.ndarray  # (steps,), falling
    alphas_cumprod: np.ndarray  # (train steps,): alpha^2 by timestep
    prediction: str


def compile_schedule(scheduler: Any, steps: int) -> ScheduleTable:
    """The table of a diffusers scheduler for a number of steps; the scheduler is left unchanged.

    Raises UserError for a scheduler, an option or a number of steps that no table can hold,
    saying what can be compiled.
    """
    name = type(scheduler).__name__
    if name not in SUPPORTED:
        raise UserError(
            f"the scheduler {name} cannot be compiled; choose one of: {', '.join(SUPPORTED)}"
        )
    rows_of, allowed = SUPPORTED[name]
    config = dict(scheduler.config)
    for option, values in (COMMON_OPTIONS | allowed).items():
        if option in config and config[option] not in values:
            raise UserError(
                f"{name} with {option}={config[option]!r} cannot be compiled; "
                f"set {option} to {' or '.join(repr(value) for value in values)}"
            )
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"{steps} steps cannot be compiled; choose from 1 to {MAX_STEPS}")
    prepared = _prepare(scheduler, steps)
    rows = rows_of(prepared)
    for row in rows:
        if not all(math.isfinite(value) for value in row.model_dump().values()):
            raise UserError(
                f"{name} with prediction_type={prepared.prediction!r} divides by zero at timestep "
                f"{row.timestep:g} (zero terminal SNR); use v_prediction or another spacing"
            )
    return ScheduleTable(
        scheduler=name,
        prediction_type=prepared.prediction,
        steps=steps,
        init_noise_sigma=float(prepared.scheduler.init_noise_sigma),
        rows=tuple(rows),
    )


def _prepare(scheduler: Any, steps: int) -> Prepared:
    name = type(scheduler).__name__
    ready = with_steps(scheduler, steps)
    timesteps = ready.timesteps.double().numpy()
    falls = np.diff(timesteps) <= 0
    # diffusers looks the first timestep up by its value, so that one has to be unique.
    first_is_unique = timesteps[0] not in timesteps[1:]
    if len(timesteps) != steps or timesteps.min() < 0 or not (falls.all() and first_is_unique):
        raise UserError(
            f"{name} makes the timesteps {timesteps.tolist()} for {steps} steps, which cannot be "
            "followed; choose another timestep_spacing or number of steps"
        )
    return Prepared(
        ready, timesteps, ready.alphas_cumprod.double().numpy(), str(ready.config.prediction_type)
    )


def _to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """u, v of x0 = u x + v model_out, for x = alpha x0 + sigma eps."""
    if prediction == "epsilon":
        return _divide(1.0, alpha), -_divide(sigma, alpha)
    if prediction == "v_prediction":
        return alpha, -sigma
    return 0.0, 1.0


def _divide(numerator: float, denominator: float) -> float:
    # Infinity marks the row; compile_schedule tells it.
    return numerator / denominator if denominator else math.inf


def _row(timestep: float, u: float, v: float, a: float, b: float, **rest: float) -> ScheduleRow:
    """A row; what is not given adds nothing. Not validated: an infinity is told by the caller."""
    values = {"timestep": timestep, "input_scale": 1.0, "u": u, "v": v, "a": a, "b": b}
    values |= {"c": 0.0, "d": 0.0} | rest
    return ScheduleRow.model_construct(None, **{key: float(x) for key, x in values.items()})


def _pair(alpha_cumprod: float) -> tuple[float, float]:
    return math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod)


def _ddim(p: Prepared) -> list[ScheduleRow]:
    config = p.scheduler.config
    # DDIM steps by a fixed stride, even where the timesteps are spaced otherwise.
    stride = config.num_train_timesteps // len(p.timesteps)
    rows = []
    for timestep in p.timesteps.astype(int):
        after = timestep - stride
        alpha, sigma = _pair(p.alphas_cumprod[timestep])
        alpha_next, sigma_next = _pair(
            p.alphas_cumprod[after] if after >= 0 else float(p.scheduler.final_alpha_cumprod)
        )
        u, v = _to_x0(p.prediction, alpha, sigma)
        # x_next = alpha_next x0 + sigma_next eps, with eps = (x - alpha x0) / sigma
        ratio = sigma_next / sigma
        rows.append(_row(timestep, u, v, a=ratio, b=alpha_next - alpha * ratio))
    return rows


def _euler(p: Prepared) -> list[ScheduleRow]:
    return [
        _sigma_row(p, timestep, sigma, sigma_next, fresh=0.0)
        for timestep, sigma, sigma_next in _sigmas(p)
    ]


def _euler_ancestral(p: Prepared) -> list[ScheduleRow]:
    rows = []
    for timestep, sigma, sigma_next in _sigmas(p):
        fresh = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2)) / sigma
        kept = math.sqrt(sigma_next**2 - fresh**2)
        rows.append(_sigma_row(p, timestep, sigma, kept, fresh))
    return rows


def _sigmas(p: Prepared) -> list[tuple[float, float, float]]:
    """(timestep, sigma, next sigma), sigma in units of alpha."""
    sigmas = p.scheduler.sigmas.double().tolist()
    return list(zip(p.timesteps.tolist(), sigmas, sigmas[1:], strict=False))


def _sigma_row(
    p: Prepared, timestep: float, sigma: float, sigma_next: float, fresh: float
) -> ScheduleRow:
    """Euler's step from sigma to sigma_next, for x = x0 + sigma eps; then `fresh` noise."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    u, v = _to_x0(p.prediction, alpha, sigma * alpha)
    # The model sees alpha x, and so does the formula of u and v.
    ratio = sigma_next / sigma
    return _row(timestep, u * alpha, v, a=ratio, b=1 - ratio, input_scale=alpha, d=fresh)


def _lcm(p: Prepared) -> list[ScheduleRow]:
    config = p.scheduler.config
    sigma_data = 0.5
    rows = []
    following = [*p.timesteps[1:].astype(int), None]
    for timestep, after in zip(p.timesteps.astype(int), following, strict=True):
        u, v = _to_x0(p.prediction, *_pair(p.alphas_cumprod[timestep]))
        scaled = timestep * config.timestep_scaling
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / math.sqrt(scaled**2 + sigma_data**2)
        # The last step keeps the denoised latents; the others add noise up to the next timestep.
        alpha, sigma = (1.0, 0.0) if after is None else _pair(p.alphas_cumprod[after])
        rows.append(_row(timestep, u, v, a=alpha * c_skip, b=alpha * c_out, d=sigma))
    return rows


def _ddpm(p: Prepared) -> list[ScheduleRow]:
    rows = []
    following = [*p.timesteps[1:].astype(int), None]
    for timestep, after in zip(p.timesteps.astype(int), following, strict=True):
        alpha2 = p.alphas_cumprod[timestep]
        alpha2_next = 1.0 if after is None else p.alphas_cumprod[after]
        alpha2_step = alpha2 / alpha2_next
        beta = 1 - alpha2_step
        u, v = _to_x0(p.prediction, *_pair(alpha2))
        small = (1 - alpha2_next) / (1 - alpha2) * beta
        variance = beta if p.scheduler.config.variance_type == "fixed_large" else small
        rows.append(
            _row(
                timestep,
                u,
                v,
                a=math.sqrt(alpha2_step) * (1 - alpha2_next) / (1 - alpha2),
                b=math.sqrt(alpha2_next) * beta / (1 - alpha2),
                d=math.sqrt(variance) if timestep > 0 else 0.0,
            )
        )
    return rows


def _dpm_solver(p: Prepared) -> list[ScheduleRow]:
    config = p.scheduler.config
    steps = len(p.timesteps)
    last_is_first_order = (
        config.euler_at_final
        or (config.lower_order_final and steps < 15)
        or config.final_sigmas_type == "zero"
    )
    rows: list[ScheduleRow] = []
    h_previous = math.nan
    for index, (timestep, ratio_sigma, ratio_sigma_next) in enumerate(_sigmas(p)):
        alpha, alpha_next = (
            1 / math.sqrt(value**2 + 1) for value in (ratio_sigma, ratio_sigma_next)
        )
        u, v = _to_x0(p.prediction, alpha, ratio_sigma * alpha)
        # h, the step in log SNR, is infinite when it ends at sigma 0: always a first-order step.
        h = math.log(ratio_sigma / ratio_sigma_next) if ratio_sigma_next else math.inf
        b = alpha_next * (1 - ratio_sigma_next / ratio_sigma)
        c = 0.0
        last = index == steps - 1
        if config.solver_order == 2 and index > 0 and not (last and last_is_first_order):
            # D1 = (x0 - x0_previous) / r0 with r0 = h_previous / h, at weight b / 2
            c = -b * h / (2 * h_previous)
        a = (ratio_sigma_next * alpha_next) / (ratio_sigma * alpha)
        rows.append(_row(timestep, u, v, a=a, b=b - c, c=c))
        h_previous = h
    return rows


COMMON_OPTIONS: dict[str, tuple[Any, ...]] = {
    "prediction_type": PREDICTIONS,
    "thresholding": (False,),
    "clip_sample": (False,),
}
# scheduler -> (its rows, the options that matter to them and their allowed values)
SUPPORTED: dict[str, tuple[Callable[[Prepared], list[ScheduleRow]], dict[str, Any]]] = {
    "DDIMScheduler": (_ddim, {}),
    "DDPMScheduler": (_ddpm, {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")}),
    "DPMSolverMultistepScheduler": (
        _dpm_solver,
        {
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (1, 2),
            "solver_type": ("midpoint",),
            "use_beta_sigmas": (False,),
            "use_flow_sigmas": (False,),
            "use_lu_lambdas": (False,),
            "variance_type": (None,),
        },
    ),
    "EulerAncestralDiscreteScheduler": (
        _euler_ancestral,
        {"prediction_type": ("epsilon", "v_prediction")},
    ),
    "EulerDiscreteScheduler": (
        _euler,
        {
            "interpolation_type": ("linear",),
            "timestep_type": ("discrete",),
            "use_beta_sigmas": (False,),
        },
    ),
    "LCMScheduler": (_lcm, {}),
}
