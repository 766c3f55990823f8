"""How a KV block's bytes are laid out, the fingerprint by which two workers know that they agree, and what may differ.

A layout says where each value is and of which type. Blocks of the same model that differ in nothing else are re-laid
on their way into another worker's pool (kvtransfer/relayout.py); `mismatch` says what cannot be.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from math import prod

from baton.errors import LayoutMismatch, TransferRefused
from baton.v1 import transfer_pb2 as pb

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_BLOCK_SIZE = 1 << 16
_VERSION = 2  # counts changes to the meaning of a block's bytes, the order inside one head's tile among them
_MAX_SIZE = 1 << 16  # layers, heads, a head's width, tensor-parallel ranks
_MAX_BLOCK_BYTES = 1 << 32
_MAX_FINGERPRINT = 64
_DTYPES = " or ".join(DTYPE_BYTES)
_HOLDS = {"float32": {"float32", "bfloat16", "float16"}, "bfloat16": {"bfloat16"}, "float16": {"float16"}}
"""By dtype: those whose every value it has too."""


@dataclass(frozen=True)
class KVLayout:
    """One block: `[num_layers, 2 (K, V), heads, block_size, head_dim]` of `dtype`, contiguous."""

    num_layers: int
    num_kv_heads: int
    """The model's. A block has those of its rank alone: see `heads`."""
    block_size: int
    head_dim: int
    dtype: str
    """float32, bfloat16 or float16."""
    model_fingerprint: bytes
    """Names the weights: KV of another checkpoint is of no use, whatever its shape."""
    tp_size: int = 1
    """Workers that share the model's heads among them."""
    tp_rank: int = 0

    @property
    def heads(self) -> range:
        """Which of the model's KV heads a block holds. Where there are more ranks than heads, several hold the same."""
        first = self.tp_rank * self.num_kv_heads // self.tp_size
        return range(first, first + max(1, self.num_kv_heads // self.tp_size))

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, len(self.heads), self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return prod(self.block_shape) * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> bytes:
        """16 bytes; equal only where blocks can be moved as they are."""
        fields = "\n".join(f"{name}={value!r}" for name, value in sorted(asdict(self).items()))
        return hashlib.sha256(f"baton.layout.v{_VERSION}\n{fields}".encode()).digest()[:16]

    @classmethod
    def from_proto(cls, message: pb.Layout, fingerprint: bytes) -> KVLayout:
        """Raises TransferRefused where a field is out of bounds, and LayoutMismatch where `fingerprint` is not that of
        the layout: whoever sent it lays out its blocks in a way that these fields don't tell."""
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size", "tp_size"):
            _check(name, getattr(message, name), 1, _MAX_SIZE)
        _check("tp_rank", message.tp_rank, 0, message.tp_size - 1)
        if message.num_kv_heads % message.tp_size and message.tp_size % message.num_kv_heads:
            raise TransferRefused(
                f"malformed: layout.tp_size is {message.tp_size}; it must divide the {message.num_kv_heads} KV heads, "
                "or be a multiple of them"
            )
        if message.dtype not in DTYPE_BYTES:
            raise TransferRefused(f"malformed: layout.dtype is {message.dtype[:16]!r}; it must be {_DTYPES}")
        _check("model_fingerprint's length", len(message.model_fingerprint), 1, _MAX_FINGERPRINT)
        layout = cls(
            num_layers=message.num_layers,
            num_kv_heads=message.num_kv_heads,
            block_size=message.block_size,
            head_dim=message.head_dim,
            dtype=message.dtype,
            model_fingerprint=message.model_fingerprint,
            tp_size=message.tp_size,
            tp_rank=message.tp_rank,
        )
        _check("size of a block", layout.block_bytes, 1, _MAX_BLOCK_BYTES)
        if layout.fingerprint != fingerprint:
            raise LayoutMismatch(
                f"the layout's fingerprint is {fingerprint.hex() or 'empty'}; here {layout} has "
                f"{layout.fingerprint.hex()}: the two sides must run versions of Baton that lay out blocks alike"
            )
        return layout

    def to_proto(self) -> pb.Layout:
        return pb.Layout(**asdict(self))

    def __str__(self) -> str:
        shard = f", rank {self.tp_rank} of {self.tp_size}" if self.tp_size > 1 else ""
        return (
            f"{self.num_layers} layers x {self.num_kv_heads} KV heads x {self.head_dim}, "
            f"block size {self.block_size}, {self.dtype}, model {self.model_fingerprint.hex()[:8]}{shard}"
        )


def mismatch(source: KVLayout, destination: KVLayout) -> str:
    """What keeps KV of `source` from being re-laid into `destination`, with both values; empty where nothing does."""
    compared = {
        "the model's fingerprint": (source.model_fingerprint.hex()[:16], destination.model_fingerprint.hex()[:16]),
        "the number of layers": (source.num_layers, destination.num_layers),
        "the number of KV heads": (source.num_kv_heads, destination.num_kv_heads),
        "the width of a head": (source.head_dim, destination.head_dim),
    }
    different = {what: pair for what, pair in compared.items() if pair[0] != pair[1]}
    if not different and not shared_heads(source, destination):
        different = {"the share of KV heads": (_named(source.heads), _named(destination.heads))}
    return "; ".join(f"{what} is {a} at the source, {b} at the destination" for what, (a, b) in different.items())


def differences(source: KVLayout, destination: KVLayout) -> str:
    """What is re-laid between two layouts that match, for a log; empty where they are equal."""
    compared = {
        "block size": (source.block_size, destination.block_size),
        "dtype": (source.dtype, destination.dtype),
        "KV heads": (_named(source.heads), _named(destination.heads)),
    }
    return ", ".join(f"{what} {its} to {ours}" for what, (its, ours) in compared.items() if its != ours)


def rounds(source: KVLayout, destination: KVLayout) -> bool:
    """Whether values of `source` may have no equal in `destination`."""
    return source.dtype not in _HOLDS[destination.dtype]


def shared_heads(source: KVLayout, destination: KVLayout) -> range:
    """Of the model's KV heads: those that blocks of both hold."""
    return range(max(source.heads.start, destination.heads.start), min(source.heads.stop, destination.heads.stop))


def _named(heads: range) -> str:
    return f"{heads.start} to {heads.stop - 1}" if len(heads) > 1 else f"{heads.start}"


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise TransferRefused(f"malformed: layout.{name} is {value}; it must be between {least} and {most}")
