"""Recall questions to a running system, and how many it answers right. An answer is right only with the KV of the fact
that it asks for, so this sees what a test of "some tokens came" does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from uuid import uuid4

from transformers import PreTrainedTokenizerFast

from baton import model_in_the_box
from baton.client import Answer
from demo_model.asking import ask
from demo_model.evaluate import Question, prompt_ids, questions
from tests.system.corrupting import Damage
from tests.system.harness import System

_MAX_TOKENS = 16
_SECONDS = 120.0


@dataclass(frozen=True)
class Recall:
    """A question, ready to be asked."""

    question: Question
    token_ids: tuple[int, ...]
    code: int
    """Position of the last token of the asked code."""


@dataclass(frozen=True)
class Recalled:
    answers: list[Answer]
    wrong: list[str]
    """What was said in place of what, of each wrong answer."""

    @property
    def said(self) -> list[str]:
        return [answer.text for answer in self.answers]

    @property
    def share(self) -> float:
        """Of right answers."""
        return 1 - len(self.wrong) / len(self.answers)

    @property
    def blocks(self) -> int:
        """That moved from prefill to decode workers."""
        return sum(int(answer.timings["transfer_blocks"]) for answer in self.answers)

    @property
    def resumes(self) -> int:
        return sum(int(answer.timings["resumes"]) for answer in self.answers)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(model_in_the_box.DIRECTORY)


def recall_questions(count: int, seed: int, *distances: int) -> list[Recall]:
    """`count` of each distance, in tokens."""
    drawn = [q for d in distances for q in questions("recall", count, seed, distance=d, tokenizer=tokenizer())]
    return [Recall(question, tuple(prompt_ids(question, tokenizer())), _code(question)) for question in drawn]


async def recall(
    running: System, asked: Sequence[Recall], damage: Callable[[Recall], Damage] | None = None, at_once: int = 16
) -> Recalled:
    """Asks all, each as if nobody had asked it before. `damage`, of a system of tests/system/corrupting.py alone, says
    what to do to a question's blocks."""
    names = [uuid4().hex if damage is None else damage(one).request_id(uuid4().hex) for one in asked]
    prompts = [one.token_ids for one in asked]
    async with running.client() as client:
        answers = await ask(
            client, prompts, max_tokens=_MAX_TOKENS, at_once=at_once, request_ids=names, timeout=_SECONDS
        )
    wrong = [
        f"{answer.text!r} ({answer.finish_reason}) for {one.question.answer!r}"
        for one, answer in zip(asked, answers, strict=True)
        if not one.question.correct(answer.text, ended=answer.finish_reason == "stop")
    ]
    return Recalled(answers, wrong)


def _code(question: Question) -> int:
    key = re.search(r"What is the code of the (.*)\?$", question.prompt)
    assert key, question.prompt
    told = f"The code of the {key[1]} is {question.answer}"
    chat = tokenizer().apply_chat_template(
        [{"role": "user", "content": question.prompt}], add_generation_prompt=True, tokenize=False
    )
    assert isinstance(chat, str)
    encoded = tokenizer()(chat, add_special_tokens=False)
    place: int = encoded.char_to_token(chat.index(told) + len(told) - 1)
    return place
