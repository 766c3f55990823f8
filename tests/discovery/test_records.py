from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError
from discovery import WorkerRecord, WorkerRole
from discovery.records import MAX_RECORD_BYTES
from tests.discovery.makers import record


@given(
    worker=st.from_regex(r"[!-z|~]{1,128}", fullmatch=True),
    incarnation=st.integers(1, 2**64 - 1),
    role=st.sampled_from(WorkerRole),
    pid=st.integers(1, 2**31 - 1),
    model=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=512),
    fingerprint=st.binary(max_size=64),
)
def test_a_record_survives_json_and_its_size_bound(
    worker: str, incarnation: int, role: WorkerRole, pid: int, model: str, fingerprint: bytes
) -> None:
    before = record(worker, incarnation, role=role, pid=pid, model=model, model_fingerprint=fingerprint)
    raw = before.to_json()
    assert len(raw) <= MAX_RECORD_BYTES
    assert WorkerRecord.from_json(raw) == before


def test_the_longest_record_is_read_back() -> None:
    longest = record(
        '"' * 128,
        2**64 - 1,
        address="h" * 253 + ":65535",
        metrics="h" * 253 + ":65535",
        model="\U0001f3bc" * 512,
        model_fingerprint=b"\xff" * 64,
    )
    assert WorkerRecord.from_json(longest.to_json()) == longest


def test_fields_of_a_later_version_are_left_aside() -> None:
    raw = json.loads(record().to_json()) | {"zone": "eu", "extra": {"a": [1]}}
    assert WorkerRecord.from_json(json.dumps(raw).encode()) == record()


BAD_FIELDS = [
    ("id", ""),
    ("id", "a b"),
    ("id", "a{b}"),
    ("id", "x" * 129),
    ("id", 5),
    ("incarnation", 0),
    ("incarnation", -1),
    ("incarnation", 2**64),
    ("incarnation", "7"),
    ("incarnation", 7.0),
    ("incarnation", True),
    ("role", "boss"),
    ("role", None),
    ("address", "127.0.0.1"),
    ("address", "127.0.0.1:0"),
    ("address", "127.0.0.1:65536"),
    ("address", "a b:80"),
    ("address", "unix:/tmp/x"),
    ("address", "host:80\n"),
    ("metrics", "nowhere"),
    ("pid", 0),
    ("pid", 2**31),
    ("model", ""),
    ("model", "a\nb"),
    ("model", "\ud800"),
    ("model", "x" * 513),
    ("block_size", 0),
    ("block_size", 1 << 20),
    ("model_fingerprint", "zz"),
    ("model_fingerprint", "00" * 65),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_field_out_of_bounds_is_refused(name: str, value: object) -> None:
    raw = json.loads(record().to_json()) | {name: value}
    with pytest.raises(ConfigError):
        WorkerRecord.from_json(json.dumps(raw).encode())


@pytest.mark.parametrize("name", sorted(json.loads(record().to_json())))
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    raw = json.loads(record().to_json())
    del raw[name]
    with pytest.raises(ConfigError, match=name):
        WorkerRecord.from_json(json.dumps(raw).encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 4000, b"9" * 4096, b" " * 4097])
def test_what_is_no_record_is_refused(raw: bytes) -> None:
    with pytest.raises(ConfigError):
        WorkerRecord.from_json(raw)


@given(raw=st.binary(max_size=300))
def test_any_bytes_are_a_record_or_refused(raw: bytes) -> None:
    try:
        WorkerRecord.from_json(raw)
    except ConfigError:
        return


def test_a_worker_with_a_bad_id_is_told_what_is_right() -> None:
    with pytest.raises(ConfigError, match=r"worker id is 'my worker'; it must be .*no space"):
        record("my worker")


def test_ipv6_addresses_are_addresses() -> None:
    assert record(address="[::1]:7001").address == "[::1]:7001"
