"""How a KV block's bytes are laid out, and the fingerprint by which two workers know that they agree."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from math import prod

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_VERSION = 1  # counts changes to the meaning of a block's bytes


@dataclass(frozen=True)
class KVLayout:
    """One block: `[num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]` of `dtype`, contiguous."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    """float32, bfloat16 or float16."""
    model_fingerprint: bytes
    """Names the weights: KV of another checkpoint is of no use, whatever its shape."""

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return prod(self.block_shape) * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> bytes:
        """16 bytes; equal only where blocks can be moved as they are."""
        fields = "\n".join(f"{name}={value!r}" for name, value in sorted(asdict(self).items()))
        return hashlib.sha256(f"baton.layout.v{_VERSION}\n{fields}".encode()).digest()[:16]

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers x {self.num_kv_heads} KV heads x {self.head_dim}, "
            f"block size {self.block_size}, {self.dtype}, model {self.model_fingerprint.hex()[:8]}"
        )
