"""Block hashes: same content, same name, and never the other way round."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from baton.hashing import HASH_BYTES, block_hashes, chain_hash, root_hash

MODEL = b"model"
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=200)
SIZES = st.integers(1, 40)


def test_known_answers() -> None:
    """Fixed for ever: routers and workers of different versions share one directory."""
    root = root_hash(b"\x01\x02", adapter="a", salt=b"s")
    assert root.hex() == "b0a5311afcae4f62c77044c74f89ec6dbe60b07a23dd8159e49254ef45b91d3d"
    assert chain_hash(root, [1, 2, 70000]).hex() == "68e0a11604c6955ae7272488245cb4cd7a0bdd8dbe05e07e8d79d84ee9738968"


def test_hash_is_sha256_over_the_parent_and_little_endian_ids() -> None:
    parts = [(2).to_bytes(4, "little"), b"ab", (0).to_bytes(4, "little"), (1).to_bytes(4, "little"), b"s"]
    root = hashlib.sha256(b"baton.block.v1" + b"".join(parts)).digest()
    assert root_hash(b"ab", salt=b"s") == root
    ids = (5).to_bytes(4, "little") + (2**32 - 1).to_bytes(4, "little")
    assert chain_hash(root_hash(b"ab", salt=b"s"), [5, 2**32 - 1]) == hashlib.sha256(root + ids).digest()


@given(TOKENS, TOKENS, SIZES)
def test_common_prefix_gives_common_hashes_and_nothing_more(a: list[int], b: list[int], size: int) -> None:
    root = root_hash(MODEL)
    hashes_a, hashes_b = block_hashes(root, a, size), block_hashes(root, b, size)
    for i, (x, y) in enumerate(zip(hashes_a, hashes_b, strict=False)):
        assert (x == y) == (a[: (i + 1) * size] == b[: (i + 1) * size])


@given(TOKENS, TOKENS, SIZES)
def test_appending_tokens_keeps_the_hashes_of_full_blocks(a: list[int], more: list[int], size: int) -> None:
    root = root_hash(MODEL)
    shorter, longer = block_hashes(root, a, size), block_hashes(root, a + more, size)
    assert longer[: len(shorter)] == shorter


@given(TOKENS, SIZES)
def test_there_is_a_hash_for_each_full_block_and_with_partial_one_for_the_rest(a: list[int], size: int) -> None:
    root = root_hash(MODEL)
    full, partial = block_hashes(root, a, size), block_hashes(root, a, size, partial=True)
    assert len(full) == len(a) // size
    assert len(partial) == -(-len(a) // size)
    assert partial[: len(full)] == full
    assert all(len(h) == HASH_BYTES for h in partial)


@given(TOKENS.filter(bool), SIZES)
def test_hashes_can_be_chained_one_by_one(a: list[int], size: int) -> None:
    parent = root_hash(MODEL)
    for i, expected in enumerate(block_hashes(parent, a, size, partial=True)):
        parent = chain_hash(parent, a[i * size : (i + 1) * size])
        assert parent == expected


@given(
    st.tuples(st.binary(max_size=6), st.text(max_size=6), st.binary(max_size=6)),
    st.tuples(st.binary(max_size=6), st.text(max_size=6), st.binary(max_size=6)),
)
def test_model_adapter_and_salt_separate(a: tuple[bytes, str, bytes], b: tuple[bytes, str, bytes]) -> None:
    """Also where their bytes, run together, would be the same."""
    same = root_hash(a[0], adapter=a[1], salt=a[2]) == root_hash(b[0], adapter=b[1], salt=b[2])
    assert same == (a == b)


def test_parts_that_run_together_stay_apart() -> None:
    roots = {
        root_hash(b"ab", adapter="c", salt=b""),
        root_hash(b"a", adapter="bc", salt=b""),
        root_hash(b"a", adapter="b", salt=b"c"),
        root_hash(b"", adapter="", salt=b"abc"),
        root_hash(b"abc"),
    }
    assert len(roots) == 5


def test_different_salts_share_no_block() -> None:
    tokens = list(range(64))
    a = block_hashes(root_hash(MODEL, salt=b"tenant-a"), tokens, 16)
    b = block_hashes(root_hash(MODEL, salt=b"tenant-b"), tokens, 16)
    assert not set(a) & set(b)
