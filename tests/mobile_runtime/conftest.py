"""What the tests of the desktop pipeline draw with."""

from pathlib import Path

import pytest

from converters import reference as opening
from mobile_runtime.reference import Parts
from recipes import schema
from tests.converters.small import make_small_pipeline

SMALL = """
name: small
source: {{model: {model}}}
resolution: 16
schedule: {{steps: 4, guidance_scale: 3.0}}
golden_prompts: [a red tent, the rat]
"""


@pytest.fixture(scope="session")
def parts() -> Parts:
    """The embedded model in two steps without guidance."""
    return opening.open_recipe(schema.load("pocket_turbo").resolved())


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_small_pipeline().save_pretrained(folder / "model")
    (folder / "small.yaml").write_text(SMALL.format(model=folder / "model"))
    return folder / "small.yaml"


@pytest.fixture(scope="session")
def small(small_recipe: Path) -> Parts:
    """A pipeline that draws in milliseconds, with guidance."""
    return opening.open_recipe(schema.load(str(small_recipe)).resolved())
