"""The fake model: a token depends on every KV entry before it, and an entry on all entries before it.

An entry is 64 bits, so that a block which is stale, not whole, or another's gives a wrong token and not the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

VOCAB = 1009
EOS = tuple(range(7))
"""Several, so that some answers end by themselves."""
_MASK = (1 << 64) - 1
START = 0x9E3779B97F4A7C15


def mix(state: int, value: int) -> int:
    state = ((state ^ value) * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & _MASK
    return state ^ (state >> 29)


def read(state: int, entries: Iterable[int]) -> int:
    """What attention over these entries makes of what it has seen before."""
    for entry in entries:
        state = mix(state, entry)
    return state


def entry(state: int, token_id: int) -> int:
    """The KV of a token, behind all that `state` has seen."""
    return mix(state, token_id + 1)


def drawn(state: int) -> int:
    return (state >> 7) % VOCAB


def answer(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What the model says, computed without blocks, steps or workers."""
    state = START
    tokens: list[int] = []
    for token_id in prompt:
        state = mix(state, entry(state, token_id))
    while len(tokens) < max_tokens:
        tokens.append(drawn(state))
        if tokens[-1] in EOS:
            break
        state = mix(state, entry(state, tokens[-1]))
    return tokens
