"""What is read from an event stream: times by chunk, counts by usage, and whether it is whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.latency import Objectives, Quantity, quantities
from bench.stream import Outcome, Piece, Stream, events, read_stream

USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}},
}


def chunk(text: str, reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason, **fields}], "usage": None}


def sse(*data: object) -> bytes:
    return b"".join(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n".encode() for each in data)


def read(*pieces: Piece, asked: int = 4) -> Stream:
    return read_stream(pieces, scheduled=0.0, sent=0.5, ended=9.0, asked=asked)


WHOLE: tuple[Piece, ...] = (
    (1.0, sse(chunk("a"))),
    (2.0, sse(chunk("b, c"))),
    (4.0, sse(chunk("d", "length"), USAGE, "[DONE]")),
)


def test_counts_come_from_usage_and_gaps_from_chunks() -> None:
    stream = read(*WHOLE)
    assert stream.whole, stream.error
    assert (stream.prompt_tokens, stream.cached_tokens, stream.completion_tokens) == (7, 2, 4)
    assert stream.arrivals == (1.0, 2.0, 4.0)
    assert stream.gaps == [1.0, 2.0]
    assert stream.tpot == 1.0  # three tokens behind the first, though only two chunks
    assert (stream.lateness, stream.ttft, stream.e2e) == (0.5, 0.5, 8.5)


def test_an_event_counts_when_its_last_byte_comes() -> None:
    whole = sse(chunk("ab"))
    assert list(events([(1.0, whole[:10]), (2.0, whole[10:-1]), (3.0, whole[-1:] + sse("x"))])) == [
        (3.0, json.dumps(chunk("ab"))),
        (3.0, "x"),
    ]


def test_lines_may_end_as_http_has_them() -> None:
    assert [data for _, data in events([(1.0, b"data: a\r\n\r\n: a comment\r\n\r\ndata: b\r\n\r\n")])] == ["a", "b"]


def test_a_token_without_text_is_seen_by_its_id() -> None:
    stream = read((1.0, sse(chunk("", token_ids=[5]))), (2.0, sse(chunk("é", "length"), USAGE, "[DONE]")))
    assert stream.arrivals == (1.0, 2.0)


def test_an_opening_without_tokens_is_no_first_token() -> None:
    stream = read((0.6, sse(chunk(""))), *WHOLE)
    assert stream.ttft == 0.5


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        (WHOLE[:2], "no finish_reason"),
        ((*WHOLE[:2], (4.0, sse(chunk("d", "length"), USAGE))), "DONE"),
        ((*WHOLE[:2], (4.0, sse(chunk("d", "length"), "[DONE]"))), "no usage"),
        (((4.0, sse(chunk("", "length"), USAGE, "[DONE]")),), "no chunk brought a token"),
        ((*WHOLE[:1], (2.0, sse({"error": {"message": "the worker is gone"}}))), "the worker is gone"),
        (((1.0, sse("{")), *WHOLE), "not JSON"),
    ],
)
def test_a_stream_that_is_not_whole_says_why(pieces: tuple[Piece, ...], says: str) -> None:
    assert says in read(*pieces).error


def test_fewer_tokens_than_were_asked_for_are_a_failure() -> None:
    assert read(*WHOLE, asked=5).error == "4 tokens came; 5 were asked for, past any end of sequence"


def stream(*arrivals: float, tokens: int = 0, error: str = "") -> Stream:
    ended = arrivals[-1] if arrivals else 1.0
    return Stream(0.0, 0.0, ended, arrivals, 1, 10, tokens or len(arrivals), cached_tokens=1, error=error)


def found(outcome: Outcome, objectives: Objectives) -> dict[str, Quantity]:
    return {f"{q.measure} {q.part}".strip(): q for q in quantities(outcome, objectives)}


def test_a_request_is_good_only_if_it_keeps_every_objective() -> None:
    objectives = Objectives(ttft=1.0, itl=0.5)
    assert objectives.met_by(stream(1.0, 1.5, 2.0))
    assert objectives.met_by(stream(0.9))
    assert not objectives.met_by(stream(1.1, 1.2))
    assert not objectives.met_by(stream(1.0, 1.2, 2.0))
    assert not objectives.met_by(stream(error="broke off"))
    assert Objectives(None, None).met_by(stream(99.0, 999.0))


def test_figures_are_of_whole_streams_and_failures_are_counted() -> None:
    outcome = Outcome([stream(1.0, 2.0, 4.0, tokens=8), stream(3.0, 4.0), stream(error="x")], lags=[0.001])
    quantity = found(outcome, Objectives(ttft=2.0, itl=None))
    assert quantity["TTFT p50"].value == 2000
    assert quantity["ITL p50"].value == 1000
    assert quantity["output"].value == 10 / 4
    assert quantity["tokens a chunk"].value == 2
    assert quantity["failed"].value == 1
    assert quantity["cached prompt tokens"].value == 10
    assert quantity["goodput"].value == 1 / 4
    assert quantity["good requests"].value == pytest.approx(100 / 3)
    assert quantity["client lag p99"].value == pytest.approx(1.0)


def test_an_outcome_travels_between_processes() -> None:
    outcome = Outcome([stream(1.0, 2.0), stream(error="x")], lags=[0.5])
    assert Outcome.from_json(outcome.to_json()) == outcome
