"""What is checked of the whole pipeline in one runtime: golden prompts from their stored noise."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from mobile_runtime.bundle import Bundle
from mobile_runtime.checks import (
    GoldenFile,
    Runtime,
    Step,
    Teller,
    brief,
    figures_of,
    finite,
    golden_cases,
    open_golden,
    rank,
)
from mobile_runtime.errors import BundleError, GateError, UserError
from mobile_runtime.noise import Noise
from mobile_runtime.parity import Status, check_picture, check_repeat, check_tensor
from mobile_runtime.pipeline import Pipeline
from mobile_runtime.report import PIPELINE, Check, Kind, Pictures
from mobile_runtime.sampler import needs_fresh_noise

# The seed's noise is computed in float64 and rounded; another machine's sine may turn a last bit.
NOISE_SNR_DB = 120.0


# The checks that each golden prompt gets, once the pipeline runs.
PROMPT_KINDS: tuple[Kind, ...] = (
    *("tokens", "noise", "outputs", "trajectory", "picture", "source_picture"),
)


def check_pipeline(
    bundle: Bundle, runtime: Runtime, prompts: Sequence[int], *, step: Step
) -> tuple[list[Check], list[Pictures]]:
    """Run the golden prompts of these indices from their stored noise."""
    tell = Teller(PIPELINE, runtime.label)
    if not prompts:
        return [tell("outputs", "not_run", "the bundle holds no golden prompt to run")], []
    step(f"pipeline in {runtime.label}: load")
    try:
        pipeline = Pipeline.from_bundle(bundle, backend=runtime.backend, **runtime.options)
    except BundleError as error:
        return [tell("outputs", "fail", str(error))], []
    except UserError as error:
        return [tell("outputs", "not_run", str(error))], []
    except Exception as error:  # the runtimes' own errors share no class
        return [tell("outputs", "fail", f"a model does not load: {brief(error)}")], []
    golden_file = open_golden(bundle, bundle.manifest.golden.pipeline)
    checks: list[Check] = []
    pictures: list[Pictures] = []
    for index in prompts:
        found, shown = _check_prompt(bundle, pipeline, runtime, index, golden_file, step)
        checks += found
        pictures += shown
    return checks, pictures


def _check_prompt(
    bundle: Bundle,
    pipeline: Pipeline,
    runtime: Runtime,
    index: int,
    golden_file: GoldenFile,
    step: Step,
) -> tuple[list[Check], list[Pictures]]:
    tell = Teller(PIPELINE, runtime.label, index)
    golden = bundle.manifest.golden.prompts[index]
    gates = bundle.manifest.gates
    g = bundle.manifest.generation
    latents = (g.latent_channels, g.latent_height, g.latent_width)
    noise = golden_file.get(f"{index}/noise", (1, *latents), np.float32)
    trajectory = golden_file.get(f"{index}/trajectory", (golden.steps + 1, *latents), np.float32)
    reference, source = (
        golden_file.get(f"{index}/{name}", (g.height, g.width, 3), np.uint8)
        for name in ("picture", "source_picture")
    )
    table = bundle.manifest.schedule(golden.steps)
    fresh_noise = None
    if table is not None and needs_fresh_noise(table):
        fresh_noise = golden_file.get(f"{index}/fresh_noise", (golden.steps, *latents), np.float32)
    checks = [_tokens(tell, bundle, pipeline, golden.prompt), _noise(tell, golden.seed, noise)]
    label = f"prompt {index} in {runtime.label}"
    step(label)
    try:
        result = pipeline(
            golden.prompt,
            negative_prompt=golden.negative_prompt,
            steps=golden.steps,
            guidance_scale=golden.guidance_scale,
            noise=noise,
            fresh_noise=fresh_noise,
            on_step=lambda done, steps, latents: step(f"{label}: step {done} of {steps}"),
        )
    except GateError as error:
        return [*checks, tell("outputs", "fail", str(error))], []
    except Exception as error:  # the runtimes' own errors share no class
        return [*checks, tell("outputs", "fail", f"it does not run: {brief(error)}")], []
    fault = check_tensor("the trajectory", trajectory, result.trajectory)
    sound = "the trajectory has the shape and dtype of the reference, all finite"
    checks.append(tell("outputs", *(("pass", sound) if fault.sound else ("fail", fault.reason))))
    if fault.sound:
        checks.append(_trajectory(tell, trajectory, result.trajectory))
    for kind, wanted, gate_db in (
        ("picture", reference, gates.picture_psnr_db),
        ("source_picture", source, gates.source_picture_psnr_db),
    ):
        verdict, psnr_db = check_picture(wanted, result.picture, gate_db=gate_db)
        status: Status = verdict.status
        if kind == "source_picture" and gate_db is None:
            status = "not_gated"
        checks.append(
            tell(
                cast(Kind, kind),
                status,
                verdict.reason,
                value=finite(psnr_db),
                unit="dB",
                gate=gate_db,
                equal=psnr_db == np.inf,
            )
        )
    shown = Pictures(
        prompt=golden.prompt,
        runtime=runtime.label,
        source=source,
        reference=reference,
        output=result.picture,
    )
    return checks, [shown]


def _tokens(tell: Teller, bundle: Bundle, pipeline: Pipeline, prompt: str) -> Check:
    """The bundle's tokenizer gives the ids of one of the text encoder's golden cases."""
    given = pipeline.tokenizer.encode(prompt)
    # Not ["input_ids"]: an encoder whose input has another name is told where it is run.
    known = [case.inputs.get("input_ids") for case in golden_cases(bundle, "text_encoder")]
    if any(
        check_repeat({"ids": ids}, {"ids": given}).status == "pass"
        for ids in known
        if ids is not None
    ):
        return tell("tokens", "pass", "the ids are those of a golden case of the text encoder")
    return tell(
        "tokens", "fail", f"the ids of {prompt!r} are in no golden case of the text encoder"
    )


def _noise(tell: Teller, seed: int, stored: np.ndarray) -> Check:
    verdict = check_tensor(
        f"the noise of seed {seed}", stored, Noise(seed).draw(stored.shape), gate_db=NOISE_SNR_DB
    )
    return tell(
        "noise",
        verdict.status,
        verdict.reason,
        gate=NOISE_SNR_DB,
        **figures_of(verdict),
    )


def _trajectory(tell: Teller, reference: np.ndarray, output: np.ndarray) -> Check:
    """Latents step by step: told, so that a drift can be seen where it starts; not gated."""
    verdicts = [
        check_tensor(f"step {k}", reference[k], output[k]) for k in range(1, len(reference))
    ]
    worst = min(verdicts, key=rank)
    by_step = [finite(v.figures.snr_db) if v.figures else None for v in verdicts]
    return tell(
        "trajectory",
        "not_gated",
        f"the worst of {len(verdicts)} steps is {worst.reason}",
        details={"snr_db_by_step": by_step},
        **figures_of(worst),
    )
