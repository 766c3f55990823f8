"""The model that is served, as workers say it in their Hello, and whether two of them serve the same one."""

from __future__ import annotations

from dataclasses import dataclass

from baton.layout import KVLayout
from baton.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Meanings in proto/baton/v1/worker.proto."""

    name: str
    max_model_len: int
    vocab_size: int
    max_prompt_len: int
    layout: KVLayout
    """The worker's own: others may lay out the same KV in another way."""
    source: str = ""
    eos_token_ids: frozenset[int] = frozenset()

    @classmethod
    def from_proto(cls, message: worker_pb2.ModelInfo) -> ModelInfo:
        """Raises HandoffFailed where the layout can't be understood: then nothing could be handed over."""
        return cls(
            name=message.name,
            max_model_len=message.max_model_len,
            vocab_size=message.vocab_size,
            max_prompt_len=message.max_prompt_len,
            layout=KVLayout.from_proto(message.layout, message.layout_fingerprint),
            source=message.source,
            eos_token_ids=frozenset(message.eos_token_ids),
        )

    @property
    def model_fingerprint(self) -> bytes:
        return self.layout.model_fingerprint

    def flaw(self) -> str:
        """Why nobody could be served with it; empty where it is sound."""
        for name in ("max_model_len", "vocab_size"):
            if getattr(self, name) < 1:
                return f"says {name} is {getattr(self, name)}; it must be at least 1"
        return "" if self.name else "says no model name"

    def difference(self, other: ModelInfo) -> str:
        """What keeps a worker of `other` from serving beside workers of this model; empty where nothing does."""
        compared = {
            "model": (self.name, other.name),
            "max_model_len": (self.max_model_len, other.max_model_len),
            "vocabulary size": (self.vocab_size, other.vocab_size),
            "model fingerprint": (_short(self.model_fingerprint), _short(other.model_fingerprint)),
            "number of layers": (self.layout.num_layers, other.layout.num_layers),
            "number of KV heads": (self.layout.num_kv_heads, other.layout.num_kv_heads),
            "width of a head": (self.layout.head_dim, other.layout.head_dim),
        }
        return "; ".join(
            f"its {what} is {theirs}, the served one is {ours}"
            for what, (ours, theirs) in compared.items()
            if ours != theirs
        )


def _short(fingerprint: bytes) -> str:
    return fingerprint.hex()[:16]
