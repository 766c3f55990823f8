"""The small things that all parts hold on to: errors, layout, ids, clock."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import grpc
import pytest

from baton import errors
from baton.clock import Clock, ManualClock, MonotonicClock
from baton.errors import BatonError, InvalidRequest
from baton.ids import AttemptId, new_incarnation, new_request_id, new_transfer_id
from baton.layout import DTYPE_BYTES, KVLayout

LAYOUT = KVLayout(
    num_layers=2, num_kv_heads=3, block_size=16, head_dim=8, dtype="bfloat16", model_fingerprint=b"m" * 32
)


def _subclasses(cls: type[BatonError]) -> Iterator[type[BatonError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


ERRORS = [cls for cls in _subclasses(BatonError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_says_what_a_client_sees_of_it(cls: type[BatonError]) -> None:
    assert isinstance(cls.grpc_status, grpc.StatusCode)
    assert cls.grpc_status is not grpc.StatusCode.OK
    assert 400 <= cls.http_status <= 599
    assert cls.kind
    assert str(cls("what was wrong")) == "what was wrong"


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_both_doors_agree_on_whose_fault_it_is(cls: type[BatonError]) -> None:
    clients_fault = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    }
    assert (cls.http_status < 500) == (cls.grpc_status in clients_fault)


def test_the_drawn_tree_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]  # the module has one
        match = re.match(r"([│ ]*(?:[├└]── )?)([A-Z]\w+)(?:  |$)", line)
        if match and (match[1] or match[2] == "BatonError"):
            path[len(match[1]) // 4 :] = [match[2]]
            drawn[match[2]] = path[-2] if len(path) > 1 else "Exception"
    assert drawn == {cls.__name__: cls.__base__.__name__ for cls in ERRORS if cls.__base__}


def test_an_error_names_the_field_that_is_wrong() -> None:
    assert InvalidRequest("top_p is 2; it must be …", param="top_p").param == "top_p"
    assert InvalidRequest("no field").param is None


OTHERS = {
    "num_layers": 3,
    "num_kv_heads": 2,
    "block_size": 32,
    "head_dim": 16,
    "dtype": "float16",
    "model_fingerprint": b"n" * 32,
    "tp_size": 3,
    "tp_rank": 1,
}


def test_every_field_of_the_layout_is_in_its_fingerprint() -> None:
    assert OTHERS.keys() == {f.name for f in dataclasses.fields(KVLayout)}
    changed = [dataclasses.replace(LAYOUT, **{name: value}) for name, value in OTHERS.items()]  # type: ignore[arg-type]  # each value is its field's
    prints = {layout.fingerprint for layout in (LAYOUT, *changed)}
    assert len(prints) == 1 + len(OTHERS)
    assert all(len(p) == 16 for p in prints)


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert dataclasses.replace(LAYOUT).fingerprint == LAYOUT.fingerprint


@pytest.mark.parametrize(("dtype", "size"), DTYPE_BYTES.items())
def test_block_bytes_counts_keys_and_values_of_all_layers(dtype: str, size: int) -> None:
    assert dataclasses.replace(LAYOUT, dtype=dtype).block_bytes == 2 * 2 * 3 * 16 * 8 * size


def test_a_layout_reads_as_a_sentence_for_mismatch_messages() -> None:
    assert str(LAYOUT) == "2 layers x 3 KV heads x 8, block size 16, bfloat16, model 6d6d6d6d"


def test_ids_are_new_each_time() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100
    assert len({new_transfer_id() for _ in range(100)}) == 100
    incarnations = {new_incarnation() for _ in range(100)}
    assert len(incarnations) == 100
    assert all(0 < i < 2**63 for i in incarnations), "0 is what an unset field reads as"


def test_transfer_ids_cannot_be_guessed() -> None:
    assert len(new_transfer_id()) == 16


def test_an_attempt_reads_as_request_and_number() -> None:
    assert str(AttemptId("req-1", 2)) == "req-1#2"
    assert AttemptId("r", 1) != AttemptId("r", 2)


def test_monotonic_clock_never_goes_back() -> None:
    clock: Clock = MonotonicClock()
    readings = [clock.now() for _ in range(1000)]
    assert readings == sorted(readings)


def test_manual_clock_moves_only_by_hand() -> None:
    clock = ManualClock(5.0)
    assert clock.now() == clock.now() == 5.0
    clock.advance(0.25)
    assert clock.now() == 5.25
