"""Workers that are found, of another model, restarted, silent: who is used, and who is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from baton.errors import Unavailable
from baton.ids import WorkerId
from baton.v1 import worker_pb2
from router.session import SessionOptions
from tests.router.fake_worker import FakeWorker, expected_tokens, model
from tests.router.hooks import HELLO, busy, die_at, known_busy, wait_for
from tests.router.system import FAST, decode, prefill, running, unified


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            model(model_fingerprint=b"retrained"),
            "its model fingerprint is 7265747261696e65, the served one is 77656967687473",
        ),
        (model(num_layers=3), "its number of layers is 3, the served one is 2"),
        (model(num_kv_heads=4), "its number of KV heads is 4, the served one is 2"),
        (model(head_dim=4), "its width of a head is 4, the served one is 8"),
        (worker_pb2.ModelInfo(name="tiny", block_size=4), "malformed: layout.num_layers is 0"),
    ],
)
async def test_a_worker_of_another_model_is_reported_and_not_used(other: worker_pb2.ModelInfo, said: str) -> None:
    async with running(unified("U1")) as system:
        stranger = unified("U2", model=other)
        await system.add(stranger)
        await stranger.until(lambda: stranger.sessions > 0)
        await system.until(lambda: len(system.relay.status()) == 2 and said in system.relay.status()[1].detail)
        for _ in range(4):
            await system.generate("hello")
        assert not stranger.submits


async def test_workers_of_another_block_size_and_dtype_serve_beside_each_other() -> None:
    other = model(block_size=8, dtype="bfloat16")
    async with running(prefill(), prefill("P2", model=other), decode(), decode("D2", model=other)) as system:
        for _ in range(8):
            assert (await system.generate("hello")).token_ids == expected_tokens(HELLO, 8)
        pairs = {
            (worker, fellow)
            for worker, fellow in (("P", "D"), ("P2", "D2"))
            if system[worker].submits or system[fellow].submits
        }
        assert pairs
        for worker, fellow in pairs:
            assert len(system[worker].submits) == len(system[fellow].submits), "like goes with like"
        assert system.directory.lookups == 16, "one for each block size"


async def test_a_stream_does_not_go_on_with_another_model_of_the_same_name() -> None:
    other = model(model_fingerprint=b"retrained")
    other.source = "elsewhere"
    async with running(unified(before_token=die_at(3))) as system:
        answer = asyncio.create_task(system.generate("hello"))
        await system.until(lambda: not system.workers.ready())
        await system.add(unified("U", model=other))
        with pytest.raises(Unavailable, match=r"the model was replaced after \d tokens"):
            await answer
        assert not system["U"].submits
        assert (await system.generate("hello")).token_ids == expected_tokens(HELLO, 8)
        assert (await system.relay.tokenizer()).source == "elsewhere"


async def test_whoever_computes_the_prompt_is_told_who_holds_its_beginning() -> None:
    async with running(prefill("P1", load=busy()), prefill("P2"), decode(), fetch_prefix_tokens=8) as system:
        await known_busy(system, "P1")
        system.directory.prefixes = {WorkerId("P1"): 6, WorkerId("D"): 4}
        await system.generate("x" * 40)
        (computing,) = system["P2"].submits
        prefix = computing.prefix
        assert (prefix.worker_id, prefix.address, prefix.num_blocks) == ("P1", system["P1"].address, 6)
        assert prefix.incarnation == system["P1"].incarnation
        (receiving,) = system["D"].submits
        assert not receiving.HasField("prefix")


async def test_a_session_that_stands_outlives_its_record() -> None:
    async with running(unified()) as system:
        system.directory.list()
        system.directory.connected = False
        assert (await system.generate("hello")).token_ids == expected_tokens(HELLO, 8)
        await system["U"].kill()
        await system.until(lambda: not system.workers.sessions())


async def test_a_restarted_worker_is_found_again_and_its_old_life_forgotten() -> None:
    async with running(unified()) as system:
        old = system["U"]
        await old.kill()
        await system.add(unified())
        await system.until(lambda: [k.incarnation for k in system.workers.ready()] == [system["U"].incarnation])
        assert (await system.generate("hello")).token_ids == expected_tokens(HELLO, 8)
        assert len(system.workers.sessions()) == 1


@pytest.mark.parametrize(
    "status", [grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL], ids=lambda s: s.name
)
async def test_a_worker_that_ended_its_session_is_connected_again(status: grpc.StatusCode) -> None:
    async def end_once(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at == 3:
            worker.before_token = None
            worker.end_sessions(status)
            await asyncio.Event().wait()

    async with running(unified(before_token=end_once)) as system:
        answered = await system.generate("hello")
        assert system["U"].sessions == 2
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.finished.timings.resumes == 1


async def test_a_worker_that_answers_under_another_name_is_not_used() -> None:
    async with running(unified("U1"), resume_timeout_seconds=0.2) as system:
        record = replace(system["U1"].record, id=WorkerId("U2"))
        system.directory.put([system["U1"].record, record])
        await system.until(lambda: any("'U2' of incarnation" in s.detail for s in system.relay.status()))
        assert [key.id for key in system.workers.ready()] == ["U1"]


async def test_a_record_that_cannot_be_taken_in_does_not_end_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as system:
        refused = asyncio.Event()

        def refuse(*_: object) -> None:
            refused.set()
            raise ValueError("what nobody thought of")

        with monkeypatch.context() as patched:
            patched.setattr(system.workers, "_connect", refuse)
            await system.add(unified("U1"))
            await asyncio.wait_for(refused.wait(), 5)
        await system.add(unified("U2"))
        await system.until(lambda: len(system.workers.ready()) == 2)


async def test_a_peer_that_falls_silent_behind_an_open_connection_is_found_dead() -> None:
    options = SessionOptions(
        keepalive_seconds=0.2,
        keepalive_timeout_seconds=0.3,
        first_backoff_seconds=FAST.first_backoff_seconds,
        hello_seconds=1.0,
    )
    worker = await unified("U1", before_token=wait_for(asyncio.Event(), index=2)).start()
    async with black_hole(worker) as freeze, running(options=options) as system:
        system.fakes["U1"] = worker
        system.list_all()
        await system.until(lambda: len(system.workers.ready()) == 1)
        answer = asyncio.create_task(system.generate("hello"))
        await worker.until(lambda: bool(worker.submits))
        freeze.set()
        await system.until(lambda: not system.workers.ready())
        await system.add(unified("U2"))
        assert (await answer).token_ids == expected_tokens(HELLO, 8)
    await worker.kill()


@asynccontextmanager
async def black_hole(worker: FakeWorker) -> AsyncIterator[asyncio.Event]:
    """A proxy before `worker` that, once the event is set, passes nothing on and closes nothing."""
    host, port = worker.address.split(":")
    frozen = asyncio.Event()
    pumps: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if frozen.is_set():
                await asyncio.Event().wait()
            target.write(data)
        target.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        writers.extend((writer, back))
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(pump(source, target))
            pumps.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    worker.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield frozen
    finally:
        server.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for writer in writers:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
