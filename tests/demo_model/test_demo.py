"""What `make demo` makes of answers that are wrong. That right ones come is seen in tests/system/test_demo.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.client import Answer, Message
from baton.v1 import inference_pb2 as pb
from demo_model import demo

TIMINGS = {"first_token_seconds": 0.1, "total_seconds": 0.2, "transfer_blocks": 0, "resumes": 0}
USAGE = {"prompt_tokens": 9, "cached_tokens": 0, "completion_tokens": 2}


class Script:
    """A client: it gives codes for an answer, one after the other, and the last again and again."""

    def __init__(self, *codes: str, workers: Sequence[pb.WorkerStatus] = ()) -> None:
        self.codes = list(codes)
        self.workers = workers

    async def status(self) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(workers=self.workers)

    async def answer(self, messages: Sequence[Message], sampling: object, *, hear: Callable[[str], object]) -> Answer:
        asked = "What is the code" in messages[0].content
        text = (self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]) if asked else "Well."
        hear(text)
        return Answer(text, list(text.encode()), "stop", USAGE, "prefill-0", "decode-0", "r", TIMINGS)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], int]:
    def run(script: Script) -> int:
        @asynccontextmanager
        async def system(flags: Sequence[str]) -> AsyncIterator[Any]:
            yield script

        monkeypatch.setattr(demo, "system", system)
        return demo.main([])

    return run


def test_right_answers_are_status_0(run: Callable[[Script], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Script("4172")) == 0
    assert "the same tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codes", "says"), [(["9031"], "That is wrong: it is 4172."), (["4172", "9031"], "OTHER TOKENS")]
)
def test_a_wrong_answer_is_told_and_is_status_1(
    codes: list[str], says: str, run: Callable[[Script], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Script(*codes)) == 1
    out, err = capsys.readouterr()
    assert says in out
    assert err == "demo: not every answer was what it must be; see above\n"


def test_a_worker_that_shows_no_metrics_is_named(
    run: Callable[[Script], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Script("4172", workers=[pb.WorkerStatus(id="decode-0", metrics="127.0.0.1:1")])) == 1
    err = capsys.readouterr().err
    assert err.startswith("demo: http://127.0.0.1:1/metrics gave no metrics: ")
    assert err.count("\n") == 1
