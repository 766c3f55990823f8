"""How tokens are chosen: the parameters, their bounds, and their form on the wire."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from baton.errors import InvalidRequest

if TYPE_CHECKING:
    from baton.v1 import inference_pb2

MAX_TEMPERATURE = 100.0
MAX_STOP_TOKEN_IDS = 64
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """One request's. `check` it before use: a value that reaches the engine is a value that it can serve."""

    max_tokens: int | None = None
    """None: as many as the model's length leaves."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are suppressed until this many tokens have been generated."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    seed: int | None = None
    """None: the router draws one, so that a resumed stream goes on as it would have."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check(self, vocab_size: int) -> None:
        """Raises InvalidRequest, naming the field, its value and what would be right."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _wrong("max_tokens", self.max_tokens, "at least 1")
        if self.min_tokens < 0:
            raise _wrong("min_tokens", self.min_tokens, "at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE):
            raise _wrong("temperature", self.temperature, f"between 0 and {MAX_TEMPERATURE:g}")
        if not (math.isfinite(self.top_p) and 0 < self.top_p <= 1):
            raise _wrong("top_p", self.top_p, "above 0 and at most 1")
        if not 0 <= self.top_k < 2**31:
            raise _wrong("top_k", self.top_k, "0 (all) or a number of tokens")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise _wrong("seed", self.seed, "between 0 and 2^64 - 1")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise _wrong("stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS}")
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise _wrong("stop_token_ids", token_id, f"between 0 and {vocab_size - 1}")

    def with_defaults(self, *, max_tokens: int, seed: int) -> SamplingParams:
        """With what was left open filled in, and max_tokens bounded by what the model's length leaves."""
        wanted = max_tokens if self.max_tokens is None else min(self.max_tokens, max_tokens)
        return replace(self, max_tokens=wanted, seed=seed if self.seed is None else self.seed)

    @classmethod
    def from_proto(cls, message: inference_pb2.SamplingParams) -> SamplingParams:
        return cls(
            max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
            min_tokens=message.min_tokens,
            temperature=message.temperature,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            top_k=message.top_k,
            seed=message.seed if message.HasField("seed") else None,
            stop_token_ids=tuple(message.stop_token_ids),
            ignore_eos=message.ignore_eos,
        )

    def to_proto(self) -> inference_pb2.SamplingParams:
        from baton.v1 import inference_pb2

        return inference_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


def _wrong(param: str, value: object, right: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is {value}; it must be {right}", param=param)
