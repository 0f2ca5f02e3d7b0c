"""Targets and losses, held against diffusers' schedulers."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from mobile_runtime.errors import UserError
from recipes import losses
from recipes.losses import Noise
from tests.conftest import make_tiny_pipeline

CPU = torch.device("cpu")


def noise_of(scheduler: Any) -> Noise:
    return Noise.of(scheduler, CPU)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_step_is_what_diffusers_makes_of_it(prediction: str, steps: int) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    noise = noise_of(scheduler)
    grid = noise.grid(steps)
    assert grid[:-1].tolist() == scheduler.timesteps.tolist()
    x, out = torch.randn(2, 1, 4, 8, 8)
    for index in range(steps):
        t, after = grid[index : index + 1], grid[index + 1 : index + 2]
        mine = noise.ddim(x, noise.x0(x, out, t), t, after)
        theirs = scheduler.step(out, int(t), x)
        torch.testing.assert_close(mine, theirs.prev_sample, rtol=1e-4, atol=1e-4)
        back = noise.x0_of_step(x, mine, t, after)
        torch.testing.assert_close(back, theirs.pred_original_sample, rtol=1e-3, atol=1e-3)


def test_a_student_that_does_two_steps_in_one_has_no_loss() -> None:
    """With a model that knows the picture, two DDIM steps and one lead to the same place."""
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    noise = noise_of(scheduler)
    x0, eps = torch.randn(2, 3, 4, 8, 8)
    at = torch.tensor([0, 1, 3])

    def knowing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x0

    def ignorant(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    assert float(losses.progressive(noise, knowing, knowing, x0, eps, 4, at)) < 1e-5
    assert float(losses.progressive(noise, ignorant, knowing, x0, eps, 4, at)) > 0.5


def test_the_consistency_function_is_diffusers_own() -> None:
    scheduler = LCMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(4)
    noise = noise_of(scheduler)
    x, out = torch.randn(2, 1, 4, 8, 8)
    for t in scheduler.timesteps:
        theirs = scheduler.step(out, t, x).denoised
        mine = losses.consistency(noise, x, out, t[None])
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    start = losses.consistency(noise, x, out, torch.tensor([0]))
    torch.testing.assert_close(start, x)


def test_a_consistent_student_has_no_consistency_loss() -> None:
    noise = noise_of(LCMScheduler(prediction_type="sample", clip_sample=False))
    x0, eps = torch.randn(2, 3, 4, 8, 8)

    def knowing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x0

    def wrong(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x0 + t[:, None, None, None] / 1000

    at = torch.tensor([0, 5, 20])
    for student, expected in ((knowing, True), (wrong, False)):
        loss = losses.latent_consistency(noise, student, student, knowing, x0, eps, 50, at)
        assert (float(loss) < 1e-4) == expected


def test_block_outputs_of_equal_unets_have_no_loss() -> None:
    unet: Any = make_tiny_pipeline().unet
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with losses.Features(unet) as first, torch.no_grad():
        unet(x, 5, text)
    with losses.Features(unet) as second, torch.no_grad():
        unet(x, 900, text)
    assert len(first.seen) == len(unet.down_blocks) + len(unet.up_blocks) + 1
    assert float(losses.feature_loss(first, first)) == 0
    assert float(losses.feature_loss(second, first)) > 0
    assert not any(block._forward_hooks for block in unet.modules())


def test_a_teacher_of_other_text_is_refused() -> None:
    from diffusers import UNet2DConditionModel

    teacher = make_tiny_pipeline().unet
    config = {**teacher.config, "cross_attention_dim": 64}
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(config)
    with pytest.raises(UserError, match="cross_attention_dim 32 and the student's 64"):
        losses.check_fit(teacher, student)
