"""How `baton bench engine` speaks with a peer: JSON lines over stdin and stdout of a subprocess. Standard library only.

    started with     what `Settings` has, as one JSON object behind the command
    peer, once       PEER {"name": "vllm 0.32.0"}                    it is ready
    bench            {"prompts": [[id, …], …], "max_tokens": [n, …]}
    peer             PEER {"seconds": 1.25, "generated": [n, …]}     all were generated, greedily, past any end
    bench            closes stdin; the peer ends

Lines of the peer that do not begin with PEER are its own affair: engines write to stdout, too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PREFIX = "PEER "


@dataclass(frozen=True)
class Settings:
    """The same for our engine and for every peer."""

    model: str
    dtype: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    options: dict[str, Any] = field(default_factory=dict)
    """The peer's own, as they were given."""


Run = Callable[[list[list[int]], list[int]], list[int]]
"""Prompts and how many tokens to generate for each; returns how many were."""


def settings() -> Settings:
    """Options that are JSON are taken as what they say: numbers, true, false."""
    given = Settings(**json.loads(sys.argv[-1]))
    given.options.update({name: _value(text) for name, text in given.options.items()})
    return given


def serve(name: str, run: Run) -> None:
    """Says that the peer is ready, and answers until there is nothing more to do."""
    _say({"name": name})
    for line in sys.stdin:
        jobs = json.loads(line)
        started = time.perf_counter()
        generated = run(jobs["prompts"], jobs["max_tokens"])
        _say({"seconds": time.perf_counter() - started, "generated": generated})


def _say(values: dict[str, Any]) -> None:
    print(PREFIX + json.dumps(values), flush=True)


def _value(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text
