"""A pipeline that draws at another size than it was trained for, after a short adaptation.

The pipeline draws pictures at the size that it knows; shrunk, and encoded by its own VAE, they are
what its UNet learns to draw at the recipe's resolution, by the diffusion loss (arXiv:2006.11239) on
whatever it predicts. Before that, its VAE's decoder may learn the shrunk pictures.

It comes before a distillation, which would have to be repeated; and after a pruning or before it:
a pruned UNet learns both at once. The pictures are drawn by the UNet before the pruning.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mobile_runtime.errors import UserError
from mobile_runtime.parity import picture_psnr_db
from recipes import drawn, prompts
from recipes.component_folder import attend_as_opened
from recipes.decoder import picture_losses
from recipes.losses import Noise, check_fit
from recipes.measure import latent_size, vae_factor, with_modules
from recipes.schedulers import with_steps
from recipes.schema import Recipe
from recipes.settings import ResolutionSettings
from recipes.trainer import Batch, Job, accelerator, beside, train
from recipes.work import Outcome, Work

LAST_SHARE = 0.1
"""Of the timesteps, those at the very last, where every sampling with trailing steps begins."""
WATCHED = 8
MOST_SQUEEZED = 1.1
"""Sides are multiples of the VAE's factor, so that their ratio cannot always be kept."""
HELD_OUT = 64
"""Pictures of another seed, to measure the VAE on."""


def check(pipeline: Any, settings: ResolutionSettings, recipe: Recipe) -> None:
    """Refuse, before any work, sizes that there is nothing to learn from."""
    prompts.check_training(settings, recipe)
    Noise.of(pipeline.scheduler, torch.device("cpu"))
    if not hasattr(pipeline.vae, "quant_conv"):
        raise UserError(
            f"{type(pipeline.vae).__name__} cannot encode the shrunk pictures; list resolution "
            "before decoder"
        )
    factor = vae_factor(pipeline.vae)
    wanted = (recipe.height, recipe.width)
    if any(side % factor for side in settings.drawn_at):
        raise UserError(f"drawn_at: {settings.drawn_at} is no multiple of the VAE's {factor}")
    with_steps(pipeline.scheduler, settings.draw_steps)
    if any(mine > theirs for mine, theirs in zip(wanted, settings.drawn_at, strict=True)):
        raise UserError(
            f"drawn_at: pictures of {_said(settings.drawn_at)} have no detail to learn "
            f"{_said(wanted)} from; adapt to a smaller resolution"
        )
    ratio = (wanted[0] * settings.drawn_at[1]) / (wanted[1] * settings.drawn_at[0])
    if not 1 / MOST_SQUEEZED <= ratio <= MOST_SQUEEZED:
        raise UserError(
            f"drawn_at: pictures of {_said(settings.drawn_at)} would be squeezed to "
            f"{_said(wanted)}; give sides of about the same ratio"
        )
    if wanted == settings.drawn_at:
        raise UserError(
            f"drawn_at: {_said(wanted)} is the recipe's resolution, so there is nothing to adapt; "
            "remove the stage"
        )


