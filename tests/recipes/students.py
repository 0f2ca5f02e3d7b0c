"""A distillation so small that tests can run it."""

from pathlib import Path
from typing import Any

from recipes import schema

SMALL = {
    "iterations": 3,
    "batch": 2,
    "warmup": 0,
    "pictures": 4,
    "draw_steps": 2,
    "save_every": 1,
    "watch_every": 2,
    "precision": "float32",
    "learning_rate": 1e-4,
}


def recipe(prompts: Path, **settings: Any) -> schema.Recipe:
    settings = {"steps": 1, **SMALL, "prompts": str(prompts), **settings}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 64,
            "schedule": {"steps": settings["steps"], "guidance_scale": 0.0},
            "stages": [{"distill": settings}],
        }
    )


def listed(prompts: Path, *those: dict[str, Any]) -> schema.Recipe:
    """A recipe of these stages, without guidance in one step."""
    data = recipe(prompts, method="output", iterations=1).resolved()
    return schema.parse({**data, "stages": list(those)})


def student(prompts: Path, **settings: Any) -> dict[str, Any]:
    own = {**SMALL, "iterations": 1, "steps": 1, "method": "output", "prompts": str(prompts)}
    return {"distill": {**own, **settings}}
