"""Tokens of one answer from two workers: whatever the order of arrival, the stream is the answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import DeadlineExceeded, InternalError, InvalidRequest
from router.events import Arrival, DeadlinePassed, Ended, EndReason, Event, Landed, Lost, Side, Tokens
from router.merge import TokenLog
from router.request import FinishReason
from router.verdict import AttemptState, Fail, Finish, Retry, Verdict

P, D = Side.PREFILL, Side.DECODE


@given(st.data())
def test_any_interleaving_of_both_workers_gives_the_exact_stream(data: st.DataObject) -> None:
    """Each worker's events keep their order; those of the two arrive in any. Repeats are thrown in."""
    answer = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    earlier = data.draw(st.integers(0, len(answer) - 1))
    log = TokenLog(len(answer))
    log.add(0, answer[:earlier])
    state = AttemptState(log, remote=True)

    decode: list[Event] = [Landed(0.1, 1, 1, "shm")]
    at = earlier
    while at < len(answer):
        size = data.draw(st.integers(1, len(answer) - at))
        chunk = Tokens(at, tuple(answer[at : at + size]), 0)
        decode += [chunk] * data.draw(st.integers(1, 2))
        at += size
    if earlier + 1 == len(answer):  # the first token is the last: the prefill worker says so, too
        prefill: list[Event] = [Tokens(earlier, (answer[earlier],), 0), Ended(EndReason.LENGTH, "")]
    else:
        prefill = [Tokens(earlier, (answer[earlier],), 0), Ended(EndReason.PREFILLED, "")]
        if data.draw(st.booleans()):  # its token comes from it alone
            decode = [_without_first(event, earlier) for event in decode]
    decode.append(Ended(EndReason.LENGTH, ""))

    given_out = answer[:earlier]
    queues = {P: prefill, D: decode}
    verdict: Verdict | None = None
    while verdict is None:
        side = data.draw(st.sampled_from([side for side, events in queues.items() if events]))
        known = len(log)
        verdict = state.take(Arrival(side, 0.0, queues[side].pop(0)))
        given_out += log.known[known:]
        assert given_out == answer[: len(given_out)]
    assert isinstance(verdict, Finish)
    assert verdict.reason is FinishReason.LENGTH
    assert given_out == answer


def _without_first(event: Event, first: int) -> Event:
    if isinstance(event, Tokens) and event.index == first:
        return Tokens(first + 1, event.token_ids[1:], event.cached_tokens)
    return event


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=30))
def test_any_reports_at_all_give_a_prefix_of_the_answer_without_gap_or_repeat(
    reports: list[tuple[int, int]],
) -> None:
    answer = list(range(100, 113))
    log = TokenLog(13)
    covered: set[int] = set()
    for index, size in reports:
        log.add(index, answer[index : index + size])
        covered |= set(range(index, index + size))
        whole = next(i for i in range(14) if i not in covered)
        assert list(log.known) == answer[:whole]


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_token_that_contradicts_an_earlier_report_is_a_defect(index: int) -> None:
    log = TokenLog(9)
    log.add(0, [5, 6])
    log.add(3, [8])
    with pytest.raises(InternalError, match=f"disagree on token {index}"):
        log.add(index, [99])


def test_a_token_beyond_max_tokens_is_a_defect() -> None:
    with pytest.raises(InternalError, match="token 3; max_tokens ends the answer behind token 2"):
        TokenLog(3).add(2, [1, 2])


def test_tokens_behind_a_gap_are_forgotten_for_the_next_attempt() -> None:
    log = TokenLog(9)
    log.add(0, [1])
    log.add(5, [6])
    log.drop_held_back()
    log.add(1, [2, 3, 4, 5])
    assert list(log.known) == [1, 2, 3, 4, 5]


# --- verdicts


def verdicts(*events: tuple[Side, Event], remote: bool = True) -> list[Verdict | None]:
    state = AttemptState(TokenLog(10), remote=remote)
    return [state.take(Arrival(side, 0.0, event)) for side, event in events]


FIRST = (P, Tokens(0, (7,), 0))
PREFILLED = (P, Ended(EndReason.PREFILLED, ""))
LANDED = (D, Landed(0.1, 1, 1, "shm"))


def test_prefilled_ends_only_the_prefill_side() -> None:
    assert verdicts(FIRST, PREFILLED, LANDED) == [None, None, None]


