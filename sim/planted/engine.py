"""Bugs of one process's engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from baton.ids import BlockHash, BlockIndex
from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.messages import AddRequest, BlocksEvicted
from engine.request import Request
from engine.requests import Requests
from sim.planted.plant import Plant


def _evict_and_remember(self: BlockPool) -> BlockIndex:
    block, _ = self._cached.popitem(last=False)
    name = self._names[block]
    assert name is not None
    self._names[block] = None
    self._note(BlocksEvicted, name[0])
    return block


def _find_by_name_alone(self: BlockPool, block_hash: BlockHash, token_ids: Any) -> BlockIndex | None:
    block = self._by_hash.get(block_hash)
    return block if block is not None and (block in self._cached or self._state(block) is not None) else None


def _let_go_at_once(self: Batch) -> list[Request]:
    gone, self._leaving = self._leaving, []
    self._free_slots += [request.slot for request in gone]
    return gone


def _note_what_is_stored(self: BlockPool, kind: Any, block_hash: BlockHash) -> None:
    if kind is not BlocksEvicted:
        _note(self, kind, block_hash)


_note = BlockPool._note


def _add_without_salt(self: Requests, command: AddRequest) -> None:
    _on_add(self, replace(command, cache_salt=b""))


_on_add = Requests._on_add

PLANTS = (
    Plant(
        "stale-reference",
        "vllm#52234",
        "an evicted block is still found under its old name, whatever it holds by now",
        ((BlockPool, "_evict", _evict_and_remember), (BlockPool, "find", _find_by_name_alone)),
    ),
    Plant(
        "preempted-under-step",
        "vllm#52360",
        "preemption gives blocks to others while a step in flight reads them",
        ((Batch, "let_go", _let_go_at_once),),
    ),
    Plant(
        "evictions-untold",
        "TensorRT-LLM#14882",
        "what the directory hears of blocks does not match what is there, so that routing is ruined silently",
        ((BlockPool, "_note", _note_what_is_stored),),
    ),
    Plant(
        "salt-ignored",
        "reported by nobody yet",
        "one tenant's requests hit blocks of another's, and show by their usage what he has asked",
        ((Requests, "_on_add", _add_without_salt),),
    ),
)
