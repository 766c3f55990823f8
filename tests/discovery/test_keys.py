from __future__ import annotations

import pytest

from baton.errors import ConfigError
from baton.ids import Incarnation, WorkerId
from discovery.keys import BLOCK_NAME_BYTES, Keys, block_name, joined_names
from tests.discovery.makers import block, blocks


def test_all_keys_of_a_system_share_one_hash_tag() -> None:
    keys = Keys("prod")
    all_keys = [
        keys.workers,
        keys.epoch,
        keys.worker(WorkerId("a")),
        keys.blocks(WorkerId("a"), Incarnation(1)),
    ]
    assert {key[: key.index("}") + 1] for key in all_keys} == {"{prod}"}
    assert len(set(all_keys)) == len(all_keys)


def test_incarnations_and_workers_never_share_a_block_set() -> None:
    keys = Keys("prod")
    pairs = [("a", 1), ("a", 2), ("a:1", 2), ("a:1", 1), ("b", 1)]
    assert len({keys.blocks(WorkerId(w), Incarnation(i)) for w, i in pairs}) == len(pairs)


@pytest.mark.parametrize("namespace", ["", "a b", "a{b}", "x" * 65, "a:b", "a\n"])
def test_a_namespace_that_would_break_keys_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigError, match="namespace is"):
        Keys(namespace)


def test_joined_names_are_the_names_in_order() -> None:
    joined = joined_names(blocks(5))
    assert joined[2 * BLOCK_NAME_BYTES : 3 * BLOCK_NAME_BYTES] == block_name(block(2))
    assert len(joined) == 5 * BLOCK_NAME_BYTES
