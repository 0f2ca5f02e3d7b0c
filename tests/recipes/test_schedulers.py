"""The scheduler that a recipe names keeps the source's noise levels, and clips no latents."""

from typing import Any

import diffusers
import pytest

from converters.schedule import compile_schedule
from recipes.schedulers import CLASSES, choose_scheduler
from recipes.sources.architectures import ARCHITECTURES


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
@pytest.mark.parametrize("name", [*CLASSES])
def test_every_architecture_runs_with_every_scheduler(architecture: str, name: str) -> None:
    own = ARCHITECTURES[architecture]
    source = getattr(diffusers, own.scheduler_class)(**own.scheduler)
    table = compile_schedule(choose_scheduler(source, name), 4)
    assert len(table.rows) == 4
    assert table.scheduler == CLASSES[name]


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_not_clipped_as_in_diffusers_own_pipeline(
    name: str, tiny_pipeline: Any
) -> None:
    # An Euler scheduler has no such option, so that the others' default, clipping, would hold.
    own = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)
    chosen = choose_scheduler(own, name)
    assert chosen.config.clip_sample is False
    default = getattr(diffusers, CLASSES[name]).from_config(own.config)
    components = {**tiny_pipeline.components, "scheduler": default}
    with pytest.warns(FutureWarning, match="clip_sample"):
        pipe = diffusers.StableDiffusionPipeline(**components, requires_safety_checker=False)
    assert pipe.scheduler.config.clip_sample is False


def test_the_sources_own_scheduler_stays_as_it_is() -> None:
    own = diffusers.DDIMScheduler()
    assert choose_scheduler(own, "source") is own
