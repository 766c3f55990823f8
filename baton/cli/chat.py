"""`baton chat`: a conversation on the terminal, or with whatever lines come in. What is said is conversation.py's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from baton.cli import interrupt
from baton.cli.conversation import Chat
from baton.client import Answer, Client, Message
from baton.config import ChatConfig, parse
from baton.errors import InvalidRequest
from baton.sampling import SamplingParams

_PROMPT = "> "
_CONTROL = dict.fromkeys((*range(0x20), 0x7F, *range(0x80, 0xA0)))
"""What an answer must not do to a terminal."""
del _CONTROL[ord("\n")], _CONTROL[ord("\t")]


def main(argv: Sequence[str]) -> int:
    config = parse(ChatConfig, argv, prog="baton chat")
    with asyncio.Runner() as runner, BlockingClient(config, runner) as client:
        if sys.stdin.isatty() and sys.stdout.isatty():
            _converse(config, client)
        else:
            _work_off(config, client)
    return 0


class BlockingClient:
    """Asks from outside of the event loop, which runs only while an answer comes: Ctrl-C cancels the answer then, and
    at the prompt it interrupts the reading of a line."""

    def __init__(self, config: ChatConfig, runner: asyncio.Runner) -> None:
        self._config = config
        self._runner = runner
        self._sampling = SamplingParams(
            max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed
        )
        self._sampling.check(vocab_size=0)  # it names no token

    def __enter__(self) -> BlockingClient:
        self._client = self._runner.run(self._connect())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())

    def ask(self, messages: Sequence[Message], hear: Callable[[str], None]) -> Answer:
        config = self._config
        return interrupt.run(
            self._runner,
            self._client.answer(messages, self._sampling, hear=hear, model=config.model, timeout=config.timeout),
        )

    def served(self) -> str:
        models = interrupt.run(self._runner, self._client.status()).models
        return ", ".join(f"{m.name} (up to {m.max_model_len} tokens)" for m in models) or "Nothing is served yet"

    async def _connect(self) -> Client:
        return Client(self._config.target)


class StandardStreams:
    """A Screen: answers to stdout, all else to stderr, dim where that is a terminal."""

    def __init__(self) -> None:
        self._harmless = sys.stdout.isatty()
        self._dim = "\x1b[2m{}\x1b[0m" if sys.stderr.isatty() else "{}"

    def say(self, text: str) -> None:
        print(text.translate(_CONTROL) if self._harmless else text, end="", flush=True)

    def end(self) -> None:
        print(flush=True)

    def note(self, text: str) -> None:
        print(self._dim.format(text), file=sys.stderr, flush=True)


def _converse(config: ChatConfig, client: BlockingClient) -> None:
    with suppress(ImportError):  # where Python has it, being imported is all that input() needs to edit lines
        import readline  # noqa: F401
    screen = StandardStreams()
    screen.note(f"{client.served()} at {config.target}. /help lists commands, Ctrl-D leaves.")
    stats = sys.stderr.isatty()
    chat = Chat(client.ask, screen, max_tokens=config.max_tokens, system=config.system, stats=stats)
    going_on, leaving = True, False
    while going_on:
        try:
            line = input(_PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # perhaps meant for an answer that had just ended: one alone loses no conversation
            print()
            if leaving:
                return
            leaving = True
            screen.note("Ctrl-C again leaves.")
            continue
        except UnicodeDecodeError:
            screen.note("That line is not UTF-8, and was not sent.")
            continue
        leaving = False
        with suppress(KeyboardInterrupt):  # meant for an answer that had just ended
            going_on = chat.take(line)


def _work_off(config: ChatConfig, client: BlockingClient) -> None:
    chat = Chat(client.ask, StandardStreams(), max_tokens=config.max_tokens, system=config.system, patient=False)
    for line in _lines():
        if not chat.take(line):
            return


def _lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise InvalidRequest(f"line {number} is not UTF-8") from None
