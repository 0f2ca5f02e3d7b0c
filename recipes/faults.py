"""Every fault of a recipe at once, each a sentence with its dotted key and a close match."""

import contextlib
import copy
import difflib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from mobile_runtime.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class RecipeError(UserError):
    """A recipe with faults; `faults` holds one sentence for each."""

    def __init__(self, where: str, faults: list[str]) -> None:
        self.faults = faults
        if len(faults) == 1:
            super().__init__(f"{where}: {faults[0]}")
        else:
            told = "".join(f"\n  - {fault}" for fault in faults)
            super().__init__(f"{where} has {len(faults)} faults:{told}")


@contextlib.contextmanager
def collected(faults: list[str]) -> Iterator[None]:
    """Keep what is refused inside for later, so that other faults can be told with it."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))


def validate(
    model: type[Model], data: dict[str, Any], stand_ins: dict[str, Any]
) -> tuple[Model | None, list[str]]:
    """Check single values first, then, with the faulty ones set aside, what must fit together.

    data: plain data, changed in place. stand_ins: by key, what takes the place of a faulty value
    that has no default, so that the search can go on. Returns the model (None where the search
    had to stop) and every fault found; the model counts only where there is none.
    """
    faults: list[str] = []
    aside: list[tuple[Any, ...]] = []
    while True:
        try:
            return model.model_validate(data), faults
        except ValidationError as error:
            problems = error.errors(include_url=False)
        changed = False
        for problem in problems:
            location = problem["loc"]
            # What fails only because a part of it was set aside is no fault of its own.
            if not location:
                # What does not fit a value that was set aside is no fault of its own either.
                keys = tuple(f"{'.'.join(map(str, known))}:" for known in aside)
                faults += [s for s in _sentences(model, problem) if not s.startswith(keys)]
            elif not any(known[: len(location)] == location for known in aside):
                faults += _sentences(model, problem)
            changed |= _set_aside(data, location, stand_ins)
            aside.append(location)
        if not changed:
            return None, faults


def _set_aside(data: Any, location: tuple[Any, ...], stand_ins: dict[str, Any]) -> bool:
    """Remove a faulty value, or put a stand-in there; whether anything changed."""
    # Taking one item out of a list would renumber the others.
    while location and isinstance(location[-1], int):
        location = location[:-1]
    if not location:
        return False
    for part in location[:-1]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return False  # an earlier problem has removed it
    key = location[-1]
    if not isinstance(data, dict):
        return False
    if key in stand_ins and data.get(key) != stand_ins[key]:
        data[key] = copy.deepcopy(stand_ins[key])
    elif key in data:
        del data[key]
    else:
        return False
    return True


_PLAIN_WORDS = {
    "model_type": "should be a mapping of keys",
    "tuple_type": "should be a list",
    "string_type": "should be text",
    "string_pattern_mismatch": "should be letters, digits, '.', '_' and '-'",
    "string_too_short": "should not be empty",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "too_short": "should have at least one item",
}


def _sentences(root: type[BaseModel], problem: Any) -> list[str]:
    """One problem that pydantic found, as sentences with the dotted key in front."""
    dotted = ".".join(str(part) for part in problem["loc"])
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        model = _model_at(root, problem["loc"][:-1])
        known = list(model.model_fields) if model else []
        hint = did_you_mean(str(problem["loc"][-1]), known) or f"; known: {', '.join(known)}"
        return [f"{dotted}: unknown key{hint}"]
    if kind == "missing":
        return [f"{dotted}: is missing"]
    if kind == "value_error":
        told = str(problem["ctx"]["error"]).split("\n")
        return [f"{dotted}: {line}" if dotted else line for line in told]
    if kind == "literal_error":
        known = _literals(problem)
        return [
            f"{dotted}: {given!r} is not one of: {problem['ctx']['expected']}"
            + (did_you_mean(given, known) if isinstance(given, str) else "")
        ]
    message = _PLAIN_WORDS.get(kind, problem["msg"].removeprefix("Input "))
    return [f"{dotted}: {given!r} {message}"]


def _literals(problem: Any) -> list[str]:
    return [word for word in problem["ctx"]["expected"].split("'") if word.strip(" ,or")]


def _model_at(root: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The type that lies at a location of a validation error."""
    model: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)


def did_you_mean(given: str, known: list[str]) -> str:
    """`; did you mean X?` where a known name is close to the given one; else nothing."""
    close = difflib.get_close_matches(given, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
