"""`baton chat` apart from terminal and router: commands, history, and what becomes of a turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from baton.cli.conversation import HELP, Chat
from baton.client import Answer, Message
from baton.errors import BatonError, InvalidRequest, PromptTooLong, Unavailable

MAX_TOKENS = 20
TOO_LONG = PromptTooLong("prompt has 700 tokens; the model takes 512", param="prompt")
NO_TOKEN = InvalidRequest("prompt has token id 512; token ids must be between 0 and 511", param="prompt")
GONE = Unavailable("the router at x went away")


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


class Script:
    """A router and a screen: each turn takes the next item, of which the texts come and an error ends it."""

    def __init__(self, *answers: Sequence[Any], **options: Any) -> None:
        self.answers = list(answers)
        self.asked: list[list[Message]] = []
        self.screen = ""
        self.notes: list[str] = []
        self.chat = Chat(self.ask, self, max_tokens=MAX_TOKENS, **options)

    def ask(self, messages: Sequence[Message], hear: Callable[[str], None]) -> Answer:
        self.asked.append(list(messages))
        said = ""
        reason, tokens = "stop", 3
        for item in self.answers.pop(0):
            if isinstance(item, int):
                reason, tokens = "length", item
            elif isinstance(item, str):
                hear(item)
                said += item
            else:
                raise item
        usage = {"prompt_tokens": 40, "cached_tokens": 32, "completion_tokens": tokens}
        return Answer(said, [], reason, usage, "prefill-0", "decode-0", "r", {"first_token_seconds": 0.0123})

    def say(self, text: str) -> None:
        self.screen += text

    def end(self) -> None:
        self.screen += "\n"

    def note(self, text: str) -> None:
        self.notes.append(text)

    def take(self, *lines: str) -> list[bool]:
        return [self.chat.take(line) for line in lines]


def test_each_turn_is_asked_with_all_before_it() -> None:
    script = Script(["Hel", "lo."], ["Fine."])
    assert script.take("hi", "  how are you?  ") == [True, True]
    assert script.asked == [[user("hi")], [user("hi"), assistant("Hello."), user("how are you?")]]
    assert script.screen == "Hello.\nFine.\n"
    assert script.notes == []


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_an_empty_line_asks_nothing(line: str) -> None:
    script = Script()
    assert script.take(line) == [True]
    assert script.asked == []


def test_the_system_message_stands_first_and_can_be_changed_and_taken_away() -> None:
    script = Script(["a"], ["b"], ["c"], system="Be brief.")
    script.take("1", "/system Be  long.", "2", "/system", "3")
    assert [[m.content for m in asked] for asked in script.asked] == [
        ["Be brief.", "1"],
        ["Be  long.", "1", "a", "2"],
        ["1", "a", "2", "b", "3"],
    ]
    assert script.asked[0][0].role == "system"
    assert script.notes == ["The model is told: Be  long.", "The model is told nothing beforehand."]


def test_reset_forgets_the_turns_and_keeps_the_system_message() -> None:
    script = Script(["a"], ["b"], system="S")
    script.take("1", "/reset", "2")
    assert script.asked[1] == [Message("system", "S"), user("2")]


def test_exit_leaves_and_help_lists_every_command() -> None:
    script = Script()
    assert script.take("/help", "/exit") == [True, False]
    assert script.notes == [HELP]
    for command in ("/reset", "/system TEXT", "/stats", "/help", "/exit"):
        assert f"\n{command}" in f"\n{HELP}"


def test_an_unknown_command_is_not_sent_and_a_space_before_it_sends_it() -> None:
    script = Script(["ok"])
    script.take("/rest", " /rest")
    assert script.asked == [[user("/rest")]]
    assert script.notes == ["there is no command /rest; /help lists what there is"]


def test_figures_are_shown_when_they_are_wanted() -> None:
    script = Script(["a"], ["b"], ["c"], stats=True)
    script.take("1", "/stats", "2", "/stats", "3")
    line = "3 tokens · 12 ms to the first · 32 of 40 prompt tokens cached · prefill-0 → decode-0"
    assert script.notes == [line, "Figures are hidden.", "Figures are shown.", line]


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came() -> None:
    script = Script(["Once upon", KeyboardInterrupt()], ["Short."])
    script.take("a story", "shorter")
    assert script.asked[1] == [user("a story"), assistant("Once upon"), user("shorter")]
    assert script.screen == "Once upon\nShort.\n"
    assert "the model knows what is above" in script.notes[0]


def test_a_turn_broken_off_before_its_first_word_is_taken_back() -> None:
    script = Script([KeyboardInterrupt()], ["Fine."])
    assert script.take("a story", "hi") == [True, True]
    assert script.asked[1] == [user("hi")]
    assert script.screen == "Fine.\n"
    assert "taken back" in script.notes[0]


def test_a_conversation_that_outgrows_the_model_says_what_to_do_and_goes_on() -> None:
    script = Script(["a"], [TOO_LONG], ["b"], ["c"])
    script.take("1", "x" * 700, "2", "/reset", "3")
    assert script.notes[0].startswith("The conversation has grown too long for the model. /reset forgets it")
    assert TOO_LONG.message in script.notes[0]
    assert script.asked[2:] == [[user("1"), assistant("a"), user("2")], [user("3")]]


def test_a_first_question_that_is_too_long_is_not_told_to_reset() -> None:
    script = Script([TOO_LONG])
    script.take("x" * 700)
    assert "fewer words" in script.notes[0]
    assert "/reset" not in script.notes[0]


def test_a_prompt_that_is_wrong_in_another_way_is_not_told_to_be_shorter() -> None:
    script = Script(["a"], [NO_TOKEN])
    script.take("1", "2")
    assert script.notes == [NO_TOKEN.message]


@pytest.mark.parametrize("before", [[], ["Once upon "]])
def test_a_turn_that_fails_is_taken_back_and_the_next_one_is_asked(before: list[str]) -> None:
    script = Script(["a"], [*before, GONE], ["b"])
    assert script.take("1", "2", "3") == [True, True, True]
    assert script.asked[2] == [user("1"), assistant("a"), user("3")]
    assert script.notes == [GONE.message]
    assert script.screen == "a\n" + "".join(f"{text}\n" for text in before) + "b\n"


@pytest.mark.parametrize(
    ("tokens", "says"), [(MAX_TOKENS, "Cut at 20 tokens (--max-tokens)"), (7, "/reset makes room")]
)
def test_an_answer_that_is_cut_says_by_what(tokens: int, says: str) -> None:
    script = Script(["a", tokens], ["b"])
    script.take("1", "2")
    assert len(script.notes) == 1
    assert says in script.notes[0]
    assert script.asked[1][1] == assistant("a")


@pytest.mark.parametrize("error", [TOO_LONG, GONE, KeyboardInterrupt()])
def test_without_a_person_what_ends_a_turn_is_raised(error: BaseException) -> None:
    script = Script(["a", error], patient=False)
    with pytest.raises(type(error)):
        script.take("1")
    assert script.screen == "a\n"
    assert script.notes == []


def test_without_a_person_a_wrong_command_is_an_error_and_only_answers_are_said() -> None:
    script = Script(["a", MAX_TOKENS], patient=False)
    script.take("/reset", "/system S", "1")
    assert script.screen == "a\n"
    assert script.notes == []
    with pytest.raises(BatonError, match="there is no command /rest"):
        script.take("/rest")
