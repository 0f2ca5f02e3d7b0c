"""LoRA files of every spelling become part of the weights, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import save_file
from torch import nn

from mobile_runtime.errors import UserError
from recipes import adapters, schema, stages
from recipes.measure import with_modules
from recipes.quantized_layers import dequantized
from recipes.schedulers import choose_scheduler, with_steps
from recipes.schema import Recipe
from recipes.sources import open_source
from tests.conftest import make_tiny_pipeline

Tensors = dict[str, torch.Tensor]

# A layer of every kind, and what LCM-LoRA changes beside attention.
LAYERS = (
    "unet.conv_in",
    "unet.time_embedding.linear_1",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.resnets.0.time_emb_proj",
    "unet.down_blocks.2.resnets.0.conv_shortcut",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "unet.up_blocks.1.upsamplers.0.conv",
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
)
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def recipe(*loras: dict[str, Any]) -> Recipe:
    data = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}
    return schema.parse({**data, "stages": [{"adapters": {"loras": list(loras)}}]})


def fused(pipeline: Any, *loras: dict[str, Any]) -> Any:
    return stages.apply(pipeline, recipe(*loras)).pipeline


def layer_of(pipeline: Any, name: str) -> Any:
    component, _, path = name.partition(".")
    return getattr(pipeline, component).get_submodule(path)


def all_layers(pipeline: Any) -> list[str]:
    return [
        f"{component}.{path}"
        for component in KOHYA
        for path, layer in getattr(pipeline, component).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]


def matrices(pipeline: Any, names: Any = LAYERS, rank: int = 3, seed: int = 0) -> dict[str, Any]:
    """(down, up) of each layer, in the shapes that trainers save."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        weight = layer_of(pipeline, name).weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / 10
        up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2), generator=generator) / 10
        made[name] = (down, up)
    return made


def delta(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up after down, as a layer's weight: convolutions composed on a unit impulse."""
    if down.dim() == 2:
        return torch.einsum("or,ri->oi", up, down)
    return torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)


