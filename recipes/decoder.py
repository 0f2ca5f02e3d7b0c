"""A tiny VAE decoder in place of the pipeline's own: TAESD opened, or one distilled here.

diffusers' `AutoencoderTiny` (TAESD, github.com/madebyollin/taesd) takes latents as the UNet makes
them, so its scaling factor is 1. A distilled one learns what the pipeline's decoder makes of
latents that the pipeline draws, as they are and with noise on them: the pictures' values and
gradients at several sizes and, where asked, their features in the pipeline's own VAE encoder.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mobile_runtime.errors import UserError
from mobile_runtime.parity import picture_psnr_db
from recipes import drawn, prompts
from recipes.measure import latent_size, share_structure, vae_factor, with_modules
from recipes.schedulers import choose_scheduler
from recipes.schema import Recipe
from recipes.settings import DecoderSettings
from recipes.sources.tiny_autoencoder import open_tiny
from recipes.trainer import Batch, Job, accelerator, beside, train
from recipes.work import Outcome, Work

LEVELS = 3
"""Sizes at which pictures are compared, each half of the one before."""
WATCHED = 8


def check(pipeline: Any, settings: DecoderSettings, recipe: Recipe) -> None:
    """Refuse, before any work, a model that does not fit and what cannot be trained."""
    if "vae_encoder" in recipe.components:
        raise UserError(
            "a tiny decoder brings no encoder with a latent distribution; leave vae_encoder out of "
            "the components, or the decoder stage out of the recipe"
        )
    if settings.model is not None:
        _check_fit(open_tiny(settings.model, settings.revision, weights=False), pipeline, settings)
    if settings.iterations or settings.held_out:
        prompts.check_training(settings, recipe)
    if not settings.iterations:
        return
    names = [stage.name for stage in recipe.stages]
    if "decoder" in names and "distill" in names[names.index("decoder") :]:
        raise UserError(
            "it learns from the latents that the pipeline draws in the schedule's few steps, so "
            "list it after distill"
        )
    if settings.feature_weight and not hasattr(pipeline.vae.encoder, "down_blocks"):
        raise UserError(
            f"feature_weight: the encoder of {type(pipeline.vae).__name__} has no features to "
            "compare; set it to 0"
        )


def _check_fit(tiny: Any, pipeline: Any, settings: DecoderSettings) -> None:
    """Refuse a decoder of other latents, or of pictures of another size."""
    figures = {
        "latent channels": (tiny.config.latent_channels, pipeline.unet.config.in_channels),
        "pixels a latent": (vae_factor(tiny), vae_factor(pipeline.vae)),
    }
    for what, (its, wanted) in figures.items():
        if its != wanted:
            raise UserError(
                f"model: {settings.model} has {its} {what}, and this pipeline {wanted}; give a "
                "decoder that was made for it, or none to begin anew"
            )


def reshape(pipeline: Any, settings: DecoderSettings, recipe: Recipe) -> Any:
    """The pipeline with the tiny autoencoder in place, on the meta device."""
    if settings.model is not None:
        tiny = open_tiny(settings.model, settings.revision, weights=False)
    else:
        with torch.device("meta"):
            tiny = _begin(pipeline, settings)
    return with_modules(pipeline, {"vae": tiny})


def _begin(pipeline: Any, settings: DecoderSettings) -> Any:
    """An untrained AutoencoderTiny that fits the pipeline.

    The class always has an encoder. Nobody needs this one's, so it is as small as can be, and
    gives zeros.
    """
    from diffusers import AutoencoderTiny

    sizes = vae_factor(pipeline.vae).bit_length()
    tiny: Any = AutoencoderTiny(
        latent_channels=pipeline.unet.config.in_channels,
        decoder_block_out_channels=(settings.width,) * sizes,
        # As TAESD has it: one block at the size of the picture, where blocks cost most.
        num_decoder_blocks=(*(settings.depth,) * (sizes - 1), 1),
        encoder_block_out_channels=(1,) * sizes,
        num_encoder_blocks=(0,) * sizes,
    )
    for weight in tiny.encoder.parameters():
        nn.init.zeros_(weight)
    return tiny.eval().requires_grad_(False)


def run(pipeline: Any, settings: DecoderSettings, work: Work) -> Outcome:
    """Open or begin a tiny decoder, and train it where the settings ask for iterations.

    The record has its PSNR in dB against the pipeline's own decoder, over all pictures of
    `held_out` latents that were drawn with another seed.
    """
    device = accelerator().device
    pipeline.to(device)
    try:
        lesson = _Lesson(pipeline, settings, work)
        tiny = _open_or_begin(pipeline, settings)
        if settings.iterations:
            lesson.train(tiny)
        record = {
            "model": settings.model,
            "optimizer_steps": settings.iterations,
            "pictures": settings.pictures if settings.iterations else 0,
            "held_out": settings.held_out,
            "held_out_psnr_db": lesson.held_out_psnr_db(tiny.to(device)),
        }
    finally:
        pipeline.to("cpu")
    return Outcome(with_modules(pipeline, {"vae": tiny.to("cpu")}), record=record)


def _open_or_begin(pipeline: Any, settings: DecoderSettings) -> Any:
    if settings.model is not None:
        return open_tiny(settings.model, settings.revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _begin(pipeline, settings)


class _Lesson:
    """The pipeline's latents, what its own decoder makes of them, and the training on both."""

    def __init__(self, pipeline: Any, settings: DecoderSettings, work: Work) -> None:
        self.pipeline, self.settings, self.work = pipeline, settings, work
        self.device = accelerator().device
        self.held_out = None
        if settings.held_out:
            usual = prompts.drawer(settings.prompts, work.recipe)
            latents = self.draw("held_out", usual, settings.held_out, settings.seed + 1)
            self.held_out = latents, drawn.pictures(pipeline, latents.to(self.device))

    def draw(self, name: str, draw_prompts: prompts.Draw, count: int, seed: int) -> Tensor:
        """Latents (count, C, h, w) that the pipeline draws by the recipe's schedule."""
        recipe = self.work.recipe
        with accelerator().main_process_first():
            scheduler = choose_scheduler(self.pipeline.scheduler, recipe.schedule.scheduler)
            _, latents = drawn.draw(
                with_modules(self.pipeline, {"scheduler": scheduler}),
                draw_prompts,
                count,
                latent_size(self.pipeline, recipe.height, recipe.width),
                steps=recipe.schedule.steps,
                scale=recipe.schedule.guidance_scale,
                seed=seed,
                folder=self.work.folder / name,
                key=self.work.key,
            )
        return latents

    def train(self, tiny: Any) -> None:
        """Train the decoder of a tiny autoencoder in place."""
        said = prompts.emphasized(self.settings, self.work.recipe)
        latents = self.draw("drawn", said, self.settings.pictures, self.settings.seed)
        latents = torch.cat([latents, noised(latents, self.settings.noise, self.settings.seed)])
        # Decoded once: the full decoder costs more than a step of the tiny one's training.
        wanted = torch.from_numpy(drawn.pictures(self.pipeline, latents.to(self.device)))
        weights = picture_weights(wanted, self.settings.detail_balance)
        scaling_factor = tiny.config.scaling_factor

        def loss(decoder: nn.Module, batch: Batch) -> Tensor:
            rows = torch.from_numpy(batch.rng().integers(len(latents), size=batch.size))
            goal = wanted[rows].to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            made = decoder(latents[rows].to(self.device) / scaling_factor)
            each = picture_losses(made.float(), goal)
            total = (weights[rows].to(self.device) * each).mean()
            if self.settings.feature_weight:
                features = feature_loss(self.pipeline.vae.encoder, made, goal)
                total = total + self.settings.feature_weight * features
            return total

        def watch(decoder: nn.Module) -> np.ndarray:
            """The full decoder's pictures above, the tiny one's below, of the same latents."""
            seen = share_structure(tiny)
            seen.decoder = decoder
            if self.held_out is not None:
                tqdm.write(f"decoder: {self.held_out_psnr_db(seen):.2f} dB from the full one")
            return beside([wanted[:WATCHED].numpy(), self.decode(seen, latents[:WATCHED])])

        if self.settings.gradient_checkpointing:
            tiny.enable_gradient_checkpointing()
        tiny.decoder = train(
            Job(
                "decoder", tiny.decoder, loss, self.settings, self.work.folder, self.work.key, watch
            )
        )
        if self.settings.gradient_checkpointing:
            tiny.disable_gradient_checkpointing()

    def decode(self, tiny: Any, latents: Tensor) -> np.ndarray:
        """Pictures (N, H, W, 3) uint8 that an autoencoder makes of the pipeline's latents."""
        return drawn.pictures(with_modules(self.pipeline, {"vae": tiny}), latents.to(self.device))

    def held_out_psnr_db(self, tiny: Any) -> float | None:
        """The PSNR of the tiny decoder's pictures against the full one's; all as one picture.

        At most 100 dB, which is what equal pictures are given.
        """
        if self.held_out is None:
            return None
        latents, full = self.held_out
        made = self.decode(tiny, latents)
        psnr_db = picture_psnr_db(np.concatenate(full), np.concatenate(made))
        return round(min(psnr_db, 100.0), 2)


