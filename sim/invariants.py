"""DESIGN.md's invariants, as questions to a world. They read, and change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from baton.ids import BlockIndex
from discovery.keys import Keys, block_name
from engine.block_pool import Hold

if TYPE_CHECKING:
    from sim.reached import Reached
    from sim.worker import Life
    from sim.world import World

_KEYS = Keys("baton")


def after_every_event(life: Life) -> Iterator[str]:
    """Of the process that has just run. Cheap: counters alone."""
    pool = life.pool
    held = pool._held_as
    if pool.available + sum(held) != pool.num_blocks:
        yield f"{life.node.name}: its blocks do not add up to {pool.num_blocks}: {pool.counts()}"
    if min(held) < 0:
        yield f"{life.node.name}: a negative count of blocks: {pool.counts()}"


def of_the_books(life: Life) -> Iterator[str]:
    """What the counters stand for, counted again block by block."""
    pool, counts = life.pool, life.pool.counts()
    states = Counter(pool._state(BlockIndex(block)) for block in range(pool.num_blocks))
    told = {
        Hold.ACTIVE: counts.active,
        Hold.OFFERED: counts.offered,
        Hold.LANDING: counts.landing,
        Hold.QUARANTINED: counts.quarantined,
        None: counts.free + counts.cached,
    }
    for state, count in told.items():
        if states[state] != count:
            name = "unheld" if state is None else state.name
            yield f"{life.node.name}: {states[state]} blocks are {name}, the books say {count}"


def at_exit(life: Life) -> Iterator[str]:
    """A worker that has drained in time says that it is done: nobody else may read or write its blocks any more."""
    counts = life.pool.counts()
    if counts.offered or counts.landing or counts.quarantined:
        yield f"{life.node.name}: it has drained and holds blocks: {counts}"
    if life.ledger is not None and life.ledger.live():
        yield f"{life.node.name}: it has drained and offers {', '.join(map(str, life.ledger.live()))}"


def of_calm(reached: Reached) -> Iterator[str]:
    """Nothing has gone wrong: so nothing was lost, given up or done again."""
    if reached.resumed:
        yield f"{reached.resumed} attempts were made again, and nothing had gone wrong"
    if reached.leases_expired:
        yield f"{reached.leases_expired} leases ran out, and nothing had gone wrong"
    if reached.pulled_again:
        yield f"{reached.pulled_again} blocks were pulled again, and nothing had gone wrong"


def at_rest(world: World) -> Iterator[str]:
    """Everybody lives, nothing is asked: nothing may be held, and everybody is known."""
    for life in world.workers():
        yield from _worker_at_rest(life)
        listed = world.redis.store.members(_KEYS.blocks(life.record.id, life.record.incarnation))
        if listed != {block_name(block_hash) for block_hash in life.pool._by_hash}:
            yield f"{life.node.name}: it is said to hold {len(listed)} named blocks and holds {len(life.pool._by_hash)}"
    for router in world.routers():
        name = router.node.name
        if router.relay.open_requests:
            yield f"{name}: {router.relay.open_requests} requests are open"
        for session in router.workers.sessions():
            if len(session.attempts):
                yield f"{name}: {len(session.attempts)} attempts are open at {session.peer.key.id}"
        ready = {key.incarnation for key in router.workers.ready()}
        for life in world.workers():
            if life.record.incarnation not in ready:
                yield f"{name}: {life.node.name} is not ready for it"


def _worker_at_rest(life: Life) -> Iterator[str]:
    name, counts = life.node.name, life.pool.counts()
    if counts.available != counts.total:
        yield f"{name}: an idle worker holds blocks: {counts}"
    if life.swap.available != life.swap.num_slots:
        yield f"{name}: an idle worker holds {life.swap.num_slots - life.swap.available} swap slots"
    if life.core.open_attempts:
        yield f"{name}: attempts are open: {', '.join(map(str, life.core.open_attempts))}"
    if life.engine.scheduler.open_requests():
        yield f"{name}: the engine has open requests"
    if life.ledger is not None and (life.ledger.live() or life.ledger.draining):
        yield f"{name}: block sets are live at its ledger: {life.ledger.counts()}, {life.ledger.draining} draining"
    if life.puller is not None and life.puller.counts():
        yield f"{name}: landings are under way: {life.puller.counts()}"
    yield from of_the_books(life)
