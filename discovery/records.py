"""What a worker says of itself in Redis, and the checks that it passes on the way out of there.

Whoever can reach Redis can write there, so each field has a form and a bound.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from baton.errors import ConfigError
from baton.ids import Incarnation, WorkerId

MAX_RECORD_BYTES = 4096
"""Longest record that is written or read."""

_ID = re.compile(r"[!-z|~]{1,128}")  # printable ASCII without space and braces, which mean something in keys
_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%]{2,64}\]):([0-9]{1,5})")
_MAX_MODEL = 512
_MAX_FINGERPRINT = 64
_MAX_BLOCK_SIZE = 1 << 16
_MAX_PID = 1 << 31
_MAX_INCARNATION = 1 << 64


class WorkerRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"
    """A decode worker that is offered whole prompts."""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One live worker. Raises ConfigError where a field is out of its bounds."""

    id: WorkerId
    incarnation: Incarnation
    role: WorkerRole
    address: str
    """`host:port` of its gRPC server, as others reach it."""
    metrics: str
    """`host:port` of its /metrics; empty if it serves none."""
    pid: int
    model: str
    """Served name."""
    block_size: int
    """Tokens of one block."""
    model_fingerprint: bytes
    """Names the weights; at most 64 bytes."""

    def __post_init__(self) -> None:
        _want(_ID.fullmatch(self.id), "worker id", self.id, "1 to 128 printable ASCII characters, no space or brace")
        _want(0 < self.incarnation < _MAX_INCARNATION, "incarnation", self.incarnation, "from 1 to 2**64 - 1")
        _want(isinstance(self.role, WorkerRole), "role", self.role, "a WorkerRole")
        _want(_is_address(self.address), "worker address", self.address, "HOST:PORT with a port from 1 to 65535")
        _want(
            self.metrics == "" or _is_address(self.metrics),
            "metrics address",
            self.metrics,
            "HOST:PORT with a port from 1 to 65535, or empty",
        )
        _want(0 < self.pid < _MAX_PID, "pid", self.pid, f"from 1 to {_MAX_PID - 1}")
        _want(
            0 < len(self.model) <= _MAX_MODEL and self.model.isprintable(),
            "model name",
            self.model,
            f"1 to {_MAX_MODEL} printable characters",
        )
        _want(0 < self.block_size <= _MAX_BLOCK_SIZE, "block size", self.block_size, f"from 1 to {_MAX_BLOCK_SIZE}")
        _want(
            len(self.model_fingerprint) <= _MAX_FINGERPRINT,
            "model fingerprint",
            self.model_fingerprint.hex(),
            f"at most {_MAX_FINGERPRINT} bytes",
        )

    def to_json(self) -> bytes:
        """At most MAX_RECORD_BYTES; equal records give equal bytes."""
        fields = asdict(self) | {"model_fingerprint": self.model_fingerprint.hex()}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> WorkerRecord:
        """Fields that it does not know are left aside. Raises ConfigError for anything that is not a record."""
        _want(len(raw) <= MAX_RECORD_BYTES, "size of the record", len(raw), f"at most {MAX_RECORD_BYTES} bytes")
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError):
            raise ConfigError(f"record is {raw[:80]!r}; it must be JSON") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"record is {raw[:80]!r}; it must be a JSON object")
        try:
            return cls(
                id=WorkerId(_field(fields, "id", str)),
                incarnation=Incarnation(_field(fields, "incarnation", int)),
                role=WorkerRole(_field(fields, "role", str)),
                address=_field(fields, "address", str),
                metrics=_field(fields, "metrics", str),
                pid=_field(fields, "pid", int),
                model=_field(fields, "model", str),
                block_size=_field(fields, "block_size", int),
                model_fingerprint=bytes.fromhex(_field(fields, "model_fingerprint", str)),
            )
        except ValueError as error:  # the role, or the hex
            raise ConfigError(f"record has a field that cannot be read: {error}") from None


def _field(fields: dict[str, Any], name: str, kind: type[Any]) -> Any:
    value = fields.get(name)
    if type(value) is not kind:  # exactly: a bool is an int to isinstance
        raise ConfigError(f"record's {name} is {value!r:.80}; it must be of type {kind.__name__}")
    return value


def _is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[1]) <= 65535


def _want(holds: object, name: str, value: object, right: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r:.200}; it must be {right}")
