"""What is checked of the whole pipeline in one runtime: golden prompts from their stored noise."""

from typing import cast

import numpy as np

from mobile_runtime.bundle import Bundle
from mobile_runtime.checks import Teller, figures_of, finite, rank
from mobile_runtime.errors import BundleError, GateError, UserError
from mobile_runtime.goldens import Arrays, PromptCase, golden_cases, prompt_case
from mobile_runtime.parity import Status, check_picture, check_repeat, check_tensor
from mobile_runtime.pipeline import Pipeline
from mobile_runtime.report import PIPELINE, Check, Kind, Pictures
from mobile_runtime.runs import NoRun, PromptRun, Runtime
from mobile_runtime.sketches import sketch
from mobile_runtime.tokenizer import ClipTokenizer

# The seed's noise is computed in float64 and rounded; another machine's sine may turn a last bit.
NOISE_SNR_DB = 120.0


# The sampler's own arithmetic is a few float32 operations a step.
SAMPLER_SNR_DB = 120.0


def prompt_kinds() -> list[Kind]:
    """The checks that a golden prompt gets, once the pipeline runs."""
    return ["sampler", "tokens", "noise", "outputs", "trajectory", "picture", "source_picture"]


def check_prompt(
    bundle: Bundle, runtime: Runtime, index: int, run: PromptRun
) -> tuple[list[Check], Pictures | None]:
    """Hold what came of one golden prompt against its references."""
    tell = Teller(PIPELINE, runtime.label, index)
    case, gates = prompt_case(bundle, index), bundle.manifest.gates
    # The manifest's own numbers: they are replayed here, wherever the models ran.
    checks = [_sampler(tell, bundle, case)]
    if run.ids is not None:
        checks.append(_tokens(tell, bundle, case.golden.prompt, run.ids))
    if run.noise is not None:
        checks.append(_noise(tell, case, run.noise))
    made = run.made
    if isinstance(made, NoRun):
        return [*checks, tell("outputs", made.status, made.reason)], None
    fault = check_tensor("the trajectory", case.trajectory, made.trajectory)
    sound = "the trajectory has the shape and dtype of the reference, all finite"
    checks.append(tell("outputs", *(("pass", sound) if fault.sound else ("fail", fault.reason))))
    if fault.sound:
        gate_db = gates.trajectory_snr_db
        checks.append(_trajectory(tell, case.trajectory, made.trajectory, gate_db))
    for kind, wanted, gate_db in (
        ("picture", case.picture, gates.picture_psnr_db),
        ("source_picture", case.source_picture, gates.source_picture_psnr_db),
    ):
        verdict, psnr_db = check_picture(wanted, made.picture, gate_db=gate_db)
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
    if (made.picture.dtype, made.picture.shape) != (case.picture.dtype, case.picture.shape):
        return checks, None  # which its check tells
    shown = Pictures(
        prompt=case.golden.prompt,
        seed=case.golden.seed,
        runtime=runtime.label,
        source=case.source_picture,
        reference=case.picture,
        output=made.picture,
    )
    return checks, shown


def _tokens(tell: Teller, bundle: Bundle, prompt: str, given: np.ndarray) -> Check:
    """The ids are those of one of the text encoder's golden cases, and of this very prompt."""
    try:
        own = ClipTokenizer.from_bundle(bundle).encode(prompt)
    except BundleError as error:
        return tell("tokens", "fail", str(error))
    if not np.array_equal(given, own):
        return tell("tokens", "fail", f"the ids of {prompt!r} are not what the tokenizer gives")
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


def _noise(tell: Teller, case: PromptCase, given: np.ndarray) -> Check:
    verdict = check_tensor(
        f"the noise of seed {case.golden.seed}", case.noise, given, gate_db=NOISE_SNR_DB
    )
    return tell(
        "noise",
        verdict.status,
        verdict.reason,
        gate=NOISE_SNR_DB,
        **figures_of(verdict),
    )


