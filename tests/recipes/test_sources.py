"""Sources open from safetensors alone, and what cannot be opened is told in one sentence."""

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from mobile_runtime.errors import UserError
from recipes.sources import architectures, check_resolution, open_source, single_file
from recipes.sources.architectures import ARCHITECTURES
from tests.recipes.original_format import save_original

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Any) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(model: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(model), *args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestFolder:
    def test_it_opens_as_the_pipeline_that_was_saved(
        self, original: Path, tiny_pipeline: Any
    ) -> None:
        source = open_source(str(original))
        for name in ("unet", "vae", "text_encoder"):
            loaded, saved = getattr(source.pipeline, name), getattr(tiny_pipeline, name)
            assert not loaded.training
            for key, tensor in saved.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], tensor)
        assert source.pipeline.safety_checker is None
        assert source.info["kind"] == "folder"
        assert set(source.info["weights_sha256"]) == {
            "text_encoder/model.safetensors",
            UNET_FILE,
            "vae/diffusion_pytorch_model.safetensors",
        }

    def test_half_precision_files_open_in_float32(self, folder: Path) -> None:
        path = folder / UNET_FILE
        half = {key: tensor.half() for key, tensor in load_file(path).items()}
        path.unlink()
        save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
        unet = open_source(str(folder)).pipeline.unet
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
        assert torch.equal(unet.conv_in.weight, half["conv_in.weight"].float())

    def test_sharded_weights_open(self, folder: Path, tiny_pipeline: Any) -> None:
        shutil.rmtree(folder / "unet")
        tiny_pipeline.unet.save_pretrained(folder / "unet", max_shard_size="3MB")
        assert len(list((folder / "unet").glob("*.safetensors"))) > 1
        unet = open_source(str(folder)).pipeline.unet
        assert torch.equal(unet.conv_out.weight, tiny_pipeline.unet.conv_out.weight)
        next((folder / "unet").glob("*-00002-*")).unlink()
        assert "unet lacks" in refused(folder)

    def test_without_weights_it_has_shapes_alone(self, original: Path, tiny_pipeline: Any) -> None:
        pipeline = open_source(str(original), weights=False).pipeline
        assert pipeline.unet.conv_in.weight.is_meta
        for name in ("unet", "vae", "text_encoder"):
            shapes = {k: v.shape for k, v in getattr(tiny_pipeline, name).named_parameters()}
            assert {k: v.shape for k, v in getattr(pipeline, name).named_parameters()} == shapes

    @pytest.mark.parametrize("weights", [True, False])
    def test_a_truncated_file_is_named(self, folder: Path, weights: bool) -> None:
        path = folder / UNET_FILE
        path.write_bytes(path.read_bytes()[:-100])
        message = refused(folder, weights=weights)
        assert str(path) in message
        assert "cut short" in message

    def test_an_empty_or_foreign_file_is_named(self, folder: Path) -> None:
        for content in (b"", b"<html>not found</html>"):
            (folder / UNET_FILE).write_bytes(content)
            assert "damaged" in refused(folder)

    @pytest.mark.parametrize("weights", [True, False])
    def test_pickled_weights_are_refused_with_the_way_to_convert(
        self, folder: Path, weights: bool
    ) -> None:
        (folder / UNET_FILE).rename(folder / "unet/diffusion_pytorch_model.bin")
        message = refused(folder, weights=weights)
        assert "pickled" in message
        assert "save_pretrained" in message

    def test_missing_tensors_are_told_and_not_made_up(self, folder: Path) -> None:
        tensors = load_file(folder / UNET_FILE)
        del tensors["conv_out.weight"]
        save_file(tensors, folder / UNET_FILE, {"format": "pt"})
        assert "conv_out.weight" in refused(folder)

    def test_tensors_of_another_shape_are_told(self, folder: Path) -> None:
        tensors = load_file(folder / UNET_FILE)
        tensors["conv_out.weight"] = torch.zeros(4, 16, 3, 3)
        save_file(tensors, folder / UNET_FILE, {"format": "pt"})
        assert "unet cannot be loaded" in refused(folder)

    @pytest.mark.parametrize(
        "missing",
        [
            "model_index.json",
            "unet/config.json",
            "tokenizer/vocab.json",
            "scheduler/scheduler_config.json",
            "vae",
        ],
    )
    def test_a_missing_part_is_named(self, folder: Path, missing: str) -> None:
        path = folder / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert missing.split("/")[-1] in refused(folder)

    def test_another_pipeline_is_refused_by_its_name(self, folder: Path) -> None:
        edit_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
        message = refused(folder)
        assert "StableDiffusionXLPipeline" in message
        assert "Stable Diffusion 1.x" in message

    def test_another_class_of_component_is_refused(self, folder: Path) -> None:
        edit_json(folder / "model_index.json", unet=["my_code", "MyUNet"])
        assert "unet is MyUNet" in refused(folder)
        edit_json(folder / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
        edit_json(folder / "model_index.json", scheduler=["os", "system"])
        assert "no scheduler 'system'" in refused(folder)

    def test_an_inpainting_unet_is_refused(self, folder: Path) -> None:
        edit_json(folder / "unet/config.json", in_channels=9)
        assert "inpainting" in refused(folder)

    def test_a_config_that_is_no_json_is_named(self, folder: Path) -> None:
        (folder / "vae/config.json").write_text("{")
        assert "config.json is not valid JSON" in refused(folder)

    def test_a_config_that_is_nested_without_end_is_named(self, folder: Path) -> None:
        (folder / "vae/config.json").write_text("[" * 100_000)
        assert "config.json is not valid JSON" in refused(folder)

    def test_a_config_without_its_channels_is_told(self, folder: Path) -> None:
        path = folder / "unet/config.json"
        config = json.loads(path.read_text())
        del config["out_channels"]
        path.write_text(json.dumps(config))
        assert "in_channels and out_channels" in refused(folder, weights=False)

    @pytest.mark.parametrize(
        ("component", "key", "value"),
        [
            ("unet", "attention_head_dim", 0),
            ("unet", "attention_head_dim", [2, 2, 4, 0]),
            ("unet", "norm_num_groups", "8"),
            ("text_encoder", "num_attention_heads", 0),
            ("vae", "scaling_factor", None),
            ("vae", "scaling_factor", 0),
        ],
    )
    @pytest.mark.parametrize("weights", [True, False])
    def test_a_size_that_cannot_be_is_told_by_its_key(
        self, folder: Path, component: str, key: str, value: Any, weights: bool
    ) -> None:
        edit_json(folder / component / "config.json", **{key: value})
        assert f"{component}/config.json has {key} {value!r}" in refused(folder, weights=weights)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_weight_that_is_not_finite_is_named(self, folder: Path, value: float) -> None:
        tensors = load_file(folder / UNET_FILE)
        tensors["conv_out.weight"][0, 0, 0, 0] = value
        save_file(tensors, folder / UNET_FILE, {"format": "pt"})
        message = refused(folder)
        assert message.startswith("the source's weights are not finite: unet.conv_out.weight")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((65, 64), "height of 65 pixels is no multiple of 8, which this pipeline's VAE needs"),
        ((64, 100), "the nearest is 96 or 104"),
        ((4, 64), "the nearest is 8"),
    ],
)
def test_a_resolution_that_the_vae_cannot_reduce_names_the_nearest(
    tiny_pipeline: Any, size: tuple[int, int], said: str
) -> None:
    check_resolution(tiny_pipeline, 8, 200)
    with pytest.raises(UserError, match=said):
        check_resolution(tiny_pipeline, *size)


