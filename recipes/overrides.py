"""What the command line may change in a recipe, the same for every command that takes one."""

import argparse
from typing import Any

from mobile_runtime.errors import UserError
from recipes.faults import collected
from recipes.strict_yaml import parse_yaml

# Option: (the recipe's key, its placeholder, what it is, whether it is plain text).
OPTIONS: dict[str, tuple[str, str, str, bool]] = {
    "--model": (
        "source.model",
        "SOURCE",
        "hub id, diffusers folder, .safetensors file, embedded, or random:sd_turbo|sd21|sd15",
        True,
    ),
    "--revision": ("source.revision", "REVISION", "branch, tag or commit of a hub id", True),
    "--resolution": ("resolution", "PIXELS", "picture side, or '[height, width]'", False),
    "--steps": ("schedule.steps", "N", "the default number of steps", False),
    "--guidance": ("schedule.guidance_scale", "SCALE", "guidance scale; 1 or less: none", False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that change a recipe."""
    group = parser.add_argument_group("changes to the recipe")
    for option, (key, placeholder, meaning, _) in OPTIONS.items():
        group.add_argument(option, metavar=placeholder, help=f"{meaning} ({key})")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the recipe, dotted, with a YAML value; may be repeated",
    )


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The overrides that the options ask for: dotted keys to values, for `schema.load`."""
    overrides: dict[str, Any] = {}
    faults: list[str] = []
    for option, (key, _, _, is_text) in OPTIONS.items():
        given = getattr(arguments, option.removeprefix("--"))
        if given is not None:
            with collected(faults):
                overrides[key] = given if is_text else parse_yaml(given, option)
    for setting in arguments.set:
        key, equals, text = setting.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            faults.append(f"--set {setting}: write it as key=value, e.g. --set schedule.steps=10")
            continue
        key = key.strip()
        if key in overrides:
            faults.append(f"{key}: is set twice on the command line")
            continue
        with collected(faults):
            overrides[key] = parse_yaml(text, f"--set {key}")
    if faults:
        raise UserError("; ".join(faults))
    return overrides
