"""A tiny decoder takes the place of the pipeline's own: opened and checked, or distilled."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file, save_file

from converters import components
from mobile_runtime.errors import UserError
from recipes import decoder, drawn, schema, stages
from recipes.faults import RecipeError
from recipes.schema import Recipe
from recipes.sources import open_source
from recipes.trainer import Batch, Job
from tests.conftest import make_tiny_pipeline
from tests.converters.small import make_small_pipeline


def recipe(prompts: Path | None = None, **settings: Any) -> Recipe:
    if prompts is not None:
        settings["prompts"] = str(prompts)
    data = {"name": "x", "source": {"model": "embedded"}, "resolution": 16}
    schedule = {"steps": 2, "guidance_scale": 0.0}
    return schema.parse({**data, "schedule": schedule, "stages": [{"decoder": settings}]})


TRAINED = {
    "iterations": 30,
    "channels": 8,
    "blocks": 1,
    "pictures": 8,
    "held_out": 4,
    "batch": 4,
    "learning_rate": 4e-3,
    "watch_every": 30,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red star\na green tent\n")
    return path


def make_tiny(**settings: Any) -> Any:
    """An AutoencoderTiny that fits the small pipeline: two sizes, 4 latent channels."""
    torch.manual_seed(1)
    sizes = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    tiny: Any = AutoencoderTiny(**{**sizes, **settings})
    return tiny.eval().requires_grad_(False)


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    make_tiny().save_pretrained(tmp_path / "taesd")
    return tmp_path / "taesd"


def refused(pipeline: Any, asked: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        stages.check(pipeline, asked)
    return str(caught.value)


class TestOpen:
    def test_the_pipeline_decodes_with_it_from_then_on(self, opened: Path, tmp_path: Path) -> None:
        pipeline = make_small_pipeline()
        applied = stages.apply(
            pipeline, recipe(model=str(opened), held_out=0), cache=tmp_path / "cache"
        )
        latents = torch.randn(1, 4, 8, 8)
        assert torch.equal(
            applied.pipeline.vae.decode(latents).sample, make_tiny().decode(latents).sample
        )
        assert isinstance(pipeline.vae, AutoencoderKL)
        assert applied.records[0]["held_out_psnr_db"] is None
        before, after = (applied.records[0][key]["vae_decoder"] for key in ("before", "after"))
        assert after["macs"] < before["macs"]
        assert after["parameters"] == sum(p.numel() for p in make_tiny().decoder.parameters())

    def test_its_psnr_is_measured_on_pictures_of_the_same_latents(
        self, opened: Path, prompts: Path, tmp_path: Path
    ) -> None:
        pipeline = make_small_pipeline()
        asked = recipe(prompts, model=str(opened), held_out=4)
        applied = stages.apply(pipeline, asked, cache=tmp_path / "cache")
        said = applied.records[0]["held_out_psnr_db"]
        assert 3 < said < 40
        again = stages.apply(pipeline, asked, cache=tmp_path / "other")
        assert again.records[0]["held_out_psnr_db"] == said

    def test_without_a_training_nothing_of_it_is_needed(
        self, opened: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
        asked = recipe(prompts, model=str(opened), held_out=0)
        applied = stages.apply(make_small_pipeline(), asked, cache=tmp_path)
        assert type(applied.pipeline.vae) is AutoencoderTiny

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"latent_channels": 16}, "16 latent channels, and this pipeline 4"),
            (
                {
                    "decoder_block_out_channels": (8, 8, 8),
                    "num_decoder_blocks": (1, 1, 1),
                },
                "4 pixels a latent, and this pipeline 2",
            ),
            ({"out_channels": 4}, "out_channels 4; only 3"),
            ({"decoder_block_out_channels": (8, 16)}, r"decoder_block_out_channels \[8, 16\]"),
        ],
    )
    def test_one_of_another_shape_is_refused(
        self, other: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        make_tiny(**other).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=said):
            stages.check(make_small_pipeline(), recipe(model=str(tmp_path / "other")))

    def test_what_is_no_tiny_autoencoder_is_told(self, tmp_path: Path, opened: Path) -> None:
        pipeline = make_small_pipeline()
        pipeline.vae.save_pretrained(tmp_path / "kl")
        assert "is a AutoencoderKL" in refused(pipeline, recipe(model=str(tmp_path / "kl")))
        assert "no config.json" in refused(pipeline, recipe(model=str(tmp_path)))
        assert "no folder and no hub id" in refused(pipeline, recipe(model="taesd"))
        weights = opened / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        weights.write_bytes(weights.read_bytes()[:-10])
        assert "cut short" in refused(pipeline, recipe(model=str(opened)))
        weights.unlink()
        assert "holds no" in refused(pipeline, recipe(model=str(opened)))
        del tensors["decoder.layers.0.weight"]
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(UserError, match=r"decoder\.layers\.0\.weight"):
            decoder.open_tiny(str(opened))

    def test_a_weight_that_is_not_finite_is_refused(self, opened: Path) -> None:
        weights = opened / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        tensors["decoder.layers.0.bias"][0] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(UserError, match="not finite"):
            decoder.open_tiny(str(opened))

    def test_without_the_hub_the_ways_out_are_told(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise ConnectionError

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        message = refused(make_small_pipeline(), recipe(model="madebyollin/taesd"))
        assert "madebyollin/taesd is no folder here and not in the local cache" in message
        assert "to distil one" in message

    def test_from_the_hub_a_check_needs_the_configuration_alone(
        self, opened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from types import SimpleNamespace

        asked_for: list[list[str]] = []

        def download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
            asked_for.append(allow_patterns)
            return str(opened)

        files = [SimpleNamespace(rfilename=path.name) for path in opened.iterdir()]
        answer = SimpleNamespace(sha="0" * 40, siblings=files)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answer)
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        assert decoder.open_tiny("owner/taesd", "main", weights=False).device.type == "meta"
        assert asked_for == [["config.json"]]
        assert decoder.open_tiny("owner/taesd").device.type == "cpu"


@pytest.fixture(scope="module")
def applied(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, stages.Applied]:
    """The small pipeline as it was given, and after the distillation of a decoder."""
    pipeline = make_small_pipeline()
    cache = tmp_path_factory.mktemp("cache")
    return pipeline, stages.apply(pipeline, recipe(prompts, **TRAINED), cache=cache)


class TestDistil:
    def test_it_learns_the_pipelines_own_decoder(
        self, applied: tuple[Any, stages.Applied], prompts: Path, tmp_path: Path
    ) -> None:
        _, after = applied
        begun = stages.apply(
            make_small_pipeline(),
            recipe(prompts, **{**TRAINED, "iterations": 1, "learning_rate": 1e-9}),
            cache=tmp_path,
        )
        untrained = begun.records[0]["held_out_psnr_db"]
        assert after.records[0]["held_out_psnr_db"] > untrained + 3
        assert after.records[0]["optimizer_steps"] == 30

    def test_the_pipeline_that_it_was_given_stays_as_it_was(
        self, applied: tuple[Any, stages.Applied]
    ) -> None:
        given, after = applied
        fresh = make_small_pipeline().vae.state_dict()
        assert all(torch.equal(fresh[key], own) for key, own in given.vae.state_dict().items())
        assert not any(p.requires_grad for p in after.pipeline.vae.parameters())
        assert after.pipeline.unet is given.unet

    def test_it_takes_latents_as_the_unet_makes_them(
        self, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The full decoder itself, fed with scaled latents, leaves the loss of 8 bits' rounding."""
        pipeline = make_small_pipeline()
        scaling_factor = pipeline.vae.config.scaling_factor
        assert scaling_factor != 1

        class Full(torch.nn.Module):
            def __init__(self, divisor: float) -> None:
                super().__init__()
                self.divisor = divisor

            def forward(self, latents: torch.Tensor) -> torch.Tensor:
                return pipeline.vae.decode(latents / self.divisor).sample.clamp(-1, 1)

        losses: list[float] = []

        def train(job: Job) -> Any:
            batch = Batch(0, 0, 0, 0, 4, torch.device("cpu"), job.module)
            losses.extend(float(job.loss(Full(divisor), batch)) for divisor in (scaling_factor, 1))
            return job.module

        monkeypatch.setattr(decoder, "train", train)
        applied = stages.apply(pipeline, recipe(prompts, **TRAINED), cache=tmp_path)
        assert losses[0] < 0.05
        assert losses[1] > 2 * losses[0]
        assert applied.pipeline.vae.config.scaling_factor == 1

    @pytest.mark.parametrize(
        ("named", "expected"),
        [("euler", "EulerDiscreteScheduler"), ("source", "DDIMScheduler")],
    )
    def test_it_learns_from_what_the_recipes_scheduler_draws(
        self,
        named: str,
        expected: str,
        prompts: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen: set[tuple[str, int, float]] = set()
        draw = drawn.draw

        def watched(pipeline: Any, *args: Any, **options: Any) -> Any:
            scheduler = type(pipeline.scheduler).__name__
            seen.add((scheduler, options["steps"], options["scale"]))
            return draw(pipeline, *args, **options)

        monkeypatch.setattr(drawn, "draw", watched)
        monkeypatch.setattr(decoder, "train", lambda job: job.module)
        asked = recipe(prompts, **TRAINED)
        schedule = asked.schedule.model_copy(update={"scheduler": named, "steps": 3})
        pipeline = make_small_pipeline()
        applied = stages.apply(
            pipeline, asked.model_copy(update={"schedule": schedule}), cache=tmp_path
        )
        assert seen == {(expected, 3, 0.0)}
        assert type(applied.pipeline.scheduler).__name__ == "DDIMScheduler"

    def test_a_saved_result_opens_again_with_the_same_checks(
        self, applied: tuple[Any, stages.Applied], tmp_path: Path
    ) -> None:
        _, after = applied
        stages.save(after.pipeline, after.plans, tmp_path / "saved")
        latents = torch.randn(1, 4, 8, 8)
        expected = after.pipeline.vae.decode(latents).sample
        theirs = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
        ours = open_source(str(tmp_path / "saved")).pipeline
        pipeline: Any
        for pipeline in (theirs, ours):
            assert type(pipeline.vae).__name__ == "AutoencoderTiny"
            with torch.no_grad():
                assert torch.equal(pipeline.vae.decode(latents).sample, expected)
        empty = open_source(str(tmp_path / "saved"), weights=False).pipeline.vae
        assert empty.device.type == "meta"
        config = tmp_path / "saved/vae/config.json"
        changed = {**json.loads(config.read_text()), "upsampling_scaling_factor": 3}
        config.write_text(json.dumps(changed))
        with pytest.raises(UserError, match="upsampling_scaling_factor 3; only 2"):
            open_source(str(tmp_path / "saved"), weights=False)

    def test_a_check_tells_the_shapes_that_a_run_leaves(
        self, applied: tuple[Any, stages.Applied], prompts: Path
    ) -> None:
        planned = stages.check(make_small_pipeline(), recipe(prompts, **TRAINED)).vae
        made = applied[1].pipeline.vae.state_dict()
        assert {k: v.shape for k, v in planned.state_dict().items()} == {
            k: v.shape for k, v in made.items()
        }

    def test_the_component_is_its_decoder_and_gives_the_pipelines_picture(
        self, applied: tuple[Any, stages.Applied]
    ) -> None:
        pipeline = applied[1].pipeline
        component = components.build(pipeline, "vae_decoder", height=16, width=16, batch=1)
        (latents,) = component.example_inputs().values()
        assert torch.equal(component.module(latents), pipeline.vae.decode(latents).sample)
        assert next(name for name, _ in component.module.named_parameters()).startswith(
            "vae_decoder.decoder.layers"
        )

    def test_features_of_the_encoder_and_less_memory_train_too(
        self, prompts: Path, tmp_path: Path
    ) -> None:
        more = {"iterations": 2, "feature_weight": 1.0, "gradient_checkpointing": True}
        asked = recipe(prompts, **{**TRAINED, **more})
        applied = stages.apply(make_small_pipeline(), asked, cache=tmp_path)
        assert applied.records[0]["optimizer_steps"] == 2

    def test_an_opened_one_learns_on(self, opened: Path, prompts: Path, tmp_path: Path) -> None:
        settings = {key: v for key, v in TRAINED.items() if key not in ("channels", "blocks")}
        asked = recipe(prompts, **settings, model=str(opened))
        applied = stages.apply(make_small_pipeline(), asked, cache=tmp_path)
        before = stages.apply(
            make_small_pipeline(),
            recipe(prompts, model=str(opened), held_out=4),
            cache=tmp_path,
        )
        assert applied.records[0]["held_out_psnr_db"] > before.records[0]["held_out_psnr_db"] + 1


class TestLosses:
    def test_a_small_shape_counts_as_much_as_a_large_one(self) -> None:
        pictures = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)  # the third is plain
        pictures[0, 4:8, 4:8] = 255
        pictures[1, 4:20, 4:20] = 255
        assert decoder.picture_weights(pictures, 0.0).tolist() == [1, 1, 1]
        small, large, plain = decoder.picture_weights(pictures, 1.0).tolist()
        assert small == pytest.approx(4 * large)  # its edges are a quarter as long
        assert small < plain < 20 * small
        assert small + large + plain == pytest.approx(3)

    def test_pictures_of_no_detail_count_alike(self) -> None:
        plain = torch.full((4, 8, 8, 3), 7, dtype=torch.uint8)
        assert decoder.picture_weights(plain, 1.0).tolist() == pytest.approx([1] * 4)

    def test_a_balanced_loss_trains_another_decoder(self, prompts: Path, tmp_path: Path) -> None:
        results = [
            stages.apply(
                make_small_pipeline(),
                recipe(prompts, **TRAINED, detail_balance=balance),
                cache=tmp_path,
            )
            for balance in (0.0, 1.0)
        ]
        plain, balanced = (applied.pipeline.vae.decoder.state_dict() for applied in results)
        assert any(not torch.equal(plain[name], balanced[name]) for name in plain)

    @pytest.mark.parametrize("loss", ["picture", "feature"])
    def test_it_is_zero_for_the_same_picture_and_grows_with_the_difference(self, loss: str) -> None:
        encoder = make_tiny_pipeline().vae.encoder
        torch.manual_seed(0)
        wanted, other = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 3, 16, 16)
        with torch.no_grad():
            figures = [
                float(
                    decoder.picture_losses(wanted + share * other, wanted)
                    if loss == "picture"
                    else decoder.feature_loss(encoder, wanted + share * other, wanted)
                )
                for share in (0.0, 0.1, 0.3)
            ]
        assert figures[0] == 0
        assert 0 < figures[1] < figures[2]

    def test_of_two_pictures_as_far_away_the_blurred_one_costs_more(self) -> None:
        wanted = torch.zeros(1, 3, 16, 16)
        wanted[..., 8:] = 1.0
        shifted = wanted + 0.1
        blurred = torch.nn.functional.avg_pool2d(
            torch.nn.functional.pad(wanted, (2, 2, 2, 2), mode="replicate"), 5, 1
        )
        scale = (0.01 / (blurred - wanted).square().mean()).sqrt()
        blurred = wanted + scale * (blurred - wanted)
        assert (blurred - wanted).square().mean() == pytest.approx(0.01)
        gradients = [
            float((made.diff(dim=-1) - wanted.diff(dim=-1)).abs().mean())
            for made in (shifted, blurred)
        ]
        assert gradients[0] == pytest.approx(0, abs=1e-6)
        assert gradients[1] > 0.01

    def test_noise_is_no_more_than_asked_and_the_same_again(self) -> None:
        latents = torch.randn(64, 4, 8, 8) * 2
        noise = decoder.noised(latents, 0.1, seed=3) - latents
        levels = noise.std(dim=(1, 2, 3)) / latents.std()
        assert levels.max() < 0.115
        assert levels.min() < 0.02
        assert torch.equal(decoder.noised(latents, 0.1, seed=3) - latents, noise)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({}, "iterations: one that begins anew has to be trained"),
            ({"iterations": 1, "revision": "main"}, "revision: goes with a model"),
            ({"model": "a/b", "channels": 8}, "channels: a/b brings its own"),
            ({"iterations": 1, "channels": 2}, "channels"),
            ({"iterations": 1, "warmup": 2}, "warmup"),
        ],
    )
    def test_settings_that_do_not_fit_together(self, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(RecipeError, match=said):
            recipe(**settings)

    def test_a_recipe_says_itself_again_with_its_defaults(self) -> None:
        asked = recipe(iterations=3)
        assert schema.parse(asked.resolved()) == asked

    def test_an_empty_prompt_file(self, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("# nothing\n")
        asked = recipe(tmp_path / "empty.txt", iterations=1)
        assert "holds no prompt" in refused(make_small_pipeline(), asked)

    def test_a_vae_encoder_beside_it(self) -> None:
        asked = recipe(iterations=1)
        asked = asked.model_copy(update={"components": (*asked.components, "vae_encoder")})
        assert "leave vae_encoder out" in refused(make_small_pipeline(), asked)

    def test_a_distillation_after_it(self) -> None:
        distill = {"method": "progressive", "steps": 2, "iterations": 1, "warmup": 0}
        data = recipe(iterations=1).resolved()
        asked = schema.parse({**data, "stages": [*data["stages"], {"distill": distill}]})
        assert "list it after distill" in refused(make_small_pipeline(), asked)

    def test_features_of_an_encoder_that_has_none(self) -> None:
        pipeline = make_small_pipeline()
        pipeline.vae = make_tiny()
        asked = recipe(iterations=1, feature_weight=0.5)
        assert "feature_weight" in refused(pipeline, asked)


def test_a_missing_prompt_file_is_told_where_only_the_measurement_needs_it(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path / "tiny")
    opened = {"model": str(tmp_path / "tiny"), "iterations": 0}
    asked = recipe(tmp_path / "nothing.txt", **opened)
    with pytest.raises(UserError, match="there is no prompt file"):
        stages.check(make_small_pipeline(), asked)
    stages.check(make_small_pipeline(), recipe(tmp_path / "nothing.txt", **opened, held_out=0))
