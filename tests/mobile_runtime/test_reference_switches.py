"""Each switch of the desktop pipeline keeps the picture as near as it promises, or is told."""

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobile_runtime.__main__ import main
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.parity import picture_psnr_db
from mobile_runtime.reference import EXACT, Parts, ReferencePipeline, Settings, models, switches
from mobile_runtime.reference import rows as planning
from mobile_runtime.reference.deep_cache import DeepCache
from mobile_runtime.reference.merged_tokens import merging, places
from mobile_runtime.reference.switches import SWITCHES, Machine, settings_of

CPU = Machine("cpu", "a test")


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return picture_psnr_db(np.concatenate(a), np.concatenate(b))


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


def test_tensorrt_keeps_its_engines_and_hides_no_failed_build(
    small: Parts, tmp_path: Path, monkeypatch: Any
) -> None:
    """By the options that Torch-TensorRT is given, which is not at hand."""
    asked: list[dict[str, Any]] = []

    def compile_(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    monkeypatch.setattr(torch, "compile", compile_)
    models.prepare(small, replace(EXACT, tensorrt=True), CPU)
    assert [options["backend"] for options in asked] == ["tensorrt"] * 3
    for options in (each["options"] for each in asked):
        assert options["pass_through_build_failures"]
        assert options["cache_built_engines"]
        assert options["reuse_cached_engines"]
        assert options["disable_tf32"]
        assert Path(options["engine_cache_dir"]) == tmp_path / "tensorrt"


@pytest.mark.skipif(SWITCHES["compile"].missing(CPU) is not None, reason="needs a C++ compiler")
def test_a_graph_that_the_cache_has_is_not_counted_as_compiled(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def compiled() -> int:
        torch._dynamo.reset()
        before = models.graphs_compiled()
        with torch.no_grad():
            torch.compile(lambda x: x.sin() + x.relu(), dynamic=False)(torch.ones(1000))
        return models.graphs_compiled() - before

    assert [compiled(), compiled()] == [1, 0]
    torch._dynamo.reset()


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
    spots = places((4, 6), "cpu")
    fewer, back = merging(x, *spots, 0.5)
    small = fewer(x)
    assert small.shape == (2, 12, 5)
    restored = back(small)
    same = (restored == x).all(dim=-1).sum(dim=1)
    assert (same >= 24 - 2 * 12).all()
    # Equal tokens lose nothing by being merged.
    twins = x[:, :1].expand(-1, 24, -1).contiguous()
    fewer, back = merging(twins, *spots, 0.75)
    assert torch.allclose(back(fewer(twins)), twins, atol=1e-6)
    fewer, back = merging(x, *spots, 0.0)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fast_on_a_gpu_keeps_the_picture(parts: Parts) -> None:
    machine = switches.machine_of("cuda")
    names = switches.fast_names(machine)
    lacks = switches.missing(names, machine)
    fast = settings_of([name for name in names if name not in lacks], machine)
    prompts = list(parts.judge.prompts[:4]) if parts.judge else []
    wanted = ReferencePipeline(parts, EXACT, "cuda")(prompts, seed=1, steps=1)
    made = ReferencePipeline(parts, fast, "cuda")(prompts, seed=1, steps=1)
    assert psnr_db(wanted.pictures, made.pictures) > 40
