"""YAML read strictly: no duplicate keys, no aliases, and faults told with their line."""

from typing import Any

import yaml

from recipes.faults import RecipeError


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and without aliases (which can grow without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is not text; put it in quotes"
            elif key in keys:
                problem = f"the key {key!r} appears twice"
            else:
                keys.add(key)
                continue
            raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document; RecipeError with the line where it is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(where, [f"not valid YAML: {error.problem}{line}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(where, [f"not valid YAML: {error}"]) from None
