"""Workers that die, stall, fail handoffs, lie, or come late: the answer is token-exact, or the error is clear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from baton.errors import DeadlineExceeded, InternalError, Unavailable
from baton.ids import WorkerId
from baton.v1 import inference_pb2, worker_pb2
from router.request import FinishReason
from router.session import SessionOptions
from tests.router.fake_worker import MODEL, FakeWorker, Hook, expected_tokens, model
from tests.router.system import FAST, Answered, System, decode, prefill, running, spec, unified

HELLO = tuple(b"hello")


def die_at(index: int) -> Hook:
    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at == index:
            worker.before_token = None
            await worker.kill()
            await asyncio.Event().wait()

    return hook


def wait_for(event: asyncio.Event, index: int = 0) -> Hook:
    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at >= index:
            await event.wait()

    return hook


@pytest.mark.parametrize("index", [0, 1, 2, 7, 19])
async def test_a_stream_goes_on_elsewhere_when_its_decode_worker_dies(index: int) -> None:
    async with running(prefill(), decode("D1"), decode("D2")) as system:
        die_once(system, index)
        system["P"].before_token = None
        answered = await system.generate("hello", max_tokens=20)
        assert answered.token_ids == expected_tokens(HELLO, 20)
        assert answered.text == bytes(answered.token_ids).decode()
        assert answered.finished.timings.resumes == 1
        assert system.value("baton_requests_resumed_total") == 1
        survivor = system[answered.finished.decode_worker]
        (resumed,) = [submit for submit in survivor.submits if submit.id.attempt == 2]
        assert resumed.num_prompt_tokens == 5
        assert tuple(resumed.token_ids) == (HELLO + answered.token_ids)[: len(resumed.token_ids)]


def die_once(system: System, index: int) -> None:
    """The first worker that is about to report token `index` dies instead."""
    died: list[FakeWorker] = []

    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at == index and not died:
            died.append(worker)
            await worker.kill()
            await asyncio.Event().wait()

    for worker in system.fakes.values():
        worker.before_token = hook


async def test_sixteen_streams_survive_the_death_of_their_decode_worker() -> None:
    async with running(prefill(), decode("D1"), decode("D2")) as system:
        die_once(system, 9)
        answers = await asyncio.gather(
            *(system.generate(f"prompt {i}", max_tokens=20, seed=i, temperature=1.0) for i in range(16))
        )
        await system.until(lambda: system.relay.open_requests == 0)
    for i, answered in enumerate(answers):
        assert answered.token_ids == expected_tokens(f"prompt {i}".encode(), 20, seed=i)


async def test_a_seed_that_the_router_drew_is_kept_by_a_resume() -> None:
    async with running(unified("U1"), unified("U2")) as system:
        die_once(system, 3)
        answered = await system.generate("hello", seed=None, temperature=1.0)
        first, second = (s for name in ("U1", "U2") for s in system[name].submits)
        assert first.sampling.seed == second.sampling.seed
        assert answered.token_ids == expected_tokens(HELLO, 8, seed=first.sampling.seed)


@pytest.mark.parametrize("survivors", [["P2"], []], ids=["another", "none"])
async def test_a_stream_survives_the_death_of_its_prefill_worker(survivors: list[str]) -> None:
    others = [prefill(name) for name in survivors]
    async with running(prefill("P1"), *others, decode()) as system:
        die_once(system, 0)
        answered = await system.generate("hello")
        assert answered.token_ids == expected_tokens(HELLO, 8)
        assert answered.finished.prefill_worker in (["P1", "P2"] if survivors else ["D"])
        assert answered.finished.timings.resumes == 1
        assert system["D"].cancels == [(system["D"].submits[0].id.request_id, 1)]


async def test_a_prefill_worker_that_dies_after_the_handoff_is_not_missed() -> None:
    go_on = asyncio.Event()
    async with running(prefill(), decode(before_token=wait_for(go_on, index=2))) as system:
        answered = Answered()
        stream = system.relay.generate(spec("hello"))
        while len(answered.token_ids) < 2:
            answered.add(await anext(stream))
        await system["P"].kill()
        await system.until(lambda: len(system.workers.ready()) == 1)
        go_on.set()
        async for chunk in stream:
            answered.add(chunk)
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.finished.timings.resumes == 0
    assert answered.finished.prefill_worker == "P"


async def test_a_prefill_worker_that_dies_between_its_token_and_the_handoff_costs_a_resume() -> None:
    held = decode()
    async with running(prefill(), held) as system:
        stuck = asyncio.Event()
        held.before_handoff = stuck
        answered = Answered()
        stream = system.relay.generate(spec("hello"))
        answered.add(await anext(stream))
        assert len(answered.token_ids) == 1
        await system["P"].kill()
        async for chunk in stream:
            answered.add(chunk)
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.finished.timings.resumes == 1


async def test_after_a_failed_handoff_the_decode_worker_computes_the_prompt_itself() -> None:
    async with running(prefill(), decode(failing_handoffs=1)) as system:
        answered = await system.generate("hello")
        tasks = [submit.task for submit in system["D"].submits]
        await system["P"].until(lambda: len(system["P"].cancels) == 1)  # its blocks: nobody comes for them
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert tasks == [worker_pb2.TASK_RECEIVE, worker_pb2.TASK_LOCAL]


@pytest.mark.parametrize("reason", [worker_pb2.END_REASON_UNAVAILABLE, worker_pb2.END_REASON_CANCELLED])
async def test_the_only_worker_is_asked_again_after_it_could_not(reason: int) -> None:
    async with running(unified(endings=[(reason, "full"), (reason, "full")])) as system:
        answered = await system.generate("hello")
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.finished.timings.resumes == 2


async def test_a_worker_is_asked_again_as_soon_as_it_may_though_the_directory_is_slow() -> None:
    busy = unified(endings=[(worker_pb2.END_REASON_UNAVAILABLE, "full")])
    async with running(busy, resume_timeout_seconds=30.0) as system:
        system.directory.lookup_seconds = 0.3  # longer than a first exclusion
        async with asyncio.timeout(10):
            answered = await system.generate("hello")
    assert answered.token_ids == expected_tokens(HELLO, 8)


async def test_the_directory_is_not_asked_while_nobody_could_serve() -> None:
    async with running(prefill("P1"), unified(before_token=die_at(3))) as system:
        answer = asyncio.create_task(system.generate("hello"))
        await system.until(lambda: len(system.workers.ready()) == 1)
        asked = system.directory.lookups
        await system.add(prefill("P2"))
        await system.until(lambda: len(system.workers.ready()) == 2)
        assert system.directory.lookups == asked
        await system.add(unified("U"))
        assert (await answer).token_ids == expected_tokens(HELLO, 8)


async def test_a_prefill_worker_that_cannot_be_sent_to_is_the_one_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(prefill(), decode()) as system:
        (key,) = (key for key in system.workers.ready() if key.id == "P")
        session = system.workers.session(key)
        assert session is not None
        monkeypatch.setattr(session, "_options", replace(FAST, max_queued_messages=0))
        answered = await system.generate("hello")
        assert [submit.task for submit in system["D"].submits] == [worker_pb2.TASK_RECEIVE, worker_pb2.TASK_LOCAL]
    assert answered.token_ids == expected_tokens(HELLO, 8)


async def test_without_end_of_sequence_tokens_only_a_word_ends_an_answer() -> None:
    endless = worker_pb2.ModelInfo()
    endless.CopyFrom(MODEL)
    del endless.eos_token_ids[:]

    async def never_say_so(worker: FakeWorker) -> None:
        await asyncio.Event().wait()

    worker = unified(model=endless, eos_at=3, before_end=never_say_so)
    async with running(worker, resume_timeout_seconds=0.2) as system:
        stream = system.relay.generate(spec("hello"))
        tokens: list[int] = []
        while len(tokens) < 4:
            tokens += (await anext(stream)).token_ids
        await worker.kill()
        with pytest.raises(Unavailable, match="after 4 tokens"):
            await anext(stream)


async def test_a_stream_waits_for_a_worker_to_come_back() -> None:
    async with running(unified(before_token=die_at(3))) as system:
        answer = asyncio.create_task(system.generate("hello"))
        await system.until(lambda: not system.workers.ready())
        await system.add(unified("U"))
        answered = await answer
    assert answered.token_ids == expected_tokens(HELLO, 8)


async def test_a_stream_that_nobody_goes_on_with_ends_with_a_clear_error() -> None:
    async with running(prefill(), decode(before_token=die_at(3)), resume_timeout_seconds=0.2) as system:
        with pytest.raises(Unavailable, match=r"waited 0.2 s after \d tokens .* no decode .*\(D is unreachable\)$"):
            await system.generate("hello")
        assert system["D"].address in system.relay.status()[0].detail
        assert "no decode or unified worker" in system.relay.ready()


async def test_with_no_worker_at_all_the_missing_role_is_named() -> None:
    async with running(resume_timeout_seconds=0.05) as system:
        with pytest.raises(Unavailable, match="nothing is served yet: no decode or unified worker is ready"):
            await system.generate("hello")


async def test_a_deadline_passes_while_waiting_for_a_worker() -> None:
    worker = unified(before_token=wait_for(asyncio.Event(), 3))
    async with running(worker) as system:
        stream = system.relay.generate(spec("hello", timeout_seconds=2.0))
        answered = Answered()
        while len(answered.token_ids) < 3:
            answered.add(await anext(stream))
        await worker.kill()
        with pytest.raises(DeadlineExceeded, match="after 3 tokens: no decode or unified worker is ready"):
            await anext(stream)


@pytest.mark.parametrize(
    ("eos_at", "max_tokens", "reason"), [(3, 8, FinishReason.STOP), (None, 4, FinishReason.LENGTH)]
)
async def test_an_answer_whose_last_token_arrived_is_complete_though_its_worker_dies(
    eos_at: int | None, max_tokens: int, reason: FinishReason
) -> None:
    async def never_say_so(worker: FakeWorker) -> None:
        await asyncio.Event().wait()

    worker = unified(eos_at=eos_at, before_end=never_say_so)
    async with running(worker, resume_timeout_seconds=0.2) as system:
        answered = Answered()
        stream = system.relay.generate(spec("hello", max_tokens=max_tokens))
        while len(answered.token_ids) < 4:
            answered.add(await anext(stream))
        await worker.kill()
        async for chunk in stream:
            answered.add(chunk)
    assert len(answered.token_ids) == 4
    assert answered.finished.reason is reason


async def test_strangers_repeats_and_malformed_events_are_dropped_and_counted() -> None:
    async with running(prefill(noisy=True), decode(noisy=True)) as system:
        answered = await system.generate("hello")
        assert answered.token_ids == expected_tokens(HELLO, 8)
        assert system.value("baton_stale_messages_total", kind="unknown") > 10
        assert system.value("baton_stale_messages_total", kind="malformed") > 5
        assert system.value("baton_stale_messages_total", kind="ended") >= 1


async def test_a_ticket_of_another_life_is_not_forwarded() -> None:
    async with running(prefill(before_token=wait_for(asyncio.Event())), decode()) as system:
        system["P"].ticket_incarnation = 5
        with pytest.raises(DeadlineExceeded):
            await system.generate("hello", timeout_seconds=0.2)
        assert not system["D"].handoffs
        assert system.value("baton_stale_messages_total", kind="malformed") == 1


async def test_workers_that_disagree_on_a_token_are_a_defect_and_not_an_answer() -> None:
    async with running(prefill(eos_at=0), decode()) as system:
        system["P"].say_prefilled = True
        with pytest.raises(InternalError, match="disagree on token 0"):
            await system.generate("hello", ignore_eos=True)


async def test_a_worker_that_says_more_than_was_asked_for_is_cut_off() -> None:
    async with running(unified(overrun=True)) as system:
        with pytest.raises(InternalError, match="max_tokens"):
            await system.generate("hello", max_tokens=3)


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


async def test_a_draining_worker_ends_what_it_has_where_nobody_could_go_on_with_it() -> None:
    go_on = asyncio.Event()
    async with running(unified("U1", before_token=wait_for(go_on, index=2))) as system:
        first = asyncio.create_task(system.generate("hello"))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        await drain(system, "U1")
        go_on.set()
        answered = await first
        assert answered.finished.decode_worker == "U1"
        assert answered.token_ids == expected_tokens(HELLO, 8)
        assert not system["U1"].moves


async def drain(system: System, name: str) -> None:
    system[name].draining = True
    system[name].say()
    await system.until(lambda: name not in {key.id for key in system.workers.ready()})


@pytest.mark.parametrize("others", [["U2"], ["U2", "P"]])
async def test_a_stream_moves_away_from_a_worker_that_drains(others: list[str]) -> None:
    more = [prefill(name) if name == "P" else unified(name, load=busy()) for name in others]
    async with running(unified("U1", before_token=stand_still(index=2)), *more) as system:
        await known_busy(system, "U2")
        first = asyncio.create_task(system.generate("hello", max_tokens=20))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        await drain(system, "U1")
        answered = await first
        assert answered.finished.decode_worker == "U2"
        assert answered.token_ids == expected_tokens(HELLO, 20)
        assert answered.finished.timings.resumes == 0, "nothing was lost"
        assert system.value("baton_requests_moved_total") == 1
        (taken,) = system["U2"].submits
        assert taken.id.attempt == 2
        assert taken.num_prompt_tokens == 5
        assert taken.prefix.ticket.worker_id == "U1"
        assert not system["U1"].cancels, "what it offers is to be fetched"
        assert len(system["U1"].moves) == 1


async def test_a_stream_moves_as_soon_as_there_is_somebody_to_move_to() -> None:
    go_on = asyncio.Event()

    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        await (go_on.wait() if at == 2 else asyncio.sleep(0.01))

    async with running(unified("U1", before_token=hook)) as system:
        first = asyncio.create_task(system.generate("hello", max_tokens=200))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        await drain(system, "U1")
        assert not system["U1"].moves
        await system.add(unified("U2"))
        await system.until(lambda: bool(system.workers.ready()))
        go_on.set()
        answered = await first
        assert answered.finished.decode_worker == "U2"
        assert answered.token_ids == expected_tokens(HELLO, 200)


async def known_busy(system: System, name: str) -> None:
    await system.until(lambda: any(s.load.running for s in system.workers.sessions() if s.peer.key.id == name))


def busy() -> inference_pb2.Load:
    """Of a worker that gets no request while another is there."""
    return inference_pb2.Load(running=100, queued_tokens=1000, available_blocks=1000, total_blocks=1000)


def stand_still(index: int) -> Hook:
    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at >= index:
            await asyncio.Event().wait()

    return hook


async def test_a_worker_that_dies_while_it_is_asked_to_let_a_stream_go_costs_a_resume() -> None:
    async with running(unified("U1", before_token=stand_still(index=2)), unified("U2", load=busy())) as system:
        await known_busy(system, "U2")
        first = asyncio.create_task(system.generate("hello", max_tokens=20))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        system["U1"].deaf = True
        await drain(system, "U1")
        await system["U1"].kill()
        answered = await first
        assert answered.token_ids == expected_tokens(HELLO, 20)
        assert answered.finished.timings.resumes == 1
        assert not system["U2"].submits[0].HasField("prefix")


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
