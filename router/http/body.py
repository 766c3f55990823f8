"""From a request's body to a frozen dataclass, strictly. Owns how values are read; knows no endpoint.

A request's dataclass is the table of its fields: each is made with `json_field`, which says how the value is read.
A field that no table names is refused, as OpenAI does: a misspelt one would silently change the answer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from baton.errors import InvalidRequest

T = TypeVar("T")
Read = Callable[[str, Any], Any]
"""Takes the field's name and its JSON value, gives the value; raises InvalidRequest."""

_REQUIRED = object()
_SHOWN = 80


def json_field(read: Read, default: Any = _REQUIRED) -> Any:
    """A field of a request. Without a default it must be given; null counts as not given."""
    return dataclasses.field(
        default=None if default is _REQUIRED else default,
        metadata={"read": read, "required": default is _REQUIRED},
    )


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in `body`. Raises InvalidRequest that says where it is broken."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"body is not UTF-8 at byte {error.start}; it must be JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise InvalidRequest("body is nested too deeply; a request needs no more than a few levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidRequest(f"body has a number that cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"body is {kind_of(value)}; it must be an object")
    return value


def read_request(cls: type[T], body: Mapping[str, Any], neutral: Mapping[str, Callable[[Any], bool]]) -> T:
    """A `cls` from a parsed body.

    `neutral`: fields that are not supported, each with the values that ask for nothing and so are accepted. Raises
    InvalidRequest that names the first field that is wrong.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass by contract
    for name, value in body.items():
        if name in fields or value is None:
            continue
        if name not in neutral:
            raise InvalidRequest(f"{_shown(name)} is no field of this request", param=name[:_SHOWN])
        if not neutral[name](value):
            raise InvalidRequest(f"{name} is {_shown(value)}; it is not supported, so leave it out", param=name)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        value = body.get(name)
        if value is not None:
            values[name] = field.metadata["read"](name, value)
        elif field.metadata["required"]:
            raise InvalidRequest(f"{name} is missing; it must be given", param=name)
    return cls(**values)


# --- how values are read


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def integer(name: str, value: Any) -> int:
    """Bounds are the engine's to say (baton.sampling)."""
    if isinstance(value, float) and value.is_integer():  # some clients write every number as 7.0
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, value, "a whole number")
    return value


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, value, "a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise wrong(name, value, "a number of ordinary size")
    return result


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise wrong(name, value, "a list of token ids")
    return tuple(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A string, or a list of strings."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(name, value, "a string or a list of strings")
    return tuple(value)


def salt(name: str, value: Any) -> bytes:
    try:
        return text(name, value).encode()
    except UnicodeEncodeError:
        raise wrong(name, value, "valid Unicode") from None


@dataclasses.dataclass(frozen=True, slots=True)
class StreamOptions:
    include_usage: bool = False
    """The stream ends with the usage."""


def stream_options(name: str, value: Any) -> StreamOptions:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    known = {"include_usage", "include_obfuscation", "continuous_usage_stats"}
    for key, item in value.items():
        if key not in known:
            raise InvalidRequest(f"{name}.{_shown(key)} is no field of this request", param=name)
        if item is not None:
            flag(f"{name}.{key}", item)
    if value.get("continuous_usage_stats"):
        raise InvalidRequest(f"{name}.continuous_usage_stats is true; it is not supported, so leave it out", param=name)
    return StreamOptions(bool(value.get("include_usage")))


def wrong(name: str, value: Any, right: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {kind_of(value)}; it must be {right}", param=name)


def kind_of(value: Any) -> str:
    """A JSON value in a message: short ones as they are, others by their kind."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return _shown(value)
        case str():
            return f"the string {_shown(value)}"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _shown(value: Any) -> str:
    written = json.dumps(value) if not isinstance(value, int) or abs(value) < 2**200 else "a huge number"
    return written if len(written) <= _SHOWN else written[:_SHOWN] + "…"


def _refuse_constant(constant: str) -> Any:
    raise InvalidRequest(f"body has the number {constant}, which is not JSON; numbers must be finite")
