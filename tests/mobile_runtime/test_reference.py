"""The desktop pipeline: exact as diffusers, and each switch as near to it as it promises."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters import cli
from converters import reference as opening
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import GateError, UserError, run_cli
from mobile_runtime.noise import Noise
from mobile_runtime.parity import picture_psnr_db, picture_ssim
from mobile_runtime.reference import EXACT, Parts, ReferencePipeline, Settings, switches
from mobile_runtime.reference import rows as planning
from mobile_runtime.reference.bench import Bench
from mobile_runtime.reference.deep_cache import DeepCache
from mobile_runtime.reference.merged_tokens import merging
from mobile_runtime.reference.pipeline import (
    MemoryUsedUpError,
    cut_table,
    noise_levels,
    told_memory,
)
from mobile_runtime.reference.switches import SWITCHES, Machine, settings_of
from mobile_runtime.sampler import sample
from recipes import schema
from recipes.schedulers import CLASSES, choose_scheduler
from tests.converters.small import make_small_pipeline

PROMPT = "a large red star on a white background"
CPU = Machine("cpu", "a test")
SMALL = """
name: small
source: {{model: {model}}}
resolution: 16
schedule: {{steps: 4, guidance_scale: 3.0}}
golden_prompts: [a red tent, the rat]
"""


@pytest.fixture(scope="module")
def parts() -> Parts:
    """The embedded model in two steps without guidance."""
    return opening.open_recipe(schema.load("pocket_turbo").resolved())


@pytest.fixture(scope="module")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_small_pipeline().save_pretrained(folder / "model")
    (folder / "small.yaml").write_text(SMALL.format(model=folder / "model"))
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def small(small_recipe: Path) -> Parts:
    """A pipeline that draws in milliseconds, with guidance."""
    return opening.open_recipe(schema.load(str(small_recipe)).resolved())


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return picture_psnr_db(np.concatenate(a), np.concatenate(b))


def stored_noise(parts: Parts, table: Any, count: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
    """Noise and fresh noise as torch's generator draws them for diffusers."""
    own = parts.generation
    shape = (count, own.latent_channels, own.latent_height, own.latent_width)
    first = Noise(3).draw(shape)
    if not any(row.d for row in table.rows):
        return first, None
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(shape, generator=generator) if row.d else None for row in table.rows]
    return first, np.stack([np.zeros(shape, np.float32) if r is None else r.numpy() for r in rows])


