"""What `baton bench` can be told. Flags that a worker has as well are the worker's own."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field

from baton.config import CacheConfig, ModelConfig, SchedulerConfig
from baton.errors import ConfigError
from baton.flags import at_least, setting

MEASURES = ("w1", "decode", "prefill", "w3", "steps", "start")
_FILE = "gguf"
"""The option of a peer that names a file."""
PEER_KINDS = ("vllm", "transformers", "llama.cpp", "baton", "command")


@dataclass(frozen=True)
class EngineBenchConfig:
    """`baton bench engine`: the engine alone, in this process, and beside it what the machine allows and peers do."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    measure: tuple[str, ...] = setting((), f"one of {', '.join(MEASURES)}; may be given several times; without it, all")
    peer: tuple[str, ...] = setting(
        (),
        "'KIND[:LABEL]=PYTHON [OPTION=VALUE …]', measured in turns with the engine; may be given several times; KIND "
        "is vllm, transformers, llama.cpp or baton, or command, behind which stands what to run",
    )
    rounds: int = setting(3, "how often each side is measured; figures are medians", **at_least(1))
    batches: str = setting("1,8,32", "batch sizes of decode steps")
    contexts: str = setting("64,256,1024,4096", "context lengths of decode steps")
    prompt_lengths: str = setting("128,512,2048", "prompt lengths of prefill rates")
    out: str = setting("", "directory for JSON and plots; without it, none are written")


@dataclass(frozen=True)
class ServeBenchConfig:
    """`baton bench serve`: an online load against servers that speak OpenAI's completions."""

    endpoint: tuple[str, ...] = setting(
        (), "'NAME=URL' of a server; may be given several times, and they are measured in turns"
    )
    rate: tuple[str, ...] = setting(
        ("0.5", "inf"), "requests a second, arriving at random, or inf: all at once; may be given several times"
    )
    requests: int = setting(64, "requests of each rate and round", **at_least(1))
    rounds: int = setting(2, "how often each endpoint is measured; figures are medians", **at_least(1))
    model: str = setting("", "model name to ask for; without it, the first that /v1/models lists")
    vocab_size: int = setting(32000, "prompts are random token ids from 300 to below this", **at_least(301))
    input_len: int = setting(256, "mean prompt length in tokens", **at_least(1))
    output_len: int = setting(64, "mean answer length in tokens", **at_least(1))
    range_ratio: float = setting(
        0.5,
        "lengths lie evenly within this share of the mean",
        check=lambda value: 0 <= value < 1,
        right="at least 0 and below 1",
    )
    ttft_objective_ms: float = setting(0.0, "a good request's first token comes within this; 0: any", **at_least(0))
    itl_objective_ms: float = setting(
        0.0, "99 % of a good request's gaps between chunks are within this; 0: any", **at_least(0)
    )
    return_token_ids: bool = setting(
        True, "ask for token ids with the text, so that a token without a text of its own is seen"
    )
    timeout: float = setting(600.0, "seconds until a request is given up", **at_least(0.001))
    seed: int = setting(0, "of arrivals, lengths and token ids")
    out: str = setting("", "directory for JSON and plots; without it, none are written")


@dataclass(frozen=True)
class PeerSpec:
    name: str
    """`kind` or `kind:label`; names its column."""
    kind: str
    command: tuple[str, ...]
    """The Python that has it; of kind `command`, all of what to run."""
    options: dict[str, str]


def parse_peer(text: str) -> PeerSpec:
    """Raises ConfigError."""
    name, equals, rest = text.partition("=")
    kind, _, label = name.partition(":")
    words = shlex.split(rest)
    if kind not in PEER_KINDS or not equals or not words:
        raise ConfigError(
            f"--peer is {text!r}; it must be 'KIND[:LABEL]=PYTHON [OPTION=VALUE …]', KIND one of "
            f"{', '.join(PEER_KINDS)}"
        )
    if kind == "command":
        return PeerSpec(label or kind, kind, tuple(words), {})
    options = dict(word.partition("=")[::2] for word in words[1:])
    if _FILE in options:
        options[_FILE] = os.path.abspath(options[_FILE])
        if not os.path.isfile(options[_FILE]):
            raise ConfigError(f"--peer {name}: {_FILE} is {options[_FILE]}, where there is no file")
    return PeerSpec(name, kind, (_program(words[0]),), options)


def _program(text: str) -> str:
    """Good in every directory, for a peer runs in one of its own. Links stay: a virtual environment's Python is one."""
    return os.path.abspath(text) if "/" in text else text


def parse_endpoint(text: str) -> tuple[str, str]:
    """Name and base URL. Raises ConfigError."""
    name, _, url = text.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise ConfigError(f"--endpoint is {text!r}; it must be NAME=http://HOST:PORT")
    return name, url.rstrip("/").removesuffix("/v1")


def parse_sizes(flag: str, text: str) -> tuple[int, ...]:
    """Raises ConfigError."""
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"{flag} is {text!r}; it must be whole numbers above 0 with commas between")
    return sizes
