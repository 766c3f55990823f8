"""Conversion between dtypes: torch's own result for every value, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvtransfer.convert import STORAGE, Array, converter

ALL_16 = np.arange(1 << 16, dtype=np.uint16)
"""Every 16-bit value there is."""


def tensor_of(values: Array, dtype: str) -> torch.Tensor:
    plain = torch.from_numpy(values.copy())
    return plain.view(torch.bfloat16) if dtype == "bfloat16" else plain


def converted(values: Array, source: str, destination: str) -> Array:
    out = np.empty(values.shape, STORAGE[destination])
    converter(source, destination)(values, out)
    return out


def float32_bits() -> Iterator[Array]:
    """Around every value of 16 bits: it, its neighbours, the ties and their neighbours; and many at random."""
    upper = ALL_16.astype(np.uint32) << 16
    for lower in (0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF):
        yield upper | np.uint32(lower)
    yield np.random.default_rng(5).integers(0, 1 << 32, 1 << 20, np.uint32)


def equal(ours: Array, torchs: torch.Tensor, dtype: str) -> bool:
    """Bit for bit, but that any NaN is as good as another."""
    mine = tensor_of(ours, dtype)
    same = mine.view(torch.int16 if mine.element_size() == 2 else torch.int32) == torchs.view(
        torch.int16 if mine.element_size() == 2 else torch.int32
    )
    return bool((same | (mine.isnan() & torchs.isnan())).all())


@pytest.mark.parametrize("source", ["bfloat16", "float16"])
def test_float32_holds_every_16_bit_value(source: str) -> None:
    values = ALL_16.view(STORAGE[source])
    wide = converted(values, source, "float32")
    assert equal(wide, tensor_of(values, source).float(), "float32")
    back = converted(wide, "float32", source)
    assert equal(back, tensor_of(values, source), source), "there and back nothing is lost"


@pytest.mark.parametrize("destination", ["bfloat16", "float16"])
def test_float32_is_rounded_to_the_nearest_as_torch_does_and_never_becomes_infinite(destination: str) -> None:
    dtype = getattr(torch, destination)
    for bits in float32_bits():
        values = bits.view(np.float32)
        rounded = torch.from_numpy(values).to(dtype)
        fits = (~(rounded.isinf() & torch.from_numpy(values).isfinite())).numpy()
        assert equal(converted(values[fits], "float32", destination), rounded[torch.from_numpy(fits)], destination)
        for lost in values[~fits][:3]:
            with pytest.raises(OverflowError, match=destination):
                converted(np.array([0, lost], np.float32), "float32", destination)


@pytest.mark.parametrize(("source", "destination"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_between_the_16_bit_dtypes(source: str, destination: str) -> None:
    values = ALL_16.view(STORAGE[source])
    theirs = tensor_of(values, source).float().to(getattr(torch, destination))
    fits = ~(theirs.isinf() & tensor_of(values, source).isfinite()).numpy()
    assert equal(converted(values[fits], source, destination), theirs[torch.from_numpy(fits)], destination)
    assert (~fits).any() == (destination == "float16"), "bfloat16 reaches further"
    for lost in values[~fits][::997]:
        with pytest.raises(OverflowError, match="float16"):
            converted(np.array([lost], STORAGE[source]), source, destination)


def test_one_dtype_is_copied() -> None:
    assert (converted(ALL_16, "bfloat16", "bfloat16") == ALL_16).all()


@pytest.mark.parametrize(("destination", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_the_error_is_half_a_unit_in_the_last_place(destination: str, bits: int) -> None:
    values = np.random.default_rng(1).standard_normal(1 << 20, np.float32)
    rounded = tensor_of(converted(values, "float32", destination), destination).float().numpy()
    error = np.abs(rounded - values) / np.abs(values)
    normal = np.abs(values) >= 2.0**-14
    assert 0.4 * 2.0**-bits < error[normal].max() <= 2.0**-bits