def diffusers_latents(parts: Parts, scheduler: str, noise: np.ndarray, **options: Any) -> Any:
    """What diffusers' StableDiffusionPipeline gives for the same noise."""
    pipe = parts.diffusers
    before = pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.scheduler = choose_scheduler(before, scheduler)
        given = torch.from_numpy(noise)
        generator = torch.Generator().manual_seed(5)
        made = pipe(PROMPT, latents=given, output_type="latent", generator=generator, **options)
        return made.images.numpy()
    finally:
        pipe.scheduler = before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", [*CLASSES])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_exact_is_diffusers_own_pipeline(parts: Parts, scheduler: str, guidance: float) -> None:
    steps = 4
    pipeline = ReferencePipeline(parts)
    table = parts.schedule(steps, scheduler)
    noise, fresh = stored_noise(parts, table)
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    wanted = diffusers_latents(parts, scheduler, noise, **options)
    made = pipeline(
        PROMPT,
        noise=noise,
        fresh_noise=fresh,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance,
    )
    # Euler's latents begin at sigma 4096 here (zero terminal SNR): diffusers' own float32 loses
    # 1e-4; ours is held against float64 below.
    largest = table.init_noise_sigma * np.abs(noise).max()
    assert np.abs(made.latents - wanted).max() <= 1e-5 * max(1, largest / 100)
    picture = parts.diffusers.vae.decode(torch.from_numpy(wanted) / parts.generation.scaling_factor)
    levels = ((picture.sample[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(levels - made.pictures[0].astype(float)).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm_solver_pp_2m"])
def test_exact_is_its_float64_self_but_for_rounding(parts: Parts, scheduler: str) -> None:
    pipeline, table = ReferencePipeline(parts), parts.schedule(4, scheduler)
    noise, _ = stored_noise(parts, table)
    states = pipeline.encode([PROMPT])

    def denoise(x: torch.Tensor, timestep: float) -> torch.Tensor:
        with torch.no_grad():
            return pipeline.models.denoise(x.float(), torch.tensor([timestep]), states).double()

    *_, (_, wanted) = sample(table, torch.from_numpy(noise).double(), denoise)
    made = pipeline(PROMPT, noise=noise, steps=4, scheduler=scheduler).latents
    assert np.abs(made - wanted.numpy()).max() <= 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm_solver_pp_2m"])
def test_image_to_image_is_diffusers_own(parts: Parts, scheduler: str) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = ReferencePipeline(parts)
    first = pipeline(PROMPT, seed=2).pictures[0]
    noise, _ = stored_noise(parts, parts.schedule(8, scheduler))
    made = pipeline(
        PROMPT, noise=noise, image=first, strength=0.6, steps=8, scheduler=scheduler
    ).latents
    pipe = StableDiffusionImg2ImgPipeline(
        **parts.diffusers.components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = choose_scheduler(pipe.scheduler, scheduler)
    scaled = torch.from_numpy(first).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(scaled).latent_dist.mode() * pipe.vae.config.scaling_factor
    # Latents as the image, and the noise handed over, so that nothing is drawn.
    with pytest.MonkeyPatch.context() as patch:
        name = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
        patch.setattr(name, lambda *a, **k: torch.from_numpy(noise))
        wanted = pipe(
            PROMPT,
            image=clean,
            strength=0.6,
            num_inference_steps=8,
            guidance_scale=1.0,
            output_type="latent",
        ).images.numpy()
    assert np.abs(made - wanted).max() <= 2e-5


def test_a_repeated_call_has_equal_bits_and_steps_are_told(parts: Parts) -> None:
    pipeline = ReferencePipeline(parts)
    told: list[tuple[int, int]] = []
    first = pipeline(PROMPT, seed=7, on_step=lambda k, n, latents: told.append((k, n)))
    again = pipeline(PROMPT, seed=7)
    assert told == [(1, 2), (2, 2)]
    assert first.latents.tobytes() == again.latents.tobytes()
    assert not torch.are_deterministic_algorithms_enabled()  # set back


def test_a_batch_is_its_pictures_one_by_one(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    prompts = ["a red tent", "the rat", "a tent"]
    batch = pipeline(prompts, seed=4, scheduler="euler_ancestral")
    for k, prompt in enumerate(prompts):
        alone = pipeline(prompt, seed=4 + k, scheduler="euler_ancestral")
        assert np.abs(batch.latents[k] - alone.latents[0]).max() < 1e-4


def test_embeddings_are_kept_and_may_be_given(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    calls = []
    encode = pipeline.models.encode
    object.__setattr__(pipeline.models, "encode", lambda ids: calls.append(1) or encode(ids))
    first = pipeline("a red tent", seed=1)
    assert len(calls) == 2  # the prompt, and the empty one
    assert pipeline("a red tent", seed=1).latents.tobytes() == first.latents.tobytes()
    assert len(calls) == 2
    states = pipeline.encode(["", "a red tent"]).numpy()
    given = pipeline("something else", seed=1, prompt_embeds=states)
    assert given.latents.tobytes() == first.latents.tobytes()
    with pytest.raises(UserError, match="need 2 rows"):
        pipeline("a red tent", prompt_embeds=states[:1])


NEAR = {
    "half": 45.0,
    "bfloat16": 45.0,
    "float_norms": 45.0,
    "channels_last": 70.0,
    "fused_qkv": 70.0,
    "attention": 70.0,
    "int8": 40.0,
    "merged_tokens": 30.0,
}


@pytest.mark.parametrize("name", [*NEAR])
def test_each_switch_keeps_the_picture(parts: Parts, name: str) -> None:
    if name == "int8":
        pytest.importorskip("torchao")
    names = ("half", name) if name == "float_norms" else (name,)
    exact = ReferencePipeline(parts)
    prompts = list(parts.judge.prompts[:3]) if parts.judge else []
    switched = ReferencePipeline(parts, settings_of(names, CPU))
    assert not switched.settings.exact
    wanted, made = exact(prompts, seed=1), switched(prompts, seed=1)
    assert psnr_db(wanted.pictures, made.pictures) > NEAR[name]
    assert exact(prompts, seed=1).latents.tobytes() == wanted.latents.tobytes()  # left alone


def test_the_switches_together_keep_the_picture(parts: Parts) -> None:
    names = [name for name in switches.fast_names(CPU) if name != "compile"]
    prompts = list(parts.judge.prompts[:4]) if parts.judge else []
    wanted = ReferencePipeline(parts)(prompts, seed=1)
    made = ReferencePipeline(parts, settings_of(names, CPU))(prompts, seed=1)
    assert psnr_db(wanted.pictures, made.pictures) > 40


def compiled_twice(small: Parts) -> None:
    """Two prompts through the compiled pipeline, held against exact; a recompilation raises."""
    torch._dynamo.reset()
    wanted = ReferencePipeline(small)
    made = ReferencePipeline(small, settings_of(["compile"], CPU))
    for prompt, seed in (("a red tent", 1), ("the rat and the tent", 2)):
        one, other = wanted(prompt, seed=seed), made(prompt, seed=seed)
        assert np.abs(one.latents - other.latents).max() < 1e-3
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_model_is_one_graph_for_all_prompts(small: Parts, monkeypatch: Any) -> None:
    """Traced as for a compiler, whose C++ takes minutes and has a test at full size."""
    compile_ = torch.compile
    asked: list[dict[str, Any]] = []

    def traced(function: Any, **options: Any) -> Any:
        asked.append(options)
        return compile_(function, backend="eager", **{**options, "mode": None})

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr("torch._dynamo.config.error_on_recompile", True)
    compiled_twice(small)
    assert asked == [{"mode": "default", "dynamic": False, "fullgraph": True}] * 3


@pytest.mark.full_size
@pytest.mark.skipif(SWITCHES["compile"].missing(CPU) is not None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_the_same_and_is_kept_for_the_next_process(
    small: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("torch._dynamo.config.error_on_recompile", True)
    compiled_twice(small)
    assert any((tmp_path / "inductor").rglob("*"))


def test_deep_features_are_the_unets_own(parts: Parts) -> None:
    cached, generator = DeepCache(parts.unet), torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([500.0])
    config = parts.unet.config
    states = torch.randn(2, 16, config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        out, deep = cached.full(x, t, states)
        wanted = parts.unet(x, t, states, return_dict=False)[0]
        assert torch.equal(out, wanted)
        # From this very step's features the shallow call gives this step's output.
        assert torch.allclose(cached.shallow(x, t, states, deep), wanted, atol=1e-5)


def test_deep_cache_calls_the_unet_less_often(small: Parts) -> None:
    pipeline = ReferencePipeline(small, Settings(deep_cache=3))
    calls = {"full": 0, "shallow": 0}
    for name in calls:
        own = getattr(pipeline.models, name)

        def counted(*tensors: Any, own: Any = own, name: str = name) -> Any:
            calls[name] += 1
            return own(*tensors)

        object.__setattr__(pipeline.models, name, counted)
    made = pipeline("a red tent", steps=8)
    assert calls == {"full": 3, "shallow": 5}
    exact = ReferencePipeline(small)("a red tent", steps=8)
    assert psnr_db(exact.pictures, made.pictures) > 15
    assert not np.array_equal(exact.latents, made.latents)


def test_merged_tokens_come_back_in_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 5, generator=generator)
    fewer, back = merging(x, (4, 6), 0.5)
    small = fewer(x)
    assert small.shape == (2, 12, 5)
    restored = back(small)
    same = (restored == x).all(dim=-1).sum(dim=1)
    assert (same >= 24 - 2 * 12).all()
    # Equal tokens lose nothing by being merged.
    twins = x[:, :1].expand(-1, 24, -1).contiguous()
    fewer, back = merging(twins, (4, 6), 0.75)
    assert torch.allclose(back(fewer(twins)), twins, atol=1e-6)
    fewer, back = merging(x, (4, 6), 0.0)
    assert torch.equal(back(fewer(x)), x)


def test_what_is_missing_is_told_in_a_line_each_and_fails_nothing(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["tf32", "xformers", "tensorrt", "tiny_decoder"]
    argv = ["reference", "generate", "a red tent", "--recipe", str(small_recipe)]
    argv += ["--device", "cpu", "-o", str(tmp_path / "tent.png")]
    for name in names:
        argv += ["--with", name]
    assert run_cli(main, argv) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in told] == names
    assert (tmp_path / "tent.png").is_file()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["generate", "x", "--with", "turbo"], "unknown switch 'turbo'"),
        (["generate", "x", "--device", "tpu"], "unknown device 'tpu'"),
        (["generate", "x", "--device", "cuda:7"], "is not here"),
        (["generate", "x", "--device", "cuda:abc"], "unknown device 'cuda:abc'"),
        (["generate", "x", "-o", "x.jpg"], "should be a .png"),
        (["generate", "x", "--scheduler", "heun"], "unknown scheduler 'heun'"),
        (["generate", "x", "--recipe", "nothing"], "unknown recipe"),
        (["bench", "--rows", "alone"], "--rows goes with --ablation"),
        (["bench", "--ablation", "--fast"], "--ablation runs every switch"),
        (["bench", "--ablation", "--rows", "none"], "there is no row 'none'"),
        (["bench", "--rounds", "1"], "should be 2 or more"),
        (["bench", "--judged", "9999"], "there are 512 captions"),
        (["bench", "--bundle", "x"], "needs -o DIR"),
        (["profile", "--rows", "0"], "should be 1 or more"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    argv: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(main, ["reference", *argv]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_to_start_from_is_checked(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    with pytest.raises(UserError, match=r"it has to be uint8 \(16, 16, 3\)"):
        pipeline("a tent", image=np.zeros((8, 8, 3), np.uint8))
    image = np.zeros((16, 16, 3), np.uint8)
    for strength, why in ((0.0, "out of range"), (0.1, "leaves none")):
        with pytest.raises(UserError, match=why):
            pipeline("a tent", image=image, strength=strength)
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        pipeline("a tent", seed=[1, 2])
    with pytest.raises(UserError, match="no prompt"):
        pipeline([])
    with pytest.raises(UserError, match="2 images for 1 prompts"):
        pipeline("a tent", image=np.stack([image, image]))
    with pytest.raises(UserError, match="no number to guide by"):
        pipeline("a tent", guidance_scale=float("nan"))
    with pytest.raises(UserError, match="2 rows of"):
        pipeline("a tent", prompt_embeds=np.zeros((2, 16, 31), np.float32))
    assert len(pipeline("a tent", seed=np.int64(3)).pictures) == 1
    made = ReferencePipeline(small, Settings(tiny_decoder="random"))("a tent", image=image)
    assert made.pictures.shape == (1, 16, 16, 3)  # taken in by the pipeline's own encoder


@pytest.mark.parametrize(
    "wrong", [{"precision": "fp16"}, {"attention": "fast"}, {"deep_cache": 0}, {"merged_tokens": 2}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Settings(**wrong)


def test_switches_that_do_not_go_together_are_left_out() -> None:
    names, told = planning.without_conflicts(("half", "bfloat16", "compile", "tensorrt"))
    assert names == ("bfloat16", "tensorrt")
    assert set(told) == {"half", "compile"}
    names, told = planning.without_conflicts(("xformers", "fused_qkv"))
    assert names == ("xformers",)
    names, _ = planning.without_conflicts(("xformers", "fused_qkv", "compile"))
    assert names == ("fused_qkv", "compile")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["dpm_solver_pp_2m", "euler", "ddim", "euler_ancestral"])
def test_the_yardstick_of_diffusers_runs_the_same_schedule(
    small_recipe: Path, scheduler: str
) -> None:
    recipe = schema.load(str(small_recipe), {"schedule.scheduler": scheduler})
    parts = opening.open_recipe(recipe.resolved())
    bench = Bench(parts, CPU, steps=4, rounds=2, compared=1)
    found = bench.measure(planning.Row("yardstick", "diffusers float32", own=True))
    assert found.status == "done"
    if scheduler == "euler_ancestral":
        assert found.psnr_db is None  # diffusers draws that noise itself
    else:
        assert found.equal or (found.psnr_db or 0) > 60


def test_a_recipe_is_opened_by_its_name(small_recipe: Path) -> None:
    pipeline = ReferencePipeline.open(str(small_recipe), {"schedule.steps": 3}, device="cpu")
    told: list[int] = []
    pipeline("a red tent", on_step=lambda k, n, latents: told.append(n))
    assert told == [3, 3, 3]


def test_a_process_may_choose_its_own_precision(small: Parts) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        ReferencePipeline(small)("a tent")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", [*CLASSES])
def test_noise_levels_are_the_schedulers(parts: Parts, scheduler: str) -> None:
    own = choose_scheduler(parts.diffusers.scheduler, scheduler)
    own.set_timesteps(8)
    clean, noise = (
        torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    )
    signal, sigma = noise_levels(cut_table(parts.schedule(8, scheduler), 0.5))
    wanted = own.add_noise(clean, noise, own.timesteps[4:5])
    assert torch.allclose(signal * clean + sigma * noise, wanted, atol=1e-5)


def test_out_of_memory_gives_advice() -> None:
    class CompilerError(Exception):
        """A compiler's own error, with what it met inside."""

    wrapped = CompilerError("backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("no")
    for error in (
        wrapped,
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"),
        MemoryError(),
    ):
        advice = r"half .*smaller batch.*tiny decoder"
        with pytest.raises(MemoryUsedUpError, match=advice), told_memory(EXACT, "cuda"):
            raise error
    with pytest.raises(RuntimeError, match="shape"), told_memory(EXACT, "cuda"):
        raise RuntimeError("shape")


def test_a_picture_of_no_numbers_is_no_picture(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    own = pipeline.models.decode
    object.__setattr__(pipeline.models, "decode", lambda latents: own(latents) * float("nan"))
    with pytest.raises(GateError, match="not finite in float32"):
        pipeline("a tent")


def test_the_ablation_is_measured_and_kept(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reference", "bench", "--ablation", "--recipe", str(small_recipe), "--rounds", "2"]
    argv += ["--tiny-decoder", "random", "--compared", "1", "--device", "cpu"]
    for name in ("exact", "diffusers float32", "channels_last", "tiny_decoder", "deep_cache"):
        argv += ["--rows", name]
    assert run_cli(main, [*argv, "-o", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "left out: tf32: needs a CUDA device" in table
    data = json.loads((tmp_path / "out/ablation.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["exact"]["equal"]
    assert rows["exact"]["ssim"] == 1
    assert rows["diffusers float32"]["equal"] or rows["diffusers float32"]["psnr_db"] > 60
    assert rows["tiny_decoder"]["psnr_db"] < 40  # it is untrained
    for row in rows.values():
        assert row["status"] == "done"
        assert row["seconds"] > 0
        assert row["times_low"] <= row["times"] <= row["times_high"]
        assert row["peak_bytes"] is not None
    assert rows["exact"]["floor_s"] > 0
    assert rows["deep_cache"]["floor_s"] is None
    assert run_cli(main, [*argv, "-o", str(tmp_path / "out")]) == 2
    assert "already exists" in capsys.readouterr().err
    page = (tmp_path / "out/ablation.html").read_text()
    assert "<script" not in page
    assert "tiny_decoder" in page.replace("<wbr>", "")


def test_a_row_that_has_no_memory_is_told_and_the_others_run(
    small: Parts, monkeypatch: Any
) -> None:
    bench = Bench(small, CPU, steps=2, rounds=2, compared=1)
    wanted = planning.Row("alone", "half", ("half",))
    with monkeypatch.context() as patch:
        name = "mobile_runtime.reference.models.prepare"
        patch.setattr(name, lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        found = bench.measure(wanted)
    assert found.status.startswith("the memory of cpu does not hold this")
    assert found.seconds is None
    assert bench.measure(wanted).status == "done"


def test_a_schedule_that_a_source_cannot_have_is_told_in_its_row(small: Parts) -> None:
    def schedule(steps: int, scheduler: str | None) -> Any:
        if scheduler == "ddim":
            raise UserError("DDIMScheduler with clip_sample=True cannot be compiled")
        return small.schedule(steps, scheduler)

    bench = Bench(replace(small, schedule=schedule), CPU, steps=2, rounds=2, compared=1)
    found = bench.measure(planning.Row("steps", "ddim 50", scheduler="ddim", steps=50))
    assert "clip_sample" in found.status
    assert bench.measure(planning.Row("yardstick", "exact")).status == "done"


def test_the_judge_reads_the_embedded_models_pictures(parts: Parts) -> None:
    bench = Bench(parts, CPU, steps=2, rounds=2, compared=1, judged=8)
    found = bench.measure(planning.Row("yardstick", "exact"))
    assert found.judged_pictures == 8
    assert found.judged is not None
    assert found.judged >= 0.75


def test_a_profile_has_a_table_and_a_trace(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    argv = ["reference", "profile", "--recipe", str(small_recipe), "--device", "cpu"]
    assert run_cli(main, [*argv, "-o", str(trace), "--rows", "5"]) == 0
    assert "aten::" in capsys.readouterr().out
    assert json.loads(trace.read_text())["traceEvents"]
    assert run_cli(main, [*argv, "-o", str(trace)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_desktop_stands_beside_a_bundle(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, kept = tmp_path / "bundle", tmp_path / "kept"
    argv = ["--recipe", str(small_recipe), "--output", str(bundle), "--no-validate"]
    assert cli.main("onnx", argv) == 0
    argv = ["reference", "bench", "--bundle", str(bundle), "-o", str(kept), "--rounds", "2"]
    assert run_cli(main, [*argv, "--device", "cpu", "--without", "compile"]) == 0
    capsys.readouterr()
    argv = ["validate", str(bundle), "--repeats", "1", "--reference", str(kept)]
    assert run_cli(main, argv) == 0
    report = json.loads((bundle / "report.json").read_text())
    found = [check for check in report["checks"] if check["kind"] == "reference"]
    places = {(check["runtime"], check["details"]["against"]) for check in found}
    assert places == {
        ("onnxruntime", "exact"),
        ("onnxruntime", "fast"),
        ("desktop fast", "exact"),
    }
    near = [check for check in found if check["details"]["against"] == "exact"]
    assert all(check["equal"] or check["value"] > 40 for check in near)
    desktop = [row for row in report["latency"] if row["runtime"].startswith("desktop ")]
    assert len(desktop) == 2
    assert all(row["load_ms"] > 0 and row["first_ms"] > 0 for row in desktop)
    assert all(row["peak_bytes"] is not None for row in desktop)
    page = (bundle / "report.html").read_text()
    assert "Beside the desktop pipeline" in page
    assert page.count("the desktop pipeline</figcaption>") == 4  # two prompts, exact and fast

    (kept / "reference.safetensors").write_bytes(b"x")
    assert run_cli(main, argv) == 2
    assert "is not what reference.json says" in capsys.readouterr().err
    data = json.loads((kept / "reference.json").read_text())
    (kept / "reference.json").write_text(json.dumps({**data, "manifest_sha256": "0" * 64}))
    assert run_cli(main, argv) == 2
    assert "was made for another bundle" in capsys.readouterr().err
    assert Bundle.open(bundle).manifest.name == "small"


def test_ssim_of_equal_pictures_is_one_and_small_ones_have_none() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 13, 3), np.uint8)
    assert picture_ssim(picture, picture) == pytest.approx(1)
    with pytest.raises(ValueError, match="no SSIM"):
        picture_ssim(picture[:8], picture[:8])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fast_on_a_gpu_keeps_the_picture(parts: Parts) -> None:
    machine = switches.machine_of("cuda")
    fast = settings_of(switches.fast_names(machine), machine)
    prompts = list(parts.judge.prompts[:4]) if parts.judge else []
    wanted = ReferencePipeline(parts, EXACT, "cuda")(prompts, seed=1, steps=1)
    made = ReferencePipeline(parts, fast, "cuda")(prompts, seed=1, steps=1)
    assert psnr_db(wanted.pictures, made.pictures) > 40


@pytest.mark.full_size
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["euler", "dpm_solver_pp_2m"])
def test_exact_is_diffusers_own_pipeline_at_full_size(scheduler: str) -> None:
    changes = {"source.model": "random:sd_turbo", "resolution": 256}
    parts = opening.open_recipe(schema.load("sd_turbo_int8", changes).resolved())
    table = parts.schedule(2, scheduler)
    noise, _ = stored_noise(parts, table)
    wanted = diffusers_latents(
        parts, scheduler, noise, num_inference_steps=2, guidance_scale=0.0, height=256, width=256
    )
    made = ReferencePipeline(parts)(PROMPT, noise=noise, steps=2, scheduler=scheduler)
    # Random weights leave latents of up to 61, where float32's own steps are 4e-6.
    assert np.abs(made.latents - wanted).max() <= 1e-5 * np.abs(wanted).max() / 10
