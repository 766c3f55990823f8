"""What only nixl does: its agents' ends, and being an extra that may be missing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.errors import ConfigError, PeerLost, TransferRefused
from baton.ids import new_transfer_id
from kvtransfer.gate import Gate
from kvtransfer.memory import PoolShape
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Fetched, Want
from kvtransfer.transports.chooser import Connector, transport_names
from kvtransfer.transports.nixl import NixlConnection
from kvtransfer.transports.nixl_agent import NixlAgent, NixlFailed, Piece
from kvtransfer.transports.nixl_source import NixlPeer, NixlSource
from kvtransfer.transports.offers import offer_memory
from tests.kvtransfer.rig import make_pool, make_rig, until
from tests.kvtransfer.transport_rigs import NixlRig

ROOT = Path(__file__).resolve().parents[2]
installed = pytest.mark.skipif(bool(NixlRig.missing()), reason=NixlRig.missing() or "NIXL is installed")


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads.create()
    yield threads
    threads.close()


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setenv("UCX_TLS", "tcp,self")


def test_nobody_uses_nixl_who_did_not_ask_for_it() -> None:
    assert "nixl" not in transport_names("auto")
    code = (
        "import sys, kvtransfer.transports.chooser, kvtransfer.transports.offers\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'nixl']"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_nixl_who_asks_for_it_hears_what_to_install(monkeypatch: pytest.MonkeyPatch, threads: Threads) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match=r"can't be loaded .*pip install 'baton\[nixl\]'"):
        Connector(make_pool(), threads, setting="nixl")
    with pytest.raises(ConfigError, match="--transport nixl needs NIXL"):
        offer_memory(make_pool(), ["nixl"], lambda close: None)


async def test_a_puller_that_can_make_no_agent_refuses_the_pull_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    address = NixlPeer(4096, PoolShape(64, 4096), bytes(16), b"metadata").pack()
    with pytest.raises(TransferRefused, match="needs NIXL"):
        await NixlConnection.connect(address, make_pool(), threads.network)


def test_an_address_that_is_too_large_or_of_an_impossible_pool_is_refused() -> None:
    good = NixlPeer(1 << 40, PoolShape(64, 4096), bytes(16), b"metadata")
    assert NixlPeer.parse(good.pack()) == good
    for peer in (
        good._replace(address=(1 << 64) - 4096),
        good._replace(shape=PoolShape(0, 4096)),
        good._replace(shape=PoolShape(64, 1 << 33)),
    ):
        with pytest.raises(TransferRefused, match="address"):
            NixlPeer.parse(peer.pack())


@installed
async def test_a_whole_handoff_goes_over_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_rig("nixl") as rig:
        id, blocks, ticket = rig.offer(8)
        for block in blocks:
            rig.source.write(block.index, memoryview(bytes([block.index]) * 4096))
        rig.ledger.seal(id, 8)
        landing = rig.puller.land(ticket, id, rig.reserve(8), 0)
        rig.ledger.prefilled(id, 5)
        landed = await landing.done()
        assert (landed.transport, landed.blocks) == ("nixl", 8)


@installed
def test_nixl_says_nothing_on_stdout() -> None:
    code = "from kvtransfer.transports.nixl_agent import NixlAgent; assert NixlAgent(serves=True).destroy()"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert said.stdout == b""


@installed
async def test_a_gate_is_never_left_behind_an_agent_that_does_not_go(
    monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    """Whether its reads are over then nobody can tell."""
    source = NixlSource(make_pool())
    connection = await NixlConnection.connect(source.endpoint().address, make_pool(), threads.network)
    monkeypatch.setattr(NixlAgent, "destroy", lambda agent: False)

    def fail(agent: NixlAgent, *_: object) -> None:
        raise NixlFailed("planted")

    monkeypatch.setattr(NixlAgent, "read", fail)
    gate = Gate()
    with pytest.raises(PeerLost, match="planted"):
        await connection.fetch(new_transfer_id(), [Want(0, 0, 0)], gate)
    assert gate.in_flight == 1
    assert not connection.alive
    monkeypatch.undo()
    connection._agent.destroy()
    source.close()


@installed
async def test_all_fetches_of_a_lost_connection_wait_for_the_agents_end(
    monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    source = NixlSource(make_pool())
    connection = await NixlConnection.connect(source.endpoint().address, make_pool(), threads.network)
    order: list[tuple[int, int]] = []

    def read_or_fail(agent: NixlAgent, pieces: list[Piece], seconds: float, given_up: object) -> None:
        if len(pieces) == 2:  # the nonce, and one generation
            raise NixlFailed("planted")
        while connection.alive:
            time.sleep(0.001)
        raise NixlFailed("another read of this agent failed")

    destroy = NixlAgent.destroy

    def note(agent: NixlAgent) -> bool:
        order.append((first.in_flight, second.in_flight))
        return destroy(agent)

    monkeypatch.setattr(NixlAgent, "read", read_or_fail)
    monkeypatch.setattr(NixlAgent, "destroy", note)
    first, second = Gate(), Gate()
    results = await asyncio.gather(
        connection.fetch(new_transfer_id(), [Want(0, 0, 0), Want(1, 0, 1)], first),
        connection.fetch(new_transfer_id(), [Want(2, 0, 2)], second),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [PeerLost, PeerLost]
    assert order == [(1, 1)]  # both were inside still when it went, once
    assert (first.in_flight, second.in_flight) == (0, 0)
    source.close()


@installed
async def test_a_source_that_closed_can_be_read_no_more(threads: Threads) -> None:
    source = NixlSource(make_pool())
    connection = await NixlConnection.connect(source.endpoint().address, make_pool(), threads.network, read_seconds=0.5)
    assert await connection.fetch(new_transfer_id(), [Want(0, 0, 0)], Gate()) == [Fetched.LANDED]
    source.close()
    gate = Gate()
    with pytest.raises(PeerLost):
        await connection.fetch(new_transfer_id(), [Want(0, 0, 0)], gate)
    await until(lambda: gate.in_flight == 0)
