"""What is said in `baton chat`, apart from terminal and network: commands, history, and what becomes of a turn.

A turn that fails is taken back, question and all, as if it had not been asked. An answer that the person breaks off
stays in the history as far as it came: what is on the screen is what the model knows, and "shorter, please" has
something to refer to. Broken off before its first word, the turn is taken back as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from baton.client import Answer, Message
from baton.errors import BatonError, InvalidRequest, PromptTooLong

Ask = Callable[[Sequence[Message], Callable[[str], None]], Answer]
"""Asks with a conversation and hands on the answer's text as it comes. Raises BatonError; KeyboardInterrupt where the
person breaks it off."""

HELP = """\
/reset         forget the conversation so far
/system TEXT   what the model is told before the conversation; without TEXT, nothing
/stats         show or hide the line of figures behind an answer
/help          this list
/exit          leave; so do Ctrl-D and, where no answer is coming, Ctrl-C twice
Ctrl-C breaks off an answer that is coming, or drops the line that is being typed. A line that begins with a space is
sent as it is, with / and all."""


class Screen(Protocol):
    def say(self, text: str) -> None:
        """A piece of an answer."""

    def end(self) -> None:
        """Of an answer."""

    def note(self, text: str) -> None:
        """What the model does not say."""


class Chat:
    def __init__(
        self, ask: Ask, screen: Screen, *, max_tokens: int, system: str = "", stats: bool = False, patient: bool = True
    ) -> None:
        """`max_tokens`: of an answer, as it is asked for. `patient`: a turn that fails is told of and the conversation
        goes on; otherwise whatever ended it is raised."""
        self.history: list[Message] = []
        self.system = system
        self._ask = ask
        self._screen = screen
        self._max_tokens = max_tokens
        self._stats = stats
        self._patient = patient

    def take(self, line: str) -> bool:
        """A line of the person's; False when it asks to leave."""
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            return self._command(name.rstrip(), rest.strip())
        if line.strip():
            self._turn(Message("user", line.strip()))
        return True

    def _command(self, name: str, rest: str) -> bool:
        match name:
            case "/exit":
                return False
            case "/help":
                self._screen.note(HELP)
            case "/reset":
                self.history = []
                self._confirm("The conversation is forgotten.")
            case "/stats":
                self._stats = not self._stats
                self._confirm(f"Figures are {'shown' if self._stats else 'hidden'}.")
            case "/system":
                self.system = rest
                self._confirm(f"The model is told: {rest}" if rest else "The model is told nothing beforehand.")
            case _:
                self._failed(InvalidRequest(f"there is no command {name}; /help lists what there is"))
        return True

    def _turn(self, question: Message) -> None:
        system = [Message("system", self.system)] if self.system else []
        said: list[str] = []

        def hear(text: str) -> None:
            said.append(text)
            self._screen.say(text)

        try:
            answer = self._ask([*system, *self.history, question], hear)
        except (BatonError, KeyboardInterrupt) as error:
            if said:
                self._screen.end()
            if isinstance(error, BatonError):
                self._failed(error)
            else:
                self._broken_off(question, "".join(said))
            return
        self._screen.end()
        self._remember(question, answer.text)
        if answer.finish_reason == "length":
            self._confirm(self._cut(answer))
        if self._stats:
            self._screen.note(figures(answer))

    def _remember(self, question: Message, answer: str) -> None:
        self.history += [question, Message("assistant", answer)]

    def _broken_off(self, question: Message, said: str) -> None:
        if not self._patient:
            raise KeyboardInterrupt
        if said:
            self._remember(question, said)
        self._screen.note("Broken off; the model knows what is above." if said else "Broken off, and taken back.")

    def _failed(self, error: BatonError) -> None:
        if not self._patient:
            raise error
        self._screen.note(advice(error, bool(self.history)))

    def _cut(self, answer: Answer) -> str:
        if answer.usage["completion_tokens"] >= self._max_tokens:
            return f"Cut at {self._max_tokens} tokens (--max-tokens)."
        return "Cut: the conversation has filled all that the model can hold. /reset makes room."

    def _confirm(self, text: str) -> None:
        if self._patient:
            self._screen.note(text)


def advice(error: BatonError, remembers: bool) -> str:
    """What went wrong, and what to do about it; `remembers`: whether there is a conversation to forget."""
    if isinstance(error, PromptTooLong):
        if remembers:
            return f"The conversation has grown too long for the model. /reset forgets it; then ask again. ({error})"
        return f"That is too long for the model; say it in fewer words. ({error})"
    return f"{error}"


def figures(answer: Answer) -> str:
    """One line: how much, how fast, and who did it."""
    usage = answer.usage
    workers = " → ".join(dict.fromkeys((answer.prefill_worker, answer.decode_worker)))
    return (
        f"{usage['completion_tokens']} tokens · {answer.timings['first_token_seconds'] * 1e3:.0f} ms to the first · "
        f"{usage['cached_tokens']} of {usage['prompt_tokens']} prompt tokens cached · {workers}"
    )