def _said(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"


def run(pipeline: Any, settings: ResolutionSettings, work: Work) -> Outcome:
    """Adapt the UNet, and before it the VAE's decoder where the settings ask for that.

    work.teacher draws at `settings.drawn_at`; the pipeline's UNet learns. The record has the PSNR
    in dB of held-out pictures that went through the VAE at the recipe's resolution.
    """
    check_fit(work.teacher, pipeline.unet)
    device = accelerator().device
    pipeline.to(device)
    work.teacher.to(device)
    try:
        lesson = _Lesson(pipeline, settings, work)
        record = {
            "drawn_at": list(settings.drawn_at),
            "pictures": settings.pictures,
            "optimizer_steps": settings.iterations,
            "decoder_optimizer_steps": settings.decoder_iterations,
        }
        before = lesson.round_trip_psnr_db()
        if settings.decoder_iterations:
            lesson.train_decoder()
            record["vae_psnr_db_before"] = before
        record["vae_psnr_db"] = lesson.round_trip_psnr_db()
        unet = lesson.train_unet()
    finally:
        pipeline.to("cpu")
        work.teacher.to("cpu")
    attend_as_opened(unet)
    unet.requires_grad_(False)
    vae = lesson.vae.to("cpu").requires_grad_(False)
    return Outcome(with_modules(pipeline, {"unet": unet, "vae": vae}), record=record)


class _Lesson:
    """The shrunk pictures and their latents, and the trainings on them."""

    def __init__(self, pipeline: Any, settings: ResolutionSettings, work: Work) -> None:
        self.pipeline, self.settings, self.work = pipeline, settings, work
        self.device = accelerator().device
        self.vae = copy.deepcopy(pipeline.vae)
        self.teacher = with_modules(pipeline, {"unet": work.teacher})
        self.size = (work.recipe.height, work.recipe.width)
        emphasized = prompts.emphasized(settings, work.recipe)
        usual = prompts.drawer(settings.prompts, work.recipe)
        self.said, self.wanted = self.pictures(
            "drawn", emphasized, settings.pictures, settings.seed
        )
        _, self.held_out = self.pictures("held_out", usual, HELD_OUT, settings.seed + 1)
        self.latents = self.encode(self.wanted)

    def pictures(
        self, name: str, draw_prompts: prompts.Draw, count: int, seed: int
    ) -> tuple[list[str], Tensor]:
        """Prompts, and pictures (N, H, W, 3) uint8 at the recipe's resolution."""
        settings = self.settings
        with accelerator().main_process_first():
            said, latents = drawn.draw(
                self.teacher,
                draw_prompts,
                count,
                latent_size(self.pipeline, *settings.drawn_at),
                steps=settings.draw_steps,
                scale=settings.guidance,
                seed=seed,
                folder=self.work.folder / name,
                key=self.work.key,
            )
        large = drawn.pictures(self.teacher, latents.to(self.device))
        return said, shrunk(torch.from_numpy(large), self.size)

    def encode(self, pictures: Tensor) -> Tensor:
        """The latents (N, C, h, w) that the VAE's encoder makes of pictures."""
        factor = self.vae.config.scaling_factor
        with torch.no_grad():
            parts = [
                self.vae.encode(_floats(rows, self.device)).latent_dist.mode() * factor
                for rows in tqdm(
                    pictures.split(16), desc="encode", delay=2, mininterval=2, leave=False
                )
            ]
        return torch.cat(parts).float().cpu()

    def round_trip_psnr_db(self) -> float:
        """Held-out pictures through encoder and decoder, at the recipe's resolution."""
        pipeline = with_modules(self.pipeline, {"vae": self.vae})
        made = drawn.pictures(pipeline, self.encode(self.held_out).to(self.device))
        psnr_db = picture_psnr_db(np.concatenate(self.held_out.numpy()), np.concatenate(made))
        return round(min(psnr_db, 100.0), 2)

    def train_decoder(self) -> None:
        """The VAE's decoder learns the shrunk pictures of the encoder's latents."""
        scale = self.vae.config.scaling_factor
        latents = self.latents
        with torch.no_grad():
            conv = self.vae.post_quant_conv
            if conv is not None:
                latents = torch.cat([conv(z / scale) for z in latents.to(self.device).split(64)])
            else:
                latents = latents / scale

        def loss(decoder: nn.Module, batch: Batch) -> Tensor:
            rows = torch.from_numpy(batch.rng().integers(len(latents), size=batch.size))
            made = decoder(latents[rows].to(self.device))
            wanted = _floats(self.wanted[rows], self.device)
            return picture_losses(made.float(), wanted).mean()

        settings = self.settings.model_copy(update={"iterations": self.settings.decoder_iterations})
        job = Job("vae-decoder", self.vae.decoder, loss, settings, self.work.folder, self.work.key)
        self.vae.decoder = train(job).to(self.device).requires_grad_(False)

    def train_unet(self) -> Any:
        """The UNet learns the latents of the shrunk pictures, noised."""
        from diffusers.models.attention_processor import AttnProcessor

        settings, noise = self.settings, Noise.of(self.pipeline.scheduler, self.device)
        unet: Any = copy.deepcopy(self.pipeline.unet)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if self.device.type == "cpu":
            # The fused attention's backward pass costs more there than all else together.
            unet.set_attn_processor(AttnProcessor())

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            rng = batch.rng()
            rows = rng.integers(len(self.said), size=batch.size)
            unsaid = rng.random(batch.size) < settings.empty_share
            times = rng.integers(noise.last + 1, size=batch.size)
            times[rng.random(batch.size) < LAST_SHARE] = noise.last
            words = [
                "" if empty else self.said[row] for row, empty in zip(rows, unsaid, strict=True)
            ]
            states = drawn.text_states(self.pipeline, words)
            x0 = self.latents[torch.from_numpy(rows)].to(self.device)
            eps = torch.randn(x0.shape, generator=batch.generator()).to(self.device)
            t = torch.from_numpy(times).to(self.device)
            out = module(noise.add(x0, eps, t), t, states).sample
            return F.mse_loss(out.float(), noise.output(x0, eps, t))

        job = Job("resolution", unet, loss, settings, self.work.folder, self.work.key, self.show)
        average = train(job)
        if settings.gradient_checkpointing:
            average.disable_gradient_checkpointing()
        return average

    def show(self, unet: Any) -> np.ndarray:
        """The adapted pipeline's pictures above, the shrunk ones of the same prompts below."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        words = self.said[:WATCHED]
        shape = (len(words), *self.latents.shape[1:])
        x = torch.randn(shape, generator=generator).to(self.device)
        pipeline = with_modules(self.pipeline, {"vae": self.vae})
        # The guidance is in the pictures that it learned from.
        made = drawn.sample(pipeline, unet, words, x, self.settings.draw_steps, 1.0, generator)
        return beside([drawn.pictures(pipeline, made), self.wanted[:WATCHED].numpy()])


def shrunk(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (N, H, W, 3) uint8 made smaller, bicubic with antialiasing."""
    parts = [
        F.interpolate(rows.permute(0, 3, 1, 2).float(), size=size, mode="bicubic", antialias=True)
        for rows in pictures.split(64)
    ]
    return torch.cat(parts).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _floats(pictures: Tensor, device: torch.device) -> Tensor:
    """Pictures (N, H, W, 3) uint8 as a VAE sees them: (N, 3, H, W) in [-1, 1]."""
    return pictures.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
