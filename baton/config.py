"""Every setting of every part, its flag, its default and its variable in the environment.

A setting is a field of a frozen dataclass; dataclasses are composed. `parse` makes the command line from
them: the field `max_model_len` becomes `--max-model-len` and can come from `BATON_MAX_MODEL_LEN`. No other file
reads the environment. Where vLLM has a flag for the same thing, ours has its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from baton.errors import ConfigError

T = TypeVar("T")

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
TRANSPORTS = ("auto", "shm", "tcp")


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    check: Callable[[Any], bool] | None = None,
    right: str = "",
) -> Any:
    """A field that is a flag. `check` says whether a value will do and `right` what would."""
    return field(default=default, metadata={"help": help, "choices": choices, "check": check, "right": right})


def at_least(least: float) -> dict[str, Any]:
    return {"check": lambda value: value >= least, "right": f"at least {least:g}"}


_PORT: dict[str, Any] = {"check": lambda value: 0 <= value <= 65535, "right": "between 0 (pick a free one) and 65535"}
_POSITIVE_OR_AUTO: dict[str, Any] = {
    "check": lambda value: value >= 0,
    "right": "a positive number, or 0 to choose by itself",
}


@dataclass(frozen=True)
class ModelConfig:
    model: str = setting("", "Hugging Face directory or hub id; without it, the model in the box")
    served_model_name: str = setting("", "name that requests ask for; without it, the model's own")
    dtype: str = setting("auto", "dtype of weights and KV; auto: the checkpoint's", choices=DTYPES)
    max_model_len: int = setting(
        0, "longest prompt and answer together, in tokens; 0: the model's own limit", **_POSITIVE_OR_AUTO
    )
    device: str = setting("auto", "auto: cuda where there is one", choices=DEVICES)
    threads: int = setting(0, "CPU threads for torch; 0: share the cores out", **_POSITIVE_OR_AUTO)


@dataclass(frozen=True)
class CacheConfig:
    block_size: int = setting(16, "tokens of one KV block", **at_least(1))
    kv_blocks: int = setting(0, "blocks of the KV pool; 0: as many as memory sensibly allows", **_POSITIVE_OR_AUTO)
    enable_prefix_caching: bool = setting(True, "keep the blocks of finished requests for others to hit")


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int = setting(64, "most requests in one step", **at_least(1))
    max_num_batched_tokens: int = setting(2048, "most tokens in one step", **at_least(1))


@dataclass(frozen=True)
class TransferConfig:
    transport: str = setting("auto", "how blocks move; auto: shm on one host, tcp else", choices=TRANSPORTS)
    lease_seconds: float = setting(10.0, "how long offered blocks wait for a claim or its renewal", **at_least(0.1))


@dataclass(frozen=True)
class DiscoveryConfig:
    redis_url: str = setting("", "redis://HOST:PORT/DB of a running server")
    namespace: str = setting("baton", "keeps systems that share one Redis apart")
    heartbeat_seconds: float = setting(
        1.0, "how often a worker renews its record; it is gone after three missed", **at_least(0.05)
    )


@dataclass(frozen=True)
class LogConfig:
    log_level: str = setting("info", "least severity that is logged", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True)
class WorkerConfig:
    """`baton prefill` and `baton decode`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    log: LogConfig = field(default_factory=LogConfig)
    worker_id: str = setting("", "unique name; without it, role, host and process id")
    host: str = setting("127.0.0.1", "address to listen on")
    advertise_host: str = setting("", "host that others reach this worker by; without it, --host")
    grpc_port: int = setting(0, "port of the gRPC server; 0: any free one", **_PORT)
    metrics_port: int = setting(0, "port of /metrics; 0: any free one", **_PORT)
    drain_seconds: float = setting(30.0, "how long open requests may take to end after SIGTERM", **at_least(0))


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    unified: bool = setting(False, "be offered whole prompts, too")


@dataclass(frozen=True)
class RoutingConfig:
    local_prefill_tokens: int = setting(
        64,
        "an uncached prompt suffix of at most so many tokens is prefilled on the decode worker",
        **at_least(0),
    )
    request_timeout_seconds: float = setting(600.0, "deadline of requests that bring none", **at_least(0.001))
    resume_timeout_seconds: float = setting(
        30.0, "how long a stream that lost its worker waits for another", **at_least(0)
    )
    max_waiting_requests: int = setting(4096, "requests open at once; more are refused", **at_least(1))


@dataclass(frozen=True)
class RouterConfig:
    """`baton router`."""

    model: str = setting("", "directory or hub id of the tokenizer; without it, what the workers serve")
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    host: str = setting("127.0.0.1", "address to listen on")
    grpc_port: int = setting(50051, "port of the gRPC door; 0: any free one", **_PORT)
    http_port: int = setting(8000, "port of the HTTP door; 0: any free one", **_PORT)
    max_message_bytes: int = setting(16 * 1024 * 1024, "largest request that is read", **at_least(1024))
    drain_seconds: float = setting(30.0, "how long open requests may take to end after SIGTERM", **at_least(0))


@dataclass(frozen=True)
class UpConfig:
    """`baton up`: a whole system on one machine."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    prefill: int | None = setting(None, "prefill workers; 1 unless --unified is given", **at_least(0))
    decode: int | None = setting(None, "decode workers; 1 unless --unified is given", **at_least(0))
    unified: int | None = setting(None, "workers that do both", **at_least(0))
    host: str = setting("127.0.0.1", "address to listen on")
    grpc_port: int = setting(50051, "port of the gRPC door; 0: any free one", **_PORT)
    http_port: int = setting(8000, "port of the HTTP door; 0: any free one", **_PORT)
    drain_seconds: float = setting(30.0, "how long open requests may take to end after SIGTERM", **at_least(0))


@dataclass(frozen=True)
class _Flag:
    name: str
    type: Any
    default: Any
    help: str
    choices: Sequence[str] | None
    check: Callable[[Any], bool] | None
    right: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

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
        action: dict[str, Any] = {"default": None, "dest": flag.name}
        if flag.type is bool:
            action["action"] = argparse.BooleanOptionalAction
        else:
            action |= {"metavar": "|".join(flag.choices) if flag.choices else _METAVARS[flag.type]}
        shown = "" if flag.default in ("", None) else f" (default: {flag.default})"
        parser.add_argument(flag.option, help=f"{flag.help}{shown}".replace("%", "%%"), **action)
    given = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {}
    for flag in flags:
        raw, source = given[flag.name], flag.option
        if raw is None and flag.variable in environ:
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
            kind = int if kind == (int | None) else kind
            flags.append(_Flag(name=f.name, type=kind, default=f.default, **f.metadata))
    return flags


def _convert(flag: _Flag, raw: Any, source: str) -> Any:
    if flag.type is bool and isinstance(raw, str):
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if raw.lower() not in words:
            raise ConfigError(f"{source} is {raw!r}; it must be true or false")
        return words[raw.lower()]
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
