"""Which layouts match, which of the model's heads a block holds, and what is said where something differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.layout import DTYPE_BYTES, KVLayout, differences, mismatch, rounds, shared_heads
from baton.v1 import transfer_pb2 as pb

LAYOUT = KVLayout(24, 4, 16, 64, "bfloat16", b"m" * 16)


def shard(rank: int, size: int, heads: int = 4) -> KVLayout:
    return replace(LAYOUT, num_kv_heads=heads, tp_size=size, tp_rank=rank)


@given(
    st.builds(
        KVLayout,
        num_layers=st.integers(1, 100),
        num_kv_heads=st.sampled_from([4, 8, 16]),
        block_size=st.integers(1, 128),
        head_dim=st.integers(1, 256),
        dtype=st.sampled_from(list(DTYPE_BYTES)),
        model_fingerprint=st.binary(min_size=1, max_size=64),
        tp_size=st.just(4),
        tp_rank=st.integers(0, 3),
    )
)
def test_a_layout_survives_the_wire(layout: KVLayout) -> None:
    wire = pb.Layout.FromString(layout.to_proto().SerializeToString())
    assert KVLayout.from_proto(wire, layout.fingerprint) == layout


@pytest.mark.parametrize(
    ("heads", "size", "held"),
    [
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 4)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
    ],
)
def test_the_ranks_hold_all_heads_between_them(heads: int, size: int, held: list[tuple[int, int]]) -> None:
    layouts = [shard(rank, size, heads) for rank in range(size)]
    assert [(layout.heads.start, layout.heads.stop) for layout in layouts] == held
    assert all(layout.block_bytes == LAYOUT.block_bytes // 4 * len(layout.heads) for layout in layouts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 28}, "the number of layers is 28 at the source, 24 at the destination"),
        ({"num_kv_heads": 8}, "the number of KV heads is 8 at the source, 4 at the destination"),
        ({"head_dim": 128}, "the width of a head is 128 at the source, 64 at the destination"),
        (
            {"model_fingerprint": b"n" * 16},
            "the model's fingerprint is 6e6e6e6e6e6e6e6e at the source, 6d6d6d6d6d6d6d6d at the destination",
        ),
    ],
)
def test_what_cannot_be_matched_is_named_with_both_values(changes: dict[str, object], said: str) -> None:
    assert mismatch(replace(LAYOUT, **changes), LAYOUT) == said  # type: ignore[arg-type]  # each value is its field's


def test_all_that_differs_is_named() -> None:
    assert mismatch(replace(LAYOUT, num_layers=28, head_dim=128), LAYOUT).count(" at the source, ") == 2


def test_block_size_dtype_and_share_of_the_heads_may_differ() -> None:
    other = replace(shard(1, 2), block_size=8, dtype="float32")
    assert mismatch(other, LAYOUT) == mismatch(LAYOUT, other) == ""
    assert differences(other, LAYOUT) == "block size 8 to 16, dtype float32 to bfloat16, KV heads 2 to 3 to 0 to 3"
    assert differences(LAYOUT, LAYOUT) == ""


def test_ranks_that_hold_no_head_in_common_do_not_match() -> None:
    assert mismatch(shard(0, 2), shard(1, 2)) == (
        "the share of KV heads is 0 to 1 at the source, 2 to 3 at the destination"
    )
    assert mismatch(shard(1, 2), shard(3, 4)) == ""
    assert shared_heads(shard(1, 2), shard(3, 4)) == range(3, 4)


def test_only_float32_holds_every_value_of_the_others() -> None:
    rounding = {
        (a, b) for a in DTYPE_BYTES for b in DTYPE_BYTES if rounds(replace(LAYOUT, dtype=a), replace(LAYOUT, dtype=b))
    }
    assert rounding == {
        ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16"),
    }  # fmt: skip
