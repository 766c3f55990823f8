"""Makes command lines from frozen dataclasses: one field, one flag, one variable in the environment.

The field `max_model_len` becomes `--max-model-len` and can come from `BATON_MAX_MODEL_LEN`. A field of type
`tuple[str, ...]` is a flag that may be given several times; in the environment its values have commas between. No other
file reads the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from baton.errors import ConfigError

T = TypeVar("T")


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    check: Callable[[Any], bool] | None = None,
    right: str = "",
    positional: bool = False,
) -> Any:
    """A field that is a flag, or an argument that needs none. `check` says whether a value will do, `right` what
    would."""
    metadata = {"help": help, "choices": choices, "check": check, "right": right, "positional": positional}
    return field(default=default, metadata=metadata)


def at_least(least: float) -> dict[str, Any]:
    return {"check": lambda value: value >= least, "right": f"at least {least:g}"}


@dataclass(frozen=True)
class _Flag:
    name: str
    type: Any
    default: Any
    help: str
    choices: Sequence[str] | None
    check: Callable[[Any], bool] | None
    right: str
    positional: bool

    @property
    def option(self) -> str:
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "BATON_" + self.name.upper()


def parse(cls: type[T], argv: Sequence[str], *, prog: str, environ: Mapping[str, str] | None = None) -> T:
    """A `cls` from flags, the environment and defaults, in this order.

    Raises ConfigError; prints help and exits on --help.
    """
    environ = os.environ if environ is None else environ
    parser = _Parser(prog=prog, description=(cls.__doc__ or "").strip(), allow_abbrev=False)
    flags = _flags(cls)
    for flag in flags:
        action: dict[str, Any] = {"default": None}
        if not flag.positional:
            action["dest"] = flag.name
        if flag.positional:
            action |= {"nargs": "?", "metavar": flag.name.upper()}
        elif flag.type is bool:
            action["action"] = argparse.BooleanOptionalAction
        elif flag.type is tuple:
            action |= {"action": "append", "metavar": "VALUE"}
        else:
            action |= {"metavar": "|".join(flag.choices) if flag.choices else _METAVARS[flag.type]}
        shown = "" if flag.default in ("", None, ()) else f" (default: {flag.default})"
        name = flag.name if flag.positional else flag.option
        parser.add_argument(name, help=f"{flag.help}{shown}".replace("%", "%%"), **action)
    given = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {}
    for flag in flags:
        raw, source = given[flag.name], flag.option
        if raw is None and not flag.positional and flag.variable in environ:
            raw, source = environ[flag.variable], flag.variable
        values[flag.name] = flag.default if raw is None else _convert(flag, raw, source)
    return _build(cls, values)


def to_argv(config: Any) -> list[str]:
    """The flags that make `parse` give `config` again: so `baton up` hands settings to the parts it starts."""
    argv: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        option = "--" + f.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            argv += to_argv(value)
        elif isinstance(value, bool):
            argv.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, tuple):
            argv += [f"{option}={each}" for each in value]
        elif value is not None:
            argv.append(f"{option}={value}")
    return argv


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


_METAVARS = {int: "N", float: "X", str: "NAME"}


def _flags(cls: type[Any]) -> list[_Flag]:
    flags: list[_Flag] = []
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            flags += _flags(kind)  # type: ignore[arg-type]  # is_dataclass also admits instances; a hint is a class
        else:
            if isinstance(kind, UnionType):  # `int | None`: absent is a value of its own
                kind = next(arg for arg in get_args(kind) if arg is not type(None))
            kind = get_origin(kind) or kind
            flags.append(_Flag(name=f.name, type=kind, default=f.default, **f.metadata))
    return flags


def _convert(flag: _Flag, raw: Any, source: str) -> Any:
    if flag.type is bool and isinstance(raw, str):
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if raw.lower() not in words:
            raise ConfigError(f"{source} is {raw!r}; it must be true or false")
        return words[raw.lower()]
    if flag.type is tuple:
        values = raw.split(",") if isinstance(raw, str) else raw
        return tuple(_convert(replace(flag, type=str), each, source) for each in values)
    try:
        value = flag.type(raw)
    except ValueError:
        what = "a whole number" if flag.type is int else "a number"
        raise ConfigError(f"{source} is {raw!r}; it must be {what}") from None
    if flag.type is float and not math.isfinite(value):
        raise ConfigError(f"{source} is {raw!r}; it must be a finite number")
    if flag.choices is not None and value not in flag.choices:
        raise ConfigError(f"{source} is {raw!r}; it must be one of {', '.join(flag.choices)}")
    if flag.check is not None and not flag.check(value):
        raise ConfigError(f"{source} is {raw}; it must be {flag.right}")
    return value


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    hints = get_type_hints(cls)
    parts: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass by contract
        kind = hints[f.name]
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        parts[f.name] = _build(kind, values) if nested else values[f.name]
    return cls(**parts)
