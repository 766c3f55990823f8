"""The model that is served, as workers say it in their Hello, and whether two of them serve the same one."""

from __future__ import annotations

from dataclasses import dataclass

from baton.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Meanings in proto/baton/v1/worker.proto."""

    name: str
    max_model_len: int
    block_size: int
    vocab_size: int
    model_fingerprint: bytes
    layout_fingerprint: bytes
    source: str = ""
    eos_token_ids: frozenset[int] = frozenset()

    @classmethod
    def from_proto(cls, message: worker_pb2.ModelInfo) -> ModelInfo:
        return cls(
            name=message.name,
            max_model_len=message.max_model_len,
            block_size=message.block_size,
            vocab_size=message.vocab_size,
            model_fingerprint=message.model_fingerprint,
            layout_fingerprint=message.layout_fingerprint,
            source=message.source,
            eos_token_ids=frozenset(message.eos_token_ids),
        )

    def flaw(self) -> str:
        """Why nobody could be served with it; empty where it is sound."""
        for name in ("max_model_len", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                return f"says {name} is {getattr(self, name)}; it must be at least 1"
        return "" if self.name else "says no model name"

    def difference(self, other: ModelInfo) -> str:
        """What keeps a worker of `other` from serving beside workers of this model; empty where nothing does."""
        compared = {
            "model": (self.name, other.name),
            "block size": (self.block_size, other.block_size),
            "max_model_len": (self.max_model_len, other.max_model_len),
            "vocabulary size": (self.vocab_size, other.vocab_size),
            "model fingerprint": (_short(self.model_fingerprint), _short(other.model_fingerprint)),
            "layout fingerprint": (_short(self.layout_fingerprint), _short(other.layout_fingerprint)),
        }
        return "; ".join(
            f"its {what} is {theirs}, the served one is {ours}"
            for what, (ours, theirs) in compared.items()
            if ours != theirs
        )


def _short(fingerprint: bytes) -> str:
    return fingerprint.hex()[:16] or "empty"
