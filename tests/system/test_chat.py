"""`baton chat` before a real system: turns, Ctrl-C, a conversation that grows too long, a router that dies."""

from __future__ import annotations

import os
import re
import signal
import unicodedata
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from baton.client import Message
from baton.errors import Unavailable
from baton.sampling import SamplingParams
from tests.system.harness import System, children, run_cli, system, until
from tests.system.terminal import CTRL_C, CTRL_D, Terminal, terminal

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CONTEXT = 1024
PROMPT = "\n> "
LONG = "runner " * 300
TOO_LONG = "runner " * 1000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    log = tmp_path_factory.mktemp("chat") / "log"
    flags = (f"--max-model-len={CONTEXT}", "--served-model-name=tiny")
    async with system(checkpoint("llama"), log, *flags) as started:
        yield started


async def expected(running: System, *turns: str, system: str = "", max_tokens: int = 12) -> list[str]:
    """The answers to all turns of a conversation, asked for one by one."""
    messages = [Message("system", system)] if system else []
    answers: list[str] = []
    async with running.client() as client:
        for turn in turns:
            messages.append(Message("user", turn))
            answer = await client.answer(messages, SamplingParams(max_tokens=max_tokens))
            answers.append(answer.text)
            messages.append(Message("assistant", answer.text))
    return answers


async def test_lines_that_come_in_are_turns_of_one_conversation(running: System) -> None:
    first, second = await expected(running, "Who has the baton?", "And now?", system="Be brief.")
    (afresh,) = await expected(running, "And now?", system="Be brief.")
    assert second != afresh, "else nothing would show that the first turn counts"
    status, out, err = await run_cli(
        "chat", f"--target={running.grpc}", "--max-tokens=12", "--system=Be brief.", "--model=tiny",
        stdin=b"Who has the baton?\n\nAnd now?\n/reset\nAnd now?",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert out == f"{first}\n{second}\n{afresh}\n"


async def test_the_first_refused_line_ends_it_with_status_1(running: System) -> None:
    (first,) = await expected(running, "hi")
    lines = f"hi\n{TOO_LONG}\nhi\n".encode()
    status, out, err = await run_cli("chat", f"--target={running.grpc}", "--max-tokens=12", stdin=lines)
    assert (status, out) == (1, f"{first}\n")
    assert err.count("\n") == 1
    assert f"takes {CONTEXT} tokens" in err


@pytest.mark.parametrize(
    ("flags", "stdin", "says"),
    [
        (["--target=127.0.0.1:1"], b"hi", "baton up"),
        (["--model=other"], b"hi", "'other'"),
        (["--top-p=7"], b"hi", "top_p is 7"),
        (["--max-tokens=0"], b"hi", "--max-tokens is 0"),
        ([], b"\xff\xfe\n", "line 1 is not UTF-8"),
        ([], b"/nonsense\n", "/nonsense"),
    ],
)
async def test_what_is_wrong_is_one_line_and_status_1(
    running: System, flags: list[str], stdin: bytes, says: str
) -> None:
    status, out, err = await run_cli("chat", f"--target={running.grpc}", *flags, stdin=stdin)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert says in err


async def test_a_conversation_at_the_terminal(running: System) -> None:
    questions = "Who has the baton?", "And now?"
    answers = await expected(running, *questions)
    async with terminal("chat", f"--target={running.grpc}", "--max-tokens=12") as chat:
        banner = await chat.until(PROMPT)
        assert "tiny (up to 1024 tokens)" in banner
        assert "Ctrl-D leaves" in banner
        for question, answer in zip(questions, answers, strict=True):
            shown = await ask(chat, question)
            assert on_terminal(answer) in shown
            assert "ms to the first" in shown
            assert "decode-0" in shown
        await ask(chat, "/stats")
        assert "ms to the first" not in await ask(chat, "hi")
        chat.type(CTRL_D)
        assert await chat.ended() == 0


async def test_ctrl_c_cancels_the_answer_that_is_coming_and_at_the_prompt_leaves_when_it_comes_twice(
    running: System,
) -> None:
    aborted = {"finished_reason": "abort"}
    (answer,) = await expected(running, "Tell me all of it.")
    begins = on_terminal(answer)[:1]
    workers = [worker["pid"] for worker in await running.workers()]
    before = await running.metric("vllm:request_success_total", **aborted)
    async with terminal("chat", f"--target={running.grpc}", f"--max-tokens={CONTEXT}") as chat:
        await chat.until(PROMPT)
        chat.type("Tell me all of it.\n")
        await chat.until("all of it.\n")
        await chat.until(begins)  # broken off before its first word, an answer would be taken back
        for pid in workers:  # so that it does not end before the key is seen
            os.kill(pid, signal.SIGSTOP)
        chat.type(CTRL_C)
        try:
            assert "Broken off; the model knows what is above." in await chat.until(PROMPT)
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
        await running.assert_idle()
        assert await running.metric("vllm:request_success_total", **aborted) == before + 1
        chat.type(f"a line that is drop{CTRL_C}")
        assert "Ctrl-C again leaves." in await chat.until(PROMPT)
        assert "forgotten" in await ask(chat, "/reset")
        chat.type(CTRL_C)
        assert "Ctrl-C again leaves." in await chat.until(PROMPT), "the line between counts for nothing"
        chat.type(CTRL_C)
        assert await chat.ended() == 0


async def test_a_conversation_that_grows_too_long_is_told_so_and_goes_on(running: System) -> None:
    async with terminal("chat", f"--target={running.grpc}", "--max-tokens=4") as chat:
        await chat.until(PROMPT)
        for _ in range(8):
            shown = await ask(chat, LONG)
            if "too long" in shown:
                break
        assert "The conversation has grown too long for the model. /reset forgets it" in shown
        assert "tokens cached" in await ask(chat, "hi"), "the refused turn was kept"
        assert "too long" in await ask(chat, LONG)
        await ask(chat, "/reset")
        assert "tokens cached" in await ask(chat, LONG)


async def test_a_router_that_dies_is_told_and_once_it_is_back_the_conversation_goes_on(running: System) -> None:
    (first,) = await expected(running, "Who has the baton?")
    async with terminal("chat", f"--target={running.grpc}", "--max-tokens=12") as chat:
        await chat.until(PROMPT)
        router = router_of(running)
        os.kill(router, signal.SIGSTOP)
        chat.type("And now?\n")
        await chat.until("And now?\n")
        os.kill(router, signal.SIGKILL)
        # Where the question had not left yet, it finds nobody any more.
        says = rf"the router at {running.grpc} went away|no router answers at {running.grpc}"
        assert re.search(says, await chat.until(PROMPT))

        async def back() -> bool:
            with suppress(Unavailable):
                return {w["state"] for w in await running.workers()} == {"ready"}
            return False

        await until(back, 60, lambda: "the router did not come back")

        async def answered() -> bool:
            # The terminal's own connection looks again within a second of the router's return.
            return on_terminal(first) in await ask(chat, "Who has the baton?")

        await until(answered, 10, lambda: "the conversation does not go on")


async def ask(chat: Terminal, line: str) -> str:
    """What is shown until the next prompt."""
    chat.type(f"{line}\n")
    return await chat.until(PROMPT)


def on_terminal(answer: str) -> str:
    """Its first line, without what would steer the terminal."""
    return "".join(c for c in answer.split("\n")[0] if unicodedata.category(c) != "Cc").strip()


def router_of(running: System) -> int:
    for pid in children(running.process.pid):
        if b"\0router\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("baton up has no router")
