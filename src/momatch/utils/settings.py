"""Settings that are checked the moment they are made, from Python, a file or the command line alike.

    @settings("train")
    class TrainConfig:
        num_steps: Annotated[int, Field(gt=0)] = 3000

    TrainConfig(num_steps=0)    # ConfigError: train.num_steps is 0; it must be above 0

pydantic checks types and bounds; here its findings become the one sentence that users get: the key as the
command line and config.json name it, its value, and what is allowed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

import annotated_types as bounds
import pydantic
from pydantic import ConfigDict, TypeAdapter, ValidationError

from momatch.utils.errors import ConfigError

Settings = TypeVar("Settings")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
TYPES = {  # pydantic's names of what was wrong → what to give
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dataclass_type": "its settings",
    "dataclass_exact_type": "its settings",
}


@dataclass(frozen=True)
class Remedy:
    """Beside a field's bounds: what to say, after the semicolon, of a value outside them.

    Attributes:
        text: that.
        of_types: say it of a value of another type too.
    """

    text: str
    of_types: bool = False


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(section: str = "") -> Callable[[type[Settings]], type[Settings]]:
    """Make a class a frozen dataclass whose constructor checks types and bounds, strictly.

    Args:
        section: where its fields stand in a config, such as "optim"; "" at the top.

    Returns:
        A class decorator. The class raises ConfigError when it is made with what it does not allow. A tuple
        may be given as a list, a float as a whole number; nothing else is converted.
    """

    def decorate(kind: type[Settings]) -> type[Settings]:
        made: Any = pydantic.dataclasses.dataclass(frozen=True, config=STRICT)(kind)
        unchecked, names = made.__init__, [each.name for each in fields(made)]

        @functools.wraps(unchecked)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if len(args) > len(names):
                raise TypeError(f"{kind.__name__} takes {len(names)} values, got {len(args)}")
            try:  # all by name, or pydantic would call them by their place
                unchecked(self, **dict(zip(names, args, strict=False)), **kwargs)
            except ValidationError as error:
                raise ConfigError(sentence(error, made, section)) from None

        made.__init__ = __init__
        return made

    return decorate


def from_json(kind: type[Settings], text: str, section: str = "") -> Settings:
    """Settings from JSON, as strictly as from Python.

    Raises:
        ConfigError: naming the first offending key.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ConfigError(sentence(error, kind, section)) from None


def require(holds: bool, key: str, value: object, remedy: str) -> None:
    """Refuse a value that does not fit others.

    Raises:
        ConfigError: unless `holds`.
    """
    if not holds:
        raise ConfigError(f"{key} is {shown(value)}; {remedy}")


def sentence(error: ValidationError, kind: type, section: str = "") -> str:
    """The first thing that pydantic found wrong with a `kind`: key, value, what to do."""
    first = error.errors()[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):  # a check of our own, which has said it all
        return str(inner)
    path = list(first["loc"])
    key = ".".join([section] * bool(section) + [str(part) for part in path if isinstance(part, str)])
    if first["type"] in ("unexpected_keyword_argument", "dataclass_unexpected_keyword_argument"):
        known = ", ".join(_hints(_at(kind, path[:-1])))
        return f"unknown config key {key!r}; known here are {known}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} is missing; give it"
    place = f" at place {path[-1]}" if path and isinstance(path[-1], int) else ""
    return f"{key} is {shown(first['input'])}{place}; {_remedy(first, kind, path)}"


def shown(value: object) -> str:
    """A value as a sentence names it: words in quotation marks, long ones cut."""
    text = repr(value) if isinstance(value, str) else " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"


def _remedy(first: Any, kind: type, path: Sequence[Any]) -> str:
    hint, marks = _field(kind, path)
    said = [mark.text for mark in marks if isinstance(mark, Remedy)]
    if any(isinstance(mark, Remedy) and mark.of_types for mark in marks):
        return said[0]
    if first["type"] == "literal_error":
        *words, last = map(str, get_args(hint))
        return f"use {', '.join(words)} or {last}" if words else f"use {last}"
    if first["type"] in TYPES and not (said and first["type"] == "finite_number"):
        return f"give {TYPES[first['type']]}"
    return said[0] if said else _range(marks)


def _range(marks: Sequence[Any]) -> str:
    """The bounds of a field in words."""
    low = next((m for m in marks if isinstance(m, bounds.Ge | bounds.Gt)), None)
    high = next((m for m in marks if isinstance(m, bounds.Le | bounds.Lt)), None)
    lowest: Any = getattr(low, "ge", getattr(low, "gt", -math.inf))
    highest: Any = getattr(high, "le", getattr(high, "lt", math.inf))
    if low is not None and high is not None:
        left, right = "[" if isinstance(low, bounds.Ge) else "(", "]" if isinstance(high, bounds.Le) else ")"
        return f"it must lie in {left}{lowest:g}, {highest:g}{right}"
    if low is not None:
        return f"it must be {f'{lowest:g} or more' if isinstance(low, bounds.Ge) else f'above {lowest:g}'}"
    return f"it must be {f'{highest:g} or less' if isinstance(high, bounds.Le) else f'below {highest:g}'}"


def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in fields(kind)} if is_dataclass(kind) else {}


def _at(kind: Any, path: Sequence[Any]) -> Any:
    """The settings class at a path below `kind`."""
    for part in path:
        if isinstance(part, str) and is_dataclass(kind) and part in _hints(kind):
            kind, _ = _unwrapped(_hints(kind)[part])
    return kind


def _field(kind: type, path: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The type of the field at a path, and what its annotation says besides."""
    names = [part for part in path if isinstance(part, str)]
    owner = _at(kind, names[:-1])
    if not names or not is_dataclass(owner) or names[-1] not in _hints(owner):
        return owner, ()
    return _unwrapped(_hints(owner)[names[-1]])


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    marks = getattr(hint, "__metadata__", ())
    found: list[Any] = []
    for mark in marks:
        found += getattr(mark, "metadata", [mark])
    return (get_args(hint)[0] if marks else hint), tuple(found)
