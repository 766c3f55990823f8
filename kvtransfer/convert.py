"""Converts KV between float32, bfloat16 and float16: to the nearest value, ties to even, in numpy alone.

numpy has no bfloat16: its values are kept as their upper 16 bits of a float32, in uint16. Infinities stay infinities
and NaNs NaNs. A finite value that the new type could only hold as an infinity is refused: a limit in its place would be
off by any amount, and an infinity makes NaN of every attention that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

STORAGE: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""By dtype: numpy's type of an array that holds it."""
_TOO_LARGE_FOR_BFLOAT16 = np.uint32(0x7F7F8000).view(np.float32)
"""The least float32 that would round to infinity."""
_TOO_LARGE_FOR_FLOAT16 = np.uint16(0x4780)
"""The least bfloat16 that would round to infinity: 65,536."""
_INFINITE_BFLOAT16 = np.uint16(0x7F80)
_QUIET = np.uint32(0x40)  # a NaN whose upper bits are those of an infinity needs one of its own

Array = NDArray[Any]
Convert = Callable[[Array, Array], None]


def converter(source: str, destination: str) -> Convert:
    """`convert(values, out)` for arrays of one shape, in the STORAGE of the two dtypes. Raises OverflowError where a
    finite value would become infinite; `out` is then worthless."""
    return _CONVERTERS.get((source, destination), _copy)


def _copy(values: Array, out: Array) -> None:
    np.copyto(out, values)


def _widen(values: Array, out: Array) -> None:
    bits = out.view(np.uint32)
    bits[...] = values
    bits <<= 16


def _narrow(values: Array, out: Array) -> None:
    usual = values.min() > -_TOO_LARGE_FOR_BFLOAT16 and values.max() < _TOO_LARGE_FOR_BFLOAT16  # False with a NaN
    if not usual and bool((np.abs(values[np.isfinite(values)]) >= _TOO_LARGE_FOR_BFLOAT16).any()):
        raise OverflowError("bfloat16")
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if not usual:
        np.copyto(rounded, bits >> 16 | _QUIET, where=np.isnan(values))
    out[...] = rounded


def _cast(values: Array, out: Array) -> None:
    try:
        with np.errstate(over="raise", under="ignore", invalid="ignore"):
            out[...] = values
    except FloatingPointError:
        raise OverflowError("float16") from None


def _look_up(table: Array) -> Convert:
    def convert(values: Array, out: Array) -> None:
        np.take(table, values.view(np.uint16), out=out, mode="clip")  # none is out of bounds, and "raise" would buffer

    return convert


def _from_bfloat16_to_float16(values: Array, out: Array) -> None:
    magnitude = values & 0x7FFF
    magnitude -= _TOO_LARGE_FOR_FLOAT16  # those that are small enough wrap around, and are larger than all others
    if bool((magnitude < _INFINITE_BFLOAT16 - _TOO_LARGE_FOR_FLOAT16).any()):
        raise OverflowError("float16")
    _HALVED(values, out)


def _bfloat16(values: Array) -> Array:
    out = np.empty(values.shape, np.uint16)
    _narrow(values, out)
    return out


_EVERY = np.arange(1 << 16, dtype=np.uint16)
_FLOAT16S = _EVERY.view(np.float16).astype(np.float32)
with np.errstate(over="ignore", under="ignore", invalid="ignore"):
    _HALVED = _look_up((_EVERY.astype(np.uint32) << 16).view(np.float32).astype(np.float16))

_CONVERTERS: dict[tuple[str, str], Convert] = {
    ("bfloat16", "float32"): _widen,
    ("float32", "bfloat16"): _narrow,
    ("float32", "float16"): _cast,
    # numpy converts float16 one by one, and far slower than it looks up one of 65,536.
    ("float16", "float32"): _look_up(_FLOAT16S),
    ("float16", "bfloat16"): _look_up(_bfloat16(_FLOAT16S)),
    ("bfloat16", "float16"): _from_bfloat16_to_float16,
}
