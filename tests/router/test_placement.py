"""The policy alone: who is picked, why, and who never is."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import Incarnation, WorkerId
from baton.layout import KVLayout, mismatch
from router import placement
from router.placement import Candidate, Need, Prefix, Role, State, Way, WorkerKey, place

LAYOUT = KVLayout(2, 2, 16, 8, "bfloat16", b"weights")
BLOCK = LAYOUT.block_size


def worker(name: str, role: Role = Role.DECODE, **changes: object) -> Candidate:
    key = WorkerKey(WorkerId(name), Incarnation(1))
    plain = Candidate(key, role, State.READY, max_prompt_len=100_000, layout=LAYOUT, available_blocks=10_000)
    return replace(plain, **changes)


def need(num_tokens: int = 1000, **changes: object) -> Need:
    return replace(Need(num_tokens, local_prefill_tokens=64), **changes)


P, D = worker("P", Role.PREFILL), worker("D")
P2, D2 = worker("P2", Role.PREFILL), worker("D2")
U = worker("U", Role.UNIFIED)


def test_a_long_prompt_goes_to_a_prefill_and_a_decode_worker() -> None:
    placed = place([P, D], need())
    assert placed is not None
    assert (placed.way, placed.prefill, placed.decode) == (Way.REMOTE, P.key, D.key)


def test_a_short_uncached_suffix_stays_on_the_decode_worker() -> None:
    cached = replace(D, cached_blocks=60)  # 960 of 1000 tokens
    placed = place([P, cached], need())
    assert placed is not None
    assert (placed.way, placed.prefill, placed.decode) == (Way.LOCAL, None, D.key)
    assert placed.cached_tokens == 960


def test_the_threshold_is_the_last_suffix_that_stays() -> None:
    assert place([P, D], need(64)).way is Way.LOCAL
    assert place([P, D], need(65)).way is Way.REMOTE


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt() -> None:
    for absent in ([], [replace(P, state=State.DRAINING)], [replace(P, max_prompt_len=999)]):
        placed = place([*absent, D], need())
        assert (placed.way, placed.prefill) == (Way.LOCAL, None)


def test_a_unified_worker_is_offered_whole_prompts() -> None:
    placed = place([P, U], need())
    assert (placed.way, placed.prefill, placed.decode) == (Way.LOCAL, None, U.key)


def test_nobody_who_decodes_is_no_placement() -> None:
    assert place([P, P2], need()) is None
    assert place([], need()) is None


def test_the_longest_cached_prefix_wins_among_equals() -> None:
    placed = place([P, replace(P2, cached_blocks=10), D, replace(D2, cached_blocks=5)], need())
    assert (placed.prefill, placed.decode) == (P2.key, D2.key)
    assert placed.cached_tokens == 160


def fetching(num_tokens: int = 1000, **changes: object) -> Need:
    return need(num_tokens, **({"fetch_prefix_tokens": 256} | changes))


def test_what_another_holds_is_fetched_where_the_holder_is_busy() -> None:
    busy = replace(P2, cached_blocks=50, queued_tokens=5000)
    placed = place([P, busy, D], fetching())
    assert (placed.prefill, placed.prefix) == (P.key, Prefix(P2.key, 50))
    assert placed.cached_tokens == 800, "what is fetched is not computed"
    assert "fetch=80" in str(placed)


def test_the_holder_itself_is_chosen_before_a_fetch() -> None:
    placed = place([P, replace(P2, cached_blocks=50), D], fetching())
    assert (placed.prefill, placed.prefix) == (P2.key, None)


def test_a_decode_worker_s_blocks_are_fetched_by_the_prefill_worker() -> None:
    """As in the second turn of a conversation, whose first answer it wrote."""
    placed = place([P, replace(D, cached_blocks=50)], fetching(2000))
    assert (placed.prefill, placed.decode, placed.prefix) == (P.key, D.key, Prefix(D.key, 50))


def test_with_its_prefix_fetched_a_short_rest_stays_on_the_decode_worker() -> None:
    busy = replace(D2, cached_blocks=60, queued_tokens=9000)  # 960 of 1000 tokens
    placed = place([P, D, busy], fetching())
    assert (placed.way, placed.decode, placed.prefix) == (Way.LOCAL, D.key, Prefix(D2.key, 60))


@pytest.mark.parametrize(
    "changes",
    [
        {"cached_blocks": 15},  # 240 tokens
        {"state": State.UNREACHABLE},
        {"layout": replace(LAYOUT, dtype="float32")},
    ],
)
def test_too_little_or_out_of_reach_is_not_fetched(changes: dict[str, object]) -> None:
    holder = replace(P2, **{"cached_blocks": 50, "queued_tokens": 5000} | changes)
    assert place([P, holder, D], fetching()).prefix is None
    assert place([P, replace(P2, cached_blocks=50, queued_tokens=5000), D], need()).prefix is None, "0 is never"


def test_what_a_stream_brings_along_is_fetched_however_little_it_is() -> None:
    placed = place([D], fetching(100, offered_blocks=2, offered_layout=LAYOUT))
    assert placed.prefix == Prefix(None, 2)
    assert place([replace(D, cached_blocks=2)], fetching(100, offered_blocks=2, offered_layout=LAYOUT)).prefix is None
    other = replace(LAYOUT, block_size=8)
    assert place([D], fetching(100, offered_blocks=2, offered_layout=other)).prefix is None, "not block by block"
    other = replace(LAYOUT, dtype="float32")
    assert place([D], fetching(100, offered_blocks=2, offered_layout=other)).prefix is None, "not what it computes"


def test_load_outweighs_a_small_prefix() -> None:
    busy_p = replace(P2, cached_blocks=10, queued_tokens=5000)
    busy_d = replace(D2, cached_blocks=5, streams=50)
    placed = place([P, busy_p, D, busy_d], need())
    assert (placed.prefill, placed.decode) == (P.key, D.key)


def test_a_decode_worker_with_room_is_preferred() -> None:
    full = replace(D2, cached_blocks=40, available_blocks=3)
    assert place([P, replace(D, streams=100), full], need()).decode == D.key
    assert place([P, full], need()).decode == D2.key


def test_equal_costs_are_decided_by_the_tie_breaker() -> None:
    ranks = {P.key: 1.0, P2.key: 0.0, D.key: 1.0, D2.key: 0.0}
    placed = place([P, P2, D, D2], need(), ranks.__getitem__)
    assert (placed.prefill, placed.decode) == (P2.key, D2.key)
    placed = place([P, P2, D, D2], need(), lambda key: -ranks[key])
    assert (placed.prefill, placed.decode) == (P.key, D.key)


def test_a_placement_says_every_term_of_its_cost() -> None:
    placed = place([replace(P, queued_tokens=7), replace(D, streams=2)], need())
    assert str(placed) == "prefill on P[1007: compute=1000 queued=7], decode on D[132: transfer=100 streams=32]"


def test_a_worker_is_paired_with_one_that_lays_out_blocks_as_it_does() -> None:
    halves, floats = replace(LAYOUT, block_size=8), replace(LAYOUT, dtype="float32")
    for other in (halves, floats):
        placed = place([replace(P, layout=other), P2, D], need())
        assert placed.prefill == P2.key
        placed = place([P, D, replace(D2, layout=other, streams=1)], need())
        assert placed.decode == D.key
        placed = place(
            [replace(P, layout=other), P2, replace(D, streams=1), replace(D2, layout=other, streams=1)], need()
        )
        assert (placed.prefill, placed.decode) in {(P.key, D2.key), (P2.key, D.key)}


def test_of_those_that_differ_one_of_its_own_dtype_is_preferred() -> None:
    halves, floats = replace(LAYOUT, block_size=8), replace(LAYOUT, dtype="float32")
    placed = place([replace(P, layout=floats), replace(P2, layout=halves, queued_tokens=400), D], need())
    assert placed.prefill == P2.key
    assert placed.decode_score.terms == {
        "transfer": 100.0, "queued": 0.0, "streams": 0.0, "room": 0.0, "relaying": 50.0, "converting": 0.0,
    }  # fmt: skip


def test_load_outweighs_a_difference_in_layout() -> None:
    other = replace(P2, layout=replace(LAYOUT, dtype="float32"))
    assert place([replace(P, queued_tokens=5000), other, D], need()).prefill == P2.key


def test_a_decode_worker_that_no_prefill_worker_matches_computes_the_prompt_itself() -> None:
    deeper = replace(P, layout=replace(LAYOUT, num_layers=3))
    assert place([deeper, D], need()).way is Way.LOCAL
    placed = place([deeper, D, replace(D2, layout=deeper.layout, streams=10)], need())
    assert (placed.way, placed.prefill, placed.decode) == (Way.LOCAL, None, D.key), "computing costs the same"


def test_cached_blocks_count_as_many_tokens_as_they_hold() -> None:
    small = replace(P2, layout=replace(LAYOUT, block_size=8), cached_blocks=50)
    assert place([replace(P, cached_blocks=49), small, D], need()).cached_tokens == 49 * 16
    assert place([replace(P, cached_blocks=10), small, D], need()).cached_tokens == 50 * 8


LAYOUTS = (
    LAYOUT,
    replace(LAYOUT, block_size=8),
    replace(LAYOUT, dtype="float32"),
    replace(LAYOUT, tp_size=2),
    replace(LAYOUT, tp_size=2, tp_rank=1),
)
candidates = st.lists(
    st.builds(
        Candidate,
        key=st.builds(WorkerKey, st.sampled_from("abcdefgh").map(WorkerId), st.integers(1, 3).map(Incarnation)),
        role=st.sampled_from(Role),
        state=st.sampled_from(State),
        max_prompt_len=st.integers(0, 4000),
        layout=st.sampled_from(LAYOUTS),
        streams=st.integers(0, 100),
        queued_tokens=st.integers(0, 10_000),
        available_blocks=st.integers(0, 300),
        cached_blocks=st.integers(0, 200),
    ),
    max_size=8,
    unique_by=lambda c: c.key,
)
needs = st.builds(
    Need,
    num_tokens=st.integers(1, 3000),
    local_prefill_tokens=st.integers(0, 200),
    excluded=st.frozensets(
        st.builds(WorkerKey, st.sampled_from("abcdefgh").map(WorkerId), st.integers(1, 3).map(Incarnation))
    ),
)


@given(candidates, needs)
def test_only_workers_that_can_serve_are_picked_and_one_is_picked_if_there_is_any(
    workers: list[Candidate], wanted: Need
) -> None:
    def can_serve(c: Candidate) -> bool:
        return c.state is State.READY and c.key not in wanted.excluded and c.max_prompt_len >= wanted.num_tokens

    placed = place(workers, wanted)
    by_key = {c.key: c for c in workers}
    assert (placed is not None) == any(can_serve(c) and c.role is not Role.PREFILL for c in workers)
    if placed is None:
        return
    chosen = by_key[placed.decode]
    assert can_serve(chosen)
    assert chosen.role is not Role.PREFILL
    assert (placed.way is Way.REMOTE) == (placed.prefill is not None)
    missing = wanted.num_tokens - chosen.cached_blocks * chosen.layout.block_size
    if placed.prefill is None:
        others = [
            c for c in workers
            if can_serve(c) and c.role is Role.PREFILL and not mismatch(c.layout, chosen.layout)
        ]  # fmt: skip
        assert chosen.role is Role.UNIFIED or not others or max(missing, 1) <= wanted.local_prefill_tokens
    else:
        assert can_serve(by_key[placed.prefill])
        assert by_key[placed.prefill].role is Role.PREFILL
        assert not mismatch(by_key[placed.prefill].layout, chosen.layout)
        assert chosen.role is Role.DECODE
        assert max(missing, 1) > wanted.local_prefill_tokens
    assert 0 <= placed.cached_tokens < wanted.num_tokens


@given(candidates, needs, st.randoms(use_true_random=False))
def test_the_order_in_which_workers_are_listed_does_not_matter(workers, wanted, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(workers)
    random.shuffle(shuffled)
    assert place(shuffled, wanted) == place(workers, wanted)


@given(candidates, needs)
def test_room_is_preferred_among_workers_of_one_kind(workers: list[Candidate], wanted: Need) -> None:
    decoders = [replace(c, role=Role.UNIFIED) for c in workers]
    placed = place(decoders, wanted)
    if placed is not None and placed.decode_score.terms["room"]:
        ready = [c for c in decoders if c.state is State.READY and c.key not in wanted.excluded]
        fitting = [c for c in ready if c.max_prompt_len >= wanted.num_tokens]
        assert all(
            c.available_blocks * size < max(wanted.num_tokens - c.cached_blocks * size, 1) + size
            for c in fitting
            for size in [c.layout.block_size]
        )


def test_the_policy_imports_neither_grpc_nor_asyncio() -> None:
    tree = ast.parse(inspect.getsource(placement))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", "collections", "dataclasses", "enum", "typing", "baton"}
