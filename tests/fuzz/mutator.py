"""Damages messages: by field, so that what is wrong lies deep, and by byte, so that anything may be wrong."""

from __future__ import annotations

import math
import random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_M = TypeVar("_M", bound=Message)

_INTS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
_FLOATS = (0.0, -0.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan)
_TEXTS = ("", "x", "x" * 256, "x" * 257, "\x00", "\n", "ä" * 200, "../../etc/passwd", "%s%n")
_LARGE = 70_000


class Mutator:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def wire(self, message: Message) -> bytes:
        """Damaged in one way, in the other, in both, or not at all."""
        how = self.rng.random()
        if how < 0.65:
            message = self.message(message)
        wire = message.SerializeToString()
        return self.data(wire) if 0.55 < how < 0.95 else wire

    def message(self, message: _M) -> _M:
        damaged = type(message)()
        damaged.CopyFrom(message)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            self._damage(damaged)
        return damaged

    def data(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        for _ in range(self.rng.choice((1, 1, 2, 4))):
            self._damage_bytes(damaged)
        return bytes(damaged)

    def _damage_bytes(self, data: bytearray) -> None:
        rng = self.rng
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 16))
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del data[at:]
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 12))

    def _damage(self, message: Message) -> None:
        rng = self.rng
        if not message.DESCRIPTOR.fields:
            return
        present = [field for field, _ in message.ListFields()]
        field = rng.choice(present if present and rng.random() < 0.85 else message.DESCRIPTOR.fields)
        inner = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if field.is_repeated:
            self._damage_list(message, field)
        elif inner and rng.random() < 0.9:
            self._damage(getattr(message, field.name))
            getattr(message, field.name).SetInParent()
        elif inner or rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, self._value(field, getattr(message, field.name)))

    def _damage_list(self, message: Message, field: FieldDescriptor) -> None:
        rng, items = self.rng, getattr(message, field.name)
        inner = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        what = rng.randrange(5)
        if what == 0 or not items:
            self._grow(items, field, inner)
        elif what == 1:
            del items[rng.randrange(len(items)) :]
        elif what == 2:
            del items[rng.randrange(len(items))]
        elif what == 3 and rng.random() < 0.05:
            items.extend([items[0]] * (_LARGE // (16 if inner else 1)))
        elif inner:
            self._damage(rng.choice(items))
        else:
            at = rng.randrange(len(items))
            items[at] = self._value(field, items[at])

    def _grow(self, items: Any, field: FieldDescriptor, inner: bool) -> None:
        if inner and items:
            items.append(self.rng.choice(items))
        elif inner:
            items.add()
        else:
            items.append(self._value(field, items[0] if items else None))

    def _value(self, field: FieldDescriptor, value: Any) -> Any:
        rng = self.rng
        if field.cpp_type in _INTS:
            least, most = _INTS[field.cpp_type]
            near = int(value or 0) + rng.randint(-2, 2)
            anywhere = rng.randint(least, most)
            chosen = rng.choice((near, near, 0, 1, least, most, most - 1, rng.randint(0, 100), anywhere))
            return min(most, max(least, chosen))
        if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return rng.choice((*_FLOATS, rng.random()))
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return not value
        if field.type == FieldDescriptor.TYPE_BYTES:
            if rng.random() < 0.5:
                return self.data(value or b"")
            return rng.randbytes(rng.choice((0, 1, 15, 16, 16, 17, 31, 32, 33, 4097)))
        return rng.choice((*_TEXTS, f"{value}x", str(value)[:-1]))