def noised(latents: Tensor, most: float, seed: int) -> Tensor:
    """Latents (N, C, h, w) with normal noise of up to `most` of their deviation, row by row."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(len(latents), 1, 1, 1, generator=generator) * most * latents.std()
    return latents + level * torch.randn(latents.shape, generator=generator)


def picture_weights(pictures: Tensor, balance: float) -> Tensor:
    """How much each picture (N, H, W, 3), uint8, counts in the loss; 1 on average.

    A small shape on a plain ground is a small part of any loss over all pixels, and so is learned
    last. So each picture counts by the inverse of its detail, the mean difference of neighbours,
    to the power of `balance`; one of nearly none counts as one of a twentieth of the mean.
    """
    detail = torch.stack([p.float().diff(dim=0).abs().mean() for p in pictures])
    detail += torch.stack([p.float().diff(dim=1).abs().mean() for p in pictures])
    weights = detail.clamp_min(max(float(detail.mean()) / 20, 1e-6)) ** -balance
    return weights / weights.mean()


def picture_losses(made: Tensor, wanted: Tensor) -> Tensor:
    """How far each picture (N, 3, H, W) in [-1, 1] is from another, at several sizes: (N,).

    At each size the mean absolute difference of values, and that of differences between neighbours
    (which blurred edges fail), and at full size the mean square, which is the PSNR's.
    """
    total = _means((made - wanted) ** 2)
    for level in range(LEVELS):
        if level:
            made, wanted = F.avg_pool2d(made, 2), F.avg_pool2d(wanted, 2)
        total = total + _means((made - wanted).abs())
        for axis in (-2, -1):
            total = total + _means((made.diff(dim=axis) - wanted.diff(dim=axis)).abs())
    return total


def _means(values: Tensor) -> Tensor:
    return values.mean(dim=(1, 2, 3))


def feature_loss(encoder: Any, made: Tensor, wanted: Tensor) -> Tensor:
    """How far apart two sets of pictures are in an AutoencoderKL's frozen encoder.

    After each of its levels, as LPIPS compares (arXiv:1801.03924): each place's features have unit
    length.
    """
    with torch.no_grad():
        goals = list(_features(encoder, wanted))
    terms = [F.mse_loss(a, b) for a, b in zip(_features(encoder, made), goals, strict=True)]
    return torch.stack(terms).sum()


def _features(encoder: Any, pictures: Tensor) -> Iterator[Tensor]:
    x = encoder.conv_in(pictures)
    for block in encoder.down_blocks:
        x = block(x)
        yield F.normalize(x.float(), dim=1)