def test_both_sides_of_a_wrong_resolution_are_told(tiny_pipeline: Any) -> None:
    with pytest.raises(UserError, match=r"height of 65 .* width of 70"):
        check_resolution(tiny_pipeline, 65, 70)


@pytest.mark.parametrize(
    ("config", "multiple"),
    [
        ({}, 8),
        ({"downsample_padding": 0}, 16),
        ({"up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D")}, 16),
    ],
)
def test_a_unet_that_cannot_double_to_an_odd_size_needs_latents_that_halve_evenly(
    tiny_pipeline: Any, config: dict[str, Any], multiple: int
) -> None:
    plain = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**plain | config)
    pipeline = SimpleNamespace(unet=unet, vae=tiny_pipeline.vae)
    check_resolution(pipeline, 2 * multiple, multiple)
    with pytest.raises(UserError, match=f"no multiple of {multiple}, .* the nearest is {multiple}"):
        check_resolution(pipeline, multiple + multiple // 2, multiple)


class TestNames:
    def test_an_address_is_told_to_be_dropped(self) -> None:
        message = refused("https://huggingface.co/stabilityai/sd-turbo")
        assert "drop the address and give OWNER/NAME alone" in message

    @pytest.mark.parametrize("model", ["nothing", "./nothing", "a/b/c", "/nothing/here"])
    def test_what_is_no_source_lists_what_is_one(self, model: str) -> None:
        assert "random:ARCH (sd_turbo, sd21, sd15)" in refused(model)

    def test_an_unknown_architecture_lists_the_known_ones(self) -> None:
        assert "sd15, sd21, sd_turbo" in refused("random:sdxl")

    @pytest.mark.parametrize("model", ["embedded", "random:sd15", "./folder"])
    def test_a_revision_goes_with_a_hub_id_alone(self, model: str) -> None:
        assert "--revision" in refused(model, "main")


class TestHub:
    """No test here reaches the network: the connection is refused, or the answer is made up."""

    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def test_without_network_and_cache_it_names_the_id_and_the_ways_out(self) -> None:
        start = time.monotonic()
        message = refused("stabilityai/sd-turbo", "abc")
        assert time.monotonic() - start < 30
        for words in (
            "stabilityai/sd-turbo@abc",
            "hf auth login",
            "--model embedded",
            "--model random:",
            ".safetensors",
        ):
            assert words in message

    @pytest.mark.parametrize(
        ("code", "header", "said"),
        [
            (401, "RepoNotFound", "no model owner/name, or it is private"),
            (404, "RevisionNotFound", "no revision 'abc'"),
            (403, "GatedRepo", "is gated"),
            (503, "", "HTTP 503"),
        ],
    )
    def test_private_gated_and_unknown_are_told_apart(
        self, monkeypatch: pytest.MonkeyPatch, code: int, header: str, said: str
    ) -> None:
        import requests

        def answer(_: Any, request: Any, **__: Any) -> Any:
            response = requests.Response()
            response.status_code, response.request, response.url = code, request, request.url
            response.headers["X-Error-Code"] = header
            response._content = b"{}"
            return response

        monkeypatch.setattr(requests.Session, "send", answer)
        assert said in refused("owner/name", "abc")

    def test_a_name_that_the_hub_cannot_have_is_told(self) -> None:
        assert "no hub id" in refused("owner/na--me")

    def test_a_cached_snapshot_opens_without_network(self, original: Path, tmp_path: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "cache" / "models--owner--tiny"
        shutil.copytree(original, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        info = open_source("owner/tiny").info
        assert (info["kind"], info["id"], info["revision"]) == ("hub", "owner/tiny", commit)

    def test_without_weights_the_configurations_are_enough(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fnmatch import fnmatch
        from types import SimpleNamespace

        files = [p.relative_to(original).as_posix() for p in original.rglob("*") if p.is_file()]
        answer = SimpleNamespace(
            sha="0" * 40, siblings=[SimpleNamespace(rfilename=file) for file in files]
        )

        def download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
            for file in files:
                if any(fnmatch(file, pattern) for pattern in allow_patterns):
                    (tmp_path / file).parent.mkdir(exist_ok=True)
                    shutil.copy(original / file, tmp_path / file)
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answer)
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        assert open_source("owner/tiny", weights=False).pipeline.unet.conv_in.weight.is_meta
        assert not list(tmp_path.rglob("*.safetensors"))
        assert not open_source("owner/tiny").pipeline.unet.conv_in.weight.is_meta

    def test_a_repository_of_pickles_is_refused_before_the_download(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from types import SimpleNamespace

        names = ["unet/diffusion_pytorch_model.bin", "text_encoder/model.safetensors"]
        answer = SimpleNamespace(
            sha="0" * 40, siblings=[SimpleNamespace(rfilename=name) for name in names]
        )
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answer)
        assert "unet has only pickled weights" in refused("owner/name")


class TestRandom:
    @pytest.mark.parametrize(
        ("name", "unet", "text"),
        [
            ("sd_turbo", 865_910_724, 340_387_840),
            ("sd21", 865_910_724, 340_387_840),
            ("sd15", 859_520_964, 123_060_480),
        ],
    )
    def test_the_architectures_have_the_published_sizes(
        self, name: str, unet: int, text: int
    ) -> None:
        def count(module: Any) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        modules = architectures.empty_modules(ARCHITECTURES[name])
        assert (count(modules[0]), count(modules[2])) == (unet, text)
        assert count(modules[1].decoder) == 49_490_179

    def test_the_vocabulary_gives_clips_own_token_ids(self, tmp_path: Path) -> None:
        from transformers import CLIPTokenizer

        for name, pad in (("sd_turbo", 0), ("sd15", 49407)):
            architectures.write_clip_tokenizer(tmp_path / name, ARCHITECTURES[name].pad_token)
            tokenizer = CLIPTokenizer.from_pretrained(tmp_path / name)
            ids = tokenizer("a photo of an astronaut riding a horse on mars").input_ids
            assert ids == [
                49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407
            ]  # fmt: skip
            assert len(tokenizer) == 49408
            assert tokenizer.pad_token_id == pad

    def narrow(self) -> Any:
        architecture = ARCHITECTURES["sd_turbo"]
        return replace(
            architecture,
            unet={
                **architecture.unet,
                "block_out_channels": (32, 64, 64, 64),
                "attention_head_dim": (2, 4, 4, 4),
                "cross_attention_dim": 64,
            },
            vae={**architecture.vae, "block_out_channels": (32, 32, 64, 64)},
            text_encoder={
                **architecture.text_encoder,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "vocab_size": 100,
            },
        )

    def test_random_weights_give_outputs_of_useful_scale_even_in_half_precision(self) -> None:
        unet, vae, text_encoder = architectures.random_modules(self.narrow())
        generator = torch.Generator().manual_seed(0)
        x, ids = torch.randn(1, 4, 8, 8, generator=generator), torch.arange(154).view(2, 77) % 100
        peaks: list[float] = []
        for module in (*unet.modules(), *vae.modules(), *text_encoder.modules()):
            module.register_forward_hook(
                lambda _, __, out: (
                    peaks.append(float(out.abs().max())) if isinstance(out, torch.Tensor) else None
                )
            )
        with torch.no_grad():
            text = text_encoder(ids).last_hidden_state
            out = [unet(x, torch.tensor([999.0]), one[None]).sample for one in text]
            picture = vae.decode(x).sample
        for tensor in (text, out[0], picture):
            assert 0.1 < float(tensor.std()) < 10
        assert float((out[0] - out[1]).std()) > 0.05  # the prompt counts
        assert max(peaks) < 1000  # far below float16's 65504

    def test_the_same_seed_gives_the_same_weights_and_no_two_layers_are_alike(self) -> None:
        first, again = (architectures.random_modules(self.narrow())[0] for _ in range(2))
        other = architectures.random_modules(self.narrow(), seed=9)[0]
        for own, same in zip(first.parameters(), again.parameters(), strict=True):
            assert torch.equal(own, same)
        assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
        resnets = first.mid_block.resnets
        assert not torch.equal(resnets[0].conv1.weight, resnets[1].conv1.weight)

    def test_it_opens_as_a_pipeline_with_sizes_alone(self) -> None:
        source = open_source("random:sd_turbo", weights=False)
        assert source.pipeline.unet.conv_in.weight.is_meta
        assert source.info == {"kind": "random", "id": "random:sd_turbo", "seed": 0}
        with pytest.raises(UserError, match="no multiple of 8"):
            check_resolution(source.pipeline, 500, 512)


class TestSingleFile:
    def tiny(self, pipeline: Any) -> architectures.Architecture:
        text = pipeline.text_encoder.config
        return architectures.Architecture(
            unet=dict(pipeline.unet.config),
            vae=dict(pipeline.vae.config),
            text_encoder={
                key: getattr(text, key)
                for key in (*ARCHITECTURES["sd15"].text_encoder, "num_hidden_layers")
            },
            scheduler_class="DDIMScheduler",
            scheduler=ARCHITECTURES["sd15"].scheduler,
            pad_token=architectures.EOS,
        )

    def test_an_original_checkpoint_opens_offline_with_the_same_weights(
        self, tiny_pipeline: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "tiny.safetensors"
        save_original(tiny_pipeline, path)
        loaded = single_file.load_single_file(path, self.tiny(tiny_pipeline))
        for name in ("unet", "vae", "text_encoder"):
            own = getattr(loaded, name).state_dict()
            for key, tensor in getattr(tiny_pipeline, name).state_dict().items():
                assert torch.equal(own[key], tensor), key

    @pytest.mark.parametrize(
        "lacking",
        [
            "model.diffusion_model.out.2.weight",
            "first_stage_model.decoder.conv_out.bias",
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        ],
    )
    def test_a_tensor_that_the_file_lacks_is_told(
        self, tiny_pipeline: Any, tmp_path: Path, lacking: str
    ) -> None:
        path = tmp_path / "tiny.safetensors"
        save_original(tiny_pipeline, path)
        tensors = load_file(path)
        del tensors[lacking]
        save_file(tensors, path)
        with pytest.raises(UserError, match="lacks tensors"):
            single_file.load_single_file(path, self.tiny(tiny_pipeline))

    def checkpoint(self, path: Path, width: int, *more: str) -> Path:
        prefix = "model.diffusion_model.input_blocks."
        tensors = {
            f"{prefix}0.0.weight": torch.zeros(320, 4, 3, 3),
            f"{prefix}1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, width),
            **{name: torch.zeros(1) for name in more},
        }
        save_file(tensors, path)
        return path

    @pytest.mark.parametrize(
        ("name", "width", "architecture"),
        [
            ("v1-5-pruned-emaonly", 768, "sd15"),
            ("anything-v3", 768, "sd15"),
            ("sd_turbo", 1024, "sd_turbo"),
            ("v2-1_512-ema-pruned", 1024, "sd21"),
            ("v2-1_768-ema-pruned", 1024, "sd21_v"),
        ],
    )
    def test_the_architecture_is_told_from_the_tensors_and_the_name(
        self, tmp_path: Path, name: str, width: int, architecture: str
    ) -> None:
        path = self.checkpoint(tmp_path / f"{name}.safetensors", width)
        assert single_file.identify_checkpoint(path) == architecture

    def test_a_2x_checkpoint_that_does_not_say_which_is_not_guessed(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path / "mine.safetensors", 1024)
        assert "nothing in it says" in refused(path)

    def test_without_weights_it_has_the_shapes_of_its_architecture(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path / "v1-5.safetensors", 768)
        source = open_source(str(path), weights=False)
        assert source.info["architecture"] == "sd15"
        assert source.pipeline.unet.conv_in.weight.is_meta

    def test_a_tensor_of_too_few_dimensions_is_told(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path / "v1-5.safetensors", 768)
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("to_k.weight"))
        save_file({**tensors, name: torch.zeros(320)}, path)
        assert "no text-to-image checkpoint" in refused(path)

    def test_a_weight_that_is_not_finite_is_named(self, tiny_pipeline: Any, tmp_path: Path) -> None:
        path = tmp_path / "tiny.safetensors"
        save_original(tiny_pipeline, path)
        tensors = load_file(path)
        tensors["model.diffusion_model.out.2.bias"][0] = float("nan")
        save_file(tensors, path)
        with pytest.raises(UserError, match=r"not finite: unet\.conv_out\.bias"):
            single_file.load_single_file(path, self.tiny(tiny_pipeline))

    def test_other_networks_are_refused(self, tmp_path: Path) -> None:
        xl = self.checkpoint(tmp_path / "xl.safetensors", 2048, "conditioner.embedders.0.x")
        assert "no text-to-image checkpoint" in refused(xl)
        save_file({"lora": torch.zeros(1)}, tmp_path / "lora.safetensors")
        assert "no text-to-image checkpoint" in refused(tmp_path / "lora.safetensors")

    def test_a_checkpoint_without_its_other_parts_is_told(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path / "v1-5.safetensors", 768)
        assert "cannot be loaded" in refused(path)

    def test_pickles_and_damaged_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "v1-5.ckpt").write_bytes(b"\x80\x02")
        assert "may run code" in refused(tmp_path / "v1-5.ckpt")
        (tmp_path / "cut.safetensors").write_bytes(b"\x80\x02")
        assert "damaged" in refused(tmp_path / "cut.safetensors")


def test_importing_the_module_loads_no_heavy_library() -> None:
    code = (
        "import sys; import recipes.sources; "
        "assert not {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
