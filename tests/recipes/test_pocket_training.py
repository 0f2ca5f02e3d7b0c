"""Training: a killed run ends where an uninterrupted one does, and mistakes are told."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from mobile_runtime.errors import UserError
from recipes.pocket import train as train_module
from recipes.pocket.captions import parse_caption
from recipes.pocket.train import fresh_parts, main, train
from recipes.pocket.train_text import _CHOICES, UNSAID, labels, train_text
from recipes.pocket.train_unet import PHASES as UNET_PHASES
from recipes.pocket.train_unet import encode_drawings, train_unet, training_scenes
from recipes.pocket.train_vae import PHASES as VAE_PHASES
from recipes.pocket.train_vae import drawings, normalize_latents, psnr_db, train_vae
from recipes.pocket.training import step_generator, to_pictures, to_tensor


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return fresh_parts(tmp_path_factory.mktemp("parts"), seed=0)


def run_stage(name, parts, folder, stop_after=None):
    """Two steps of a stage on a copy of the parts; returns the trained weights."""
    parts = copy.deepcopy(parts)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    if name.startswith("vae"):
        phase = next(phase for phase in VAE_PHASES if phase.name == name)
        return train_vae(parts.vae, phase, folder, 0, 2, stop_after).state_dict()
    if name == "text":
        args = (parts.text_encoder, parts.tokenizer, folder, 0, 2, stop_after)
        return train_text(*args).state_dict()
    phase = next(phase for phase in UNET_PHASES if phase.name == name)
    sizes = {"drawings": 24, "extra_pairs": 2, "watch_every": 1000}
    train_unet(parts, phase, folder, 0, 2, stop_after, **sizes)
    return parts.unet.state_dict()


@pytest.fixture
def no_watching(monkeypatch):
    monkeypatch.setattr("recipes.pocket.train_unet.watch_line", lambda *_: "")
    monkeypatch.setattr("recipes.pocket.train_vae.psnr_db", lambda *_: 0.0)


@pytest.mark.usefixtures("no_watching")
@pytest.mark.parametrize("name", ["vae", "vae_fine", "text", "unet", "unet_fine"])
def test_an_interrupted_run_resumes_to_the_same_weights(name, parts, tmp_path):
    whole = run_stage(name, parts, tmp_path / "whole")
    run_stage(name, parts, tmp_path / "broken", stop_after=1)
    resumed = run_stage(name, parts, tmp_path / "broken")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    modules = {"vae": parts.vae, "text": parts.text_encoder, "unet": parts.unet}
    untrained = modules[name.removesuffix("_fine")]
    assert any(not torch.equal(whole[k], v) for k, v in untrained.state_dict().items())


def test_normalizing_latents_leaves_pictures_alone_and_whitens(parts):
    vae = copy.deepcopy(parts.vae)
    pictures = drawings(np.random.default_rng(0), 32)
    before = psnr_db(vae, pictures)
    normalize_latents(vae, seed=0, count=64)
    assert psnr_db(vae, pictures) == pytest.approx(before, abs=1e-3)
    with torch.no_grad():
        mean = vae.encode(to_tensor(drawings(np.random.default_rng([0, 97]), 64))).latent_dist.mean
    flat = (mean * vae.config.scaling_factor).permute(1, 0, 2, 3).flatten(1)
    assert flat.mean(1).abs().max() < 1e-3
    assert (torch.cov(flat) - torch.eye(4)).abs().max() < 1e-2


def test_labels_name_both_objects_as_said_and_by_where_they_are():
    scene = parse_caption("a red star right of a small blue ring")
    named = dict(zip(_CHOICES, labels(scene), strict=True))
    read = {k: _CHOICES[k][v] for k, v in named.items() if v != UNSAID}
    assert (read["shape 1"], read["shape 2"]) == ("star", "ring")
    assert (read["shape at 1"], read["shape at 2"]) == ("ring", "star")
    assert read["layout"] == "right of"
    assert read["size 2"] == read["size at 1"] == "small"
    assert named["background"] == named["size 1"] == UNSAID


def test_pictures_survive_the_way_to_tensors_and_back():
    pictures = drawings(np.random.default_rng(0), 2)
    assert (to_pictures(to_tensor(pictures)) == pictures).all()


def test_each_step_has_its_own_noise():
    draws = [torch.randn(3, generator=step_generator(0, s, k)) for s in (0, 1) for k in (0, 1)]
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_latents_are_made_again_for_another_autoencoder(parts, tmp_path):
    parts = copy.deepcopy(parts)
    scenes = training_scenes(0, 3)
    first = encode_drawings(parts, scenes, 0, tmp_path / "latents.pt")
    assert torch.equal(encode_drawings(parts, scenes, 0, tmp_path / "latents.pt"), first)
    with torch.no_grad():
        parts.vae.quant_conv.weight.mul_(1.5)
    assert not torch.equal(encode_drawings(parts, scenes, 0, tmp_path / "latents.pt"), first)


def test_all_stages_in_a_row_give_a_model_and_none_builds_on_an_unfinished_one(
    no_watching, tmp_path, monkeypatch
):
    from recipes.pocket import train as command
    from recipes.pocket import train_unet as unet_stage

    monkeypatch.setattr(command, "STEPS", dict.fromkeys(command.STEPS, 1))
    small = {"drawings": 24, "extra_pairs": 2}
    monkeypatch.setattr(command, "train_unet", partial(unet_stage.train_unet, **small))
    monkeypatch.setattr(command, "normalize_latents", lambda vae, seed: None)
    model = train(tmp_path)
    assert (model / "model_index.json").is_file()
    path = tmp_path / "checkpoints" / "unet.ckpt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "steps": 2}, path)
    with pytest.raises(UserError, match="stands at step 1 of 2; finish it first"):
        train(tmp_path, "unet_fine")


def test_stages_ask_for_what_comes_before(tmp_path):
    with pytest.raises(UserError, match="'vae', which comes first"):
        train(tmp_path, "vae_fine")
    with pytest.raises(UserError, match="begun with --seed 0"):
        train(tmp_path, "vae_fine", seed=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stage", "unets"], "choose one of: all, vae, vae_fine, text, unet"),
        (["--steps", "5"], "--steps needs one --stage"),
        (["--stage", "vae", "--steps", "0"], "at least 1 step"),
        (["--seed", "-1"], "negative"),
    ],
)
def test_a_wrong_request_exits_with_2_and_one_sentence(arguments, told, tmp_path, capsys):
    assert train_module.run_cli(main, ["--output", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
