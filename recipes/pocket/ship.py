"""Put the trained results of a recipe into the package: `python -m recipes.pocket.ship --help`.

Every user of the recipe then finds them there (recipes/work.py), and trains nothing.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below, which would chatter.
    from recipes.quiet import import_torch

    import_torch("train", "training")

import argparse
import json

from mobile_runtime.errors import UserError, run_cli
from recipes import component_folder, overrides, schema, stages, work
from recipes.sources import open_source


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.pocket.ship",
        description="Run a recipe of the embedded model, and keep what it trained in the package, "
        "as fp16 safetensors.",
        epilog="example: python -m recipes.pocket.ship pocket_turbo",
    )
    parser.add_argument("recipe", metavar="NAME")
    overrides.add_arguments(parser)
    arguments = parser.parse_args(argv)
    recipe = schema.load(arguments.recipe, overrides.from_arguments(arguments))
    if recipe.source.model != "embedded":
        raise UserError(f"{recipe.name} begins with {recipe.source.model}; ship embedded ones only")
    applied = stages.apply(
        open_source("embedded").pipeline, recipe, stages.changing(recipe), progress=print
    )
    # What a later result supersedes, nobody needs.
    needed = [each for each in applied.records if each.get("trained") != stages.SUPERSEDED]
    for name in (record["result"] for record in needed if "result" in record):
        kept, shipped = work.default_cache() / name, work.SHIPPED / name
        if shipped.exists():
            print(f"{name} is there already")
            continue
        shipped.mkdir(parents=True)
        for part in sorted(path for path in kept.iterdir() if any(path.glob("*config.json"))):
            component = component_folder.load(part)
            half = component.half() if hasattr(component, "half") else component
            component_folder.save(half, shipped / part.name)
        record = json.loads((kept / work.RECORD).read_text())
        record["sha256"] = work.hashes(shipped, [part.name for part in shipped.iterdir()])
        (shipped / work.RECORD).write_text(json.dumps(record, indent=1) + "\n")
        print(f"{shipped}: {sum(file.stat().st_size for file in shipped.rglob('*')) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