def _trajectory(
    tell: Teller, reference: np.ndarray, output: np.ndarray, gate_db: float | None
) -> Check:
    """Latents step by step, the noise that they begin with too: a drift is seen where it starts."""
    verdicts = [
        check_tensor(f"step {k}" if k else "the beginning", wanted, given, gate_db=gate_db)
        for k, (wanted, given) in enumerate(zip(reference, output, strict=True))
    ]
    worst = min(verdicts, key=rank)
    by_step = [finite(v.figures.snr_db) if v.figures else None for v in verdicts[1:]]
    return tell(
        "trajectory",
        worst.status,
        f"the worst of {len(verdicts) - 1} steps is {worst.reason}",
        gate=gate_db,
        details={"snr_db_by_step": by_step},
        **figures_of(worst),
    )


def _sampler(tell: Teller, bundle: Bundle, case: PromptCase) -> Check:
    """Replay the run with PyTorch's model outputs: what is left is the manifest's own numbers.

    The schedule's rows, the guidance, the scaling of inputs and latents. No model runs.
    """
    if not case.between:
        reason = "the bundle does not hold PyTorch's model outputs to replay; convert it again"
        return tell("sampler", "not_run", reason).model_copy(update={"gated": False})
    if fault := _fresh_noise_fault(bundle, case):
        return tell("sampler", "fail", fault)
    verdicts = []
    try:
        pipeline, fed = _replayed(bundle, case)
        golden = case.golden
        made = pipeline(
            golden.prompt,
            **golden.call,
            noise=case.noise,
            fresh_noise=case.fresh_noise,
        )
    except (GateError, UserError) as error:
        return tell("sampler", "fail", f"the run cannot be replayed: {error}")
    given = {name: np.stack(values) for name, values in fed.items()}
    for name, wanted, output in (
        ("the timesteps", case.between["timestep"], given["timestep"]),
        ("the UNet's samples", case.between["sample"], given["sample"]),
        ("the latents", case.trajectory, made.trajectory),
        ("the decoder's latents", case.between["latent_sample"], given["latent_sample"][0]),
    ):
        verdicts.append(check_tensor(name, wanted, output, gate_db=SAMPLER_SNR_DB))
    worst = min(verdicts, key=rank)
    reason = f"replayed with PyTorch's model outputs, {worst.reason}"
    return tell("sampler", worst.status, reason, gate=SAMPLER_SNR_DB, **figures_of(worst))


def _fresh_noise_fault(bundle: Bundle, case: PromptCase) -> str | None:
    """The first step that adds noise where PyTorch added none; its stored noise is zeros."""
    table = bundle.manifest.schedule(case.golden.steps)
    if table is None or case.fresh_noise is None:
        return None
    for step, (row, noise) in enumerate(zip(table.rows, case.fresh_noise, strict=True), start=1):
        if row.d != 0 and not noise.any():
            return f"step {step} of {table.steps} adds fresh noise, and PyTorch added none there"
    return None


def _replayed(bundle: Bundle, case: PromptCase) -> tuple[Pipeline, dict[str, list[np.ndarray]]]:
    """The runtime's pipeline over stored model outputs, and what it feeds to the models."""
    fed: dict[str, list[np.ndarray]] = {"timestep": [], "sample": [], "latent_sample": []}
    outputs = iter(case.between["out_sample"])

    def outputs_of(component: str) -> Arrays:
        """Zeros of the right form: nothing looks at them."""
        specs = bundle.component(component).outputs
        return {spec.name: np.zeros(spec.shape, np.float32) for spec in specs}

    def unet(feeds: Arrays) -> Arrays:
        fed["timestep"].append(feeds["timestep"][0])
        fed["sample"].append(sketch(feeds["sample"]))
        output = next(outputs, None)
        if output is None:
            raise GateError("it calls the UNet more often than PyTorch did")
        return {"out_sample": output}

    def vae_decoder(feeds: Arrays) -> Arrays:
        fed["latent_sample"].append(feeds["latent_sample"])
        return outputs_of("vae_decoder")

    pipeline = Pipeline(
        {
            "text_encoder": lambda feeds: outputs_of("text_encoder"),
            "unet": unet,
            "vae_decoder": vae_decoder,
        },
        ClipTokenizer.from_bundle(bundle),
        bundle.manifest.generation,
        bundle.manifest.schedules,
        unet_batch=bundle.component("unet").inputs[0].shape[0],
    )
    return pipeline, fed