def as_kohya(made: dict[str, Any], alpha: float) -> Tensors:
    tensors = {}
    for name, (down, up) in made.items():
        component, _, path = name.partition(".")
        key = KOHYA[component] + path.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def as_peft(made: dict[str, Any], alpha: float) -> Tensors:
    tensors = {}
    for name, (down, up) in made.items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def as_diffusers(made: dict[str, Any], alpha: float) -> Tensors:
    tensors = {}
    for name, (down, up) in made.items():
        middle = "lora_linear_layer" if name.startswith("text") else "lora"
        tensors |= {f"{name}.{middle}.down.weight": down, f"{name}.{middle}.up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def written(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> str:
    alone = {key: torch.clone(value).contiguous() for key, value in tensors.items()}
    save_file(alone, path, metadata)
    return str(path)


@pytest.mark.parametrize("spell", [as_kohya, as_peft, as_diffusers])
def test_the_weights_are_what_the_formula_says(
    spell: Any, tiny_pipeline: Any, tmp_path: Path
) -> None:
    made = matrices(tiny_pipeline)
    file = written(spell(made, alpha=2.0), tmp_path / "style.safetensors")
    result = fused(tiny_pipeline, {"model": file, "scale": 0.5})
    for name in all_layers(tiny_pipeline):
        before, after = (layer_of(p, name).weight for p in (tiny_pipeline, result))
        if name in made:
            torch.testing.assert_close(after, before + 0.5 * 2.0 / 3 * delta(*made[name]))
            assert not torch.equal(after, before)
        else:
            assert after is before


def test_every_layer_is_found_by_its_name_in_sd_scripts_spelling(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    names = all_layers(tiny_pipeline)
    file = written(
        as_kohya(matrices(tiny_pipeline, names, rank=1), 1.0), tmp_path / "all.safetensors"
    )
    applied = stages.apply(tiny_pipeline, recipe({"model": file}))
    for name in names:
        assert not torch.equal(
            layer_of(applied.pipeline, name).weight, layer_of(tiny_pipeline, name).weight
        ), name
    (record,) = applied.records
    told = {"file": "all.safetensors", "scale": 1.0, "layers": len(names), "ranks": [1]}
    assert record["loras"] == [told]
    assert record["before"] == record["after"]


def test_older_spellings_of_diffusers_are_known(tiny_pipeline: Any, tmp_path: Path) -> None:
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    attention = "text_encoder.text_model.encoder.layers.0.self_attn"
    old = {
        f"{block}.to_out.0": f"{block}.processor.to_out_lora",
        f"{attention}.k_proj": f"{attention}.to_k_lora",
    }
    made = matrices(tiny_pipeline, old)
    tensors = {}
    for name, (down, up) in made.items():
        tensors |= {f"{old[name]}.down.weight": down, f"{old[name]}.up.weight": up}
    result = fused(tiny_pipeline, {"model": written(tensors, tmp_path / "old.safetensors")})
    for name, pair in made.items():
        before, after = (layer_of(p, name).weight for p in (tiny_pipeline, result))
        torch.testing.assert_close(after, before + delta(*pair))


def test_loras_add_up_each_with_its_scale(tiny_pipeline: Any, tmp_path: Path) -> None:
    one, other = (matrices(tiny_pipeline, rank=rank, seed=rank) for rank in (2, 5))
    files = [
        written(as_kohya(one, 2.0), tmp_path / "one.safetensors"),
        written(as_diffusers(other, 5.0), tmp_path / "other.safetensors"),
    ]
    loras = [{"model": files[0], "scale": 0.7}, {"model": files[1], "scale": -0.2}]
    result = fused(tiny_pipeline, *loras)
    for name in LAYERS:
        expected = layer_of(tiny_pipeline, name).weight
        expected = expected + 0.7 * delta(*one[name]) - 0.2 * delta(*other[name])
        torch.testing.assert_close(layer_of(result, name).weight, expected)


def test_a_scale_of_zero_leaves_the_weights_equal(tiny_pipeline: Any, tmp_path: Path) -> None:
    file = written(as_kohya(matrices(tiny_pipeline), 1.0), tmp_path / "lora.safetensors")
    result = fused(tiny_pipeline, {"model": file, "scale": 0.0})
    assert all(layer_of(result, n).weight is layer_of(tiny_pipeline, n).weight for n in LAYERS)


def test_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    pipeline = make_tiny_pipeline()
    before = {name: layer_of(pipeline, name).weight.clone() for name in all_layers(pipeline)}
    file = written(as_kohya(matrices(pipeline), 1.0), tmp_path / "lora.safetensors")
    result = fused(pipeline, {"model": file})
    assert all(torch.equal(layer_of(pipeline, name).weight, w) for name, w in before.items())
    for name in LAYERS:
        assert not layer_of(result, name).weight.requires_grad


def test_the_rank_is_alpha_where_the_file_has_none(tiny_pipeline: Any, tmp_path: Path) -> None:
    made = matrices(tiny_pipeline)
    tensors = {k: v for k, v in as_peft(made, 1.0).items() if not k.endswith("alpha")}
    result = fused(tiny_pipeline, {"model": written(tensors, tmp_path / "a.safetensors")})
    name = LAYERS[-1]
    expected = layer_of(tiny_pipeline, name).weight + delta(*made[name])
    torch.testing.assert_close(layer_of(result, name).weight, expected)


def test_alpha_may_stand_in_the_header_that_diffusers_writes(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    made = matrices(tiny_pipeline)
    tensors = {k: v for k, v in as_peft(made, 1.0).items() if not k.endswith("alpha")}
    settings = {"unet.lora_alpha": 6, "unet.r": 3, "unet.use_dora": False, "unet.alpha_pattern": {}}
    metadata = {adapters.METADATA: json.dumps(settings)}
    file = written(tensors, tmp_path / "lora.safetensors", metadata)
    result = fused(tiny_pipeline, {"model": file})
    for name, factor in ((LAYERS[0], 2.0), (LAYERS[-1], 1.0)):
        expected = layer_of(tiny_pipeline, name).weight + factor * delta(*made[name])
        torch.testing.assert_close(layer_of(result, name).weight, expected)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ('{"unet.lora_alpha": [4]}', r"lora_alpha \[4\] is no number"),
        ('{"unet.lora_alpha": "four"}', "lora_alpha 'four' is no number"),
        ('{"unet.lora_alpha": true}', "lora_alpha True is no number"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no JSON"),
    ],
)
def test_a_header_that_cannot_be_is_told(
    header: str, told: str, tiny_pipeline: Any, tmp_path: Path
) -> None:
    tensors = as_peft(matrices(tiny_pipeline), 1.0)
    file = written(tensors, tmp_path / "lora.safetensors", {adapters.METADATA: header})
    with pytest.raises(UserError, match=told):
        fused(tiny_pipeline, {"model": file})


def test_a_lora_that_is_too_large_is_told(tiny_pipeline: Any, tmp_path: Path) -> None:
    made = {name: (down * 1e25, up * 1e25) for name, (down, up) in matrices(tiny_pipeline).items()}
    file = written(as_peft(made, 1.0), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="are no longer finite; lower its scale"):
        fused(tiny_pipeline, {"model": file})


def test_a_linear_layer_may_be_written_as_a_kernel_and_in_float16(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    name = "unet.down_blocks.0.attentions.0.proj_in"
    ((down, up),) = matrices(tiny_pipeline, [name]).values()
    halved = {name: (down[..., None, None].half(), up[..., None, None].half())}
    result = fused(
        tiny_pipeline, {"model": written(as_kohya(halved, 3.0), tmp_path / "k.safetensors")}
    )
    expected = layer_of(tiny_pipeline, name).weight + delta(down.half().float(), up.half().float())
    torch.testing.assert_close(layer_of(result, name).weight, expected)
    assert layer_of(result, name).weight.dtype == torch.float32


@pytest.mark.parametrize("spell", [as_kohya, as_peft])
def test_diffusers_with_the_adapter_active_computes_the_same(spell: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pipeline = make_tiny_pipeline()
    tensors = spell(matrices(pipeline), 3.0 if spell is as_peft else 2.0)
    if spell is as_peft:  # where diffusers takes alpha to be the rank
        tensors = {key: value for key, value in tensors.items() if not key.endswith("alpha")}
    file = written(tensors, tmp_path / "lora.safetensors")
    result = fused(pipeline, {"model": file, "scale": 0.6})
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="style")
    pipeline.set_adapters("style", 0.6)
    x, text, ids = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32), torch.arange(16)[None]
    plain = make_tiny_pipeline()
    with torch.no_grad():
        ours, theirs, before = (
            (p.unet(x, 500, text).sample, p.text_encoder(ids)[0]) for p in (result, pipeline, plain)
        )
    for own, its, unchanged in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(own, unchanged, rtol=1e-2, atol=1e-3)


def test_a_fused_pipeline_is_saved_as_an_ordinary_folder(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    file = written(as_kohya(matrices(tiny_pipeline), 1.0), tmp_path / "lora.safetensors")
    result = fused(tiny_pipeline, {"model": file})
    stages.save(result, [], tmp_path / "saved")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet")
    assert torch.equal(loaded.conv_in.weight, result.unet.conv_in.weight)


def refusal(pipeline: Any, **lora: Any) -> str:
    """What `check` says, which works on the meta device and reads headers alone."""
    with pytest.raises(UserError) as caught:
        stages.check(pipeline, recipe(lora))
    message = str(caught.value)
    assert message.startswith("stages.0.adapters: ")
    assert "\n" not in message
    return message


def test_keys_of_no_layer_are_all_counted_and_the_first_named(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    tensors = as_kohya(matrices(tiny_pipeline, LAYERS[:1]), 1.0)
    blocks = [f"lora_unet_input_blocks_{index}_1_proj_in" for index in range(5)]
    tensors |= {f"{block}.lora_down.weight": torch.zeros(2, 8) for block in blocks}
    message = refusal(tiny_pipeline, model=written(tensors, tmp_path / "sgm.safetensors"))
    assert "of its 8 keys, 5 are no part" in message
    assert f"({blocks[0]}.lora_down.weight, " in message
    assert "and 2 more)" in message


@pytest.mark.parametrize(
    "key",
    [
        "unet.conv_in.lora_A.bias",
        "unet.conv_in.lora_magnitude_vector",
        "lora_unet_conv_in.dora_scale",
        "lora_unet_conv_in.hada_w1_a",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "unet.conv_norm_out.lora_A.weight",
        "nonsense",
        "",
        "unet.",
    ],
)
def test_what_is_no_plain_lora_is_refused(key: str, tiny_pipeline: Any, tmp_path: Path) -> None:
    tensors = as_peft(matrices(tiny_pipeline, LAYERS[:1]), 1.0) | {key: torch.zeros(2)}
    message = refusal(tiny_pipeline, model=written(tensors, tmp_path / "a.safetensors"))
    assert "1 are no part of a LoRA" in message
    assert "no LoHa, LoKr or DoRA" in message


def test_a_half_lora_and_one_that_is_there_twice_are_refused(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    made = matrices(tiny_pipeline, LAYERS[:1])
    half = as_peft(made, 1.0)
    del half["unet.conv_in.lora_B.weight"]
    message = refusal(tiny_pipeline, model=written(half, tmp_path / "half.safetensors"))
    assert "unet.conv_in.lora_A.weight" in message
    both = as_peft(made, 1.0) | as_kohya(made, 1.0)
    message = refusal(tiny_pipeline, model=written(both, tmp_path / "both.safetensors"))
    assert "3 are no part of a LoRA" in message


def test_a_lora_of_another_model_is_refused_with_its_shapes(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    made = {name: (torch.zeros(4, 768), torch.zeros(32, 4))}  # reads CLIP-L's 768 channels
    message = refusal(
        tiny_pipeline, model=written(as_peft(made, 1.0), tmp_path / "sd15.safetensors")
    )
    assert "trained for another model: 1 layers have other shapes" in message
    assert "(32, 32)" in message
    assert "(4, 768)" in message


@pytest.mark.parametrize(
    ("down", "up"),
    [((3, 32), (64, 3)), ((3, 32), (32, 4)), ((0, 32), (32, 0)), ((32,), (32,)), ((), ())],
)
def test_matrices_that_do_not_multiply_to_the_weight_are_refused(
    down: Any, up: Any, tiny_pipeline: Any, tmp_path: Path
) -> None:
    made = {"unet.time_embedding.linear_1": (torch.zeros(down), torch.zeros(up))}
    assert "other shapes" in refusal(
        tiny_pipeline, model=written(as_peft(made, 1.0), tmp_path / "a.safetensors")
    )


@pytest.mark.parametrize("role", ["lora_down.weight", "lora_up.weight", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(
    role: str, value: float, tiny_pipeline: Any, tmp_path: Path
) -> None:
    tensors = as_kohya(matrices(tiny_pipeline), 1.0)
    tensors[f"lora_unet_conv_in.{role}"].view(-1)[0] = value
    file = written(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"unet\.conv_in holds NaN or Inf"):
        stages.apply(tiny_pipeline, recipe({"model": file}))


def test_files_that_are_missing_pickled_damaged_or_empty_are_refused(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.safetensors"
    assert f"there is no LoRA at {missing}" in refusal(tiny_pipeline, model=str(missing))
    assert "there is no LoRA at style.pt" in refusal(tiny_pipeline, model="style.pt")
    for ending in (".bin", ".ckpt", ".pt"):
        pickled = tmp_path / f"lora{ending}"
        torch.save({}, pickled)
        assert "a pickle" in refusal(tiny_pipeline, model=str(pickled))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "lora.pt").read_bytes())
    assert "is no safetensors file" in refusal(tiny_pipeline, model=str(damaged))
    empty = written({}, tmp_path / "empty.safetensors")
    assert "holds no LoRA" in refusal(tiny_pipeline, model=empty)


@pytest.mark.parametrize("header", ["{", "[]", json.dumps({"unet.use_dora": True})])
def test_a_header_that_says_more_than_alpha_is_refused(
    header: str, tiny_pipeline: Any, tmp_path: Path
) -> None:
    tensors = as_peft(matrices(tiny_pipeline, LAYERS[:1]), 1.0)
    file = written(tensors, tmp_path / "a.safetensors", {adapters.METADATA: header})
    message = refusal(tiny_pipeline, model=file)
    assert "unet.use_dora" in message or "is no JSON" in message


def test_of_a_folder_with_several_files_one_has_to_be_named(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    assert "no .safetensors file" in refusal(tiny_pipeline, model=str(folder))
    tensors = as_kohya(matrices(tiny_pipeline, LAYERS[:1]), 1.0)
    written(tensors, folder / "a.safetensors")
    fused(tiny_pipeline, {"model": str(folder)})
    written(tensors, folder / "b.safetensors")
    assert "weight_name; it has: a.safetensors, b.safetensors" in refusal(
        tiny_pipeline, model=str(folder)
    )
    fused(tiny_pipeline, {"model": str(folder), "weight_name": "b.safetensors"})
    for wrong in ("c.safetensors", "../loras/a.safetensors"):
        assert "has no LoRA file" in refusal(tiny_pipeline, model=str(folder), weight_name=wrong)


def test_a_hub_id_without_network_says_what_to_do(
    tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(tiny_pipeline, model="someone/no-such-lora")
    assert "someone/no-such-lora is no folder here" in message
    assert "download its .safetensors file" in message


def test_of_a_hub_repository_the_named_file_alone_is_asked_for(
    tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written(as_kohya(matrices(tiny_pipeline, LAYERS[:1]), 1.0), tmp_path / "b.safetensors")
    asked = []

    def fetch(model: str, revision: Any, choose: Any, cached: Any, ways_out: str) -> Any:
        asked.append((model, revision, choose(["a.safetensors", "b.safetensors"])))
        return tmp_path, "commit"

    monkeypatch.setattr(adapters, "fetch", fetch)
    lora = {"model": "owner/name", "revision": "v1", "weight_name": "b.safetensors"}
    stages.check(tiny_pipeline, recipe(lora))
    assert asked == [("owner/name", "v1", ["b.safetensors"])]


def test_nothing_runs_where_a_later_file_is_refused(tiny_pipeline: Any, tmp_path: Path) -> None:
    file = written(as_kohya(matrices(tiny_pipeline), 1.0), tmp_path / "lora.safetensors")
    ran: list[str] = []
    with pytest.raises(UserError, match="there is no LoRA"):
        stages.apply(
            tiny_pipeline,
            recipe({"model": file}, {"model": str(tmp_path / "none.safetensors")}),
            progress=ran.append,
        )
    assert ran == []


def test_the_recipe_with_lcm_lora_runs_on_a_folder_and_a_file(tmp_path: Path) -> None:
    """Where nobody has the hub: the same stages, the sampler's known steps, and no guidance."""
    pipeline = with_modules(
        make_tiny_pipeline(),
        {  # as Stable Diffusion 1.5 has it
            "scheduler": PNDMScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                skip_prk_steps=True,
                steps_offset=1,
            )
        },
    )
    stages.save(pipeline, [], tmp_path / "sd15")
    made = matrices(pipeline, [name for name in LAYERS if name.startswith("unet")])
    changes = {
        "source.model": str(tmp_path / "sd15"),
        "stages.adapters.loras.0.model": written(as_kohya(made, 1.0), tmp_path / "l.safetensors"),
        "resolution": 64,
    }
    asked = schema.load("sd15_lcm_int8", changes)
    assert not asked.guided
    opened = open_source(asked.source.model).pipeline
    scheduler = choose_scheduler(opened.scheduler, asked.schedule.scheduler)
    assert with_steps(scheduler, asked.schedule.steps).timesteps.tolist() == [999, 759, 499, 259]
    applied = stages.apply(opened, asked)
    assert [record["stage"] for record in applied.records] == ["adapters", "quantize"]
    result = dequantized(applied.pipeline.unet)
    for name, pair in made.items():
        path = name.removeprefix("unet.")
        exact = pipeline.unet.get_submodule(path).weight + delta(*pair) / 3  # alpha 1, rank 3
        step = exact.flatten(1).abs().amax(1) / 127
        error = (result.get_submodule(path).weight - exact).flatten(1).abs().amax(1)
        assert (error <= 0.501 * step).all(), name
