"""`python -m recipes list | show NAME | check FILE`: look at recipes, and check one."""

import argparse
import sys

from mobile_runtime.errors import run_cli
from recipes import schema
from recipes.overrides import add_arguments, from_arguments

EXAMPLES = """examples:
  python -m recipes list
  python -m recipes show sd_turbo_int8
  python -m recipes show pocket_int8 --steps 10 --set stages.quantize.activations=int8_dynamic
  python -m recipes check my_recipe.yaml
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes",
        description="Recipes say how a pipeline becomes a bundle; look at them and check them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | show | check")
    told = {
        "list": "the recipes that the package ships, and their purposes",
        "show": "a whole recipe, its defaults filled in, as YAML",
        "check": "every fault of a recipe, or that it is fine",
    }
    parsers = {
        name: commands.add_parser(
            name,
            help=text,
            description=f"Tell {text}.",
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, text in told.items()
    }
    show, check = parsers["show"], parsers["check"]
    show.add_argument("recipe", metavar="NAME", help="a shipped recipe, or a .yaml file")
    add_arguments(show)
    check.add_argument("recipe", metavar="FILE", help="a .yaml file, or a shipped recipe")
    add_arguments(check)
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        return _list()
    recipe = schema.load(arguments.recipe, from_arguments(arguments))
    if arguments.command == "show":
        print(recipe.to_yaml(), end="")
        return 0
    stages = ", ".join(stage.name for stage in recipe.stages) or "no stages"
    print(
        f"{arguments.recipe} is fine: {recipe.source.model}, {recipe.width}x{recipe.height}, "
        f"{recipe.schedule.steps} steps of {recipe.schedule.scheduler}, {stages}, "
        f"{recipe.precision}\n"
        "the recipe alone was checked; whether the source takes this resolution, these layer "
        "patterns and this sampler is told, with the same options, by: "
        f"python -m converters.onnx --recipe {arguments.recipe} --dry-run"
    )
    return 0


def _list() -> int:
    names = schema.names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {schema.purpose(schema.find(name))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