def test_a_prefill_worker_is_not_missed_once_the_blocks_have_landed() -> None:
    assert verdicts(FIRST, PREFILLED, LANDED, (P, Lost("gone"))) == [None] * 4
    assert verdicts(FIRST, LANDED, (P, Ended(EndReason.UNAVAILABLE, "drained"))) == [None] * 3


@pytest.mark.parametrize("reason", [EndReason.PREFILLED, EndReason.STOP, EndReason.LENGTH])
def test_a_prefill_worker_is_told_to_let_go_of_blocks_that_nobody_came_for(reason: EndReason) -> None:
    state = AttemptState(TokenLog(10), remote=True)
    for side, event in (FIRST, (P, Ended(reason, ""))):
        state.take(Arrival(side, 0.0, event))
    assert state.cancel_prefill
    state.take(Arrival(D, 0.0, LANDED[1]))
    assert not state.cancel_prefill


def test_a_prefill_worker_lost_before_that_means_another_attempt() -> None:
    assert verdicts(FIRST, PREFILLED, (P, Lost("gone")))[-1] == Retry(P, "gone")
    assert verdicts((P, Lost("gone"))) == [Retry(P, "gone")]


def test_a_failed_handoff_is_held_against_the_source() -> None:
    failed = Ended(EndReason.HANDOFF_FAILED, "checksum")
    assert verdicts(FIRST, (D, failed))[-1] == Retry(P, "checksum")
    assert verdicts((D, failed), remote=False) == [Retry(D, "checksum")]


@pytest.mark.parametrize("reason", [EndReason.UNAVAILABLE, EndReason.CANCELLED])
@pytest.mark.parametrize("side", [P, D])
def test_a_worker_that_cannot_go_on_means_another_attempt_without_it(side: Side, reason: EndReason) -> None:
    assert verdicts((side, Ended(reason, "full"))) == [Retry(side, "full")]


@pytest.mark.parametrize("side", [P, D])
def test_what_no_other_worker_could_serve_fails(side: Side) -> None:
    (invalid,) = verdicts((side, Ended(EndReason.INVALID, "too long")))
    assert isinstance(invalid, Fail)
    assert isinstance(invalid.error, InvalidRequest)
    (late,) = verdicts((side, Ended(EndReason.DEADLINE, "")))
    assert isinstance(late, Fail)
    assert isinstance(late.error, DeadlineExceeded)


def test_the_deadline_fails_it() -> None:
    (late,) = verdicts((D, DeadlinePassed()))
    assert isinstance(late, Fail)
    assert isinstance(late.error, DeadlineExceeded)


def test_a_worker_that_says_no_reason_is_quoted_by_its_word() -> None:
    assert verdicts((D, Ended(EndReason.UNAVAILABLE, ""))) == [Retry(D, "the decode worker ended it as UNAVAILABLE")]


def test_a_decode_worker_cannot_end_as_prefilled() -> None:
    (defect,) = verdicts((D, Ended(EndReason.PREFILLED, "")))
    assert isinstance(defect, Fail)
    assert isinstance(defect.error, InternalError)


def test_an_end_behind_a_gap_waits_for_the_gap_to_be_filled() -> None:
    behind = (D, Tokens(1, (8, 9), 0))
    ended = (D, Ended(EndReason.STOP, ""))
    assert verdicts(behind, ended, FIRST) == [None, None, Finish(FinishReason.STOP, D)]


def test_a_gap_that_nobody_can_fill_means_another_attempt() -> None:
    behind = (D, Tokens(1, (8, 9), 0))
    ended = (D, Ended(EndReason.STOP, ""))
    assert isinstance(verdicts(behind, ended, PREFILLED)[-1], Retry)
    assert isinstance(verdicts(behind, ended, remote=False)[-1], Retry)


def test_the_first_token_can_be_the_last() -> None:
    assert verdicts(FIRST, (P, Ended(EndReason.STOP, "")))[-1] == Finish(FinishReason.STOP, P)


def test_blocks_that_nobody_came_for_are_still_to_be_cancelled() -> None:
    state = AttemptState(TokenLog(10), remote=True)
    for side, event in (FIRST, PREFILLED):
        state.take(Arrival(side, 0.0, event))
    assert state.cancel_prefill
    state.take(Arrival(*LANDED[:1], 0.0, LANDED[1]))
    assert not state.cancel_prefill
    assert state.cancel_decode
